"""A small sweep from end to end, with real trainings, some of which go on from the trained baseline; and its report."""

import json
import sys

import pytest

from context_pythia.cli import command_line as cli
from context_pythia.cli.command import reported
from context_pythia.config.recipe_files import save_recipe
from context_pythia.errors import Failure
from context_pythia.report.document import to_markdown
from context_pythia.report.formats import change
from context_pythia.report.sweep import SweepReport
from context_pythia.report.texts import Texts
from context_pythia.sweep.options import SweepPlan, parse_over
from context_pythia.sweep.worker import sweep
from tests.runs.test_compare_healed import MODELS, healing_recipe

NAMES = ["Pythia", "Control", "Converted"]
SHARED = {"name": "shared", "context_source": "shared", "context_dim": 12}


def plan_of(folder, over=(), models=(*NAMES, "shared"), seeds=(0,), **asked):
    recipe = healing_recipe(folder, models=[*MODELS, SHARED])
    recipe.models = [model for model in recipe.models if model.name in models]
    return SweepPlan(recipe, [parse_over(text) for text in over], seeds, **asked)


def metrics_of(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, own_cache):
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def finished(folder):
    save_recipe(plan_of(folder).recipe, folder / "tiny.yaml")
    out = folder / "sweep"
    options = ["sweep", str(folder / "tiny.yaml"), "--over", "heal.steps=3,9", "--out", str(out)]
    assert cli.main([*options, "--quiet", "--lang", "ja"]) == 0
    return out


def test_every_training_is_a_whole_run_folder_with_the_figures_of_the_sweep(finished):
    trials = metrics_of(finished)["trials"]
    assert {trial["state"] for trial in trials} == {"complete"}
    assert [(trial["model"], trial["setting"]["heal.steps"]) for trial in trials] == [
        ("Pythia", None), ("shared", None), ("Control", 3), ("Control", 9), ("Converted", 3), ("Converted", 9),
    ]  # fmt: skip
    assert {path.name for path in (finished / "trials").iterdir()} == {trial["folder"] for trial in trials}
    assert trials[2]["folder"] == "control_heal_steps=3_seed=0" and trials[3]["folder"] == "control_seed=0"
    for trial in trials:
        (entry,) = metrics_of(finished / "trials" / trial["folder"])["models"]
        assert (trial["val_ppl"], trial["cache_bytes"]) == (entry["best_val_ppl"], entry["cache"]["bytes_measured"])
        assert trial["best_epoch"] == entry["best_epoch"] and trial["baseline"] == (trial["model"] == "Pythia")
        assert trial["val_ppl_by_position"] == entry["val_ppl_by_position"] != []
    assert [trial["cache_bytes"] for trial in trials] == [64 * numbers for numbers in (128, 16, 128, 128, 12, 12)]
    assert len(list(finished.glob("trials/*/models/pythia/model.safetensors"))) == 1
    # Of phase 1 the sweep keeps what it reached.
    (entry,) = metrics_of(finished / "trials" / "shared_seed=0")["models"]
    assert len(entry["phase1"].pop("history")) == trials[1]["phase1"]["iterations"] > 1
    assert trials[1]["phase1"] == entry["phase1"]


def test_options_that_do_not_concern_it_make_no_second_training(folder):
    plan = plan_of(folder, ["context_dim=6,8", "context_sharing=1,2", "heal.ce_weight=0.5,1"], NAMES)
    names = [setting.model.name for setting in plan.settings]
    assert [names.count(name) for name in NAMES] == [1, 2, 4]
    assert {plan.origin(setting).name for setting in plan.settings[1:]} == {plan.settings[0].name}
    assert plan.origin(plan.settings[0]) is None


def test_a_failed_baseline_fails_what_is_made_of_it(folder, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise Failure("out of memory")

    monkeypatch.setattr("context_pythia.runs.train.train_language_model", fail)
    with pytest.raises(Failure, match="all 3 trials failed: out of memory"), reported(tmp_path / "sweep"):
        sweep(plan_of(folder, models=NAMES), tmp_path / "sweep", progress=False)
    errors = [trial["error"] for trial in metrics_of(tmp_path / "sweep")["trials"]]
    assert errors[1:] == ["its baseline Pythia failed: out of memory"] * 2
    report = (tmp_path / "sweep" / "report.md").read_text()
    assert "No model has a result yet." in report and "failed: its baseline Pythia failed" in report


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"models": ["Converted"]}, "Converted starts from the trained baseline: name the baseline with --models too"),
        ({"sampler": "tpe", "trials": 8}, "Control starts from the trained baseline: .* sweep with --sampler grid"),
        ({"over": ["heal.warmup_ratio=0.1", "heal.schedule=constant"]}, "schedule constant has no warm-up"),
    ],
)
def test_what_cannot_be_healed_is_refused_before_any_training(folder, tmp_path, asked, message):
    with pytest.raises(ValueError, match=message):
        sweep(plan_of(folder, **asked), tmp_path / "sweep", progress=False)
    assert not list(tmp_path.rglob("models"))


def test_the_report_is_made_again_from_the_folder_alone(finished, monkeypatch):
    names = {"report.md", "report.html", "report.ja.md", "report.ja.html"}
    names |= {"pareto.png", "perplexities.png", "positions.png"}
    assert names <= {path.name for path in finished.iterdir()}
    (finished / "report.ja.md").unlink()
    monkeypatch.setitem(sys.modules, "optuna", None)  # neither Optuna nor the study is needed
    assert cli.main(["report", str(finished), "--lang", "ja"]) == 0
    report, japanese = ((finished / name).read_text() for name in ("report.md", "report.ja.md"))
    for trial in metrics_of(finished)["trials"]:
        assert f"| {trial['val_ppl']:,.2f} |" in report and f"| {trial['val_ppl']:,.2f} |" in japanese
    assert "Trained longer than the others, because they start from the trained baseline: " in report
    assert "| heal steps |" in report or "| steps |" in report
    assert (finished / "report.html").read_text().count("data:image/png") == 3


def against(report: str, model: str, steps: str) -> list[str]:
    """The column of differences to the control, of one row of the table of all settings."""
    lines = [[cell.strip() for cell in line.split("|")] for line in report.splitlines() if line.startswith("|")]
    head = next(line for line in lines if "steps" in line)
    column = next(i for i, cell in enumerate(head) if cell in ("Against control", "対照との差"))
    found = {tuple(line) for line in lines if len(line) == len(head) and line[1] == model}
    return [line[column] for line in found if line[head.index("steps")] == steps]


def test_the_report_compares_with_the_control_of_the_same_setting_and_seeds(finished):
    report, japanese = ((finished / name).read_text() for name in ("report.md", "report.ja.md"))
    metrics = metrics_of(finished)
    trials = {(trial["model"], trial["setting"]["heal.steps"]): trial for trial in metrics["trials"]}
    apart = change(trials["Converted", 9]["val_ppl"] / trials["Control", 9]["val_ppl"] - 1, 2)
    assert [against(text, "Converted", "9") for text in (report, japanese)] == [[apart], [apart]]
    assert against(report, "Control", "9") == ["–"]
    trials["Control", 9]["seed"] = 1
    # By position the models are compared whose samples have the first one's length.
    trials["shared", None]["val_ppl_by_position"][-1]["to"] += 1
    report = to_markdown(list(SweepReport(metrics, {}, Texts("en", "sweep")).blocks()))
    assert against(report, "Converted", "9") == ["–"]
    section = report[report.index("## Quality by position") : report.index("## Settings")]
    assert "\n| Pythia |" in section and "\n| shared |" not in section
