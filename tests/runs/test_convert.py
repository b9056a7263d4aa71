"""`context-pythia convert` from the command line to the folder it leaves, on a tiny GPT-NeoX and made-up sentences."""

import json
import math
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig

import context_pythia.model
from context_pythia import ContextPythiaForCausalLM
from context_pythia.cli import command_line as cli
from context_pythia.conversion import compress
from context_pythia.data.tokenizers import train_tokenizer
from context_pythia.evaluation.memory import measure_generated_cache
from context_pythia.runs import convert as module
from context_pythia.training import trainer as trainer_module
from tests.conftest import tiny_recipe
from tests.model.conftest import randomise

HIDDEN, LAYERS, HEADS = 32, 3, 4
BODY = dict(
    hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48,
    max_position_embeddings=64,
)  # fmt: skip
BELOW = ("--context-dim", 24, "--calibration-tokens", 256)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tiny_recipe(folder)
    return folder / "corpus"


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer([path.read_text() for path in sorted(corpus.iterdir())], 280, progress=False)


@pytest.fixture(scope="module")
def save(tokenizer):
    def save_to(folder, std=0.12, **changes):
        ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = GPTNeoXConfig(**{"vocab_size": len(tokenizer)} | BODY | ends | changes)
        randomise(GPTNeoXForCausalLM(config), std).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save_to


@pytest.fixture(scope="module")
def original(save, tmp_path_factory):
    return save(tmp_path_factory.mktemp("original") / "pythia-tiny")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    cache = tmp_path_factory.mktemp("packed")

    def call(model, out, *options, data=True):
        text = ("--data", corpus, "--samples", 60, "--sequence-length", 16, "--cache-dir", cache) if data else ()
        return cli.main([str(word) for word in ("convert", model, "--out", out, "--quiet", *text, *options)])

    return call


@pytest.fixture
def refused(run, tmp_path, capsys):
    """Runs, and returns the one line of the error; nothing may be left behind."""

    def call(code, model, *options, **keywords):
        out = tmp_path / "refused" / "out"
        capsys.readouterr()
        try:
            returned = run(model, out, *options, **keywords)
        except SystemExit as stop:  # argparse's own
            returned = stop.code
        assert returned == code
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("context-pythia: error: ")
        assert not out.parent.exists() or not list(out.parent.iterdir())
        return lines[0]

    return call


@pytest.fixture(scope="module")
def quarter(run, original, tmp_path_factory):
    """A conversion to a quarter of the cache, uninterrupted."""
    out = tmp_path_factory.mktemp("quarter") / "out"
    assert run(original, out, "--kv-reduction", 0.75, "--calibration-tokens", 256) == 0
    return out


def record_of(folder):
    return json.loads((folder / "conversion.json").read_text())


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@contextmanager
def edited(folder):
    """The weights in a model's folder, saved as they are left."""
    weights = load_file(folder / "model.safetensors")
    yield weights
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def assert_same_weights(folder, other):
    weights, expected = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


@pytest.fixture
def ids():
    return torch.randint(0, 280, (2, 30), generator=torch.Generator().manual_seed(0))


def test_half_the_cache_is_exact_and_reads_no_text(run, original, tmp_path, ids, monkeypatch):
    monkeypatch.setattr(module, "load_data", lambda *_: pytest.fail("text was read"))
    assert run(original, tmp_path / "half", "--kv-reduction", 0.5, data=False) == 0
    converted, before = load(tmp_path / "half"), load(original)
    assert isinstance(converted, ContextPythiaForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, before(ids).logits, rtol=0, atol=1e-4)
    assert 2 * measure_generated_cache(converted, 40).filled == measure_generated_cache(before, 40).filled
    record = record_of(tmp_path / "half")
    assert (record["context_dim"], record["cache"]["numbers_per_token"]) == (HIDDEN, HIDDEN * LAYERS)
    card = (tmp_path / "half" / "README.md").read_text()
    assert "# pythia-tiny, 50.0% less cache" in card and "Converted exactly" in card
    assert not (tmp_path / "half" / "spectrum.png").exists()


