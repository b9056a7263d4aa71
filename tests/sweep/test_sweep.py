"""Sweeps: what is searched, what a worker trains of it, and what is reported."""

import json
import random
import re
import shutil
import sys
from collections import Counter

import pytest

from context_pythia.cli import command_line as cli
from context_pythia.cli import reported
from context_pythia.config.recipe_files import load_recipe
from context_pythia.errors import Failure
from context_pythia.report.formats import change, perplexity
from context_pythia.report.report import write_report
from context_pythia.report.sweep import write_sweep
from context_pythia.report.sweep_figures import pareto, perplexities
from context_pythia.report.sweep_translations import SWEEP_TRANSLATIONS
from context_pythia.sweep import worker
from context_pythia.sweep.options import SweepPlan, parse_over
from context_pythia.sweep.results import importances, settings_over_seeds
from context_pythia.sweep.study import JOURNAL, Queue, open_storage
from tests.conftest import tiny_recipe

QUICK = load_recipe("quick")


def plan_of(recipe=QUICK, over=(), models=("Pythia", "layer"), seeds=(0,), sampler="grid", trials=None) -> SweepPlan:
    return SweepPlan(recipe, models, [parse_over(text) for text in over], seeds, sampler, trials)


def metrics_of(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def quick_trials(monkeypatch):
    """Trials that end at once, with a perplexity that the settings decide; returns what was trained."""
    trained = []

    def train(setting, folder, progress, origin=None):
        trained.append(setting)
        model, rate = setting.recipe.models[0], setting.recipe.train.learning_rate
        width = 512 if model.context_source is None else model.context_dim
        perplexity = 100 + 10 * abs(rate - 0.002) / 0.002 + 1000 / width + setting.recipe.seed
        entry = dict.fromkeys((*worker.KEPT, "phase1")) | {"error": None, "best_val_ppl": perplexity}
        return entry | {"cache": {"bytes_measured": 4096 * width}}

    monkeypatch.setattr(worker, "train_trial", train)
    monkeypatch.setattr(worker, "check_setting", lambda recipe, progress: "the same text")
    return trained


# What is searched


@pytest.mark.parametrize(
    ("over", "path", "values"),
    [
        ("learning_rate=1e-4,0.001", "train.learning_rate", (0.0001, 0.001)),
        ("train.learning-rate=1", "train.learning_rate", (1.0,)),
        ("phase1-learning-rate=0.1", "phase1.learning_rate", (0.1,)),
        ("phase1=true,false", "model.phase1", (True, False)),
        ("context_source=null,shared", "model.context_source", (None, "shared")),
        ("hidden_size=64, 128", "architecture.hidden_size", (64, 128)),
        ("data=a.txt,b.txt", "data.data", ("a.txt", "b.txt")),
    ],
)
def test_keys_are_those_of_the_flags_and_values_have_the_option_s_kind(over, path, values):
    dimension = parse_over(over)
    assert (dimension.path, dimension.values) == (path, values)
    assert list(map(type, dimension.values)) == list(map(type, values))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--over", "learning_rte=1"],
            "--over key 'learning_rte' is unknown (did you mean learning_rate?); valid: arch",
        ),
        (["--over", "seed=1,2"], "--over seed: seeds are given by --seeds"),
        (
            ["--over", "schedule=cosin"],
            "train.schedule 'cosin': must be one of constant, constant_with_warmup, linear, ",
        ),
        (["--over", "epochs=two"], "train.epochs 'two': must be a whole number"),
        (["--over", "epochs=2,0"], "train.epochs 0: must be >= 1"),
        (["--over", "epochs=2,2"], "--over epochs: 2,2 names a value twice"),
        (["--over", "epochs"], "--over 'epochs': give key=value,value"),
        (["--over", "epochs=2", "--over", "train.epochs=3"], "--over train.epochs: is given twice"),
        (["--over", "context_dim=32,300"], "context_dim 300: must be between 1 and 2 * hidden_size = 256"),
        (["--over", "context_dim=32..64"], "--over model.context_dim: a range needs --sampler tpe"),
        (["--over", "context_dim=64..300", "--sampler", "tpe", "--trials", "4"], "context_dim 300: must be between"),
        (["--over", "schedule=a..b", "--sampler", "tpe"], "--over train.schedule: a..b is no range of numbers"),
        (
            ["--over", "epochs=2", "--sampler", "tpe", "--trials", "5"],
            "--trials 5: --sampler tpe needs a multiple of 4",
        ),
        (["--over", "epochs=2", "--trials", "5"], "--trials: is for --sampler tpe"),
        (["--over", "epochs=2", "--seeds", "0,x"], "--seeds 0,x: give different whole numbers"),
        (["--over", "epochs=2", "--models", "a"], "recipe quick: model 'a' is unknown; valid: Pythia, input, shared"),
    ],
)
def test_a_wrong_sweep_is_one_line_and_exit_2_before_any_training(tmp_path, capsys, argv, message):
    assert cli.main(["sweep", "quick", *argv, "--out", str(tmp_path / "sweep")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"context-pythia: error: {message}") and err.count("\n") == 1 and not out
    assert not (tmp_path / "sweep").exists()


def test_the_grid_holds_each_training_once():
    over = ["context_dim=32,64", "context_sharing=1,2", "phase1.noise=0,0.1", "learning_rate=0.001,0.002"]
    found = plan_of(over=over, models=("Pythia", "shared", "layer"), seeds=(0, 1)).combinations()
    assert len({setting.identity for setting in found}) == len(found)
    counts = Counter(setting.recipe.models[0].name for setting in found)
    # The baseline has no context, `shared` no context_sharing, `layer` no phase 1.
    assert counts == {"Pythia": 2 * 2, "shared": 2 * 2 * 2 * 2, "layer": 2 * 2 * 2 * 2}
    assert found[0].params == {"model": "Pythia", "train.learning_rate": 0.001}
    assert [setting.recipe.seed for setting in found] == [0] * 18 + [1] * 18


def test_healing_leaves_the_identities_of_what_is_not_healed_as_they_are():
    (one,), (other,) = (
        plan_of(load_recipe("quick", {"heal.steps": steps}), models=["layer"]).combinations() for steps in (0, 9)
    )
    assert one.identity == other.identity == "11f139a8f9"  # of studies from before there was healing


def test_a_study_from_before_there_was_healing_goes_on(tmp_path, quick_trials):
    reported.sweep(plan_of(), tmp_path / "sweep", progress=False)
    queue = Queue(open_storage(None, tmp_path / "sweep"), "sweep", tmp_path / "sweep")
    held = queue.study.user_attrs[worker.RECIPE]
    assert "heal" not in held and "from_baseline" not in held["models"][0]
    reported.sweep(plan_of(load_recipe("quick", {"heal.steps": 4}), seeds=(0, 1)), tmp_path / "sweep", progress=False)
    assert len(quick_trials) == 4


def test_equal_settings_have_one_identity_however_they_were_asked_for(tmp_path):
    (asked,) = plan_of(over=["learning_rate=1e-3"], models=("Pythia",)).combinations()
    moved = load_recipe("quick", {"data.cache_dir": str(tmp_path), "train.learning_rate": 0.001})
    (default,) = plan_of(moved, models=("Pythia",)).combinations()
    assert asked.identity == default.identity
    assert plan_of(over=["epochs=4"], models=("Pythia",)).combinations()[0].identity != asked.identity
    folder = plan_of(over=["data=/x/y.txt,b"], models=("Pythia",)).combinations()[0].folder
    assert re.fullmatch(r"pythia_data=-x-y\.txt_seed=0_[0-9a-f]{10}", folder)


def test_tpe_gives_each_model_and_seed_the_same_budget(tmp_path, quick_trials):
    over = ["learning_rate=log:1e-4..1e-2", "context_dim=32,64"]
    plan = plan_of(over=over, models=("Pythia", "layer"), seeds=(0, 1), sampler="tpe", trials=16)
    metrics = reported.sweep(plan, tmp_path / "sweep", progress=False)
    assert Counter(setting.recipe.models[0].name for setting in quick_trials) == {"Pythia": 8, "layer": 8}
    assert Counter(setting.recipe.seed for setting in quick_trials) == {0: 8, 1: 8}
    assert all(row["n"] == 2 for row in metrics["settings"]) and len(metrics["settings"]) == 8
    rates = {setting.recipe.train.learning_rate for setting in quick_trials}
    assert len(rates) >= 4 and all(1e-4 <= rate <= 1e-2 for rate in rates)


def test_tpe_ends_where_nothing_new_is_left(tmp_path, quick_trials):
    plan = plan_of(over=["epochs=1,2,3"], models=("Pythia",), sampler="tpe", trials=20)
    reported.sweep(plan, tmp_path / "sweep", progress=False)
    assert sorted(setting.recipe.train.epochs for setting in quick_trials) == [1, 2, 3]


# A sweep from end to end


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory, own_cache):
    folder = tmp_path_factory.mktemp("sweeps")
    plan = plan_of(tiny_recipe(folder), ["context_dim=12,16"], ("Pythia", "Layer 12 x2"))
    reported.sweep(plan, folder / "sweep", lang="ja", progress=False)
    return folder / "sweep", plan


