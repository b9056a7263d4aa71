"""`generate(cache_implementation="quantized")`: what GPT-NeoX can, with the smaller cache in it."""

import pytest
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, cache_utils
from transformers.cache_utils import QuantizedCache, QuantizedLayer

from context_pythia.evaluation.memory import cache_of
from context_pythia.evaluation.quantized import measure_quantized
from context_pythia.model.cache import measure_cache
from context_pythia.model.quantized import full_attention, hold_contexts

from .conftest import KINDS, SIZE, build, randomise
from .test_generation import GPT_NEOX, generate

HQQ = dict(backend="hqq", nbits=8, axis_key=1, axis_value=1, q_group_size=16, residual_length=8)


# Token ids are refused (test_token_ids.py), and grouped heads of 16 do not fill hqq's groups of 64.
@pytest.mark.parametrize("family", [GPT_NEOX, *KINDS[:-2]])
def test_eight_bits_write_the_same_text_from_half_the_bytes(family, ids):
    pytest.importorskip("hqq")
    model = randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE))) if family == GPT_NEOX else build(family)
    ids, quantized = ids[:2], dict(cache_implementation="quantized", cache_config=dict(HQQ))
    own = generate(model, ids, tokens=20, return_dict_in_generate=True)
    found = generate(model, ids, tokens=20, return_dict_in_generate=True, **quantized)
    assert found.sequences.tolist() == own.sequences.tolist()
    plain, measured = measure_cache(cache_of(own)), measure_quantized(cache_of(found))
    assert measured.length == plain.length == 36
    assert measured.filled < 0.55 * plain.filled
    if hasattr(QuantizedLayer, "_apply_pending_reorder"):  # older versions of the host do not reorder
        assert generate(model, ids, mode="beams", **quantized).tolist() == generate(model, ids, mode="beams").tolist()
    # The host's own settings: four bits, groups of 64 over all tokens. It takes the backend out of what it is given.
    quantized["cache_config"] = {"backend": "hqq"}
    four = generate(model, ids, return_dict_in_generate=True, **quantized)
    assert measure_quantized(cache_of(four)).filled < 0.8 * plain.filled
    assert quantized["cache_config"] == {"backend": "hqq"} or family == GPT_NEOX


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8 cache")
@pytest.mark.parametrize("source", ["input", "shared", "layer, shared by 2"])
def test_fp8_takes_contexts_too(source, ids):
    model, settings = build(source), dict(tokens=9, return_dict_in_generate=True)
    own = generate(model, ids, **settings)
    found = generate(model, ids, cache_implementation="quantized", cache_config={"backend": "fp8"}, **settings)
    plain, measured = measure_cache(cache_of(own)), measure_quantized(cache_of(found))
    assert measured.length == plain.length and measured.filled < 0.3 * plain.filled
    assert (found.sequences == own.sequences)[:, 17:].float().mean() > 0.6


def test_a_backend_that_was_not_tried_with_contexts_is_refused_in_one_line():
    class OtherLayer(QuantizedLayer):
        _quantize = _dequantize = None

    model = build("layer")
    cache = QuantizedCache.__new__(QuantizedCache)
    cache.layers = [OtherLayer() for _ in range(3)]
    with pytest.raises(ValueError, match=r"OtherLayer: contexts need the backend 'hqq' or 'fp8'; give"):
        hold_contexts(cache, model.config)
    assert full_attention(model.config).num_hidden_layers == 3
