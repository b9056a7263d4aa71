"""Recipes: reading, overriding, checking, writing."""

from dataclasses import replace

import pytest
import yaml

from context_pythia.config.recipe import (
    ArchitectureOptions,
    DataOptions,
    ModelOptions,
    Recipe,
    TrainOptions,
)
from context_pythia.config.recipe_files import (
    load_recipe,
    packaged_recipes,
    recipe_from_dict,
    recipe_to_dict,
    save_recipe,
)

HEALED = "heal: {{steps: 3}}\nmodels: [{{name: a, from_baseline: true, {}}}]"
BASED = "heal: {{steps: 3, ce_weight: 1}}\nmodels: [{}]"
BY_LAYERS = "models: [{{name: a, context_source: layer, context_layers: {}}}]"
MODELS = "models: [{name: base}, {name: wide, context_source: layer, context_dim: 512}]\n"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_report_recipe_has_the_settings_of_the_report():
    recipe = load_recipe("report")
    assert recipe.name == "report"
    assert recipe.architecture == ArchitectureOptions(model_vocab_size=50304)
    body = recipe.architecture
    assert (body.hidden_size, body.num_hidden_layers, body.num_attention_heads) == (512, 6, 8)
    assert (body.intermediate_size, body.max_position_embeddings) == (2048, 2048)
    assert (recipe.data.samples, recipe.data.sequence_length, recipe.data.validation_fraction) == (10_000, 128, 0.1)
    train = recipe.train
    assert (train.learning_rate, train.batch_size, train.epochs, train.patience) == (1e-4, 32, 10, 1)
    assert train.schedule == "constant"
    oacd = recipe.phase1
    assert (oacd.max_iterations, oacd.convergence_rate, oacd.threshold) == (100, 0.95, 0.03)
    assert (oacd.learning_rate, oacd.batch_tokens, oacd.noise, oacd.mean_penalty) == (0.003, 5000, 0.05, 0.1)
    assert oacd.max_grad_norm == 2.0
    assert [(m.context_source, m.context_sharing) for m in recipe.models] == [
        (None, 1),
        ("input", 1),
        ("shared", 1),
        ("layer", 1),
        ("layer", 3),
    ]
    assert {m.context_dim for m in recipe.models} == {256}


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_recipe_comes_back_from_its_dict_and_its_file(name, tmp_path):
    recipe = load_recipe(name, {"train.learning_rate": 3e-5})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe
    # The file keeps the recipe's own name: it is not called after the file.
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_a_file_says_only_what_differs(write):
    recipe = load_recipe(write("train: {learning_rate: 1e-4, epochs: 3}\ndata:\n" + MODELS))
    assert recipe.name == "mine"
    assert recipe.train == TrainOptions(epochs=3, learning_rate=1e-4)
    assert recipe.data == DataOptions()
    assert recipe.models == [ModelOptions("base"), ModelOptions("wide", "layer", 512)]


def test_overrides_go_over_the_recipe_and_keep_the_rest(write):
    path = write("seed: 1\ntrain: {epochs: 3, batch_size: 4}\n" + MODELS)
    recipe = load_recipe(path, {"seed": 7, "train.epochs": 5, "data.samples": 20, "phase1.noise": 0.0})
    assert (recipe.seed, recipe.train.epochs, recipe.train.batch_size) == (7, 5, 4)
    assert (recipe.data.samples, recipe.phase1.noise) == (20, 0.0)


def test_model_overrides_leave_the_baseline_alone(write):
    recipe = load_recipe(write(MODELS), {"model.context_dim": 300, "model.context_source": "shared"})
    assert recipe.models == [ModelOptions("base"), ModelOptions("wide", "shared", 300)]


def test_models_select_in_the_order_of_the_recipe():
    recipe = load_recipe("quick", models=["layer", "Pythia"])
    assert [model.name for model in recipe.models] == ["Pythia", "layer"]


def test_what_is_made_of_the_baseline_is_no_baseline():
    healed = "heal: {steps: 3, ce_weight: 0.5}\n" + MODELS.replace("base}", "base}, {name: more, from_baseline: true}")
    recipe = recipe_from_dict(yaml.safe_load(healed))
    assert [model.is_baseline for model in recipe.models] == [True, False, False]


def test_an_override_mends_what_the_file_alone_would_be_refused_for(write):
    text = "models: [{name: a}, {name: b, context_source: layer, context_dim: 60, from_baseline: true}]"
    with pytest.raises(ValueError, match="heal.steps 0: b is healed after its conversion"):
        load_recipe(write(text))
    assert load_recipe(write(text), {"heal.steps": 5}).heal.steps == 5