def test_every_trial_is_a_whole_run_folder_with_the_figures_of_the_study(finished_sweep):
    folder, _ = finished_sweep
    metrics = metrics_of(folder)
    assert [trial["state"] for trial in metrics["trials"]] == ["complete"] * 3
    assert {path.name for path in (folder / "trials").iterdir()} == {trial["folder"] for trial in metrics["trials"]}
    for trial in metrics["trials"]:
        (entry,) = metrics_of(folder / "trials" / trial["folder"])["models"]
        assert (trial["val_ppl"], trial["cache_bytes"]) == (entry["best_val_ppl"], entry["cache"]["bytes_measured"])
        assert trial["best_epoch"] == entry["best_epoch"] and trial["model"] == entry["name"]
        assert trial["val_ppl_by_position"] == entry["val_ppl_by_position"] != []
    assert [trial["cache_bytes"] for trial in metrics["trials"]] == [16 * 4 * numbers for numbers in (128, 12, 16)]


def test_what_is_recorded_is_never_trained_again(finished_sweep, tmp_path, monkeypatch, capsys):
    folder, plan = finished_sweep
    before = metrics_of(folder)
    monkeypatch.setattr(worker, "compare", None)
    assert reported.sweep(plan, folder, progress=False)["trials"] == before["trials"]
    assert capsys.readouterr().out.startswith("all 3 trials ended before, nothing is left to train\n")
    # Even in another study: the run folders are the record.
    (folder / JOURNAL).rename(tmp_path / JOURNAL)
    assert reported.sweep(plan, folder, progress=False)["trials"] == before["trials"]


