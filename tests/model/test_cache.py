import pytest
import torch
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, StaticCache

from context_pythia.model import ContextPythiaConfig
from context_pythia.model.cache import cache_bytes, cached_numbers_per_token, measure_cache

from .conftest import SIZE, build, randomise

PYTHIA_70M = dict(vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048)


def test_numbers_per_token_of_pythia_70m_are_the_designs():
    assert cached_numbers_per_token(GPTNeoXConfig(**PYTHIA_70M)) == 6144
    numbers = {
        ("input", 1): 6144,
        ("shared", 1): 272,
        ("layer", 1): 1536,
        ("layer", 3): 512,
        ("layer", 6): 256,
    }
    for (source, sharing), expected in numbers.items():
        config = ContextPythiaConfig(**PYTHIA_70M, context_source=source, context_sharing=sharing)
        assert cached_numbers_per_token(config) == expected
    assert cache_bytes(GPTNeoXConfig(**PYTHIA_70M), 128) == 3_145_728


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_fills_the_bytes_of_the_formula(model, ids, dtype):
    model = model.to(dtype)
    cache = model.generate(ids, max_new_tokens=40, return_dict_in_generate=True).past_key_values
    measured = measure_cache(cache)
    assert measured.length == 17 + 39
    assert measured.filled == cache_bytes(model.config, 56, batch_size=3, dtype=dtype) > 0


def test_baseline_is_measured_alike(ids):
    model = randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE)))
    measured = measure_cache(model(ids, use_cache=True).past_key_values)
    assert (measured.filled, measured.slack) == (3 * 17 * 2 * 64 * 3 * 4, 0)


@torch.no_grad()
def test_slack_is_shown_apart_and_bounded(ids):
    model = build("layer")
    cache = model(ids, use_cache=True).past_key_values
    for length in range(17, 78):
        measured = measure_cache(cache)
        assert measured.filled == cache_bytes(model.config, length, batch_size=3)
        assert measured.slack <= max(measured.filled // 2, cache_bytes(model.config, 32, batch_size=3))
        cache = model(ids[:, :1], past_key_values=cache).past_key_values
    assert measured.slack > 0


@torch.no_grad()
def test_context_layer_grows_in_place(ids):
    model = build("shared")
    cache = model(ids, use_cache=True).past_key_values
    addresses = [cache.layers[0].keys.data_ptr()]
    for _ in range(32):  # the room that the prefill left
        model(ids[:, :1], past_key_values=cache)
        assert cache.layers[0].keys.data_ptr() == addresses[0]
    for _ in range(200):
        model(ids[:, :1], past_key_values=cache)
        addresses.append(cache.layers[0].keys.data_ptr())
    assert len(set(addresses)) <= 6


@torch.no_grad()
@pytest.mark.parametrize("copied", [torch.clone, lambda keys: keys.double().float()], ids=["clone", "cast"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_copied_cache_grows_on(ids, copied, rows):
    # PyTorch gives the copy of a single sequence the strides of the original, whose room it has not.
    model, caches = build("layer"), []
    for copy in (lambda keys: keys, copied):
        cache = model(ids[:rows], use_cache=True).past_key_values
        for layer in cache.layers:
            layer.keys = copy(layer.keys)
        for _ in range(3):
            model(ids[:rows, :1], past_key_values=cache)
        caches.append(cache)
    assert measure_cache(caches[1]).length == 20
    for layer, plain in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(layer.keys, plain.keys)


def test_static_cache_counts_its_empty_part_as_slack(ids):
    model = build("layer")
    cache = StaticCache(model.config, max_cache_len=50)
    model(ids, past_key_values=cache)
    measured = measure_cache(cache)
    assert measured.filled == cache_bytes(model.config, 17, batch_size=3)
    assert measured.filled + measured.slack == cache_bytes(model.config, 50, batch_size=3)


def test_input_refuses_a_cache_that_cannot_keep_its_state(ids):
    model, cache = build("input"), DynamicCache()
    with pytest.raises(ValueError, match="config=model.config"):
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)


def test_input_cannot_crop_a_past_it_did_not_keep(ids):
    model = build("input")
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)
