from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from context_pythia.model import ContextPythiaForCausalLM
from context_pythia.model.cache import cached_numbers_per_token
from context_pythia.model.layer_contexts import from_digits, to_digits
from tests.model.conftest import build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ids_are_exact_in_every_type(dtype):
    ids = torch.tensor([[0, 1, 255, 256, 50303, 65535, 65536, 2**24 - 1]])
    digits = to_digits(ids, 3).to(dtype)
    assert digits.shape == (1, 8, 3)
    assert torch.equal(from_digits(digits)[0], ids)
    begins = torch.tensor([[True, False] * 4])
    again, before = from_digits(to_digits(ids, 3, begins=begins).to(dtype))
    assert torch.equal(again, ids) and before.tolist() == [[-1, 0, -1, 2, -1, 4, -1, 6]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_token_before_another_is_the_last_one_of_its_text(dtype):
    ids = torch.tensor([[9, 9, 300, 301, 302, 303, 304, 305], [300, 301, 9, 9, 302, 303, 9, 304]])
    is_text = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 0, 1]]).bool()
    begins = torch.tensor([[0, 0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]).bool()
    stored, before = from_digits(to_digits(ids, 2, is_text, begins).to(dtype))
    assert torch.equal(stored, ids * is_text)
    assert before[0].tolist() == [-1, -1, -1, 2, 3, -1, 5, 6]
    assert before[1][is_text[1]].tolist() == [-1, 0, 1, 4, -1]


@pytest.mark.parametrize(("vocab_size", "digits"), [(256, 1), (257, 2), (65536, 2), (65537, 3)])
def test_an_id_takes_as_many_numbers_as_the_vocabulary_needs(vocab_size, digits):
    config = build("layer, token ids").config
    before = cached_numbers_per_token(config)
    config.vocab_size = vocab_size
    assert cached_numbers_per_token(config) == before - 1 + digits == 4 + 23 + digits


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_cached_token_is_looked_up_by_its_own_id(dtype):
    """Ids of two digits, far apart in their embeddings, through the cache against one forward pass."""
    model = build("layer, token ids", vocab_size=700).to(dtype)
    ids = torch.tensor([[3, 259, 515, 256, 255, 699, 0, 512]])
    whole, cache = model(ids).logits, DynamicCache(config=model.config)
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])]
    assert cache.layers[0].keys.shape == (1, 1, 8, 4 + 2) and cache.layers[0].keys.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-10, rtol=0)
    other = model(ids[:, :1] + 256).logits
    assert not torch.allclose(other, whole[:, :1], atol=0.1)
    stored, before = from_digits(cache.layers[0].keys[:, 0, :, -2:])
    assert torch.equal(stored, ids) and before.tolist() == [[-1, 0, 1, 2, 3, 4, 5, 6]]


@torch.no_grad()
def test_an_embedding_is_mixed_with_that_of_the_token_before_it(ids):
    """The formula, written out: e_t = x_t + m (x_{t-1} - x_t), with the norm of the embedding as x."""
    body = build("layer, token ids").double().gpt_neox
    x = body.token_norm(body.embed_in(ids))
    previous = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    before = torch.arange(ids.shape[1]).sub(1).expand_as(ids)
    expected = x + body.token_shift.weight * (previous - x)
    torch.testing.assert_close(body.embed_token(ids, before), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_mix_looked_up_in_a_table_is_the_computed_one(dtype):
    body = build("layer, token ids").gpt_neox.to(dtype)
    ids = torch.tensor([[9, 3, 96, 3], [0, 5, 9, 9]])
    before = torch.tensor([[-1, 0, 1, 2], [-1, -1, 1, -1]])
    looked_up = body.token_shift.look_up(ids, before, body.token_table(1))
    assert looked_up.dtype == dtype and not looked_up[..., :23].any()
    # In bfloat16 a number near 2 is rounded by up to 2**-8, once in the table, once in the sum.
    atol = 1e-12 if dtype == torch.float64 else 2**-6
    torch.testing.assert_close(looked_up[..., 23:], body.embed_token(ids, before), rtol=0, atol=atol)


@torch.no_grad()
def test_the_first_layer_reads_which_token_came_before():
    """With no latent in the first context and a rotary key alone, a key of layer 0 still differs by its predecessor."""
    model = build("layer, token ids")
    attention, seen = model.gpt_neox.layers[0].attention, []
    attention.key_up.register_forward_hook(lambda _, __, keys: seen.append(keys[0, -1]))
    model(torch.tensor([[5, 6, 7]]), use_cache=False)
    model(torch.tensor([[5, 8, 7]]), use_cache=False)
    model(torch.tensor([[4, 6, 7]]), use_cache=False)
    assert not torch.allclose(seen[0], seen[1], atol=0.1)
    torch.testing.assert_close(seen[0], seen[2], rtol=0, atol=1e-6)


def decoded(model, ids):
    cache = DynamicCache(config=model.config)
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([5, 3, *[1] * 9], dim=1)], dim=1)


