import json

import pytest
import torch

from context_pythia.cli import command_line as cli
from context_pythia.cli.info import info_table
from context_pythia.config.recipe_files import load_recipe
from context_pythia.runs.build import build_model
from context_pythia.runs.info import info


def test_report_recipe_has_the_reports_sizes_and_the_designs_caches(capsys):
    assert cli.main(["info", "--recipe", "report", "--length", "8", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [model["cached_numbers_per_token"] for model in models] == [6144, 6144, 272, 1536, 512]
    assert models[0]["parameters"] == 70_426_624
    assert (models[1]["parameters"], models[1]["trainable_parameters"]) == (70_756_608, 70_559_232)
    assert models[0]["cache"]["bytes_measured"] == 196_608
    for model in models:
        assert model["cache"]["bytes_measured"] == model["cache"]["bytes_formula"]


def test_contexts_by_layers_have_the_cache_and_the_parameters_of_their_peers():
    models = info(load_recipe("text-s"), None, length=8, dtype="float32")
    assert {model["name"]: model["cached_numbers_per_token"] for model in models} == {
        "Pythia": 1536,
        "MQA": 384,
        "MQA x2": 192,
        "MQA x6": 64,
        "layer 24 x2": 72,
        "ids 8 20x2 43x3": 73,
        "ids 8x2 20x4": 30,
        "ids 8x6": 10,
        "layer 18 23x2 31x3": 72,
        "ids 8x2 31x2 32x2": 73,
        "ids 8 74 74 74 74 74": 380,
        "ids 8 136 136 136 136 136": 690,
        "shared 64": 72,
    }
    for model in models:
        assert model["cache"]["bytes_measured"] == model["cache"]["bytes_formula"]
        assert model["parameters"] == pytest.approx(models[0]["parameters"], rel=1e-3)


def test_context_dim_is_the_mean_width_of_the_contexts_that_layers_make():
    recipe = load_recipe("quick", models=["layer and ids"])
    (options,) = recipe.models
    options.layer_context_dims = [8, 40, 99, 99]  # layers 2 and 3 read the context of layer 1
    with torch.device("meta"):
        assert build_model(options, recipe, rows=256).config.context_dim == 24


def test_what_a_conversion_decides_is_left_open():
    recipe = load_recipe("tuned", {"architecture.num_hidden_layers": 1, "heal.parameters": "attention"})
    models = info(recipe, None, length=8, dtype="float32")
    control, converted = models[1:3]
    assert control["trainable_parameters"] == 3 * 512 * 513  # queries, keys and values
    assert (converted["parameters"], converted["trainable_parameters"]) == (None, None)
    assert converted["cache"]["bytes_measured"] == 4 * 8 * 256
    assert info_table(models).endswith("\n–: the conversion of the trained baseline decides it")


def test_saved_model_is_described_as_a_table(finished_run, capsys):
    model = str(finished_run / "models" / "shared")
    assert cli.main(["info", model, "--length", "20", "--dtype", "bfloat16"]) == 0
    output = capsys.readouterr().out
    assert "20 tokens in bfloat16" in output
    assert f"{16 * 20 * 2 / 1024:,.1f} KB" in output.splitlines()[-1]


def test_a_cache_longer_than_the_models_positions_is_refused(finished_run):
    with pytest.raises(ValueError, match="--length 65: must be at most 64, the positions of .*shared"):
        info(None, str(finished_run / "models" / "shared"), length=65, dtype="float32")


def test_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model"):
        info(None, str(tmp_path / "nothing.here"), length=8, dtype="float32")
