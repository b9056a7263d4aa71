import pytest
import torch
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM, flash_decoding
from context_pythia.model import attention as attention_module
from context_pythia.model.attention import turn_rotary_keys, turned_scores

from .conftest import SIZE, SOURCES, build, randomise


def as_pairs(keys: torch.Tensor) -> torch.Tensor:
    """`[H, d, ...]` -> `[H d, ...]`: real parts first, by frequency and head."""
    return keys.unflatten(1, (2, -1)).movedim(0, 2).flatten(0, 2)


def transplant(model: ContextPythiaForCausalLM, original: GPTNeoXForCausalLM) -> None:
    """Full rank: the latent is the layer's input itself, so keys and values are the original's."""
    heads, size, rotary = 4, 16, model.config.rotary_dim
    state = original.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if "query_key_value" not in k}, strict=False)
    for ours, theirs in zip(model.gpt_neox.layers, original.gpt_neox.layers, strict=True):
        attention, qkv = ours.attention, theirs.attention.query_key_value
        weight = qkv.weight.view(heads, 3, size, -1)
        bias = None if qkv.bias is None else qkv.bias.view(heads, 3, size)
        with torch.no_grad():
            attention.query.weight.copy_(weight[:, 0].flatten(0, 1))
            attention.context.weight.copy_(torch.cat([as_pairs(weight[:, 1, :rotary]), torch.eye(64)]))
            own = torch.eye(heads).repeat(1, rotary // 2)  # each head's own pair at each frequency
            attention.rotary_up.weight.copy_(torch.stack([own, torch.zeros_like(own)], dim=-1))
            attention.key_up.weight.copy_(weight[:, 1, rotary:].flatten(0, 1))
            attention.value_up.weight.copy_(weight[:, 2].flatten(0, 1))
            if bias is not None:
                attention.query.bias.copy_(bias[:, 0].flatten())
                attention.context.bias.copy_(torch.cat([as_pairs(bias[:, 1, :rotary]), torch.zeros(64)]))
                attention.value_up.bias.copy_(bias[:, 2].flatten())


@pytest.mark.parametrize("attention_bias", [True, False])
@pytest.mark.parametrize("use_parallel_residual", [True, False])
def test_layer_at_full_rank_is_gpt_neox(ids, attention_bias, use_parallel_residual):
    form = dict(attention_bias=attention_bias, use_parallel_residual=use_parallel_residual)
    original = randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE, **form)))
    config = ContextPythiaConfig(**SIZE, **form, context_source="layer", context_dim=4 * 4 + 64, num_rotary_keys=4)
    model = ContextPythiaForCausalLM(config).eval()
    transplant(model, original)
    expected, actual = original(ids).logits, model(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_input_is_gpt_neox_when_its_projection_gives_the_embeddings(ids):
    original = randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE)))
    model = ContextPythiaForCausalLM(ContextPythiaConfig(**SIZE, context_source="input", context_dim=20)).eval()
    model.load_state_dict(original.state_dict(), strict=False)
    embeddings = original.gpt_neox.embed_in(ids)
    model.gpt_neox.context_proj.register_forward_hook(lambda *_: embeddings)
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=1e-5)