def test_a_sweep_keeps_to_its_recipe(finished_sweep):
    folder, plan = finished_sweep
    other = plan_of(tiny_recipe(folder.parent, train={"epochs": 3}), ["context_dim=12"], plan.models)
    with pytest.raises(
        ValueError, match=r"holds a sweep with another train.epochs \(2, not 3\): choose another folder"
    ):
        reported.sweep(other, folder, progress=False)


def test_a_sweep_refuses_another_text_of_the_same_name(tmp_path, own_cache):
    recipe = tiny_recipe(tmp_path)
    reported.sweep(plan_of(recipe, models=("Pythia",)), tmp_path / "sweep", progress=False)
    before = metrics_of(tmp_path / "sweep")["trials"]
    (tmp_path / "corpus" / "00.txt").write_text("another text")
    refused = r"holds results of data \w+, and the same names here give \w+: the text has changed, or is another on"
    with pytest.raises(ValueError, match=rf"{tmp_path}/sweep {refused}"):
        reported.sweep(plan_of(recipe, models=("Pythia",), seeds=(0, 1)), tmp_path / "sweep", progress=False)
    assert metrics_of(tmp_path / "sweep")["trials"] == before
    # Another study, to which a recorded run folder would be a trial's end; what it refuses waits.
    (tmp_path / "sweep" / JOURNAL).rename(tmp_path / JOURNAL)
    with pytest.raises(ValueError, match=rf"{tmp_path}/sweep/trials/pythia_seed=0_\w+ {refused}"):
        reported.sweep(plan_of(recipe, models=("Pythia",)), tmp_path / "sweep", progress=False)
    queue = Queue(open_storage(None, tmp_path / "sweep"), "sweep", tmp_path / "sweep")
    assert [trial.state.name for trial in queue.trials()] == ["WAITING"]