@pytest.mark.parametrize("source", ["layer, token ids", "layer, token ids and rotary pairs"])
@torch.no_grad()
def test_decoding_by_the_table_of_embeddings_is_decoding_by_the_modules(source, ids, monkeypatch):
    model = build(source)
    table = model.gpt_neox.token_table(1)
    assert table.shape == (2 * 97 + 1, 23 + 64)
    by_table = decoded(model, ids)
    assert model.eval().gpt_neox.token_table(1) is table
    monkeypatch.setattr(type(model.gpt_neox), "token_table", lambda *_: None)
    torch.testing.assert_close(by_table, decoded(model, ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(by_table, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["embed_in.weight", "token_norm.bias", "token_shift.weight"])
@torch.no_grad()
def test_a_table_of_embeddings_never_outlives_its_weights(part, ids):
    model = build("layer, token ids").double()
    body, before, saved = model.gpt_neox, decoded(model, ids), deepcopy(model.state_dict())
    body.get_parameter(part).add_(0.5 * torch.rand_like(body.get_parameter(part)))
    after = decoded(model, ids)
    assert not torch.allclose(after, before, atol=0.1)
    torch.testing.assert_close(after, model(ids).logits, rtol=0, atol=1e-5)
    model.load_state_dict(saved)
    torch.testing.assert_close(decoded(model, ids), before, rtol=0, atol=1e-5)
    model.resize_token_embeddings(120, mean_resizing=False)
    torch.testing.assert_close(decoded(model, ids + 23), model(ids + 23).logits, rtol=0, atol=1e-5)
    assert model.float().gpt_neox._table == (None, None, None)
    assert body.token_table(1).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert body.token_table(1) is None
    assert model.train().gpt_neox.token_table(1) is None
    body.embed_in.register_forward_hook(lambda *_: None)
    assert model.eval().gpt_neox.token_table(1) is None
    with torch.enable_grad():
        assert build("layer, token ids").gpt_neox.token_table(1) is None


@torch.no_grad()
def test_a_parameter_in_the_place_of_another_makes_a_new_table(ids):
    """The freed memory of the old parameter may become the new one's."""
    model = build("layer, token ids").double()
    for seed in range(20):
        before = decoded(model, ids)
        torch.manual_seed(seed)
        model.gpt_neox.token_shift.weight = torch.nn.Parameter(torch.rand(64, dtype=torch.float64))
        after = decoded(model, ids)
        assert not torch.allclose(after, before, atol=0.01)
        torch.testing.assert_close(after, model(ids).logits, rtol=0, atol=1e-5)


def test_the_first_layer_needs_no_latent(ids):
    """Its input is the embedding alone, so with ids it caches its rotary key and nothing else."""
    model = build("layer, token ids")
    assert model.gpt_neox.layers[0].attention.content_dim == 64
    attention = model.gpt_neox.layers[1].attention
    assert attention.content_dim == 23 - 4 + 64 and attention.value_up.in_features == attention.content_dim


def test_embeddings_get_gradients_from_keys_and_values_of_all_layers(ids):
    model = build("layer, token ids")
    model(ids, labels=ids).loss.backward()
    for layer in model.gpt_neox.layers:
        assert layer.attention.value_up.weight.grad[:, -64:].abs().max() > 1e-4
    for part in (model.gpt_neox.token_norm, model.gpt_neox.token_shift):
        assert part.weight.grad.abs().max() > 1e-4


@torch.no_grad()
def test_what_the_dropout_of_the_embedding_hides_is_not_looked_up(ids):
    model = build("layer, token ids")
    model.gpt_neox.emb_dropout.p = 1.0
    assert not torch.allclose(model(ids).logits, model(ids.flip(1)).logits, atol=0.1)
    model.train()
    torch.testing.assert_close(model(ids).logits, model(ids.flip(1)).logits, rtol=0, atol=0)


@torch.no_grad()
def test_embeddings_begin_with_values_as_large_as_those_of_contexts():
    torch.manual_seed(0)
    config = build("layer, token ids").config
    weight = ContextPythiaForCausalLM(config).gpt_neox.layers[1].attention.value_up.weight
    torch.testing.assert_close(weight[:, 19:].std(), torch.tensor(config.initializer_range), rtol=0.05, atol=0)


def test_loading_keeps_the_weights_beside_a_missing_one(tmp_path):
    model = build("layer, token ids")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["gpt_neox.layers.1.attention.value_up.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name


def test_inputs_without_ids_are_refused(ids):
    model = build("layer, token ids")
    with pytest.raises(ValueError, match="inputs_embeds: this model caches token ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids))


def test_a_quantized_cache_is_refused(ids):
    pytest.importorskip("hqq")
    model = build("layer, token ids")
    with pytest.raises(ValueError, match="caches token ids .*, which must stay exact"):
        model.generate(ids, max_new_tokens=2, cache_implementation="quantized", cache_config={"backend": "hqq"})
