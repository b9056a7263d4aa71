"""Models of a run that are made of its trained baseline, converted or not, and healed."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

from context_pythia import ContextPythiaForCausalLM, processes
from context_pythia.errors import Failure
from context_pythia.report.report import write_report
from context_pythia.report.run import RunReport
from context_pythia.report.texts import Texts
from context_pythia.runs import train as module
from context_pythia.runs.record import Run
from context_pythia.runs.train import compare
from tests.conftest import tiny_recipe

HEAL = {"steps": 9, "batch_size": 9, "ce_weight": 0.5, "parameters": "all", "learning_rate": 1e-3}
MODELS = [
    {"name": "Pythia"},
    {"name": "Control", "from_baseline": True},
    {"name": "Converted", "context_source": "layer", "context_dim": 6, "from_baseline": True},
]


def healing_recipe(folder, heal=HEAL, models=MODELS, **sections):
    return tiny_recipe(folder, heal=heal, models=models, **sections)


def alone(recipe, *names):
    return dataclasses.replace(recipe, models=[model for model in recipe.models if model.name in names])


def entries(run) -> dict:
    return {entry["name"]: entry for entry in json.loads((run / "metrics.json").read_text())["models"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, own_cache):
    return tmp_path_factory.mktemp("healed")


@pytest.fixture(scope="module")
def run(folder):
    # The baseline comes from an earlier call, whose folder has healed nothing yet.
    recipe = healing_recipe(folder)
    compare(alone(healing_recipe(folder, {**HEAL, "steps": 5}), "Pythia"), folder / "run", progress=False)
    compare(recipe, folder / "run", progress=False)
    write_report(folder / "run", "en", "ja")
    return folder / "run"


def test_healing_begins_at_the_trained_baseline(run):
    baseline, control, converted = entries(run).values()
    assert control["history"][0]["val_ppl"] == pytest.approx(baseline["best_val_ppl"], rel=1e-6)
    assert converted["history"][0]["val_ppl"] > 1.00001 * baseline["best_val_ppl"]
    for entry in (control, converted):
        origin = {key: baseline[key] for key in ("name", "best_epoch", "best_val_ppl")}
        assert entry["from_baseline"] == origin
        assert [row["step"] for row in entry["history"]] == [0, 6, 9]
        assert entry["best_val_ppl"] == min(row["val_ppl"] for row in entry["history"])
        assert entry["best_epoch"] == next(
            row["epoch"] for row in entry["history"] if row["val_ppl"] == entry["best_val_ppl"]
        )
        assert entry["trainable_parameters"] == entry["parameters"] and entry["machine"] == baseline["machine"]
    assert baseline["from_baseline"] is None


def test_caches_are_measured(run):
    baseline, control, converted = (entry["cache"] for entry in entries(run).values())
    assert [cache["numbers_per_token"] for cache in (baseline, control, converted)] == [128, 128, 12]
    assert converted["length"] == 16 and converted["bytes_measured"] == 4 * 16 * 12


def test_saved_weights_have_the_recorded_perplexity(folder, run):
    validation = module.load_data(healing_recipe(folder).data, progress=False).validation
    rows = [validation[i] for i in range(len(validation))]
    ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    for name, kind in (("Control", GPTNeoXForCausalLM), ("Converted", ContextPythiaForCausalLM)):
        model = AutoModelForCausalLM.from_pretrained(run / "models" / name.lower()).eval()
        assert isinstance(model, kind)
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
        assert math.exp(loss) == pytest.approx(entries(run)[name]["best_val_ppl"], rel=1e-5)


def test_the_report_says_what_the_longer_training_is_worth(run):
    english, japanese = ((run / name).read_text() for name in ("report.md", "report.ja.md"))
    control, converted = (entries(run)[name] for name in ("Control", "Converted"))
    change = converted["best_val_ppl"] / control["best_val_ppl"] - 1
    assert f"| {'+' if change > 0 else '−'}{abs(change):.1%}"[:-1] in english and "| Against control |" in english
    assert "| Control | control: baseline, healed |" in english and "| Converted | layer 6, converted |" in english
    assert f"| 2 + {converted['best_epoch']:.3g} |" in english and "9 more steps on the same text." in english
    assert "epoch 3.5: train_loss=" in english and "| Healing: weight of the text's cross-entropy | 0.5 |" in english
    assert "| Control | 対照：ベースラインの追加学習 |" in japanese and "| 対照との差 |" in japanese


def test_curves_go_on_where_the_baseline_ended(run):
    report = RunReport(json.loads((run / "metrics.json").read_text()), {}, Texts())
    perplexity, _, loss, *_ = report.panels()
    baseline, _, converted = entries(run)
    assert [one.baseline for one in report.series] == [True, False, False]
    assert [x for x, _ in perplexity.curves[baseline]] == [1, 2]
    assert [x for x, _ in perplexity.curves[converted]] == [2, 3, 3.5] and perplexity.stars[converted][0] > 2
    # The loss of healing is not that of training.
    assert loss.curves[baseline] and converted not in loss.curves


def test_a_pass_over_a_text_without_all_samples_is_healed_on_what_there_is(tmp_path, own_cache):
    short = {"samples": 79_000, "validation_fraction": 0.01}
    recipe = healing_recipe(tmp_path, data=short, train={"tokens": 288, "batch_size": 9})
    compare(alone(recipe, "Pythia", "Converted"), tmp_path / "run", progress=False)
    baseline, converted = entries(tmp_path / "run").values()
    assert converted["error"] is None and converted["history"][-1]["step"] == HEAL["steps"]
    assert converted["from_baseline"]["best_val_ppl"] == baseline["best_val_ppl"]


def test_what_is_healed_is_kept(folder, run, monkeypatch, capsys):
    monkeypatch.setattr(module, "Conversion", None)
    before = entries(run)
    compare(healing_recipe(folder), run, progress=False)
    assert capsys.readouterr().out.count("already trained") == 3 and entries(run) == before


def test_a_folder_keeps_to_its_healing_once_something_is_healed(folder, run):
    with pytest.raises(ValueError, match=r"holds a run with heal.steps 9, not 5: choose another folder"):
        Run(run, healing_recipe(folder, {**HEAL, "steps": 5}))


def test_healing_is_made_up_for_where_it_failed_and_goes_on_however_its_folder_is_named(
    folder, run, tmp_path, monkeypatch
):
    def heal_anew(error, heal=HEAL):
        with monkeypatch.context() as patch:
            patch.setattr("context_pythia.runs.convert.heal", lambda *args, **named: (_ for _ in ()).throw(error))
            recipe = healing_recipe(folder, heal)
            origin = Run(Path(run.name), healing_recipe(folder))
            compare(alone(recipe, "Converted"), tmp_path / "run", progress=False, origin=origin)

    monkeypatch.chdir(run.parent)
    with pytest.raises(RuntimeError, match="1 of 1 models failed: Converted: loss became nan"):
        heal_anew(Failure("loss became nan at or before step 3"), {**HEAL, "learning_rate": 1e9})
    assert entries(tmp_path / "run")["Converted"]["error"] == "loss became nan at or before step 3"
    with pytest.raises(KeyboardInterrupt):
        heal_anew(KeyboardInterrupt())
    recipe = healing_recipe(folder)
    compare(alone(recipe, "Converted"), tmp_path / "run", progress=False, origin=Run(run, recipe))
    assert entries(tmp_path / "run")["Converted"]["best_val_ppl"] == entries(run)["Converted"]["best_val_ppl"]


def test_a_baseline_that_failed_is_not_converted(folder, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "train_language_model", fail)
    with pytest.raises(RuntimeError, match="3 of 3 models failed: Pythia: out of memory"):
        compare(healing_recipe(folder, models=MODELS[::-1]), tmp_path, progress=False)
    assert "has no trained baseline" in entries(tmp_path)["Converted"]["error"]


def test_a_run_without_a_baseline_is_refused_before_the_text_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_data", None)
    with pytest.raises(ValueError, match="Converted is converted from the trained baseline, but .*: list a"):
        compare(alone(healing_recipe(folder), "Converted"), tmp_path, progress=False)


def test_several_processes_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    recipe = healing_recipe(folder)
    with pytest.raises(ValueError, match="Control is converted from the trained baseline in one process, but 2"):
        module._check_origins(recipe, Run(tmp_path, recipe))