def test_the_report_names_every_call_that_trained(tmp_path, quick_trials, monkeypatch):
    for seeds in ("0", "0,1", "1"):
        monkeypatch.setattr(sys, "argv", ["context-pythia", "sweep", "quick", "--seeds", seeds])
        reported.sweep(plan_of(seeds=tuple(map(int, seeds.split(",")))), tmp_path / "sweep", progress=False)
    provenance = json.loads((tmp_path / "sweep" / "provenance.json").read_text())
    assert provenance["command"] == "context-pythia sweep quick --seeds 0,1"
    assert [call["command"] for call in provenance["earlier"]] == ["context-pythia sweep quick --seeds 0"]
    report = (tmp_path / "sweep" / "report.md").read_text()
    assert report.count("context-pythia sweep quick --seeds 0\n") == 1


def test_what_phase_1_reached_is_kept_with_the_trial(tmp_path, own_cache):
    metrics = reported.sweep(plan_of(tiny_recipe(tmp_path), models=("shared",)), tmp_path / "sweep", progress=False)
    (trial,) = metrics["trials"]
    (entry,) = metrics_of(tmp_path / "sweep" / "trials" / trial["folder"])["models"]
    assert len(entry["phase1"].pop("history")) == trial["phase1"]["iterations"] > 1
    assert trial["phase1"] == entry["phase1"]


def test_the_report_is_made_again_from_the_folder_alone(finished_sweep, monkeypatch):
    folder, _ = finished_sweep
    names = {"report.md", "report.html", "report.ja.md", "report.ja.html"}
    names |= {"pareto.png", "perplexities.png", "positions.png"}
    assert names <= {path.name for path in folder.iterdir()}
    (folder / "report.ja.md").unlink()
    monkeypatch.setitem(sys.modules, "optuna", None)  # neither Optuna nor the study is needed
    assert cli.main(["report", str(folder), "--lang", "ja"]) == 0
    report = (folder / "report.md").read_text()
    assert (folder / "report.ja.md").exists() and "Layer 12 x2, context\\_dim" not in report
    for row in metrics_of(folder)["settings"]:
        assert f"| {row['mean']:,.2f} |" in report
    assert "Not computed: 3 trials have a result, 4 at least are needed." in report
    assert (folder / "report.html").read_text().count("data:image/png") == 3


def test_the_report_says_where_in_a_sample_the_best_setting_of_each_model_loses(finished_sweep):
    folder, _ = finished_sweep
    baseline, *others = metrics_of(folder)["settings"]
    ours = min(others, key=lambda row: row["mean"])
    report = (folder / "report.md").read_text()
    section = report[report.index("## Quality by position") : report.index("## Importance")]
    first, whole = ours["positions"][0]["perplexity"], baseline["positions"][0]["perplexity"]
    assert f"| {perplexity(first)} ({change(first / whole - 1)})" in section
    assert f"| Pythia | {perplexity(whole)} |" in section and "In brackets: against Pythia." in section


