import copy
from itertools import product

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    StaticCache,
)

from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM

from .conftest import KINDS, SIZE, SOURCES, build

CLOSE = dict(rtol=0, atol=1e-5)


def token_by_token(model, ids, cache):
    return torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])], dim=1)


# A stock cache, made without the config, keeps no recurrent state of "input": test_cache.py has its refusal. A static
# cache is filled by the chunks below.
@pytest.mark.parametrize(("source", "kind"), [*product(SOURCES, ["ours"]), *product(KINDS[1:], ["stock"])])
@torch.no_grad()
def test_token_by_token_is_one_forward(model, ids, kind):
    whole = model(ids).logits
    assert whole.std() > 0.5
    cache = DynamicCache(config=model.config) if kind == "ours" else DynamicCache()
    torch.testing.assert_close(token_by_token(model, ids, cache), whole, **CLOSE)


@torch.no_grad()
def test_the_cache_has_two_names_and_any_other_is_refused(ids):
    model = build("layer", num_hidden_layers=1)
    whole = model(ids).logits[:, 8:]
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config)
        model(ids[:, :8], **{name: cache})
        torch.testing.assert_close(model.gpt_neox(ids[:, 8:], **{name: cache})[0] @ model.lm_head.weight.t(), whole)
        assert cache.get_seq_length() == 17
    for others in (dict(kv_cache=cache), dict(past_key_values=cache, cache=DynamicCache(config=model.config))):
        with pytest.raises(ValueError, match="give"):
            model.gpt_neox(ids, **others)
    with pytest.raises(ValueError, match="kv_cache: no argument of this model"):
        model(ids, kv_cache=cache)


@torch.no_grad()
def test_chunks_through_the_cache_are_one_forward(model, ids):
    whole = model(ids).logits
    for kind in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=20)):
        parts = [model(ids[:, a:b], past_key_values=kind).logits for a, b in ((0, 6), (6, 7), (7, 17))]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


def padded(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    starts = [0, 5, 11]
    mask = torch.ones_like(ids)
    for row, start in enumerate(starts):
        mask[row, :start] = 0
    return ids * mask, mask, starts


@torch.no_grad()
def test_left_padded_batch_is_its_single_rows(model, ids):
    batch, mask, starts = padded(ids)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=positions).logits
    for row, start in enumerate(starts):
        torch.testing.assert_close(logits[row : row + 1, start:], model(ids[row : row + 1, start:]).logits, **CLOSE)


def test_left_padded_generation_is_that_of_single_rows(model, ids):
    batch, mask, starts = padded(ids)
    settings = dict(max_new_tokens=8, do_sample=False, cache_implementation="static")
    together = model.generate(batch, attention_mask=mask, **settings)[:, 17:]
    for row, start in enumerate(starts):
        alone = model.generate(ids[row : row + 1, start:], **settings)[0, 17 - start :]
        assert together[row].tolist() == alone.tolist()


@torch.no_grad()
def test_cropped_cache_goes_on_as_if_never_longer(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], past_key_values=cache)
    cache.activate_past_recording()
    model(ids[:, 8:14].flip(1), past_key_values=cache)
    cache.crop(-6)
    assert cache.get_seq_length() == 8
    logits = model(ids[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 8:], **CLOSE)


@pytest.mark.parametrize("source", [kind for kind in KINDS if kind != "layer, token ids"])  # refused there
@torch.no_grad()
def test_embeddings_stand_in_for_ids(model, ids):
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits, rtol=0, atol=0)
    settings = dict(max_new_tokens=6, do_sample=False)
    assert (
        model.generate(inputs_embeds=embeddings, **settings).tolist()
        == model.generate(ids, **settings)[:, 17:].tolist()
    )


def test_gradient_checkpointing_changes_no_gradient(model, ids):
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("source", ["layer, shared by 2", "shared"])
def test_reentrant_checkpointing_gives_the_same_gradients(source, ids):
    gradients = []
    for checkpointing in (False, True):
        model = build(source).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": True})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("source", ["layer, shared by 2", "shared"])
def test_reentrant_checkpointing_by_torchs_own_wrapper_is_refused(source, ids):
    model = build(source).train()
    model.enable_input_require_grads()
    for i, layer in enumerate(model.gpt_neox.layers):
        model.gpt_neox.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.REENTRANT)
    with pytest.raises(RuntimeError, match="give use_reentrant=False"):
        model(ids, labels=ids, use_cache=False).loss.backward()


