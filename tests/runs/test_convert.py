"""`context-pythia convert` from the command line to the folder it leaves, on a tiny GPT-NeoX and made-up sentences."""

import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM, dynamic_module_utils
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import context_pythia.model
from context_pythia import ContextPythiaForCausalLM
from context_pythia.conversion import compress, heal
from context_pythia.evaluation.memory import measure_generated_cache
from context_pythia.runs import convert as module
from tests.runs.conftest import BELOW, HALF, HEALING, HIDDEN, LAYERS, assert_same_weights, load, record_of


@pytest.fixture(scope="module")
def quarter(convert, original, tmp_path_factory):
    """A conversion to a quarter of the cache, uninterrupted."""
    out = tmp_path_factory.mktemp("quarter") / "out"
    assert convert(original, out, "--kv-reduction", 0.75, "--calibration-tokens", 256, card=True) == 0
    return out


@pytest.fixture(scope="module")
def healed(convert, original, tmp_path_factory):
    out = tmp_path_factory.mktemp("healed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD", "20KB")  # the healed weights replace all shards of those from before
        assert convert(original, out, *BELOW, *HEALING, "--ship-code", card=True) == 0
    return out


def test_half_the_cache_is_exact_and_reads_no_text(convert, original, tmp_path, ids, monkeypatch, capsys):
    monkeypatch.setattr(module, "load_data", lambda *_: pytest.fail("text was read"))
    (tmp_path / "half").mkdir()  # an empty folder is filled
    (tmp_path / "link").symlink_to(tmp_path / "half")
    assert convert(original, tmp_path / "link", *HALF, data=False, card=True) == 0
    assert (tmp_path / "link").is_symlink() and "warning" not in capsys.readouterr().err
    converted, before = load(tmp_path / "half"), load(original)
    assert isinstance(converted, ContextPythiaForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, before(ids).logits, rtol=0, atol=1e-4)
    assert 2 * measure_generated_cache(converted, 40).filled == measure_generated_cache(before, 40).filled
    # The heads' own rotary keys: mixed ones would be rounded more in a quantized cache.
    assert converted.gpt_neox.layers[1].attention.rotary_up.weight.unique().tolist() == [0, 1]
    record = record_of(tmp_path / "half")
    assert (record["context_dim"], record["cache"]["numbers_per_token"]) == (HIDDEN, HIDDEN * LAYERS)
    card = (tmp_path / "half" / "README.md").read_text()
    assert "# pythia-tiny, 50.0% less cache" in card and "Converted exactly" in card


def test_a_quarter_of_the_cache_with_its_papers(quarter, original):
    converted, record = load(quarter), record_of(quarter)
    assert 4 * measure_generated_cache(converted, 40).filled == measure_generated_cache(load(original), 40).filled
    assert record["numbers_per_token_original"] == 4 * record["cache"]["numbers_per_token"] == 2 * HIDDEN * LAYERS
    assert sum(layer["width"] for layer in record["layers"]) == LAYERS * HIDDEN // 2
    for layer, row in enumerate(record["layers"]):
        assert row["width"] == converted.config.cached_width(layer) and row["width"] % 8 == 0
        assert row["latent"] + 2 * sum(row["rotary_pairs"]) == row["width"]
        assert row["rotary_pairs"] == converted.config.rotary_pairs[layer]
        assert row["error"] > 0
    card = (quarter / "README.md").read_text()
    assert "A layer caches one context a token in place of keys and values: 75.0% less." in card
    assert "75.0% less cache" in card and "calibrated on 256 tokens" in card and "base_model" not in card
    assert "trust_remote_code" not in card
    assert AutoTokenizer.from_pretrained(quarter).eos_token_id == 0
    assert not list(quarter.parent.glob(".*")) and not list(quarter.glob("*.py"))


def test_what_lies_in_the_output_is_kept(convert, quarter, original, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "load_original", lambda *_: pytest.fail("it is done again"))
    monkeypatch.chdir(original.parent)
    assert convert(original.name, quarter, "--kv-reduction", 0.75, "--calibration-tokens", 256) == 0
    assert "holds this conversion already" in capsys.readouterr().out
    assert convert(original, quarter, *BELOW) == 2
    assert "holds a conversion with convert.context_dim None, not 24: choose another" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert convert(original, tmp_path / "mine", *BELOW) == 2
    assert "holds something else; choose another folder" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()
    monkeypatch.setattr(type(tmp_path), "is_mount", lambda path: path.name == "mounted")
    assert convert(original, tmp_path / "mounted", *HALF, data=False) == 2
    assert "is a mount point and cannot be replaced; give a folder below it" in capsys.readouterr().err


