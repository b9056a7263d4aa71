"""Trials of what is made of the trained baseline: each waits for the baseline's trial, then goes on with its run."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from context_pythia.cli import command_line as cli
from context_pythia.cli import reported
from context_pythia.cli.reported import compare
from context_pythia.config.recipe_files import save_recipe
from context_pythia.report.formats import perplexity
from context_pythia.report.report import write_report
from context_pythia.sweep import worker
from context_pythia.sweep.options import SweepPlan, parse_over
from context_pythia.sweep.study import Queue, open_storage
from tests.runs.test_compare_healed import HEAL, entries, healing_recipe

NAMES = ["Pythia", "Control", "Converted"]


def plan_of(folder, over=(), models=NAMES, seeds=(0,), sampler="grid", trials=None):
    return SweepPlan(healing_recipe(folder), models, [parse_over(text) for text in over], seeds, sampler, trials)


def trials_of(out) -> dict:
    return {trial["folder"]: trial for trial in json.loads((out / "metrics.json").read_text())["trials"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, own_cache):
    return tmp_path_factory.mktemp("healed-sweep")


@pytest.fixture(scope="module")
def finished(folder):
    """By two workers at one time."""
    recipe, out = folder / "tiny.yaml", folder / "sweep"
    save_recipe(healing_recipe(folder), recipe)
    options = ["sweep", str(recipe), "--over", "heal.steps=3,9", "--out", str(out), "--quiet", "--lang", "ja"]
    with subprocess.Popen([sys.executable, "-m", "context_pythia", *options], stdout=subprocess.PIPE) as second:
        assert cli.main(options) == 0
        second.communicate(timeout=300)
    assert second.returncode == 0
    return out


def test_each_trial_ends_with_its_figures(finished):
    trials = list(trials_of(finished).values())
    assert [(trial["model"], trial["setting"]["heal.steps"]) for trial in trials] == [
        ("Pythia", None), ("Control", 3), ("Control", 9), ("Converted", 3), ("Converted", 9),
    ]  # fmt: skip
    assert [trial["baseline"] for trial in trials] == [True, False, False, False, False]
    assert {trial["state"] for trial in trials} == {"complete"}
    assert [trial["cache_bytes"] for trial in trials] == [4 * 16 * numbers for numbers in (128, 128, 128, 12, 12)]


def test_a_trial_is_what_compare_makes_of_the_baseline(folder, finished, tmp_path):
    compare(healing_recipe(folder), tmp_path, progress=False)
    trials = {(trial["model"], trial["setting"]["heal.steps"]): trial for trial in trials_of(finished).values()}
    for name, entry in entries(tmp_path).items():
        trial = trials[name, None if name == "Pythia" else 9]
        # The other worker may have had another number of threads, and so another rounding.
        assert trial["val_ppl"] == pytest.approx(entry["best_val_ppl"], rel=1e-5)


def test_the_baseline_is_trained_once(finished):
    weights = finished.glob("trials/*/models/pythia/model.safetensors")
    assert len(list(weights)) == 1


def test_trials_are_taken_when_the_baseline_has_ended(folder, tmp_path):
    plan = plan_of(folder, seeds=(0, 1))
    queue = Queue(open_storage(None, tmp_path), "study", tmp_path)
    assert worker.Search(plan, queue).fill()

    def take():
        return queue.take(lambda trial, states: worker._origin_ended(plan, trial, states))

    first, second = take(), take()
    assert [(claim.trial.params["model"], claim.trial.user_attrs["seed"]) for claim in (first, second)] == [
        ("Pythia", 0), ("Pythia", 1),
    ]  # fmt: skip
    assert take() is None
    with second:
        second.end([1.0, 2.0], {})
    third = take()
    assert (third.trial.params["model"], third.trial.user_attrs["seed"]) == ("Control", 1)


def test_a_worker_waits_for_the_baseline_that_another_trains(folder, tmp_path, monkeypatch, capsys):
    plan = plan_of(folder, models=["Pythia", "Control"])
    queue = Queue(open_storage(None, tmp_path), tmp_path.name, tmp_path)
    assert worker.Search(plan, queue).fill()
    claims = [queue.take()]

    def other_worker_ends(seconds):
        with claims.pop() as claim:
            worker._run(plan, claim, tmp_path, progress=False)

    monkeypatch.setattr(worker, "time", SimpleNamespace(sleep=other_worker_ends))
    reported.sweep(plan, tmp_path, progress=False)
    output = capsys.readouterr().out
    assert not claims and "waiting for 2 of 2 trials in other workers" in output
    assert output.index("trial 1 of 2: Pythia") < output.index("trial 2 of 2: Control")


def test_a_failed_baseline_fails_what_is_made_of_it(folder, tmp_path, monkeypatch):
    plan = plan_of(folder)

    def fail(*arguments, **named):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("context_pythia.runs.train.train_language_model", fail)
    with pytest.raises(RuntimeError, match="all 3 trials failed: out of memory"):
        reported.sweep(plan, tmp_path / "sweep", progress=False)
    errors = [trial["error"] for trial in trials_of(tmp_path / "sweep").values()]
    assert errors[1:] == ["its baseline Pythia failed: out of memory"] * 2


def test_a_baseline_that_is_elsewhere_leaves_the_trial_to_others(folder, finished, tmp_path):
    out = tmp_path / "sweep"
    shutil.copytree(finished, out)
    for trial in trials_of(finished).values():
        if trial["model"] == "Pythia":
            shutil.rmtree(out / "trials" / trial["folder"])
    with pytest.raises(FileNotFoundError, match="no trained Pythia in .*workers that heal must share --out"):
        reported.sweep(plan_of(folder, ["heal.steps=5"]), out, progress=False)
    # It is left to a worker that has the baseline.
    states = [trial.state.name for trial in Queue(open_storage(None, out), "sweep", out).trials()]
    assert states == ["COMPLETE"] * 5 + ["WAITING"] * 2


def test_wrong_options_of_healing_are_found_before_any_training(folder, tmp_path):
    recipe = healing_recipe(folder, {**HEAL, "schedule": "constant"})
    for run in (
        lambda: compare(recipe, tmp_path / "run"),
        lambda: reported.sweep(SweepPlan(recipe, NAMES, [], [0]), tmp_path),
    ):
        with pytest.raises(ValueError, match="heal.warmup_ratio 0.05: needs the schedule constant_with_warmup"):
            run()
    assert not list(tmp_path.rglob("models"))


def test_the_report_of_a_trial_names_the_baseline_that_it_is_made_of(finished):
    trials = {
        trial["model"]: trial for trial in trials_of(finished).values() if trial["setting"]["heal.steps"] in (None, 9)
    }
    folder, before, after = (
        trials["Converted"]["folder"],
        *(trials[name]["val_ppl"] for name in ("Pythia", "Converted")),
    )
    for lang in ("en", "ja"):
        write_report(finished / "trials" / folder, lang)
    report = (finished / "trials" / folder / "report.md").read_text()
    assert "Pythia から作られた Converted" in (finished / "trials" / folder / "report.ja.md").read_text()
    assert (
        f"Converted, which is made of Pythia, takes its perplexity from {perplexity(before)} to {perplexity(after)} ("
        in report
    )


def test_the_report_compares_with_the_control(finished):
    report, japanese = ((finished / name).read_text() for name in ("report.md", "report.ja.md"))
    assert "Trained longer than the others, since they go on from the trained baseline: " in report
    means = {
        trial["model"]: trial["val_ppl"]
        for trial in trials_of(finished).values()
        if trial["setting"]["heal.steps"] == 9
    }
    change = means["Converted"] / means["Control"] - 1
    sign = "−" if change < 0 else "+"
    assert f"the control Control, steps 9, means over the same seeds: {sign}{abs(100 * change):.2f} %" in report
    assert report.count("means over the same seeds") == japanese.count("同じシードの平均") == 2


def test_what_other_seeds_gave_is_not_compared_with_the_control(finished, tmp_path):
    metrics = json.loads((finished / "metrics.json").read_text())
    for row in metrics["settings"]:
        if (row["model"], row["setting"]["heal.steps"]) == ("Control", 9):
            row["seeds"] = [1]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    shutil.copy(finished / "provenance.json", tmp_path)
    write_report(tmp_path)
    assert (tmp_path / "report.md").read_text().count("means over the same seeds") == 1


def test_a_flag_mends_a_recipe_without_healing(folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    save_recipe(healing_recipe(folder), recipe)
    recipe.write_text(recipe.read_text().replace("steps: 9", "steps: 0"))
    # The flag is taken, and the model is what the sweep refuses.
    sweep = ["sweep", str(recipe), "--heal-steps", "9", "--models", "Converted", "--out", str(tmp_path / "sweep")]
    assert cli.main(sweep) == 2
    assert "Converted is made of the trained baseline: name Pythia with --models too" in capsys.readouterr().err


def test_options_that_do_not_concern_it_make_no_second_trial(folder):
    plan = plan_of(folder, ["context_dim=6,8", "context_sharing=1,2", "heal.ce_weight=0.5,1"])
    settings = plan.combinations()
    assert [setting.recipe.models[0].name for setting in settings].count("Pythia") == 1
    assert [setting.recipe.models[0].name for setting in settings].count("Control") == 2
    assert [setting.recipe.models[0].name for setting in settings].count("Converted") == 4
    assert {plan.origin(setting).identity for setting in settings[1:]} == {settings[0].identity}
    assert plan.origin(settings[0]) is None


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (("--models", "Converted"), "Converted is made of the trained baseline: name Pythia with --models too"),
        (("--sampler", "tpe", "--trials", "6"), "Control is made of .* its setting: sweep it with --sampler grid"),
    ],
)
def test_what_cannot_be_swept_is_refused(folder, tmp_path, capsys, further, message):
    save_recipe(healing_recipe(folder, HEAL), tmp_path / "recipe.yaml")
    assert cli.main(["sweep", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "sweep"), *further]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
