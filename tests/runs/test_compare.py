import dataclasses
import json
import math
import re
import shutil
import sys

import pytest
import torch
import yaml
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from context_pythia import ContextPythiaForCausalLM
from context_pythia.config.recipe_files import load_recipe
from context_pythia.errors import Failure, UsageError
from context_pythia.runs import train
from context_pythia.runs.build import build_model
from context_pythia.runs.record import Run
from context_pythia.runs.train import compare, run_phase1
from tests.conftest import tiny_recipe


def metrics(run) -> dict:
    return json.loads((run / "metrics.json").read_text())


def test_every_model_is_recorded_with_its_figures(finished_run):
    entries = metrics(finished_run)["models"]
    assert [entry["name"] for entry in entries] == ["Pythia", "input", "shared", "Layer 12 x2"]
    for entry in entries:
        assert entry["error"] is None
        assert 1 < entry["best_val_ppl"] < 280
        assert entry["best_val_ppl"] == min(row["val_ppl"] for row in entry["history"])
        (band,) = entry["val_ppl_by_position"]
        assert band["to"] == 16 and band["perplexity"] == pytest.approx(entry["best_val_ppl"], rel=1e-5)
        assert entry["history"][1]["train_loss"] < entry["history"][0]["train_loss"]
        assert entry["cache"]["bytes_measured"] == entry["cache"]["bytes_formula"]
        assert entry["machine"]["threads"] == torch.get_num_threads() and entry["machine"]["processes"] == 1
    assert [entry["phase1"] is None for entry in entries] == [True, False, False, True]
    assert all(0 < entries[i]["phase1"]["effective_rank"] <= 12 for i in (1, 2))
    assert entries[1]["parameters"] - entries[1]["trainable_parameters"] == (12 + 32 + 1) * 12 + 2 * 12


def test_caches_are_measured_at_the_trained_length(finished_run):
    caches = [entry["cache"] for entry in metrics(finished_run)["models"]]
    assert [cache["numbers_per_token"] for cache in caches] == [128, 128, 16, 12]
    numbers = [16 * 128, 16 * 128 + 12, 16 * 16, 16 * 12]
    assert [cache["bytes_measured"] for cache in caches] == [4 * number for number in numbers]


def test_run_folder_is_whole(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        "recipe.yaml", "metrics.json", "provenance.json", "phase1", "models", "curves.png", "frontier.png",
        "positions.png", "report.md", "report.html", "report.ja.md", "report.ja.html",
        ".lock", ".locks",
    }  # fmt: skip
    provenance = json.loads((finished_run / "provenance.json").read_text())
    assert provenance["data_fingerprint"] == metrics(finished_run)["data"]["fingerprint"]
    assert torch.__version__.startswith(provenance["versions"]["torch"])
    assert yaml.safe_load((finished_run / "recipe.yaml").read_text()) == metrics(finished_run)["recipe"]


def test_models_are_usable_by_generate(finished_run):
    for name, kind in (("pythia", GPTNeoXForCausalLM), ("layer-12-x2", ContextPythiaForCausalLM)):
        folder = finished_run / "models" / name
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert isinstance(model, kind)
        ids = tokenizer("the cache of", return_tensors="pt").input_ids
        assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]


def test_saved_weights_have_the_recorded_perplexity(finished_run):
    entry = metrics(finished_run)["models"][2]
    recipe = tiny_recipe(finished_run.parent)
    validation = train.load_data(recipe.data, progress=False).validation
    model = AutoModelForCausalLM.from_pretrained(finished_run / "models" / "shared").eval()
    rows = [validation[i] for i in range(len(validation))]
    ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert math.exp(loss) == pytest.approx(entry["best_val_ppl"], rel=1e-5)
    assert (logits.argmax(-1) == labels).float().mean() == pytest.approx(entry["val_accuracy"], rel=1e-5)


def test_a_finished_run_is_not_run_again(finished_run, monkeypatch, capsys):
    before, provenance = metrics(finished_run), (finished_run / "provenance.json").read_bytes()
    monkeypatch.setattr(train, "train_language_model", None)
    monkeypatch.setattr(train, "train_context_block", None)
    compare(tiny_recipe(finished_run.parent), finished_run, progress=False)
    assert metrics(finished_run) == before
    assert (finished_run / "provenance.json").read_bytes() == provenance
    assert capsys.readouterr().out.count("already trained") == 4


