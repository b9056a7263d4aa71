"""What workers train of a sweep, by stand-ins for trainings: Optuna, its database, processes and folders are real."""

import json
import re
import sys
from collections import Counter
from functools import partial

import optuna
import pytest

from context_pythia.errors import Failure
from context_pythia.runs.record import Run, model_entry
from context_pythia.sweep import worker
from context_pythia.sweep.worker import sweep
from tests.sweep import stand_in
from tests.sweep.stand_in import plan_of


@pytest.fixture
def trained(monkeypatch):
    """The recipes of what was trained."""
    recipes = []
    stand_in.stand_in(monkeypatch.setattr)
    whole = worker.compare
    monkeypatch.setattr(worker, "compare", lambda *args, **named: recipes.append(args[0]) or whole(*args, **named))
    return recipes


def test_what_has_ended_is_never_trained_again(tmp_path, trained, capsys):
    first = sweep(plan_of(), tmp_path)
    capsys.readouterr()
    assert sweep(plan_of(), tmp_path) == first and len(trained) == 2
    assert capsys.readouterr().out == "all 2 trials have ended, nothing is left to train\n"


def test_a_grid_grows_in_the_same_folder(tmp_path, trained):
    sweep(plan_of(over=["context_dim=32,64"]), tmp_path)
    wider = plan_of(over=["context_dim=16,128", "learning_rate=0.002"], models=("layer",), seeds=(0, 1))
    metrics = sweep(wider, tmp_path)
    assert len(trained) == 3 + 4 and len(metrics["trials"]) == 7
    settings = {
        (one["setting"]["model.context_dim"], one["setting"]["train.learning_rate"]) for one in metrics["trials"]
    }
    assert settings == {(None, 0.001), (32, 0.001), (64, 0.001), (16, 0.002), (128, 0.002)}


def test_tpe_gives_each_model_and_seed_the_same_budget(tmp_path, trained):
    over = ["learning_rate=1e-4..1e-2", "context_dim=32,64", "epochs=1..9"]
    metrics = sweep(plan_of(over=over, seeds=(0, 1), sampler="tpe", trials=4), tmp_path)
    assert Counter((recipe.models[0].name, recipe.seed) for recipe in trained) == dict.fromkeys(
        [("Pythia", 0), ("Pythia", 1), ("layer", 0), ("layer", 1)], 1
    )
    assert len({repr((trial["model"], trial["setting"])) for trial in metrics["trials"]}) == 2
    rates = {recipe.train.learning_rate for recipe in trained}
    assert len(rates) == 2 and all(1e-4 <= rate <= 1e-2 for rate in rates)
    # A larger budget goes on, and another search has a budget of its own.
    sweep(plan_of(over=over, models=("layer",), seeds=(0, 1), sampler="tpe", trials=4), tmp_path)
    assert [(recipe.models[0].name, recipe.seed) for recipe in trained[4:]] == [("layer", 0), ("layer", 1)]
    sweep(plan_of(over=["epochs=10..99999"], models=("layer",), sampler="tpe", trials=1), tmp_path)
    assert len(trained) == 7


def test_tpe_ends_where_nothing_new_is_left_and_leaves_out_what_does_not_go_together(
    tmp_path, trained, capsys, monkeypatch
):
    # Which values TPE proposes is chance: this seed proposes all four.
    monkeypatch.setattr(optuna.samplers, "TPESampler", partial(optuna.samplers.TPESampler, seed=0))
    over = ["context_dim=40,20", "num_rotary_keys=1,4"]  # four rotary keys of 8 dims need more than 32
    metrics = sweep(plan_of(over=over, models=("layer",), sampler="tpe", trials=20), tmp_path)
    assert {recipe.models[0].context_dim for recipe in trained if recipe.models[0].num_rotary_keys == 4} <= {40}
    assert len(trained) <= 3 and {trial["state"] for trial in metrics["trials"]} == {"complete"}
    assert "skipped, model layer: context_dim 20 of layer 0: leaves no latent beside" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (OSError(28, "No space left on device"), {}),
        (KeyboardInterrupt, {"over": ["epochs=1..9"], "sampler": "tpe", "trials": 2}),
    ],
    ids=["grid", "tpe"],
)
def test_what_ends_a_worker_leaves_the_trial_to_the_next(tmp_path, trained, monkeypatch, error, asked):
    with monkeypatch.context() as patch:
        patch.setattr(worker, "compare", lambda *args, **named: (_ for _ in ()).throw(error))
        with pytest.raises((KeyboardInterrupt, OSError)):
            sweep(plan_of(**asked), tmp_path)
    metrics = sweep(plan_of(**asked), tmp_path)
    assert [trial["state"] for trial in metrics["trials"]] == ["complete"] * 2 and len(trained) == 2