def test_samples_of_different_lengths_are_not_compared_by_position(finished_sweep, tmp_path):
    folder, _ = finished_sweep
    metrics = metrics_of(folder)
    for row in metrics["settings"]:
        if not row["baseline"]:
            row["positions"][-1]["to"] += 1
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    shutil.copy(folder / "provenance.json", tmp_path)
    write_sweep(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert report.count("## Quality by position") == 2 and "In brackets" not in report
    assert not (tmp_path / "positions.png").exists()


def test_the_picture_of_perplexities_has_a_line_for_each_of_the_best_thirty_settings():
    def height(count):
        rows = [{"model": "Pythia", "baseline": True, "mean": i, "min": i, "max": i} for i in range(1, count + 1)]
        picture = perplexities(rows, [[row["mean"]] for row in rows], ["Pythia"] * count, "learning_rate")
        return int.from_bytes(picture[20:24], "big")

    assert height(2) < height(30) == height(40)


def test_a_failed_trial_is_recorded_with_its_reason_and_the_sweep_goes_on(tmp_path, monkeypatch):
    whole = worker.compare

    def fail(recipe, folder, progress, origin):
        if recipe.train.learning_rate == 0.1:
            monkeypatch.setattr(
                "context_pythia.runs.train.train_language_model",
                lambda *args, **kwargs: (_ for _ in ()).throw(Failure("training loss became nan at step 3")),
            )
        whole(recipe, folder, progress=progress)

    monkeypatch.setattr(worker, "compare", fail)
    plan = plan_of(tiny_recipe(tmp_path), ["learning_rate=0.003,0.1"], ("Pythia",))
    metrics = reported.sweep(plan, tmp_path / "sweep", progress=False)
    good, bad = metrics["trials"]
    assert (good["state"], bad["state"]) == ("complete", "failed")
    assert bad["error"] == "training loss became nan at step 3" and bad["val_ppl"] is None
    assert "failed: training loss became nan at step 3" in (tmp_path / "sweep" / "report.md").read_text()
    monkeypatch.setattr(worker, "compare", None)
    assert reported.sweep(plan, tmp_path / "sweep", progress=False)["trials"] == metrics["trials"]


def test_a_sweep_whose_trials_all_fail_is_a_failure(tmp_path, monkeypatch, quick_trials):
    failed = {"error": "no memory", "best_val_ppl": None}
    monkeypatch.setattr(worker, "train_trial", lambda *args: failed)
    with pytest.raises(RuntimeError, match="all 2 trials failed: no memory"):
        reported.sweep(plan_of(), tmp_path / "sweep", progress=False)
    assert "no memory" in (tmp_path / "sweep" / "report.md").read_text()


def test_a_machine_s_failure_leaves_the_trial_for_the_next_worker(tmp_path, monkeypatch, quick_trials):
    train = worker.train_trial

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker, "train_trial", full_disk)
    with pytest.raises(OSError, match="No space left"):
        reported.sweep(plan_of(), tmp_path / "sweep", progress=False)
    monkeypatch.setattr(worker, "train_trial", train)
    metrics = reported.sweep(plan_of(), tmp_path / "sweep", progress=False)
    assert [trial["state"] for trial in metrics["trials"]] == ["complete", "complete"]


def test_a_grid_grows_in_the_same_study(tmp_path, quick_trials):
    reported.sweep(plan_of(over=["context_dim=32,64"]), tmp_path / "sweep", progress=False)
    metrics = reported.sweep(
        plan_of(over=["context_dim=16,128", "learning_rate=0.002"], seeds=(0, 1)), tmp_path / "sweep", progress=False
    )
    assert len(quick_trials) == 3 + 6 and len(metrics["trials"]) == 9
    older = {
        (row["setting"]["model.context_dim"], row["setting"]["train.learning_rate"]) for row in metrics["settings"]
    }
    assert older == {(None, 0.001), (32, 0.001), (64, 0.001), (None, 0.002), (16, 0.002), (128, 0.002)}


# What is found


def trial(model, ppl, cache_bytes, seed=0, state="complete", **setting):
    figures = {"val_ppl": ppl, "cache_bytes": cache_bytes, "seed": seed, "state": state}
    return {"model": model, "baseline": model == "Pythia", "setting": setting} | figures