def test_models_of_several_calls_end_like_one_comparison_and_a_failed_one_is_recorded(
    finished_run, tmp_path, monkeypatch
):
    recipe, whole = tiny_recipe(finished_run.parent), train.train_language_model
    run = tmp_path / "run"

    def call(number, step, *names):
        monkeypatch.setattr(sys, "argv", ["context-pythia", f"call {number}"])
        models = [model for name in names for model in recipe.models if model.name == name]
        step(dataclasses.replace(recipe, models=models), run, progress=False)

    def fail_with_layers(model, *args, **kwargs):
        if model.config.model_type == "context_pythia" and model.config.context_source == "layer":
            raise Failure("the loss became nan at step 3")
        return whole(model, *args, **kwargs)

    monkeypatch.setattr(train, "train_language_model", fail_with_layers)
    call(0, run_phase1, "shared")
    assert metrics(run)["models"] == []
    with pytest.raises(RuntimeError, match="1 of 2 models failed: Layer 12 x2: the loss became nan"):
        call(1, compare, "Layer 12 x2", "Pythia")
    call(2, compare, "shared")
    expected = {entry["name"]: entry for entry in metrics(finished_run)["models"]}
    entries = {entry["name"]: entry for entry in metrics(run)["models"]}
    failed = entries.pop("Layer 12 x2")
    assert failed["error"] == "the loss became nan at step 3" and failed["best_val_ppl"] is None
    assert entries.keys() == {"Pythia", "shared"}
    for name, entry in entries.items():
        for key in ("best_val_ppl", "best_epoch", "val_accuracy", "parameters", "cache"):
            assert entry[key] == expected[name][key]
    provenance = json.loads((run / "provenance.json").read_text())
    calls = [*provenance.pop("earlier"), provenance]
    assert [call["models"] for call in calls] == [["shared"], ["Layer 12 x2", "Pythia"], ["shared"]]
    assert [call["command"] for call in calls] == [f"context-pythia 'call {number}'" for number in range(3)]
    assert all(call["versions"] == provenance["versions"] for call in calls)


def test_calls_that_run_at_one_time_keep_each_others_models(finished_run, tmp_path):
    recipe, entries = tiny_recipe(finished_run.parent), metrics(finished_run)["models"]
    alone = [dataclasses.replace(recipe, models=[model]) for model in recipe.models[:3]]
    runs = [Run(tmp_path, one) for one in alone]
    for run, entry in reversed(list(zip(runs, entries, strict=False))):
        run.write(entry)
    assert entries[0]["name"] not in runs[0].finished and entries[1]["name"] in Run(tmp_path, alone[0]).finished
    recorded = metrics(tmp_path)
    assert {entry["name"]: entry for entry in recorded["models"]} == {entry["name"]: entry for entry in entries[:3]}
    assert {model["name"] for model in recorded["recipe"]["models"]} == {entry["name"] for entry in entries[:3]}


def test_a_folder_keeps_to_its_recipe(finished_run):
    recipe = tiny_recipe(finished_run.parent, train={"epochs": 3})
    with pytest.raises(ValueError, match="holds a run with train.epochs 2, not 3: choose another folder with --out"):
        compare(recipe, finished_run, progress=False)


def test_options_that_change_no_result_may_change(finished_run, tmp_path):
    for name in ("metrics.json", "recipe.yaml"):
        shutil.copy(finished_run / name, tmp_path)
    free = {"checkpoint_steps": 3, "gradient_checkpointing": True, "tensorboard": True}
    recipe = tiny_recipe(finished_run.parent, train=free, phase1={"checkpoint_seconds": 1.0})
    run = Run(tmp_path, recipe)
    run.write()
    assert "shared" in run.finished and metrics(tmp_path)["models"] == metrics(finished_run)["models"]
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["train"]["checkpoint_steps"] == 3


def test_a_folder_keeps_to_its_text(finished_run, tmp_path, monkeypatch):
    for name in ("metrics.json", "recipe.yaml"):
        shutil.copy(finished_run / name, tmp_path)
    recipe = tiny_recipe(finished_run.parent)
    other = dataclasses.replace(recipe, models=[dataclasses.replace(recipe.models[0], name="another")])
    data, before = train.load_data(recipe.data, progress=False), (tmp_path / "metrics.json").read_bytes()
    data.summary = data.summary | {"fingerprint": "of other text"}
    monkeypatch.setattr(train, "load_data", lambda *given: data)
    for again in (recipe, other):
        with pytest.raises(ValueError, match="the text has changed; choose another folder with --out"):
            compare(again, tmp_path, progress=False)
    assert (tmp_path / "metrics.json").read_bytes() == before


def test_phase1_refuses_a_model_without_context_block(tmp_path):
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(ValueError, match="Pythia has no ContextBlock"):
        run_phase1(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"warmup_ratio": 0.1}, {"tensorboard": True}], ids=str)