def test_layers_of_equal_width_that_is_no_multiple_of_eight(convert, original, tmp_path):
    options = ("--context-dim", 21, "--calibration-tokens", 256, "--uniform", "--weighting", "none")
    assert convert(original, tmp_path / "out", *options) == 0
    assert [layer["width"] for layer in record_of(tmp_path / "out")["layers"]] == [21] * LAYERS
    converted = load(tmp_path / "out")
    assert converted.config.layer_context_dims is None
    assert measure_generated_cache(converted, 10).filled == 21 * LAYERS * 10 * 4


def divergence(folder, original, tokenizer, corpus) -> float:
    """Of a model's predictions from the original's, in nats per token."""
    ids = torch.tensor(tokenizer(next(corpus.iterdir()).read_text())["input_ids"][:640]).view(-1, 16)
    with torch.no_grad():
        expected, got = (load(model)(ids).logits.log_softmax(-1) for model in (original, folder))
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def test_wider_contexts_are_nearer_to_the_original(original, quarter, below, tokenizer, corpus):
    assert 0 < divergence(below, original, tokenizer, corpus) < divergence(quarter, original, tokenizer, corpus)


def test_contexts_by_layers_and_token_ids_are_nearer_at_a_tenth_of_the_cache(
    convert, original, tokenizer, corpus, tmp_path
):
    tenth = ("--kv-reduction", 0.9, "--calibration-tokens", 256)
    assert convert(original, tmp_path / "plain", *tenth) == 0
    assert convert(original, tmp_path / "ids", *tenth, "--cache-token-ids", "--context-layers", "0,1,1", card=True) == 0
    converted, record = load(tmp_path / "ids"), record_of(tmp_path / "ids")
    assert converted.config.context_layers == [0, 1, 1] and converted.config.cache_token_ids
    assert not converted.gpt_neox.token_shift.weight.any()
    widths = [layer["width"] for layer in record["layers"]]
    assert record["cache"]["numbers_per_token"] == sum(widths) + 2 == 6 * LAYERS and widths[2] == 0
    assert measure_generated_cache(converted, 10).filled == 6 * LAYERS * 10 * 4
    card = (tmp_path / "ids" / "README.md").read_text()
    assert "90.6% less cache" in card and "A layer caches one context" not in card
    assert "contexts of 16 numbers a token, which layers share, and the token's id in place of keys and values" in card
    near, far = (divergence(tmp_path / name, original, tokenizer, corpus) for name in ("ids", "plain"))
    assert 0 < near < 0.8 * far


