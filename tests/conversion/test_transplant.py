"""Converted models against their originals: every kind of GPT-NeoX, prefill and decoding, and what is refused.

Random weights with std 0.2, so that a wrong formula shows. In float64 the rest of the difference is that of RoPE's
angles, which transformers makes in float32.
"""

import warnings

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia.conversion.calibrate import WEIGHTINGS, LayerStatistics
from context_pythia.conversion.factorize import LayerFactorizer
from context_pythia.conversion.transplant import context_config, keys_and_values, split_projection, transplant
from context_pythia.evaluation.memory import measure_generated_cache
from context_pythia.evaluation.pretrained import load_pretrained
from tests.model.conftest import SIZE, randomise

TURNED = {"rope_theta": 10000.0}
KINDS = {
    "pythia": {},
    "no biases, no parallel residual": {"attention_bias": False, "use_parallel_residual": False},
    "all rotary, tied": {
        "rope_parameters": TURNED | {"rope_type": "default", "partial_rotary_factor": 1.0},
        "tie_word_embeddings": True,
    },
    "yarn RoPE": {
        "rope_parameters": TURNED
        | {
            "rope_type": "yarn",
            "factor": 4.0,
            "partial_rotary_factor": 0.25,
            "original_max_position_embeddings": 32,
        }
    },
}  # fmt: skip


def make_original(**changes) -> GPTNeoXForCausalLM:
    model = randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE | changes)))
    model.generation_config.eos_token_id = None
    return model