def test_options_that_cannot_be_are_refused_before_phase_1(tmp_path, monkeypatch, options):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    wrong = tiny_recipe(tmp_path, train=options)
    with pytest.raises(ValueError, match=next(iter(options))):
        compare(dataclasses.replace(wrong, models=[wrong.models[2]]), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_model_that_another_call_trains_is_refused_and_the_others_are_not(tmp_path, own_cache):
    recipe = tiny_recipe(tmp_path)
    locked, other = (dataclasses.replace(recipe, models=[recipe.models[i]]) for i in (1, 2))
    (tmp_path / "run" / ".locks").mkdir(parents=True)
    with FileLock(tmp_path / "run" / ".locks" / "input.lock"):
        for command in (compare, run_phase1):
            with pytest.raises(ValueError, match=r"another call trains input in .*run now: wait for its end"):
                command(locked, tmp_path / "run", progress=False)
        assert metrics(tmp_path / "run")["models"] == []
        run_phase1(other, tmp_path / "run", progress=False)


def test_a_refused_command_leaves_the_folder_free(tmp_path):
    wrong = tiny_recipe(tmp_path, data={"data": str(tmp_path / "missing.txt")})
    with pytest.raises(FileNotFoundError, match="missing.txt"):
        compare(wrong, tmp_path / "run", progress=False)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("content", ["{", '{"kind": "evaluation", "models": [], "data": {}}'])
def test_damaged_metrics_are_named(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match="metrics.json is damaged"):
        compare(tiny_recipe(tmp_path), tmp_path / "run", progress=False)


def test_a_pass_over_models_of_equal_size(tmp_path, own_cache):
    recipe = tiny_recipe(
        tmp_path,
        architecture={"match_parameters": True},
        train={"tokens": 256, "batch_size": 8},
        models=[{"name": "Pythia"}, {"name": "MQA x2", "context_source": "grouped", "context_sharing": 2}],
    )
    compare(recipe, tmp_path / "run", progress=False)
    baseline, *others = metrics(tmp_path / "run")["models"]
    assert baseline["intermediate_size"] == recipe.architecture.intermediate_size
    for entry in (baseline, *others):
        assert entry["parameters"] == pytest.approx(baseline["parameters"], rel=0.01)
        assert (entry["stop_reason"], entry["history"][-1]["tokens"]) == ("all tokens", 256)
    assert all(entry["intermediate_size"] > baseline["intermediate_size"] for entry in others)
    assert others[0]["cache"]["bytes_measured"] == others[0]["cache"]["bytes_formula"]
    assert (others[0]["key_value_heads"], others[0]["context_sharing"]) == (1, 2)


def test_a_pass_needs_its_tokens_and_not_the_samples_of_the_recipe(tmp_path, own_cache, capsys):
    def recipe(tokens):
        return tiny_recipe(
            tmp_path,
            data={"samples": 79_000, "validation_fraction": 0.01},
            train={"tokens": tokens, "batch_size": 8},
            models=[{"name": "Pythia"}],
        )

    with pytest.raises(UsageError, match=r"train.tokens 999999: \S+corpus has \d+ tokens to train on, give") as refused:
        compare(recipe(999_999), tmp_path / "run", progress=False)
    most = int(re.search(r"--tokens (\d+) at most, or more text$", str(refused.value))[1])
    with pytest.raises(UsageError, match=f"train.tokens {most + 1}: .* has {most} tokens to train on"):
        compare(recipe(most + 1), tmp_path / "run", progress=False)
    capsys.readouterr()
    compare(recipe(most), tmp_path / "run", progress=False)
    found = metrics(tmp_path / "run")
    trained, held_out = found["data"]["samples_train"], found["data"]["samples_validation"]
    assert 16 * trained == most and found["models"][0]["history"][-1]["tokens"] == most // 128 * 128
    line = f"gives {trained + held_out} of data.samples 79000: {trained} to train on and {held_out} held out\n"
    assert line in capsys.readouterr().out


def test_a_text_of_less_than_a_step_is_told_no_number_of_tokens(tmp_path, own_cache):
    recipe = tiny_recipe(tmp_path, data={"samples": 79_000}, train={"tokens": 999_999, "batch_size": 4096})
    with pytest.raises(UsageError, match=r"corpus has \d+ tokens to train on, give more text$"):
        compare(recipe, tmp_path / "run", progress=False)


def test_a_model_that_cannot_be_as_small_as_the_baseline_is_refused():
    recipe = load_recipe(
        "quick",
        {"architecture.match_parameters": True, "architecture.intermediate_size": 4, "model.context_dim": 255},
        models=["Pythia", "layer"],
    )
    with pytest.raises(ValueError, match=r"layer: has \d+ more parameters than the baseline"):
        build_model(recipe.models[1], recipe, rows=2048)


def test_a_run_folder_that_cannot_be_made_is_a_failure(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot make the run folder .* choose another with --out") as caught:
        compare(tiny_recipe(tmp_path), tmp_path / "file" / "run", progress=False)
    assert not isinstance(caught.value, FileNotFoundError | NotADirectoryError)