@torch.no_grad()
def test_shipped_code_loads_where_the_package_is_absent(healed, tmp_path, ids, monkeypatch):
    assert "trust_remote_code=True" in (healed / "README.md").read_text()
    expected = load(healed)(ids).logits
    monkeypatch.setitem(sys.modules, "context_pythia", None)  # an import of it fails
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "context_pythia")
    for registry in (DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING):  # the code enters its own layers
        for kind, layer in registry.items():
            monkeypatch.setitem(registry, kind, layer)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", sys.path[:])
    with monkeypatch.context() as patch, pytest.raises(ImportError, match="^transformers 5.99.0: Context-Pythia was"):
        patch.setattr(transformers, "__version__", "5.99.0")
        AutoModelForCausalLM.from_pretrained(healed, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(healed, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1] == 33


def test_healing_writes_the_healed_weights_and_its_record(healed, below):
    weights, before = load_file(healed / "model.safetensors"), load_file(below / "model.safetensors")
    moved = "gpt_neox.layers.0.attention.value_up.weight"
    assert not torch.equal(weights[moved], before[moved])
    assert torch.equal(weights["gpt_neox.embed_in.weight"], before["gpt_neox.embed_in.weight"])
    healing = record_of(healed)["healing"]
    assert healing["steps"] == 4 and healing["val_ppl"] <= healing["val_ppl_before"]
    assert "healed for 4 steps" in (healed / "README.md").read_text()
    code = {path.name for path in Path(context_pythia.model.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert {path.name for path in healed.iterdir()} == code | {
        "README.md", "config.json", "conversion.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "train.json",
    }  # fmt: skip
    assert isinstance(load(healed), ContextPythiaForCausalLM)


def test_the_control_heals_the_original_itself(convert, original, tmp_path):
    assert convert(original, tmp_path / "control", "--control", *HEALING, "--ship-code", card=True) == 0
    assert isinstance(load(tmp_path / "control"), GPTNeoXForCausalLM)
    record = record_of(tmp_path / "control")
    assert record["context_dim"] is None and record["healing"]["steps"] == 4
    # Half of the loss is the cross-entropy with the text, half the divergence from itself, which begins at nothing.
    assert all(row["train_loss"] > 1 for row in record["healing"]["history"][1:])
    assert record["healing"]["history"][1]["train_loss"] < 0.75 * math.log(record["healing"]["val_ppl_before"])
    assert record["cache"]["numbers_per_token"] == record["numbers_per_token_original"]
    card = (tmp_path / "control" / "README.md").read_text()
    assert "the control of a healing" in card and "# pythia-tiny, healed" in card and "one context" not in card
    assert "trust_remote_code" not in card and "import context_pythia" not in card


def interrupt_at(count, function):
    """`function`, interrupted as it is called for the count-th time, and the list of its calls."""
    calls = []

    def wrapped(*arguments, **named):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return function(*arguments, **named)

    return wrapped, calls


@pytest.fixture
def interrupted(convert, tmp_path, monkeypatch, capsys):
    """Interrupts the calibration after its first layer."""
    monkeypatch.setattr(compress, "MOST_STATISTICS", 1)  # a layer at a time

    def call(model, *options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compress, "collect", interrupt_at(2, compress.collect)[0])
            assert convert(model, tmp_path / "out", *BELOW, *options) == 130
        assert "run the same command again" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    return call


def test_an_interrupted_calibration_goes_on_with_the_layers_that_are_left(
    interrupted, convert, original, below, tmp_path, monkeypatch
):
    interrupted(original)
    wrapped, calls = interrupt_at(-1, compress.collect)
    monkeypatch.setattr(compress, "collect", wrapped)
    assert convert(original, tmp_path / "out", *BELOW, "--set", "convert.batch_size=256") == 0  # changes only rounding
    assert len(calls) == LAYERS - 1
    assert_same_weights(tmp_path / "out", below)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_calibration_goes_on_with_the_same_work_alone(
    interrupted, convert, save, corpus, tmp_path, capsys
):
    model, text = save(tmp_path / "model"), Path(shutil.copytree(corpus, tmp_path / "text"))
    interrupted(model, "--data", text)

    def refusal(*options, code=2):
        assert convert(model, tmp_path / "out", *BELOW, "--data", text, *options) == code
        return capsys.readouterr().err

    assert "unfinished conversion with convert.seed 0, not 7: finish it or delete it" in refusal("--seed", 7)
    changed = sorted(text.iterdir())[0]
    words = changed.read_text()
    changed.write_text(words[::-1])
    assert "unfinished conversion with text " in refusal()
    changed.write_text(words)
    (statistics,) = (tmp_path / ".out.partial").glob("statistics-*.safetensors")
    sound = statistics.read_bytes()
    statistics.write_bytes(sound[:-9])
    assert "delete it to calibrate again" in refusal(code=1)
    statistics.write_bytes(sound)
    save(model, std=0.11)
    assert "unfinished conversion with model.config.json [" in refusal()


def test_an_interrupted_healing_goes_on(healed, convert, original, tmp_path, monkeypatch, capsys):
    options = (*BELOW, *HEALING, "--ship-code")
    with monkeypatch.context() as patch:
        patch.setattr(heal, "linear_distillation", interrupt_at(3, heal.linear_distillation)[0])  # of the third step
        assert convert(original, tmp_path / "out", *options) == 130
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(compress, "collect", lambda *_, **__: pytest.fail("it is calibrated again"))
        assert convert(original, tmp_path / "out", *options, card=True) == 0
    assert "resumes from the converted model" in capsys.readouterr().out
    assert_same_weights(tmp_path / "out", healed)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in healed.iterdir()}
    assert "auto_map" in (tmp_path / "out" / "config.json").read_text()


def test_a_healing_that_went_wrong_is_done_anew(convert, original, tmp_path, monkeypatch, capsys):
    def options(rate):
        return (*BELOW, "--heal-steps", 4, "--heal-batch-size", 9, "--heal-learning-rate", rate)

    assert convert(original, tmp_path / "out", *options(1e30)) == 1
    assert "try a heal.learning_rate below 1e+30" in capsys.readouterr().err
    assert convert(original, tmp_path / "out", *options(1e-3)) == 2
    healed = tmp_path / ".out.partial" / "healed"
    line = capsys.readouterr().err
    assert f"{healed} holds a run with learning_rate 1e+30, not 0.001: choose another output folder, or delete" in line
    shutil.rmtree(healed)
    monkeypatch.setattr(compress, "collect", lambda *_, **__: pytest.fail("it is calibrated again"))
    assert convert(original, tmp_path / "out", *options(1e-3)) == 0
    assert record_of(tmp_path / "out")["settings"]["heal"]["learning_rate"] == 1e-3