def exact_factors(original: GPTNeoXForCausalLM, layer: int):
    config, width = original.config, original.gpt_neox.layers[0].attention.rotary_ndims
    factorizer = LayerFactorizer(
        keys_and_values(original, layer), *WEIGHTINGS["none"](LayerStatistics.zeros(config.hidden_size))
    )
    heads = config.num_attention_heads
    return factorizer.factors([heads] * (width // 2), config.hidden_size - heads * width)


def exact_on_disk(original: GPTNeoXForCausalLM, folder):
    config, layers = original.config, range(original.config.num_hidden_layers)
    frequencies = original.gpt_neox.layers[0].attention.rotary_ndims // 2
    pairs = [[config.num_attention_heads] * frequencies for _ in layers]
    made = context_config(config, pairs, [config.hidden_size for _ in layers])
    factors = (exact_factors(original, layer) for layer in layers)
    return transplant(original, factors, made, folder, original.dtype)


@pytest.fixture
def exact(tmp_path):
    """Makes the exact conversion, saved and loaded again."""

    def convert(original):
        folder = tmp_path / f"converted-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        with warnings.catch_warnings(action="ignore"):  # transformers' about room for a shard
            exact_on_disk(original, folder).save_pretrained(folder / "saved")
        return load_pretrained(str(folder / "saved"), original.dtype)

    return convert


@pytest.fixture(params=KINDS)
def original(request):
    return make_original(**KINDS[request.param])


@pytest.fixture
def ids():
    return torch.randint(2, 97, (3, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids, **keywords):
    return model(ids, **keywords).logits


@torch.no_grad()
def stepwise(model, ids):
    """A prefill of 5 tokens, 3 at once, then one at a time."""
    outputs = model(ids[:, :5], use_cache=True)
    found = [outputs.logits]
    for chunk in [ids[:, 5:8], *ids[:, 8:].split(1, dim=1)]:
        outputs = model(chunk, past_key_values=outputs.past_key_values, use_cache=True)
        found.append(outputs.logits)
    return torch.cat(found, dim=1)


def test_logits_are_the_originals_in_parallel_and_through_the_cache(original, ids, exact):
    expected = logits(original, ids)
    converted = exact(original.double())
    assert expected.abs().max() > 3 and converted.dtype == torch.float64
    for got in (logits(converted, ids), stepwise(converted, ids)):
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=5e-5)


def test_a_whole_context_of_2048_tokens(exact):
    ids = torch.randint(2, 97, (1, 2048), generator=torch.Generator().manual_seed(2))
    original = make_original(max_position_embeddings=2048)
    expected = logits(original, ids)
    converted = exact(original)
    torch.testing.assert_close(logits(converted, ids), expected, rtol=0, atol=1e-3)
    with torch.no_grad():
        cache = converted(ids[:, :2040], use_cache=True).past_key_values
        got = [converted(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(2040, 2048)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected[:, 2040:], rtol=0, atol=1e-3)


def test_padding_on_the_left_changes_nothing(ids, exact):
    original = make_original()
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :3] = 0, 0
    ids = ids * mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = logits(original, ids, attention_mask=mask, position_ids=positions)
    found = original.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    converted = exact(original)
    got = logits(converted, ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(got[mask == 1], expected[mask == 1], rtol=0, atol=2e-4)
    assert torch.equal(converted.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False), found)


def test_texts_of_beams_are_the_originals_and_the_cache_is_half(ids, exact):
    original = make_original()
    settings = {"max_new_tokens": 10, "do_sample": False, "num_beams": 3, "attention_mask": torch.ones_like(ids)}
    expected, converted = original.generate(ids, **settings), exact(original)
    assert torch.equal(converted.generate(ids, **settings), expected)
    before, after = (measure_generated_cache(model, 16, batch_size=2) for model in (original, converted))
    assert after.filled * 2 == before.filled


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_there_and_no_other_is_changed(tied, exact):
    original = make_original(tie_word_embeddings=tied)
    held = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    fused = sum(tensor.numel() for name, tensor in held.items() if "query_key_value" in name)
    converted = exact(original)
    assert not any(tensor.is_meta for tensor in [*converted.parameters(), *converted.buffers()])
    state = converted.state_dict()
    kept = {name for name in held if "query_key_value" not in name}
    assert kept == {name for name in state if not any(part in name for part in (
        ".query.", ".context.", ".rotary_up.", ".key_up.", ".value_up."))}  # fmt: skip
    for name in kept:
        assert torch.equal(state[name], held[name]), name
    assert (converted.lm_head.weight is converted.gpt_neox.embed_in.weight) == tied
    assert fused > 0


def test_parts_of_the_projection_are_those_that_the_original_computes(original):
    attention, heads = original.gpt_neox.layers[1].attention, original.config.num_attention_heads
    states = torch.randn(5, SIZE["hidden_size"], generator=torch.Generator().manual_seed(0))
    weight, bias = split_projection(original, 1)
    expected = attention.query_key_value(states).view(5, heads, 3, -1)
    for part in range(3):
        got = states @ weight[part].T + (0 if bias is None else bias[part])
        torch.testing.assert_close(got, expected[:, :, part].flatten(1))


def test_the_converted_model_holds_no_weights_and_runs(exact, tmp_path, ids):
    original = make_original()
    original.save_pretrained(tmp_path / "original")
    on_disk = load_pretrained(str(tmp_path / "original"), torch.float32, {"": "disk"})
    converted = exact_on_disk(on_disk, tmp_path)
    assert all(parameter.is_meta for model in (on_disk, converted) for parameter in model.parameters())
    assert torch.equal(logits(converted, ids), logits(exact(original), ids))
    assert torch.equal(logits(on_disk, ids), logits(original, ids))
    assert all(parameter.is_meta for model in (on_disk, converted) for parameter in model.parameters())
    cache = measure_generated_cache(converted, 30, decoded=3)
    assert (cache.length, 2 * cache.filled) == (30, measure_generated_cache(original, 30).filled)


def test_a_model_in_half_precision_stays_so(ids, exact):
    dtype = torch.bfloat16
    original = make_original()
    expected = logits(original, ids)
    converted = exact(original.to(dtype))
    assert {tensor.dtype for tensor in converted.parameters()} == {dtype}
    got = logits(converted, ids).float()
    assert float((got - expected).norm() / expected.norm()) < 0.1


def test_widths_of_layers_are_written_down_only_where_they_differ():
    original = make_original()
    pairs = [[4, 4]] * 3
    assert context_config(original.config, pairs, [64, 64, 64]).layer_context_dims is None
    config = context_config(original.config, pairs, [32, 48, 40])
    assert config.layer_context_dims == [32, 48, 40] and config.context_dim == 40
    assert config.model_type == "context_pythia" and config.num_hidden_layers == 3


def test_a_weight_without_a_place_is_an_error(exact):
    original = make_original()
    original.gpt_neox.layers[0].register_parameter("stray", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match="stray"):
        exact(original)


def test_too_few_factors_are_an_error(tmp_path):
    original = make_original()
    config = context_config(original.config, [[4, 4]] * 3, [64] * 3)
    factors = [exact_factors(original, layer) for layer in (0, 1)]
    with pytest.raises(RuntimeError, match=r"weight .*layers\.2\.attention\.context\.bias is missing"):
        transplant(original, factors, config, tmp_path, torch.float32)