def test_a_quarter_of_the_cache_with_its_papers(quarter, original):
    converted, record = load(quarter), record_of(quarter)
    assert 4 * measure_generated_cache(converted, 40).filled == measure_generated_cache(load(original), 40).filled
    assert record["numbers_per_token_original"] == 4 * record["cache"]["numbers_per_token"] == 2 * HIDDEN * LAYERS
    assert sum(layer["width"] for layer in record["layers"]) == LAYERS * HIDDEN // 2
    for layer, held in enumerate(record["layers"]):
        assert held["width"] == converted.config.cached_width(layer) and held["width"] % 8 == 0
        assert held["latent"] + 2 * sum(held["rotary_pairs"]) == held["width"]
        assert held["rotary_pairs"] == converted.config.rotary_pairs[layer]
        assert held["error"] > 0 and held["spectrum"] == sorted(held["spectrum"], reverse=True)
    card = (quarter / "README.md").read_text()
    assert "75.0% less cache" in card and "calibrated on 256 tokens" in card and "base_model" not in card
    assert "trust_remote_code" not in card
    assert (quarter / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert AutoTokenizer.from_pretrained(quarter).eos_token_id == 0
    assert not list(quarter.parent.glob(".*")) and not list(quarter.glob("*.py"))


def test_a_finished_conversion_is_not_done_again(run, quarter, original, capsys, monkeypatch):
    monkeypatch.setattr(module, "_load_original", lambda *_: pytest.fail("it is done again"))
    assert run(original, quarter, "--kv-reduction", 0.75, "--calibration-tokens", 256) == 0
    assert "holds this conversion already" in capsys.readouterr().out


def test_an_output_that_holds_something_else_is_refused(run, quarter, original, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for out, options in ((quarter, BELOW), (tmp_path / "mine", BELOW)):
        assert run(original, out, *options) == 2
        assert "exists and holds something else" in (line := capsys.readouterr().err)
        assert ("convert.context_dim None, not 24" in line) == (out == quarter)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_widths_weightings_and_uniform_layers(run, original, tmp_path):
    outcomes = {}
    for name, options in {
        "unequal": (),
        "uniform": ("--uniform",),
        "inputs": ("--uniform", "--weighting", "inputs"),
        "none": ("--uniform", "--weighting", "none"),
    }.items():
        assert run(original, tmp_path / name, *BELOW, *options) == 0
        outcomes[name] = record_of(tmp_path / name)["layers"]
        assert sum(layer["width"] for layer in outcomes[name]) == 24 * LAYERS
    for name in ("uniform", "inputs", "none"):
        assert {layer["width"] for layer in outcomes[name]} == {24}
        assert load(tmp_path / name).config.layer_context_dims is None
    assert len({str(outcomes[name][0]["spectrum"]) for name in ("uniform", "inputs", "none")}) == 3


def test_a_width_that_is_no_multiple_of_eight(run, original, tmp_path):
    assert run(original, tmp_path / "out", "--context-dim", 21, "--calibration-tokens", 256) == 0
    assert sum(layer["width"] for layer in record_of(tmp_path / "out")["layers"]) == 21 * LAYERS
    assert measure_generated_cache(load(tmp_path / "out"), 10).filled == 21 * LAYERS * 10 * 4


def test_wider_contexts_are_nearer_to_the_original(run, original, quarter, tmp_path, tokenizer, corpus):
    assert run(original, tmp_path / "out", "--context-dim", 24, "--calibration-tokens", 800) == 0
    ids = torch.tensor(tokenizer(next(corpus.iterdir()).read_text())["input_ids"][:640]).view(-1, 16)
    with torch.no_grad():
        expected = load(original)(ids).logits.log_softmax(-1)
        near, far = (
            float((expected.exp() * (expected - load(folder)(ids).logits.log_softmax(-1))).sum(-1).mean())
            for folder in (tmp_path / "out", quarter)
        )
    assert 0 < near < far


def test_shipped_code_loads_where_the_package_is_absent(run, original, tmp_path, ids):
    out = tmp_path / "out"
    assert run(original, out, "--kv-reduction", 0.5, "--ship-code", data=False) == 0
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    torch.save({"ids": ids, "logits": load(out)(ids).logits.detach()}, tmp_path / "expected.pt")
    script = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "context_pythia":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
import transformers

for kind in ("AutoModel", "AutoModelForSequenceClassification"):
    body = getattr(transformers, kind).from_pretrained({str(out)!r}, trust_remote_code=True)
    assert type(body).__module__.startswith("transformers_modules"), kind
model = transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
held = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
assert type(model).__module__.startswith("transformers_modules")
assert torch.allclose(model(held["ids"]).logits, held["logits"], atol=1e-5)
assert model.generate(held["ids"], max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1] == 33
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    # Code is shipped where it is asked for, not from then on.
    assert run(original, tmp_path / "plain", "--kv-reduction", 0.5, data=False) == 0
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in (tmp_path / "plain" / "config.json").read_text()


# The original is random, so only the text has something to teach.
HEALING = ("--heal-steps", 4, "--heal-batch-size", 9, "--heal-learning-rate", 0.003, "--heal-ce-weight", 0.5)


@pytest.fixture(scope="module")
def healed(run, original, tmp_path_factory):
    out = tmp_path_factory.mktemp("healed") / "out"
    assert run(original, out, *BELOW, *HEALING, "--ship-code") == 0
    return out


def test_healing_writes_the_healed_weights_and_its_record(healed, run, original, tmp_path):
    assert run(original, tmp_path / "plain", *BELOW) == 0
    weights, before = load_file(healed / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    assert not torch.equal(weights["gpt_neox.layers.0.attention.value_up.weight"],
                           before["gpt_neox.layers.0.attention.value_up.weight"])  # fmt: skip
    assert torch.equal(weights["gpt_neox.embed_in.weight"], before["gpt_neox.embed_in.weight"])
    healing = record_of(healed)["healing"]
    assert healing["steps"] == 4 and healing["val_ppl"] <= healing["val_ppl_before"]
    card = (healed / "README.md").read_text()
    assert "healed for 4 steps" in card
    code = {path.name for path in Path(context_pythia.model.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert {path.name for path in healed.iterdir()} == code | {
        "README.md", "config.json", "conversion.json", "generation_config.json", "model.safetensors", "spectrum.png",
        "tokenizer.json", "tokenizer_config.json", "train.json",
    }  # fmt: skip
    assert "auto_map" in (healed / "config.json").read_text()
    assert isinstance(load(healed), ContextPythiaForCausalLM)


def test_healed_weights_replace_all_shards_from_before(run, original, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", "20KB")
    assert run(original, tmp_path / "out", *BELOW, *HEALING) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


def test_the_control_heals_the_original_itself(run, original, tmp_path, capsys):
    assert run(original, tmp_path / "control", "--control", *HEALING, "--ship-code") == 0
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
    """`function`, interrupted as it is called for the count-th time."""
    calls = []

    def wrapped(*arguments, **named):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return function(*arguments, **named)

    return wrapped, calls


GROUPS = ("--set", "convert.statistics_gb=1e-6")  # a layer at a time


def test_an_interrupted_calibration_goes_on_with_the_layers_that_are_left(run, original, tmp_path, monkeypatch, capsys):
    assert run(original, tmp_path / "whole", *BELOW, *GROUPS) == 0
    wrapped, calls = interrupt_at(2, compress.collect)
    with monkeypatch.context() as patch:
        patch.setattr(compress, "collect", wrapped)
        assert run(original, tmp_path / "out", *BELOW, *GROUPS) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    wrapped, calls = interrupt_at(-1, compress.collect)
    monkeypatch.setattr(compress, "collect", wrapped)
    assert run(original, tmp_path / "out", *BELOW, *GROUPS) == 0
    assert len(calls) == LAYERS - 1
    assert_same_weights(tmp_path / "out", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_an_interrupted_calibration_does_not_go_on_with_another_text(
    run, original, corpus, tmp_path, monkeypatch, capsys
):
    shutil.copytree(corpus, tmp_path / "text")
    command = (original, tmp_path / "out", *BELOW, *GROUPS, "--data", tmp_path / "text")
    with monkeypatch.context() as patch:
        patch.setattr(compress, "collect", interrupt_at(2, compress.collect)[0])
        assert run(*command) == 130
    changed = sorted((tmp_path / "text").iterdir())[0]
    words = changed.read_text()
    changed.write_text(words[::-1])
    assert run(*command) == 2
    assert "holds an unfinished conversion by other text than is now in" in capsys.readouterr().err
    changed.write_text(words)
    assert run(*command) == 0
    fingerprint = record_of(tmp_path / "out")["data_fingerprint"]
    assert run(original, tmp_path / "other", *BELOW) == 0
    assert record_of(tmp_path / "other")["data_fingerprint"] == fingerprint


def test_statistics_in_groups_or_at_once_convert_alike(run, original, tmp_path):
    assert run(original, tmp_path / "groups", *BELOW, *GROUPS) == 0
    assert run(original, tmp_path / "once", *BELOW) == 0
    assert_same_weights(tmp_path / "groups", tmp_path / "once")


@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupted_healing_goes_on(step, healed, run, original, tmp_path, monkeypatch, capsys):
    options = (*BELOW, *HEALING, "--ship-code")
    with monkeypatch.context() as patch:
        owner = trainer_module.LanguageModelTrainer
        wrapped, _ = interrupt_at(step, owner.training_step)
        patch.setattr(owner, "training_step", lambda *arguments, **named: wrapped(*arguments, **named))
        assert run(original, tmp_path / "out", *options) == 130
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(compress, "collect", lambda *_, **__: pytest.fail("it is calibrated again"))
        assert run(original, tmp_path / "out", *options) == 0
    assert "goes on with the converted model" in capsys.readouterr().out
    assert_same_weights(tmp_path / "out", healed)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in healed.iterdir()}
    assert "auto_map" in (tmp_path / "out" / "config.json").read_text()


def test_work_in_progress_of_other_settings_is_refused(run, original, tmp_path, monkeypatch, capsys):
    wrapped, _ = interrupt_at(2, compress.collect)
    with monkeypatch.context() as patch:
        patch.setattr(compress, "collect", wrapped)
        assert run(original, tmp_path / "out", *BELOW, *GROUPS) == 130
    assert run(original, tmp_path / "out", *BELOW, "--seed", 7) == 2
    assert "unfinished conversion with convert.seed 0, not 7: finish it or delete it" in capsys.readouterr().err
    # What changes only how the result is reached may change on the way.
    assert (
        run(original, tmp_path / "out", *BELOW, "--set", "convert.batch_size=3", "--set", "convert.statistics_gb=1")
        == 0
    )


def test_work_in_progress_of_other_weights_is_refused(run, save, tmp_path, monkeypatch, capsys):
    model = save(tmp_path / "model")
    wrapped, _ = interrupt_at(2, compress.collect)
    with monkeypatch.context() as patch:
        patch.setattr(compress, "collect", wrapped)
        assert run(model, tmp_path / "out", *BELOW, *GROUPS) == 130
    save(model, std=0.11)
    assert run(model, tmp_path / "out", *BELOW) == 2
    assert f"an unfinished conversion with other files in {model} than are there now" in capsys.readouterr().err


def test_an_empty_folder_is_filled(run, original, tmp_path):
    (tmp_path / "out").mkdir()
    assert run(original, tmp_path / "out", "--kv-reduction", 0.5, data=False) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_rotary_keys_that_nearly_depend_on_each_other_are_warned_of(run, original, save, tmp_path, capsys):
    shutil.copytree(original, tmp_path / "near")
    with edited(tmp_path / "near") as weights:
        fused = weights["gpt_neox.layers.1.attention.query_key_value.weight"].unflatten(0, (HEADS, 3, -1))
        fused[1, 1, 0] = fused[0, 1, 0] * (1 + 1e-6)  # the first rotary dim of two heads' keys
        fused[1, 1, 0, 0] += 1e-6
    assert run(original, tmp_path / "well", "--kv-reduction", 0.5, data=False) == 0
    assert "warning" not in capsys.readouterr().err
    assert run(tmp_path / "near", tmp_path / "out", "--kv-reduction", 0.5, data=False) == 0
    line = capsys.readouterr().err.strip()
    assert line.startswith("warning: the rotary keys of layer 1 nearly depend on each other (condition number")
    condition = record_of(tmp_path / "out")["layers"][1]["condition"]
    assert condition > 1e5 and f"{condition:,.3g}" in (tmp_path / "out" / "README.md").read_text()


def test_a_refused_command_does_not_lock_the_output(run, original, tmp_path):
    assert run(original, tmp_path / "out", "--context-dim", HIDDEN + 1) == 2
    assert run(original, tmp_path / "out", "--context-dim", HIDDEN, data=False) == 0


def test_rotary_keys_that_depend_on_each_other_are_not_exact_and_do_not_lock_the_output(run, damaged, tmp_path, capsys):
    with edited(damaged) as weights:
        fused = weights["gpt_neox.layers.2.attention.query_key_value.weight"].unflatten(0, (HEADS, 3, -1))
        fused[1, 1] = fused[0, 1]
    assert run(damaged, tmp_path / "out", "--kv-reduction", 0.5, data=False) == 1
    line = capsys.readouterr().err
    assert "layer 2: its rotary keys depend on each other, so 32 numbers are not exact: give a smaller" in line
    assert run(damaged, tmp_path / "out", *BELOW) == 0


def test_the_smallest_width_of_many_heads(run, save, tmp_path):
    """More pairs than the width has room for are among those that are tried first."""
    model = save(tmp_path / "heads", hidden_size=64, num_attention_heads=8, std=0.2)
    for name, options in {"shared": (), "equal": ("--uniform",)}.items():
        assert run(model, tmp_path / name, "--context-dim", 3, "--calibration-tokens", 256, *options) == 0
        layers = record_of(tmp_path / name)["layers"]
        assert sum(layer["width"] for layer in layers) == 3 * LAYERS
        assert all(sum(layer["rotary_pairs"]) == 1 for layer in layers if layer["width"] == 3)


def test_bfloat16_rounds_and_is_not_warned_of_for_that(run, damaged, tmp_path, capsys):
    with edited(damaged) as weights:
        weights["gpt_neox.layers.1.attention.query_key_value.weight"].unflatten(0, (HEADS, 3, -1))[0, 1, 0] *= 0.2
    assert run(damaged, tmp_path / "out", "--kv-reduction", 0.5, "--dtype", "bfloat16", data=False) == 0
    assert max(layer["condition"] for layer in record_of(tmp_path / "out")["layers"]) * 2**-7 > module.MOST_ROUNDING
    assert "warning" not in capsys.readouterr().err


def test_a_link_to_an_empty_folder_is_followed_and_a_mount_point_refused(run, original, tmp_path, monkeypatch, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert run(original, tmp_path / "link", "--kv-reduction", 0.5, data=False) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "model.safetensors").is_file()
    monkeypatch.chdir(tmp_path / "real")
    assert run(original, ".", "--kv-reduction", 0.5, data=False) == 0
    assert "holds this conversion already" in capsys.readouterr().out
    assert run(original, "/proc", "--kv-reduction", 0.5, data=False) == 2
    monkeypatch.setattr(type(tmp_path), "is_mount", lambda path: path.name == "mounted")
    assert run(original, tmp_path / "mounted", "--kv-reduction", 0.5, data=False) == 2
    assert "is a mount point, which nothing can be moved to" in capsys.readouterr().err


def test_files_in_the_place_of_work_in_progress_are_left_alone(run, original, tmp_path, capsys):
    mine = tmp_path / ".out.partial" / "mine"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert run(original, tmp_path / "out", "--kv-reduction", 0.5, data=False) == 2
    assert "holds files that are not a conversion's" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_healing_that_went_wrong_is_done_anew_with_the_converted_model(run, original, tmp_path, monkeypatch, capsys):
    def options(rate):
        return (*BELOW, "--heal-steps", 4, "--heal-batch-size", 9, "--heal-learning-rate", rate)

    assert run(original, tmp_path / "out", *options(1e30)) == 1
    assert "try a heal.learning_rate below 1e+30" in capsys.readouterr().err
    assert run(original, tmp_path / "out", *options(1e-3)) == 2
    partial = tmp_path / ".out.partial"
    line = capsys.readouterr().err
    assert "an unfinished healing with heal.learning_rate 1e+30, not 0.001" in line
    assert f"or delete {partial / 'healed'} to heal anew" in line
    shutil.rmtree(partial / "healed")
    monkeypatch.setattr(compress, "collect", lambda *_, **__: pytest.fail("it is calibrated again"))
    assert run(original, tmp_path / "out", *options(1e-3)) == 0
    assert record_of(tmp_path / "out")["settings"]["heal"]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "give either --context-dim N or --kv-reduction R"),
        (("--context-dim", 16, "--kv-reduction", 0.5), "give either --context-dim N or --kv-reduction R"),
        (("--context-dim", 33), "context_dim 33: 32 numbers, the model's width, are exact already"),
        (("--kv-reduction", 0.4), "kv_reduction 0.4: 32 numbers"),
        (("--context-dim", 2), "one rotary key of 2 dims and a latent; give a context_dim of at least 3"),
        (("--kv-reduction", 0.99), "kv_reduction 0.99: leaves no room"),
        (("--context-dim", 16, "--calibration-tokens", 63), "a width of 32 takes at least 64 tokens"),
        (("--context-dim", 16, "--calibration-tokens", 5000), "the training split has 864 tokens"),
        (("--context-dim", 16, "--weighting", "hope"), "hope"),
        (("--control", "--context-dim", 16), "--heal-steps"),
        (("--control", "--context-dim", 16, "--heal-steps", 2), "--control converts nothing, so drop --context-dim"),
        (("--control",), "--control heals the original itself, so give --heal-steps"),
        (("--control", "--heal-steps", 2), "heal.ce_weight 0: an original without dropout agrees with itself"),
        (("--context-dim", 16, "--heal-steps", 1, "--heal-ce-weight", 2), "2"),
        (("--context-dim", 16, "--heal-learning-rate", 0.1), "heal.learning_rate 0.1: nothing is healed without"),
        (("--context-dim", 16, "--tokenizer", "train"), "tokenizer train: a trained model has its own"),
        (("--context-dim", 16, "--sequence-length", 65), "sequence_length 65: the model has 64 positions"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_one_line(options, says, refused, original):
    assert says in refused(2, original, *options)


def test_a_model_that_is_all_rotary_goes_to_half_and_no_further(refused, run, save, tmp_path, ids):
    model = save(tmp_path / "rotary", std=0.2, rope_parameters={
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0})  # fmt: skip
    line = refused(2, model, "--context-dim", 24)
    assert "the smallest exact cache is the keys alone, 32 numbers a layer (kv_reduction 0.5)" in line
    assert run(model, tmp_path / "half", "--kv-reduction", 0.5, data=False) == 0
    with torch.no_grad():
        got, expected = load(tmp_path / "half")(ids).logits, load(model)(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)


def test_models_of_other_families_are_named(refused, quarter, tmp_path, tokenizer):
    from transformers import LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=280, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    line = refused(2, tmp_path / "llama", "--kv-reduction", 0.5, data=False)
    assert "llama is a llama model: only GPT-NeoX checkpoints" in line
    assert "is a Context-Pythia already" in refused(2, quarter, "--kv-reduction", 0.5, data=False)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"model_type": "of_tomorrow"}')
    line = refused(2, tmp_path / "new", "--kv-reduction", 0.5, data=False)
    assert "new is a of_tomorrow model: only GPT-NeoX checkpoints" in line


def test_a_configuration_that_contradicts_itself(refused, damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    assert "mend its config.json" in refused(1, damaged, "--kv-reduction", 0.5, data=False)


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "--kv-reduction", "0.5", "--out", "out"),
        ("info", "--length", "8"),
        ("generate", "--prompt", "the"),
        ("eval", "--samples", "20"),
        ("bench", "--lengths", "32"),
    ],
    ids=lambda words: words[0],
)
def test_a_quantised_checkpoint_is_one_line_from_every_command(command, damaged, monkeypatch, capsys):
    config = json.loads((damaged / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}}
    (damaged / "config.json").write_text(json.dumps(config | quantised))
    monkeypatch.chdir(damaged.parent)
    assert cli.main([command[0], str(damaged), *command[1:]]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "is quantised (gptq)" in line and "the checkpoint in full precision" in line


def test_entries_that_point_to_the_originals_own_files_are_left_behind(run, damaged, tmp_path):
    config = json.loads((damaged / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "own.Config"}, "custom_pipelines": {"own": {"impl": "own.Pipeline"}}}
    (damaged / "config.json").write_text(json.dumps(config | own))
    assert run(damaged, tmp_path / "out", "--kv-reduction", 0.5, data=False) == 0
    assert not own.keys() & json.loads((tmp_path / "out" / "config.json").read_text()).keys()


@pytest.mark.parametrize("options", [("--kv-reduction", 0.5), BELOW], ids=["half", "below"])
def test_tied_embeddings_stay_one_weight(options, run, save, tmp_path, ids):
    model = save(tmp_path / "tied", tie_word_embeddings=True)
    assert run(model, tmp_path / "out", *options) == 0
    before, converted = load(model), load(tmp_path / "out")
    assert converted.lm_head.weight is converted.gpt_neox.embed_in.weight
    assert torch.equal(converted.lm_head.weight, before.lm_head.weight)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    if options != BELOW:
        torch.testing.assert_close(converted(ids).logits, before(ids).logits, rtol=0, atol=1e-4)


def test_a_folder_without_a_configuration(refused, damaged):
    (damaged / "config.json").unlink()
    assert "holds no config.json" in refused(2, damaged, "--kv-reduction", 0.5, data=False)


def test_a_model_that_is_not_there(refused, tmp_path):
    assert "no such model" in refused(2, tmp_path / "nowhere", "--kv-reduction", 0.5, data=False)


def test_a_tokenizer_that_the_model_has_no_rows_for(refused, run, save, tmp_path):
    model = save(tmp_path / "small", vocab_size=200)
    line = refused(2, model, *BELOW)
    assert "280" in line and "200" in line
    # An exact conversion reads no text.
    assert run(model, tmp_path / "half", "--kv-reduction", 0.5, data=False) == 0


@pytest.fixture
def damaged(original, tmp_path):
    shutil.copytree(original, tmp_path / "damaged")
    return tmp_path / "damaged"


def test_a_checkpoint_with_nan(refused, damaged):
    with edited(damaged) as weights:
        weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"][2, 3] = torch.nan
    line = refused(1, damaged, "--kv-reduction", 0.5, data=False)
    assert "gpt_neox.layers.1.mlp.dense_h_to_4h.weight is not finite" in line


def test_a_checkpoint_with_a_missing_tensor(refused, damaged):
    with edited(damaged) as weights:
        del weights["gpt_neox.layers.1.attention.dense.weight"]
    assert "missing keys gpt_neox.layers.1.attention.dense.weight" in refused(1, damaged, "--kv-reduction", 0.5)


def test_a_shard_that_was_cut_off(refused, original, tmp_path):
    load(original).save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    AutoTokenizer.from_pretrained(original).save_pretrained(tmp_path / "shards")
    path = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    assert "is damaged" in refused(1, tmp_path / "shards", "--kv-reduction", 0.5, data=False)


def test_a_checkpoint_with_a_tensor_of_another_shape(refused, damaged):
    with edited(damaged) as weights:
        name = "gpt_neox.layers.2.attention.dense.weight"
        weights[name] = weights[name][:5].clone()
    line = refused(1, damaged, "--kv-reduction", 0.5, data=False)
    assert f"{name} has the shape [5, 32], not [32, 32]" in line


def test_a_sharded_checkpoint_converts_alike_and_large_outputs_are_sharded(run, original, tmp_path, monkeypatch):
    load(original).save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    AutoTokenizer.from_pretrained(original).save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    monkeypatch.setattr(module, "SHARD", "20KB")
    assert run(tmp_path / "shards", tmp_path / "out", *BELOW) == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    monkeypatch.undo()
    assert run(original, tmp_path / "whole", *BELOW) == 0
    weights, expected = load(tmp_path / "out").state_dict(), load(tmp_path / "whole").state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def test_a_checkpoint_in_half_precision_is_computed_in_float32(run, original, tmp_path):
    load(original).half().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(original).save_pretrained(tmp_path / "half")
    for dtype in ("float16", "float32"):
        assert run(tmp_path / "half", tmp_path / dtype, *BELOW, "--dtype", dtype) == 0
    rounded, exact = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float16", "float32"))
    for name, tensor in exact.items():
        assert tensor.dtype == torch.float32 and torch.equal(rounded[name], tensor.half()), name
    assert record_of(tmp_path / "float16")["cache"]["dtype"] == "float16"


def test_a_checkpoint_that_was_cut_off(refused, damaged):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "is damaged" in refused(1, damaged, "--kv-reduction", 0.5, data=False)


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device"), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("place", ["statistics", "model"])
def test_a_full_disk(place, error, run, original, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        if place == "statistics":
            patch.setattr("context_pythia.conversion.calibrate.save_file", full)
        else:
            patch.setattr(ContextPythiaForCausalLM, "save_pretrained", full)
        assert run(original, tmp_path / "out", *BELOW) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and f"cannot write to {tmp_path / '.out.partial'}: " in lines[0]
    assert "No space left on device" in lines[0] and "goes on with what is there, or delete it" in lines[0]
    assert not (tmp_path / "out").exists()
    assert run(original, tmp_path / "out", *BELOW) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_damaged_statistics_of_an_interrupted_run(run, original, tmp_path, monkeypatch, capsys):
    wrapped, _ = interrupt_at(2, compress.collect)
    with monkeypatch.context() as patch:
        patch.setattr(compress, "collect", wrapped)
        assert run(original, tmp_path / "out", *BELOW, *GROUPS) == 130
    (held,) = (tmp_path / ".out.partial").glob("statistics-*.safetensors")
    held.write_bytes(held.read_bytes()[:-9])
    capsys.readouterr()
    assert run(original, tmp_path / "out", *BELOW, *GROUPS) == 1
    assert "delete it to calibrate again" in capsys.readouterr().err
    held.unlink()
    assert run(original, tmp_path / "out", *BELOW, *GROUPS) == 0