@torch.no_grad()
def test_dropout_of_the_embedding_reaches_every_context(source, ids):
    model = build(source, hidden_dropout=0.5)

    def first_cached() -> torch.Tensor:
        return model(ids, use_cache=True).past_key_values.layers[0].keys

    torch.testing.assert_close(first_cached(), first_cached())
    model.train()
    assert (first_cached() - first_cached()).abs().max() > 0.1


@torch.no_grad()
def test_dropout_drops_numbers_of_the_context_that_all_layers_share(ids):
    model = build("shared", hidden_dropout=0.5).train()
    latent = model(ids, use_cache=True).past_key_values.layers[0].keys[..., model.config.rotary_dim :]
    assert 0.4 < (latent == 0).float().mean() < 0.6
    model.eval()
    assert (model(ids, use_cache=True).past_key_values.layers[0].keys != 0).all()


def test_every_parameter_is_trained(model, ids):
    model(ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_saved_model_loads_through_the_auto_classes(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ContextPythiaConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, ContextPythiaForCausalLM)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


@torch.no_grad()
def test_half_precision_generates_and_stays_near_fp32(model, ids):
    expected = model(ids).logits
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        logits = half(ids).logits
        assert logits.dtype == dtype
        assert (logits.float() - expected).abs().mean() < 0.15 * expected.std()
        assert half.generate(ids, max_new_tokens=4).shape == (3, 21)


def test_fresh_context_block_has_the_initialization_that_oacd_needs():
    model = ContextPythiaForCausalLM(ContextPythiaConfig(**{**SIZE, "hidden_size": 256}, context_source="shared"))
    layer = model.gpt_neox.context_block.layers[0]
    assert layer.dense.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert layer.dense.bias.std().item() == pytest.approx(0.01, rel=0.2)
    assert model.gpt_neox.layers[0].attention.query.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_fresh_token_shift_goes_from_the_token_to_the_one_before():
    options = dict(context_source="layer", context_dim=8, cache_token_ids=True)
    model = ContextPythiaForCausalLM(ContextPythiaConfig(**SIZE, **options))
    torch.testing.assert_close(model.gpt_neox.token_shift.weight.detach(), torch.arange(64) / 64, rtol=0, atol=0)


def test_pythia_70m_has_the_reports_parameters():
    size = dict(vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048)
    with torch.device("meta"):
        baseline = GPTNeoXForCausalLM(GPTNeoXConfig(**size))
        model = ContextPythiaForCausalLM(ContextPythiaConfig(**size, context_source="input"))
    assert baseline.num_parameters() == 70_426_624
    assert model.num_parameters() == 70_756_608
    model.gpt_neox.context_block.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == 70_559_232


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(context_dim=0), "context_dim 0"),
        (dict(context_dim=129), "context_dim 129: must be between 1 and 2 \\* hidden_size = 128"),
        (dict(context_dim=4), "leaves no latent"),
        (dict(context_dim=16, num_rotary_keys=4), "leaves no latent"),
        (dict(context_source="both"), "context_source 'both': must be one of input, shared, layer"),
        (dict(context_sharing=0), "context_sharing 0"),
        (dict(context_layers=[0, 1]), r"context_layers \[0, 1\]: must have 3 entries, each the layer's own index or"),
        (dict(context_layers=[0, 2, 2]), r"context_layers \[0, 2, 2\]"),
        (dict(context_layers=[0, 1, 0]), r"context_layers \[0, 1, 0\]"),
        (dict(context_layers=[0, 0, 2], context_sharing=2), "context_sharing 2: must be 1 beside context_layers"),
        (dict(context_layers=[0, 0, 2], layer_context_dims=[9, 9, 4]), "layer_context_dims 4 of layer 2: leaves"),
        (dict(context_source="shared", context_layers=[0, 1, 2]), "must be 'layer' beside context_layers"),
        (dict(num_rotary_keys=3), "num_rotary_keys 3"),
        (dict(context_block_layers=0), "context_block_layers 0"),
    ],
)
def test_impossible_contexts_are_refused_by_name(wrong, message):
    with pytest.raises(Exception, match=message):
        ContextPythiaConfig(**{**SIZE, "context_dim": 20, **wrong})


@torch.no_grad()
def test_groups_of_equal_size_are_a_case_of_contexts_by_layers(ids):
    by_size = build("layer, shared by 2")
    by_layers = build("layer, shared by 2", context_sharing=1, context_layers=[0, 0, 2], layer_context_dims=[23, 0, 23])
    torch.testing.assert_close(by_layers(ids).logits, by_size(ids).logits, rtol=0, atol=0)
