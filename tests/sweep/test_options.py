"""What a sweep searches, and how its trainings are named."""

import re
from collections import Counter

import pytest

from context_pythia.cli import command_line as cli
from context_pythia.sweep.options import parse_over
from tests.sweep.stand_in import plan_of


@pytest.mark.parametrize(
    ("over", "path", "values"),
    [
        ("learning_rate=1e-4,0.001", "train.learning_rate", (0.0001, 0.001)),
        ("train.learning-rate=1", "train.learning_rate", (1.0,)),
        ("phase1-learning-rate=0.1", "phase1.learning_rate", (0.1,)),
        ("phase1=true,false", "model.phase1", (True, False)),
        ("context_source=null,shared", "model.context_source", (None, "shared")),
        ("data=a.txt,b.txt", "data.data", ("a.txt", "b.txt")),
    ],
)
def test_keys_are_those_of_the_flags_and_values_have_the_option_s_kind(over, path, values):
    dimension = parse_over(over)
    assert (dimension.path, dimension.values) == (path, values)
    assert list(map(type, dimension.values)) == list(map(type, values))


TPE = {"sampler": "tpe", "trials": 4}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"over": ["learning_rte=1"]},
            "--over 'learning_rte' is unknown (did you mean learning_rate",
        ),
        (
            {"over": ["schedule=cosin"]},
            "train.schedule 'cosin': must be one of constant, constant_with_warmup, linear, ",
        ),
        ({"over": ["epochs=two"]}, "train.epochs 'two': must be a whole number"),
        ({"over": ["epochs=2,0"]}, "train.epochs 0: must be >= 1"),
        ({"over": ["epochs"]}, "--over 'epochs': give key=value,value"),
        ({"over": ["epochs=2", "train.epochs=3"]}, "--over train.epochs: is given twice"),
        ({"over": ["context_dim=32,300"]}, "context_dim 300: must be between 1 and 2 * hidden_size = 256"),
        ({"over": ["context_dim=32..64"]}, "--over model.context_dim=low..high: needs --sampler tpe"),
        ({"over": ["context_dim=64..300"], **TPE}, "context_dim 300: must be between"),
        ({"over": ["schedule=a..b"], **TPE}, "--over train.schedule: a..b must be two numbers"),
        ({"over": ["epochs=2..2"], **TPE}, "--over train.epochs: 2..2 must be two numbers, the lower one first"),
        ({"over": ["epochs=2"], **TPE, "trials": 5}, "--trials 5: --sampler tpe needs a multiple of 2"),
        ({"over": ["epochs=2"], "trials": 5}, "--trials: needs --sampler tpe"),
        ({"seeds": [-1]}, "seed -1: must be >= 0"),
    ],
)
def test_a_wrong_sweep_is_refused_when_it_is_planned(asked, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_of(**asked)


def test_a_wrong_sweep_is_one_line_and_exit_2_before_anything_is_written(tmp_path, capsys):
    assert cli.main(["sweep", "quick", "--over", "epochs=0", "--out", str(tmp_path / "sweep")]) == 2
    out, err = capsys.readouterr()
    assert err == "context-pythia: error: train.epochs 0: must be >= 1\n" and not out
    assert not (tmp_path / "sweep").exists()


def test_the_grid_holds_each_training_once():
    over = ["context_dim=32,64", "context_sharing=1,2", "phase1.noise=0,0.1", "learning_rate=0.001,0.002"]
    found = plan_of(over=over, models=("Pythia", "shared", "layer"), seeds=(0, 1)).settings
    assert len({setting.name for setting in found}) == len(found)
    # The baseline has no context, `shared` no context_sharing, `layer` no phase 1.
    counts = Counter(setting.model.name for setting in found)
    assert counts == {"Pythia": 2 * 2, "shared": 2 * 2 * 2 * 2, "layer": 2 * 2 * 2 * 2}
    assert (found[0].value("train.learning_rate"), found[0].value("model.context_dim")) == (0.001, None)
    assert [setting.recipe.seed for setting in found] == [0] * 18 + [1] * 18


def test_a_width_for_all_layers_adds_no_training_of_a_model_whose_layers_have_their_own():
    found = plan_of(over=["context_dim=32,64"], models=("layer", "layer and ids")).settings
    assert [setting.name for setting in found if setting.model.name != "layer"] == ["layer-and-ids_seed=0"]


def names(**asked):
    return [setting.name for setting in plan_of(models=("layer",), **asked).settings]


def test_a_training_is_named_by_what_differs_from_the_recipe_however_it_was_asked_for():
    assert names() == names(over=["learning_rate=1e-3", "context_dim=64"]) == ["layer_seed=0"]
    both = ["learning_rate=2e-3", "schedule=cosine"]
    assert names(over=both) == names(over=both[::-1]) == ["layer_learning_rate=0.002_schedule=cosine_seed=0"]
    # The recipe's own value is what nothing differs from, whatever the option's default is.
    assert names(values={"train.learning_rate": 0.0005}, over=["learning_rate=1e-3"]) == [
        "layer_learning_rate=0.001_seed=0"
    ]
    # Free text may hold anything, and be of any length.
    first, second = names(over=[f"data={'x' * 300}/y.txt,{'x' * 300}-y.txt"])
    assert first != second and all(
        re.fullmatch(r"layer_data=x+-y\.txt-[0-9a-f]{6}_seed=0", one) for one in (first, second)
    )
    # Options of the same name in two sections are told apart.
    assert len(set(names(over=["learning_rate=0.001,0.1"]) + ["layer_phase1_learning_rate=0.1_seed=0"])) == 3
