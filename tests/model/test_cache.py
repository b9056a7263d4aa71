import copy
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    StaticCache,
    configuration_utils,
)
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from context_pythia.model import ContextPythiaConfig
from context_pythia.model.cache import ContextLayer, cache_bytes, cached_numbers_per_token, measure_cache

from .conftest import SIZE, SOURCES, build, randomise

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


@pytest.mark.parametrize("source", SOURCES)
def test_generate_fills_the_bytes_of_the_formula(source, model, ids):
    dtype = torch.bfloat16 if "token ids" in source else torch.float32
    outputs = model.to(dtype).generate(ids, max_new_tokens=3, return_dict_in_generate=True)
    measured = measure_cache(outputs.past_key_values)
    assert measured.length == 17 + 2
    assert measured.filled == cache_bytes(model.config, 19, batch_size=3, dtype=dtype) > 0


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
    model, addresses = build("layer", num_hidden_layers=1), []
    cache = model(ids, use_cache=True).past_key_values
    for _ in range(100):
        addresses.append(cache.layers[0].keys.data_ptr())
        model(ids[:, :1], past_key_values=cache)
    # The prefill leaves room for 32 tokens, then it grows by half of 50 and so on.
    assert len(set(addresses[:33])) == 1 and len(set(addresses)) <= 4


