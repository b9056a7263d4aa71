"""What `context-pythia convert` refuses or points out, in one line: options, models, damage, a full disk."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from context_pythia.runs import convert as module
from tests.runs.conftest import BELOW, HALF, HEADS, LAYERS, assert_same_weights, edited, load, record_of


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "give --context-dim N, --kv-reduction R or --layer-context-dims N,N"),
        (("--context-dim", 16, "--kv-reduction", 0.5), "give only one of --context-dim, --kv-reduction"),
        (("--context-dim", 33), "context_dim 33: the layers have 3 contexts, each at most as wide as the model, 32"),
        (("--kv-reduction", 0.99), "kv_reduction 0.99: is too small for one rotary key of 2 dims and a latent"),
        (("--context-dim", 16, "--calibration-tokens", 63), "a width of 32 takes at least 64 tokens"),
        (("--context-dim", 16, "--calibration-tokens", 5000), "the training split has 864 tokens"),
        (("--control", "--context-dim", 16, "--heal-steps", 2), "convert.context_dim: --control converts nothing"),
        (("--control",), "--control heals the original itself, so give --heal-steps"),
        (("--control", "--heal-steps", 2), "heal.ce_weight 0: without dropout the control matches"),
        (("--context-dim", 16, "--heal-learning-rate", 0.1), "heal.learning_rate 0.1: needs --heal-steps"),
        (("--context-dim", 16, "--context-layers", "0,2,2"), "context_layers [0, 2, 2]: must have 3 entries, each the"),
        (("--layer-context-dims", "8,8"), "layer_context_dims [8, 8]: must name 3 layers"),
        (("--layer-context-dims", "8,1,8"), "layer_context_dims 1 of layer 1: leaves no latent beside the 2 dims"),
        (
            ("--layer-context-dims", "8,33,8"),
            "layer_context_dims [8, 33, 8]: the layers have 3 contexts, each at most as wide as the model, 32: give "
            "layer_context_dims of at most 32",
        ),
        (
            ("--kv-reduction", 0.5, "--context-layers", "0,1,1"),
            "kv_reduction 0.5: the layers have 2 contexts, each at most as wide as the model, 32: give a "
            "context_dim of at most 21 (a kv_reduction of at least 0.671875)",
        ),
        (("--layer-context-dims", "8,x,8"), "convert.layer_context_dims 'x': must be a whole number"),
        (("--context-dim", 2, "--cache-token-ids"), "context_dim 2: is too small for one rotary key of 2 dims in each"),
        (("--context-dim", 16, "--cache-token-ids", "--weighting", "none"), "weighting none: knows of no text"),
        (("--context-dim", 16, "--tokenizer", "train"), "tokenizer train: a trained model has its own"),
        (("--context-dim", 16, "--sequence-length", 65), "sequence_length 65: must be at most 64, the model"),
    ],
)
def test_what_cannot_be_asked_is_one_line(options, says, refused, original):
    assert says in refused(2, original, *options)


def test_a_model_that_is_all_rotary_goes_to_half_and_no_further(refused, save, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    model = save(tmp_path / "rotary", rope_parameters=rope)
    line = refused(2, model, "--context-dim", 24)
    assert "the smallest cache is its keys, 32 numbers per layer: give kv_reduction 0.5" in line


def test_rope_whose_angles_change_with_the_length_is_refused(refused, save, tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "partial_rotary_factor": 0.5}
    model = save(tmp_path / "dynamic", rope_parameters=rope)
    assert "has RoPE of the type 'dynamic', whose angles change" in refused(2, model, *HALF, data=False)


def test_models_of_other_families_are_named(refused, below, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=280, **sizes)).save_pretrained(tmp_path / "llama")
    line = refused(2, tmp_path / "llama", *HALF, data=False)
    assert "llama is a llama model: only GPT-NeoX checkpoints" in line
    assert "out is a context_pythia model: only GPT-NeoX" in refused(2, below, *HALF, data=False)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"model_type": "of_tomorrow"}')
    assert "new is a of_tomorrow model: only GPT-NeoX" in refused(2, tmp_path / "new", *HALF, data=False)


def reconfigure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_quantized_checkpoint_is_refused(refused, copy):
    reconfigure(copy, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False})
    line = refused(2, copy, *HALF, data=False)
    assert "is quantized (gptq)" in line and "the original checkpoint in full precision" in line


def test_a_tokenizer_that_the_model_has_no_rows_for(refused, save, tmp_path):
    model = save(tmp_path / "small", vocab_size=200)
    line = refused(2, model, *BELOW)
    assert "280" in line and "200" in line


@pytest.mark.parametrize("damage", ["not finite", "has the shape [5, 32], not [32, 32]", "is damaged"])
def test_a_damaged_checkpoint(damage, refused, copy):
    name = "gpt_neox.layers.2.attention.dense.weight"
    if damage == "is damaged":
        load(copy).save_pretrained(copy, max_shard_size="30KB")
        (copy / "model.safetensors").unlink()
        path = sorted(copy.glob("model-*.safetensors"))[1]
        path.write_bytes(path.read_bytes()[:-100])
    else:
        with edited(copy) as weights:
            weights[name][2, 3] = torch.nan
            if damage != "not finite":
                weights[name] = weights[name][:5].clone()
    line = refused(1, copy, *HALF, data=False)
    assert damage in line and (damage == "is damaged" or name in line)


def test_a_full_disk(convert, original, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("context_pythia.conversion.calibrate.save_file", full)
        assert convert(original, tmp_path / "out", *BELOW) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and f"cannot write to {tmp_path / '.out.partial'}: I/O error: No space left" in lines[0]
    assert not (tmp_path / "out").exists()
    assert convert(original, tmp_path / "out", *BELOW) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_summary_and_the_card_say_how_nearly_rotary_keys_depend_on_each_other(convert, copy, tmp_path, capsys):
    with edited(copy) as weights:
        fused = weights["gpt_neox.layers.1.attention.query_key_value.weight"].unflatten(0, (HEADS, 3, -1))
        fused[1, 1, 0] = fused[0, 1, 0] * (1 + 1e-6)  # the first rotary dim of two heads' keys
        fused[1, 1, 0, 0] += 1e-6
    assert convert(copy, tmp_path / "out", *HALF, data=False, card=True) == 0
    condition = record_of(tmp_path / "out")["layers"][1]["condition"]
    assert condition > 1e5 and f"{condition:,.3g}" in (tmp_path / "out" / "README.md").read_text()
    said = capsys.readouterr().out
    assert f"amplifies at most {condition:,.3g} times" in said and "warning: its rotary keys" in said


def test_rotary_keys_that_depend_on_each_other_are_not_exact(copy, refused):
    with edited(copy) as weights:
        fused = weights["gpt_neox.layers.2.attention.query_key_value.weight"].unflatten(0, (HEADS, 3, -1))
        fused[1, 1] = fused[0, 1]
    line = refused(1, copy, *HALF, data=False)
    assert "layer 2: its rotary keys are linearly dependent, so 32 numbers are not exact: give a smaller" in line


def test_the_smallest_width_of_many_heads(convert, save, tmp_path):
    """More pairs than the width has room for are among those that are tried first."""
    model = save(tmp_path / "heads", hidden_size=64, num_attention_heads=8, std=0.2)
    assert convert(model, tmp_path / "out", "--context-dim", 3, "--calibration-tokens", 256) == 0
    layers = record_of(tmp_path / "out")["layers"]
    assert sum(layer["width"] for layer in layers) == 3 * LAYERS
    assert all(sum(layer["rotary_pairs"]) == 1 for layer in layers if layer["width"] == 3)


def test_tied_embeddings_stay_one_weight_and_foreign_code_is_left_behind(convert, save, tmp_path):
    model = save(tmp_path / "tied", tie_word_embeddings=True)
    code = {"auto_map": {"AutoConfig": "own.Config"}, "custom_pipelines": {"own": {"impl": "own.Pipeline"}}}
    reconfigure(model, **code)
    assert convert(model, tmp_path / "out", *BELOW) == 0
    assert not code.keys() & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    converted = load(tmp_path / "out")
    assert converted.lm_head.weight is converted.gpt_neox.embed_in.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_sharded_checkpoint_converts_alike_and_large_outputs_are_sharded(
    convert, original, below, tmp_path, monkeypatch
):
    load(original).save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    AutoTokenizer.from_pretrained(original).save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    monkeypatch.setattr(module, "SHARD", "20KB")
    assert convert(tmp_path / "shards", tmp_path / "out", *BELOW) == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert_same_weights(tmp_path / "out", below)


def test_a_checkpoint_in_half_precision_is_computed_in_float32(convert, original, tmp_path):
    load(original).half().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(original).save_pretrained(tmp_path / "half")
    for dtype in ("float16", "float32"):
        assert convert(tmp_path / "half", tmp_path / dtype, *HALF, "--dtype", dtype, data=False) == 0
    rounded, exact = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float16", "float32"))
    for name, tensor in exact.items():
        assert tensor.dtype == torch.float32 and torch.equal(rounded[name], tensor.half()), name
    assert record_of(tmp_path / "float16")["cache"]["dtype"] == "float16"