def test_settings_are_means_and_spreads_over_seeds_against_the_best_baseline():
    rows = settings_over_seeds(
        [
            trial("Pythia", 20.0, 1000, lr=1),
            trial("Pythia", 10.0, 1000, lr=2),
            trial("layer", 10.0, 250, lr=1),
            trial("layer", 14.0, 250, seed=1, lr=1),
            trial("layer", None, None, seed=2, state="failed", lr=1),
            trial("layer", 13.0, 250, lr=2),
            trial("shared", 11.5, 500, lr=2),
        ]
    )
    first, best, ours, worse, between = rows
    assert best["change"] is None and first["change"] == 1.0
    assert (ours["n"], ours["trials"], ours["failed"], ours["seeds"]) == (2, 3, 1, [0, 1])
    assert (ours["mean"], ours["min"], ours["max"]) == (12.0, 10.0, 14.0)
    assert ours["std"] == pytest.approx(8**0.5)
    assert ours["change"] == pytest.approx(0.2) and ours["reduction"] == 0.75
    assert [row["unbeaten"] for row in rows] == [False, True, True, False, True]


def test_settings_are_compared_where_their_data_is_the_same():
    rows = settings_over_seeds(
        [
            trial(model, ppl, bytes_, **{"data.sequence_length": length, "train.epochs": 2})
            for model, ppl, bytes_, length in (
                ("Pythia", 20.0, 1000, 128), ("layer", 21.0, 250, 128),
                ("Pythia", 10.0, 4000, 512), ("layer", 11.0, 1000, 512),
            )
        ]
    )  # fmt: skip
    assert [row["reduction"] for row in rows] == [None, 0.75, None, 0.75]
    assert [row["change"] for row in rows] == [None, pytest.approx(0.05), None, pytest.approx(0.1)]
    assert all(row["unbeaten"] for row in rows)
    assert pareto(rows, [""] * 4, "sequence_length").startswith(b"\x89PNG")


def test_a_setting_s_perplexity_by_position_is_the_mean_over_seeds():
    bands = {"from": 0, "to": 16, "tokens": 32}
    seeds = [
        trial("layer", 10.0, 250, seed=i) | {"val_ppl_by_position": [bands | {"perplexity": value}]}
        for i, value in enumerate((8.0, 12.0))
    ]
    (row,) = settings_over_seeds(seeds)
    assert row["positions"] == [bands | {"perplexity": 10.0}]
    (row,) = settings_over_seeds([*seeds, trial("layer", 10.0, 250, seed=2)])  # of an older version
    assert row["positions"] == []


def test_importance_finds_what_decides():
    dice = random.Random(1)
    trials = [
        trial("layer" if i % 2 else "Pythia", 10 + 5 * rate + dice.random() / 100, 1, **{
            "train.learning_rate": rate, "model.context_dim": 16 * (1 + i // 2 % 2) if i % 2 else None,
        })
        for i in range(12) for rate in (0.1, 0.2, 0.4)
    ]  # fmt: skip
    found = importances(trials, ["train.learning_rate", "model.context_dim"])
    assert found["shares"]["train.learning_rate"] > 0.8
    assert sum(found["shares"].values()) == pytest.approx(1) and found["trials"] == 36
    equal = [{**one, "val_ppl": 1.0} for one in trials]
    assert importances(equal, ["train.learning_rate"]) == {"reason": "all trials have the same perplexity"}
    alone = [trial("layer", float(i), 1) for i in range(4)]
    assert importances(alone, [])["reason"].startswith("nothing was searched")


def test_every_language_has_the_same_texts():
    def placeholders(text):
        return sorted(re.findall(r"{(\w+)}", text))

    english = {key: placeholders(text) for key, text in SWEEP_TRANSLATIONS["en"].items()}
    for texts in SWEEP_TRANSLATIONS.values():
        assert {key: placeholders(text) for key, text in texts.items()} == english


def test_a_report_needs_a_known_language(finished_sweep):
    with pytest.raises(ValueError, match="unknown report language 'fr'"):
        write_report(finished_sweep[0], "fr")