@torch.no_grad()
@pytest.mark.parametrize("copied", [torch.clone, lambda keys: keys.double().float()], ids=["clone", "cast"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_copied_cache_grows_on(ids, copied, rows):
    # PyTorch gives the copy of a single sequence the strides of the original, whose room it has not.
    model, caches = build("layer"), []
    for copied_keys in (lambda keys: keys, copied):
        cache = model(ids[:rows], use_cache=True).past_key_values
        for layer in cache.layers:
            layer.keys = copied_keys(layer.keys)
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


@pytest.fixture(params=["input", "shared", "layer, shared by 2", "layer, rotary pairs", "layer, token ids"])
def any_model(request):
    return build(request.param)


def step(model, ids, cache) -> torch.Tensor:
    return model(ids, past_key_values=cache, use_cache=True).logits


def shallow(cache):
    """New containers around the same tensors."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


def handed_over(cache):
    """A cache of the user's own making around the same tensors."""
    forked = copy.deepcopy(cache)
    for layer, own in zip(forked.layers, cache.layers, strict=True):
        layer.keys, layer.values = own.keys, own.values
    return forked


@torch.no_grad()
@pytest.mark.parametrize("fork", [shallow, copy.deepcopy, handed_over])
def test_forks_of_a_prefix_leave_each_other_alone(any_model, ids, fork):
    prefix, ends = DynamicCache(config=any_model.config), (ids[:, 8:11], ids[:, 11:14])
    step(any_model, ids[:, :7], prefix)
    step(any_model, ids[:, 7:8], prefix)  # decoded, so that spare room is in use
    held = [layer.keys for layer in prefix.layers if layer.keys is not None]
    before = [keys.clone() for keys in held]
    forks = [fork(prefix), fork(prefix), prefix]
    for end, cache in zip((*ends, ids[:, 14:17]), forks, strict=True):
        for token in end.split(1, dim=1):
            step(any_model, token, cache)
    for end, cache in zip(ends, forks, strict=False):
        whole = torch.cat([ids[:, :8], end, ids[:, :1]], dim=1)
        torch.testing.assert_close(
            step(any_model, ids[:, :1], cache)[:, -1], any_model(whole).logits[:, -1], rtol=0, atol=1e-5
        )
    assert all(torch.equal(keys, copied) for keys, copied in zip(held, before, strict=True))


@torch.no_grad()
def test_tokens_after_a_crop_leave_what_was_cropped_to_who_holds_it(any_model, ids):
    cache = DynamicCache(config=any_model.config)
    cache.activate_past_recording()
    for token in ids[:, :10].split(1, dim=1):
        step(any_model, token, cache)
    held = [layer.keys for layer in cache.layers if layer.keys is not None]
    before = [keys.clone() for keys in held]
    cache.crop(-4)
    logits = torch.cat([step(any_model, part, cache) for part in (ids[:, 10:11], ids[:, 11:14])], dim=1)
    whole = torch.cat([ids[:, :6], ids[:, 10:14]], dim=1)
    torch.testing.assert_close(logits, any_model(whole).logits[:, 6:], rtol=0, atol=1e-5)
    assert all(torch.equal(keys, copied) for keys, copied in zip(held, before, strict=True))
    cache.crop(-cache.get_seq_length())
    torch.testing.assert_close(step(any_model, ids, cache), any_model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "modes",
    [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.enable_grad)],
    ids=lambda modes: " ".join(mode.__name__ for mode in modes),
)
def test_a_prefix_goes_on_in_another_gradient_mode(any_model, ids, modes):
    cache, logits = DynamicCache(config=any_model.config), []
    for mode, parts in zip(modes, ((ids[:, :8], ids[:, 8:9]), (ids[:, 9:10], ids[:, 10:17])), strict=True):
        with mode():
            logits += [step(any_model, part, cache) for part in parts]
    torch.testing.assert_close(torch.cat(logits, dim=1), any_model(ids).logits, rtol=0, atol=1e-5)


def test_gradients_flow_through_a_cache_that_only_the_queries_train(ids):
    model = build("layer")
    model.requires_grad_(False)
    model.gpt_neox.layers[0].attention.query.requires_grad_(True)
    cache = DynamicCache(config=model.config)
    logits = torch.cat([step(model, part, cache) for part in (ids[:, :9], ids[:, 9:10], ids[:, 10:])], dim=1)
    gradients = [
        torch.autograd.grad(out.square().mean(), model.gpt_neox.layers[0].attention.query.weight)[0]
        for out in (logits, model(ids).logits)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("half", ["prefill", "decoding"])
def test_a_prefix_goes_on_in_another_precision(any_model, ids, half):
    cache = DynamicCache(config=any_model.config)
    with torch.autocast("cpu", torch.bfloat16) if half == "prefill" else nullcontext():
        step(any_model, ids[:, :9], cache)
    with torch.autocast("cpu", torch.bfloat16) if half == "decoding" else nullcontext():
        logits = torch.cat([step(any_model, part, cache) for part in (ids[:, 9:10], ids[:, 10:])], dim=1)
    expected = any_model(ids).logits
    assert (logits.float() - expected[:, 9:]).abs().mean() < 0.01 * expected.std()


@torch.no_grad()
def test_the_wider_of_two_dtypes_holds_both_as_in_the_stock_layer():
    old, new = (torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    for first, second in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        ours, stock = ContextLayer(), DynamicLayer()
        for layer in (ours, stock):
            for tensor in (old.to(first), new.to(second), new.to(second)):
                layer.update(tensor, tensor[..., :0])
        assert ours.keys.dtype == stock.keys.dtype == torch.float32
        assert torch.equal(ours.keys, stock.keys)
        assert ours.values.shape == stock.values.shape == (2, 1, 9, 0)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            ours.update(new[:1], new[:1, ..., :0])


@torch.no_grad()
def test_a_static_cache_that_was_initialized_early_fills_in_chunks(any_model, ids):
    heads = any_model.config.num_attention_heads
    cache = StaticCache(config=any_model.config, max_cache_len=20)
    cache.early_initialization(3, heads, 64 // heads, torch.float32, "cpu")
    for _ in range(2):
        logits = [step(any_model, part, cache) for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:])]
        torch.testing.assert_close(torch.cat(logits, dim=1), any_model(ids).logits, rtol=0, atol=1e-5)
        assert measure_cache(cache).filled == cache_bytes(any_model.config, 17, batch_size=3)
        cache.reset()


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_an_offloaded_layer_is_back_when_it_is_read(any_model, ids, static, monkeypatch):
    # No second device here: what is offloaded stands on none, and streams do nothing.
    def offload(layer):
        if layer.is_initialized and layer.keys.device.type != "meta":
            layer.away = layer.keys, layer.values
            layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")

    def prefetch(layer):
        if layer.is_initialized and layer.keys.device.type == "meta":
            layer.keys, layer.values = layer.away

    monkeypatch.setattr(CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(CacheLayerMixin, "prefetch", prefetch)
    monkeypatch.setattr(torch.cuda, "default_stream", MagicMock())
    kind = dict(max_cache_len=20) if static else {}
    cache = (StaticCache if static else DynamicCache)(config=any_model.config, offloading=True, **kind)
    cache.prefetch_stream = MagicMock()
    logits = [step(any_model, part, cache) for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:])]
    torch.testing.assert_close(torch.cat(logits, dim=1), any_model(ids).logits, rtol=0, atol=1e-5)
    assert [layer for layer in cache.layers if layer.keys is not None][-1].keys.device.type == "meta"


@pytest.mark.parametrize("source", ["input", "shared", "layer, rotary keys reused", "layer, token ids"])
def test_compiled_decoding_is_one_graph_and_writes_the_same(source, ids):
    model = build(source, num_hidden_layers=1, context_layers=None, layer_context_dims=None)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    expected = model.generate(ids, **settings)
    # fullgraph: a break raises. Without dynamic shapes a stride that grows compiles each step anew.
    compiling = CompileConfig(backend="eager", mode=None, fullgraph=True, dynamic=False)
    compiling._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings |= dict(cache_implementation="static", compile_config=compiling)
    assert model.generate(ids, **settings).tolist() == expected.tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
@pytest.mark.skipif(
    not hasattr(configuration_utils, "get_head_shapes"), reason="this transformers exports one shape for all layers"
)
def test_exported_decoding_takes_any_number_of_tokens_that_is_absorbed(ids):
    # Widths that differ. Heads of 16 dims: more new tokens than that would be another branch.
    model = build(
        "layer, rotary pairs", num_hidden_layers=2, rotary_pairs=[[4, 1], [2, 2]], layer_context_dims=[25, 21]
    )
    model.generation_config.cache_implementation = "static"
    module = TorchExportableModuleForDecoderOnlyLM(model, batch_size=3, max_cache_len=20)
    tokens = torch.export.Dim("tokens", min=2, max=16)
    exported = module.export(
        input_ids=ids[:, :9],
        cache_position=torch.arange(9),
        dynamic_shapes=dict(input_ids={1: tokens}, cache_position={0: tokens}),
        strict=False,
    ).module()
    logits = [
        exported(input_ids=ids[:, part], cache_position=torch.arange(17)[part]) for part in (slice(5), slice(5, 17))
    ]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_token_ids_export_with_any_length(ids):
    model, given = build("layer, token ids"), dict(input_ids=ids[:, :5], use_cache=False)
    shapes = dict(input_ids={1: torch.export.Dim("tokens", min=2, max=16)}, use_cache=None)
    exported = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False).module()
    for length in (2, 9):
        given["input_ids"] = ids[:, :length]
        torch.testing.assert_close(exported(**given).logits, model(**given).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_recurrence_exports_with_a_static_length_alone(ids):
    model, given = build("shared", num_hidden_layers=1), dict(input_ids=ids[:, :3], use_cache=False)
    with pytest.raises(ValueError, match="export it with a static length"):
        shapes = dict(input_ids={1: torch.export.Dim("tokens", min=2, max=16)}, use_cache=None)
        torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)
    exported = torch.export.export(model, (), given, strict=False).module()
    torch.testing.assert_close(exported(**given).logits, model(**given).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("training", "expected"), [(False, [2]), (True, [0, 2])])
def test_a_context_that_no_layer_reads_any_more_is_let_go(ids, training, expected):
    model, left = build("layer, shared by 2"), []
    last = model.gpt_neox.layers[-1]
    last.register_forward_hook(lambda *given: left.extend(given[2]["contexts"]._made), with_kwargs=True)
    with torch.set_grad_enabled(training):
        model(ids)
    assert left == expected
