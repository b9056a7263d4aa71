"""Quantized caches: what they hold, what it costs, and that nothing else becomes quantized by them."""

import pytest
import torch
from transformers import DynamicCache, GPTNeoXConfig
from transformers.cache_utils import HQQQuantizedLayer, QuantizedCache, QuantizedLayer

from context_pythia.errors import UsageError
from context_pythia.evaluation import quantized
from context_pythia.evaluation.perplexity import score_cached
from context_pythia.evaluation.quantized import (
    quantized_cache,
    residual_length,
)
from context_pythia.model.cache import ContextLayer, measure_cache, previous_context
from context_pythia.model.configuration import ContextPythiaConfig
from context_pythia.model.quantized import hold_contexts
from tests.evaluation.conftest import build

pytest.importorskip("hqq")


def test_token_ids_are_refused_in_one_line():
    with pytest.raises(UsageError, match="quantized cache: this model caches token ids"):
        quantized_cache(ContextPythiaConfig(context_dim=64, cache_token_ids=True), "int8", 64)


@pytest.mark.parametrize("width", [5, 64, 67, 130])
@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.15)])
def test_contexts_of_any_width_come_back(width, bits, error):
    cache = QuantizedCache("hqq", GPTNeoXConfig(num_hidden_layers=2), nbits=bits, residual_length=1)
    config = ContextPythiaConfig(hidden_size=128, num_attention_heads=16, num_hidden_layers=2, context_dim=width)
    layer = hold_contexts(cache, config).layers[0]
    contexts = torch.randn(1, 1, 9, width, generator=torch.Generator().manual_seed(0))
    for t in range(9):
        new = contexts[:, :, t : t + 1]
        keys, values = layer.update(new, new[..., :0])
    assert keys.shape == contexts.shape and values.shape == (1, 1, 9, 0)
    assert torch.equal(keys[:, :, -1], contexts[:, :, -1])
    lost = (keys - contexts)[:, :, :-1].norm() / contexts[:, :, :-1].norm()
    assert error / 50 < lost < error


@pytest.mark.parametrize(("kind", "numbers"), [("int8", 68), ("int4", 34)])
def test_bytes_are_those_of_integers_scales_zero_points_and_waiting_tokens(kind, numbers):
    config = build("layer", hidden_size=64, context_dim=67).config
    cache = quantized_cache(config, kind, length=33)
    for layer in range(config.num_hidden_layers):
        for _ in range(36):
            cache.update(torch.randn(3, 1, 1, 67), torch.randn(3, 1, 1, 0), layer)
    # 67 numbers are two groups of 34; of the 36 tokens one waits, since they are quantized two by two.
    measured = measure_cache(cache)
    assert measured.length == 36
    assert measured.filled == 2 * 3 * (35 * (numbers + 2 * 2 * 4) + 67 * 4)


@pytest.mark.parametrize("source", ["input", "layer"])
def test_fewer_bits_diverge_more_and_hold_less(source, dataset):
    model = build(source, hidden_size=128, context_dim=80)
    own = score_cached(model, dataset, 1000, progress=False)
    found = [
        score_cached(
            model,
            dataset,
            1000,
            lambda kind=kind: quantized_cache(model.config, kind, 17),
            reference=model,
            progress=False,
        )
        for kind in ("int8", "int4")
    ]
    assert 1e-7 < found[0].kl < 0.02 < found[1].kl
    assert own.measurement.filled > 2 * found[0].measurement.filled > 2 * found[1].measurement.filled


def test_gpt_neox_gets_the_stock_layers_and_other_caches_stay_as_they_are():
    stock = quantized_cache(build("pythia").config, "int4", 64)
    assert [type(layer) for layer in stock.layers] == [HQQQuantizedLayer] * 2
    config = build("layer", context_sharing=2).config
    assert [type(layer).__name__ for layer in quantized_cache(config, "int8", 64).layers] == [
        "QuantizedContextLayer",
        type(DynamicCache(config=config).layers[1]).__name__,
    ]
    assert type(DynamicCache(config=config).layers[0]) is ContextLayer


def test_few_tokens_are_left_unquantized():
    assert (residual_length(1), residual_length(128), residual_length(2048)) == (1, 7, 127)
    assert max((length - 1) % residual_length(length) for length in range(1, 3000)) <= 15


@torch.no_grad()
def test_the_recurrence_of_shared_goes_on_from_the_exact_state():
    model = build("shared", hidden_size=64, context_dim=64)
    ids = torch.randint(0, 61, (3, 30), generator=torch.Generator().manual_seed(0))
    exact, cache = DynamicCache(config=model.config), quantized_cache(model.config, "int4", 30)
    for part in [ids[:, :4], *ids[:, 4:].split(1, dim=1)]:
        for held in (exact, cache):
            model(part, past_key_values=held, use_cache=True)
        expected = exact.layers[0].keys[:, 0, -1, model.config.rotary_dim :]
        assert torch.equal(previous_context(model.config, cache), expected)
    if not hasattr(QuantizedLayer, "_apply_pending_reorder"):
        return  # older versions of the host do not reorder
    for held in (exact, cache):
        held.reorder_cache(torch.tensor([2, 0, 0]))
    expected = exact.layers[0].keys[:, 0, -1, model.config.rotary_dim :]
    assert torch.equal(previous_context(model.config, cache), expected)


def test_a_missing_backend_is_named_with_the_mend(monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs HQQ: pip install 'context-pythia\[quantized\]'"):
        quantized_cache(build("pythia").config, "int8", 64)