def attention_arguments(model, queries: int, length: int):
    attention = model.gpt_neox.layers[-1].attention
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(3, 4, queries, 16, generator=generator, requires_grad=True)
    width = attention.content_dim if attention.reuse_rotary_keys else attention.rotary_width + attention.content_dim
    context = torch.randn(3, 1, length, width, generator=generator, requires_grad=True)
    mask = torch.ones(queries, length, dtype=torch.bool).tril(length - queries).expand(3, 1, -1, -1).clone()
    mask[0, :, :, :2] = False
    with torch.no_grad():
        positions = model.gpt_neox.rotary_emb(context, position_ids=torch.arange(length).unsqueeze(0))
    return attention, query, context, mask, positions


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("source", [name for name in SOURCES if name.startswith(("shared", "layer"))])
def test_absorbed_is_expanded_gradients_included(source, queries, implementation):
    model = build(source)
    model.set_attn_implementation(implementation)
    attention, query, context, mask, positions = attention_arguments(model, queries, 9)
    if implementation == "eager":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    results = []
    for method in (attention.expanded, attention.absorbed):
        query.grad = context.grad = None
        attention.zero_grad()
        output, weights = method(query, context, mask, positions)
        (output * torch.arange(64.0)).sum().backward()
        gradients = [attention.key_up.weight.grad, attention.value_up.weight.grad, attention.value_up.bias.grad]
        results.append([output, query.grad, context.grad, *gradients] + ([] if weights is None else [weights]))
    assert len(results[0]) == (7 if implementation == "eager" else 6)
    for expanded, absorbed in zip(*results, strict=True):
        torch.testing.assert_close(
            absorbed, expanded, rtol=1e-5, atol=1e-5 * expanded.detach().abs().max().clamp(min=1).item()
        )


def test_eager_is_sdpa(model, ids):
    sdpa = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, sdpa, rtol=0, atol=1e-5)
    assert model(ids, output_attentions=True).attentions[0].shape == (3, 4, 17, 17)


def test_decoding_attends_absorbed_and_prefill_expanded(ids, monkeypatch):
    model, calls = build("layer"), []
    for name in ("absorbed", "expanded"):
        method = getattr(type(model.gpt_neox.layers[0].attention), name)
        spy = lambda self, *a, _name=name, _method=method, **k: calls.append(_name) or _method(self, *a, **k)  # noqa: E731
        monkeypatch.setattr(type(model.gpt_neox.layers[0].attention), name, spy)
    cache = model(ids, use_cache=True).past_key_values
    assert calls == ["expanded"] * 3
    model(ids[:, :1], past_key_values=cache)
    assert calls[3:] == ["absorbed"] * 3


def test_rotary_keys_turned_in_parts_score_as_turned_whole(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    query, keys = (torch.randn(3, n, 24, generator=generator, requires_grad=True) for n in (4, 11))
    angles = torch.randn(3, 11, 12, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    weights = torch.randn(3, 4, 11, generator=generator)
    whole = query @ turn_rotary_keys(keys, (cos, sin)).transpose(1, 2)
    expected = [whole, *torch.autograd.grad((whole * weights).sum(), (query, keys))]
    plain = turned_scores(query, keys, (cos, sin))
    actual = [plain, *torch.autograd.grad((plain * weights).sum(), (query, keys))]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for tables in ((cos, sin), (cos[:1], sin[:1])):  # of each sequence, or of all alike
        whole = query @ turn_rotary_keys(keys, tables).transpose(1, 2)
        for numbers in (1, 48 * 3 * 4, 10**6):  # parts of one token, of four, and of all
            monkeypatch.setattr(attention_module, "TURNED_NUMBERS", numbers)
            with torch.no_grad():
                torch.testing.assert_close(turned_scores(query, keys, tables), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_attention_by_all_threads_decodes_the_same(model, ids, monkeypatch):
    monkeypatch.setattr(flash_decoding, "LEAST_TOKENS", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    whole, cache = model(ids).logits, DynamicCache(config=model.config)
    logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(17)]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", [kind for kind in SOURCES if kind.startswith("layer")])
@torch.no_grad()
def test_values_from_a_context_begin_as_large_as_those_of_gpt_neox(source):
    torch.manual_seed(0)
    config = ContextPythiaConfig(**SIZE | SOURCES[source])
    layers = ContextPythiaForCausalLM(config).gpt_neox.layers
    context, value_up = layers[config.makers[1]].attention.context, layers[1].attention.value_up
    content = context(torch.randn(1000, 64))[:, -value_up.context_columns :]
    values = content @ value_up.weight[:, : value_up.context_columns].T
    torch.testing.assert_close(values.std(), torch.tensor(config.initializer_range * 64**0.5), rtol=0.25, atol=0)
