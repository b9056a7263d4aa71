"""Contexts that several layers read, with token ids: what is linear in the embedding and a few numbers is exact."""

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia.config.convert import ConvertOptions
from context_pythia.conversion.compress import checked_form, compressed
from context_pythia.conversion.factorize import KeysAndValues
from context_pythia.conversion.readers import Readers
from context_pythia.data.packing import PackedData, PackedDataset
from context_pythia.evaluation.memory import measure_generated_cache
from tests.model.conftest import SIZE, randomise

HIDDEN, HEADS, ROTARY, RANK, TOKENS = 32, 4, 4, 5, 400
PAIRS = 2 * HEADS  # of two layers at each frequency: all there are


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs():
    """Of layers 0, 1 and 2, `[N, 3 D]`. The last two are linear in the first, the embedding, and in RANK more numbers,
    and have no more than D numbers in all, so that rotary keys, which know no embedding, are exact too."""
    embedding = randn(TOKENS, HIDDEN - RANK, seed=1) @ randn(HIDDEN - RANK, HIDDEN, seed=2) + 1
    more = randn(TOKENS, RANK, seed=3)
    later = [embedding @ randn(HIDDEN, HIDDEN, seed=s) + more @ randn(RANK, HIDDEN, seed=s + 1) for s in (4, 6)]
    return torch.cat([embedding, *later], dim=1)


@pytest.fixture
def layers():
    return [
        KeysAndValues(randn(2 * HIDDEN, HIDDEN, seed=s), randn(2 * HIDDEN, seed=s + 1), HEADS, ROTARY) for s in (8, 10)
    ]


def errors(readers, layers, factors, inputs):
    """Of all layers' keys that are not rotary, then their values, `[N, ...]`, and of the rotary ones."""
    own = inputs[:, HIDDEN : 2 * HIDDEN]
    context = own @ factors.context_weight.T + factors.context_bias
    rotary, latent = context.split([2 * sum(factors.pairs), len(context.T) - 2 * sum(factors.pairs)], dim=1)
    content = torch.cat([latent, inputs[:, :HIDDEN]], dim=1) if readers.embedding else context
    pairs, keys, values, turned = torch.complex(*rotary.chunk(2, dim=1)), [], [], []
    for layer, part, states in zip(layers, readers.split(factors), (own, inputs[:, 2 * HIDDEN :]), strict=True):
        expected = states @ layer.weight.T + layer.bias
        rows = layer.content_rows
        key = content @ part.key_up.T - expected[:, rows[rows < HIDDEN]]
        keys.append(key - key.mean(0))  # a constant drops out of the softmax
        values.append(content @ part.value_up.T + part.value_bias - expected[:, HIDDEN:])
        start = 0
        for f, count in enumerate(factors.pairs):
            way = torch.view_as_complex(part.rotary_up)[:, start : start + count]
            real, imaginary = layer.rotary_rows[f].T
            turned.append(
                pairs[:, start : start + count] @ way.T - torch.complex(expected[:, real], expected[:, imaginary])
            )
            start += count
    return torch.cat(keys + values, dim=1), torch.cat(turned, dim=1)


def test_layers_that_share_a_context_get_what_is_linear_in_it_and_the_embedding(inputs, layers):
    readers = Readers((1, 2), embedding=True)
    root = randn(4 * HIDDEN, 4 * HIDDEN, seed=12)
    moments = inputs.mean(0), torch.cov(inputs.T, correction=0)
    factorizer = readers.factorizer(layers, *moments, root @ root.T)
    pairs = [PAIRS] * (ROTARY // 2)
    exact, rotary = errors(readers, layers, factorizer.factors(pairs, RANK), inputs)
    assert exact.abs().max() < 1e-5 and rotary.abs().max() < 1e-5
    fewer = factorizer.factors(pairs, RANK - 1)
    missed, _ = errors(readers, layers, fewer, inputs)
    rows = factorizer.layer.content_rows
    metric = (root @ root.T)[rows][:, rows]
    assert fewer.error == pytest.approx(float(torch.einsum("ni,ij,nj->n", missed, metric, missed).mean()) / 2, rel=1e-5)
    assert fewer.error > 1
    # Neither the embedding nor the latent is enough by itself.
    assert errors(readers, layers, factorizer.factors(pairs, 0), inputs)[0].abs().max() > 1
    alone = Readers((1, 2)).factorizer(layers, moments[0][HIDDEN:], moments[1][HIDDEN:, HIDDEN:], root @ root.T)
    assert errors(Readers((1, 2)), layers, alone.factors([1, 1], RANK), inputs)[0].abs().max() > 1


def silent(layer) -> None:
    """Let a layer add nothing, so that the next one's input is linear in its own."""
    for linear in (layer.attention.dense, layer.mlp.dense_4h_to_h):
        linear.weight.zero_()
        linear.bias.zero_()


@pytest.fixture
def original():
    """Layer 1 reads the embedding alone. Layers 2 and 3 read, beside whole rotary keys, RANK numbers of one state."""
    model = randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE | {"num_hidden_layers": 4})))
    with torch.no_grad():
        silent(model.gpt_neox.layers[0])
        silent(model.gpt_neox.layers[2])
        heads, size = SIZE["num_attention_heads"], SIZE["hidden_size"] // SIZE["num_attention_heads"]
        into = torch.randn(RANK, SIZE["hidden_size"], generator=torch.Generator().manual_seed(0))
        for layer, seed in zip(model.gpt_neox.layers[2:], (1, 2), strict=True):
            dice = torch.Generator().manual_seed(seed)
            weight = layer.attention.query_key_value.weight.unflatten(0, (heads, 3, size))
            rotary = weight[:, 1, : size // 4].clone()
            weight[:, 1:] = 0.1 * torch.einsum("hkdr,ri->hkdi", torch.randn(heads, 2, size, RANK, generator=dice), into)
            weight[:, 1:] /= layer.input_layernorm.weight
            weight[:, 1, : size // 4] = rotary
    model.generation_config.eos_token_id = None
    return model.double()  # so that the statistics do not round


# Older versions of transformers take an offloaded model's device for that of its empty weights.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
def test_a_model_whose_keys_and_values_are_linear_in_them_converts_exactly(original, tmp_path):
    text = np.random.default_rng(0).integers(1, SIZE["vocab_size"], (40, 33), dtype=np.uint16)
    options = ConvertOptions(
        layer_context_dims=[32, 0, 32 + RANK, 0],
        context_layers=[0, 0, 2, 2],
        cache_token_ids=True,
        calibration_tokens=1280,
    )
    packed = PackedData(PackedDataset(text), PackedDataset(text), None, {})
    converted, record = compressed(original, checked_form(options, original), options, packed, tmp_path, progress=False)
    ids = torch.from_numpy(text[:3, :20].astype(np.int64))
    with torch.no_grad():
        expected, got = original(ids).logits, converted(ids).logits
    assert expected.abs().max() > 3
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-4)
    assert [layer["width"] for layer in record["layers"]] == options.layer_context_dims
    generated = [model.generate(ids, max_new_tokens=6, do_sample=False) for model in (converted, original)]
    assert torch.equal(*generated)
    assert measure_generated_cache(converted, 12, decoded=2).filled == 4 * 12 * (32 + 32 + RANK + 1)
