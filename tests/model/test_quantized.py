"""`generate(cache_implementation="quantized")`: what GPT-NeoX can, with the smaller cache in it."""

import pytest
from transformers.cache_utils import DynamicLayer, QuantizedCache, QuantizedLayer

from context_pythia.evaluation.memory import cache_of
from context_pythia.model.cache import measure_cache
from context_pythia.model.quantized import hold_contexts

from .conftest import KINDS, build
from .test_generation import generate

HQQ = dict(backend="hqq", nbits=8, axis_key=1, axis_value=1, q_group_size=16, residual_length=8)


# Token ids are refused (test_token_ids.py), and grouped heads of 16 do not fill hqq's groups of 64.
@pytest.mark.parametrize("source", KINDS[:-2])
def test_eight_bits_write_the_same_text_from_half_the_bytes(model, ids):
    pytest.importorskip("hqq")
    ids, quantized = ids[:2], dict(cache_implementation="quantized", cache_config=dict(HQQ))
    own = generate(model, ids, tokens=20, return_dict_in_generate=True)
    found = generate(model, ids, tokens=20, return_dict_in_generate=True, **quantized)
    assert found.sequences.tolist() == own.sequences.tolist()
    plain, measured = measure_cache(cache_of(own)), measure_cache(cache_of(found))
    assert measured.length == plain.length == 36
    assert measured.filled < 0.55 * plain.filled
    if hasattr(QuantizedLayer, "_apply_pending_reorder"):  # older versions of the host do not reorder
        assert generate(model, ids, mode="beams", **quantized).tolist() == generate(model, ids, mode="beams").tolist()
    # The host's own settings: four bits, groups of 64 over all tokens. It takes the backend out of what it is given.
    quantized["cache_config"] = {"backend": "hqq"}
    four = generate(model, ids, return_dict_in_generate=True, **quantized)
    assert measure_cache(cache_of(four)).filled < 0.8 * plain.filled
    assert quantized["cache_config"] == {"backend": "hqq"}


def test_another_backend_is_refused_in_one_line():
    cache = QuantizedCache.__new__(QuantizedCache)
    cache.layers = [DynamicLayer() for _ in range(3)]
    with pytest.raises(ValueError, match="DynamicLayer: contexts need the backend 'hqq': give"):
        hold_contexts(cache, build("layer").config)