@pytest.mark.parametrize("asked", [{}, {"sampler": "tpe", "trials": 2}], ids=["grid", "tpe"])
def test_failures_are_recorded_and_not_tried_again(tmp_path, trained, monkeypatch, asked):
    def fail(recipe, folder, **named):
        trained.append(recipe)
        Run(folder, recipe).write(model_entry(recipe.models[0], error="training loss became nan at step 3"))
        raise Failure("1 of 1 models failed")

    good = worker.compare
    monkeypatch.setattr(worker, "compare", lambda recipe, *args, **named: (
        fail if recipe.models[0].name == "layer" else good)(recipe, *args, **named))  # fmt: skip
    metrics = sweep(plan_of(**asked), tmp_path / "sweep")
    bad, good = sorted(metrics["trials"], key=lambda trial: trial["model"] == "Pythia")
    assert (good["state"], bad["state"]) == ("complete", "failed")
    assert bad["error"] == "training loss became nan at step 3" and bad["val_ppl"] is None
    assert sweep(plan_of(**asked), tmp_path / "sweep") == metrics and len(trained) == 2
    with pytest.raises(Failure, match="all 1 trials failed: training loss became nan"):
        sweep(plan_of(models=("layer",)), tmp_path / "other")


def test_a_folder_keeps_to_its_recipe_and_its_text(tmp_path, trained, monkeypatch):
    sweep(plan_of(), tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with train.epochs \d, not 9: choose another folder"):
        sweep(plan_of(values={"train.epochs": 9}), tmp_path)
    # Of another text nothing is trained: the first setting is recorded, and the second would be new.
    monkeypatch.setitem(stand_in.DATA, "fingerprint", "another text")
    message = "trials/pythia_seed=0 holds a run with data.fingerprint the same text, not another text"
    with pytest.raises(ValueError, match=message):
        sweep(plan_of(seeds=(0, 1)), tmp_path)
    with pytest.raises(ValueError, match="pythia_seed=0 holds a run, or a sweep of an older version: choose another"):
        sweep(plan_of(), tmp_path / "trials" / "pythia_seed=0")
    assert len(trained) == 2


def test_no_password_is_written_and_every_call_that_trained_is(tmp_path, trained, monkeypatch):
    for seeds in ("0", "0,1", "1"):
        url = "postgresql://me:pa@s:word@host/db?password=pass:word"
        monkeypatch.setattr(sys, "argv", ["context-pythia", "sweep", "--seeds", seeds, "--storage", url])
        sweep(plan_of(seeds=tuple(map(int, seeds.split(",")))), tmp_path / "sweep")
    provenance = json.loads((tmp_path / "sweep" / "provenance.json").read_text())
    shown = "--storage 'postgresql://me:***@host/db?password=***'"
    assert provenance["command"] == f"context-pythia sweep --seeds 0,1 {shown}"
    assert [call["command"] for call in provenance["earlier"]] == [f"context-pythia sweep --seeds 0 {shown}"]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"word" not in path.read_bytes().replace(b"password", b"")


@pytest.mark.parametrize("url", ["bad://me:secret@host/db", "postgresql://me:secret"])
def test_a_storage_that_cannot_be_used_is_named_without_its_password(tmp_path, trained, url):
    with pytest.raises(ValueError, match=re.escape(f"--storage {url.replace('secret@', '***@')}"[:20])) as caught:
        sweep(plan_of(sampler="tpe", trials=2), tmp_path, storage=url)
    assert "cannot be opened" in str(caught.value) and "\n" not in str(caught.value)
    assert "secret@" not in str(caught.value)