def test_of_the_model_overrides_a_conversion_takes_the_width_alone():
    recipe = load_recipe("tuned", {"model.context_dim": 60, "model.phase1": True, "model.context_block_layers": 2})
    converted, shared = recipe.models[2], recipe.models[-1]
    assert (converted.context_dim, converted.context_block_layers) == (60, 1)
    assert (shared.context_dim, shared.context_block_layers, shared.phase1) == (60, 2, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {epochs: 3}", r"section 'trian' is unknown \(did you mean train\?\); valid: name, seed, data, "),
        ("train: {epoch: 3}", r"option train: 'epoch' is unknown \(did you mean epochs\?\); valid: batch_size, "),
        ("train: {epochs: three}", "train.epochs 'three': must be a whole number"),
        ("train: {learning_rate: .nan}", "train.learning_rate nan: must be a finite number"),
        ("train: {tensorboard: 1}", "train.tensorboard 1: must be true or false"),
        ("train: {schedule: cosin}", r"train.schedule 'cosin': must be one of constant, .*did you mean cosine"),
        ("data: corpus.txt", "section data: must be a mapping"),
        ("[1, 2]", "must be a mapping"),
        ("models: []", "models: is empty"),
        (
            "models: [{name: a, context_width: 3}]",
            "model a: option 'context_width' is unknown .*context_dim.*valid: name, ",
        ),
        ("models: [{name: a}, {name: A}]", "name 'A': is taken by 'a'"),
        ("models: [{name: 'a,b'}]", "name 'a,b': must hold letters or digits, and no comma"),
        ("models: [{name: a, from_baseline: true}]", "heal.steps 0: a is healed after its conversion"),
        (
            "heal: {steps: 3}\nmodels: [{name: a, from_baseline: true}]",
            "heal.ce_weight 0: without dropout the control a matches",
        ),
        (HEALED.format("context_source: shared"), "a: from_baseline makes contexts of source layer, not shared"),
        (HEALED.format("context_source: layer, context_dim: 16"), "a: context_dim 16: must be between 17 .* and"),
        (HEALED.format("context_source: layer, context_sharing: 2"), "a: context_sharing 2 does not apply"),
        (BY_LAYERS.format("[0, 1, 1]"), r"context_layers \[0, 1, 1\]: must have 6 entries"),
        (BY_LAYERS.format("[0, 1.5, 2]"), "model a: context_layers 1.5: must be a whole number"),
        (
            BY_LAYERS.format("[0, 0, 0, 3, 3, 3], context_sharing: 3"),
            "context_sharing 3: must be 1 beside context_layers",
        ),
        (BASED.format("{name: b}, {name: c}, {name: a, from_baseline: true}"), "the recipe has two, b and c: keep one"),
        ("name: ../up", "name '../up': must be"),
        ("train: {epochs: 3", "is not valid YAML"),
    ],
)
def test_bad_files_are_named_in_one_line(write, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(write(text))
    assert "\n" not in str(caught.value)


def test_yaml_cannot_build_objects(write):
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_recipe(write("!!python/object/apply:os.getcwd []"))


def test_an_unknown_recipe_is_named_with_the_packaged_ones():
    with pytest.raises(
        ValueError, match=r"recipe 'quik' is unknown \(did you mean quick\?\); valid: quick, recall, report"
    ):
        load_recipe("quik")


def test_unknown_models_and_overrides_are_named_with_the_valid_ones(write):
    with pytest.raises(ValueError, match="model 'shard' is unknown .*valid: Pythia, input, shared, layer"):
        load_recipe("quick", models=["shard"])
    for text, message in (
        ("models: 3", "section models: must be a list, not 3"),
        ("models: [{name: 5}]", "model 5: name 5: must be text"),
        ("models: [{name: a}, {context_dim: 8}]", "model 2: has no name"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe(write(text), models=["a"])
    with pytest.raises(ValueError, match=r"option 'train.lr' is unknown.*; `context-pythia compare --set help`"):
        load_recipe("quick", {"train.lr": 1.0})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.epochs", 0, "train.epochs 0: must be >= 1"),
        ("train.warmup_ratio", 1.5, "train.warmup_ratio 1.5: must be >= 0 and <= 1"),
        ("data.sequence_length", 4096, "data.sequence_length 4096: must be at most max_position_embeddings = 2048"),
        (
            "architecture.hidden_size",
            511,
            "architecture.hidden_size 511: must be a multiple of num_attention_heads = 8",
        ),
        ("architecture.hidden_size", 32, "architecture.hidden_size 32: .*a multiple of 8 .* = 64"),
        ("model.context_dim", 1025, "context_dim 1025: must be between 1 and 2 \\* hidden_size = 1024"),
        ("model.context_dim", 16, "context_dim 16 of layer 0: leaves no latent beside the 16 dims of its rotary keys"),
        ("model.context_sharing", 7, "context_sharing 7: must be between 1 and num_hidden_layers = 6"),
        ("model.num_rotary_keys", 3, "num_rotary_keys 3: must be 1 or num_attention_heads = 8"),
    ],
)
def test_numbers_out_of_bounds_are_named(path, value, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("report", {path: value})


def test_a_pass_of_more_tokens_than_are_packed_or_of_less_than_a_step_is_refused():
    with pytest.raises(ValueError, match="data.samples 10000 gives 1152000 training tokens, lower train.tokens"):
        load_recipe("report", {"train.tokens": 2_000_000})
    with pytest.raises(ValueError, match="train.tokens 4095: must be at least 4096, the tokens of one step"):
        load_recipe("report", {"train.tokens": 4095})


def test_what_a_pass_ignores_is_refused_where_it_was_asked_for():
    for name in ("epochs", "patience"):
        with pytest.raises(ValueError, match=f"train.{name} 2: has no effect beside train.tokens 20000000, which"):
            load_recipe("text-s", {f"train.{name}": 2})
    assert load_recipe("text-s", {"train.epochs": 2, "train.tokens": None}).train.epochs == 2
    assert load_recipe("quick", {"train.tokens": 99_999}).train.epochs == 3  # the recipe's own, as its record has them


def test_bounds_admit_their_edges():
    load_recipe("report", {"model.context_dim": 1024, "phase1.convergence_rate": 1, "model.num_rotary_keys": 8})
    load_recipe("report", {"model.context_dim": 1}, models=["Context-Pythia shared"])


def test_python_code_meets_the_same_checks():
    with pytest.raises(ValueError, match="context_dim 0"):
        Recipe(models=[ModelOptions("a", "shared", 0)])
    with pytest.raises(ValueError, match="must be one of float32, bfloat16"):
        replace(TrainOptions(), precision="int8")
