"""Moments of a calibration against plain hooks and autograd, and what a pass over the text must leave alone."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia.config import convert as options
from context_pythia.conversion import calibrate
from context_pythia.conversion.calibrate import WEIGHTINGS, LayerStatistics, collect, observed
from context_pythia.conversion.readers import Readers
from context_pythia.data.packing import PackedDataset
from context_pythia.evaluation.memory import peak_during, weight_bytes
from context_pythia.evaluation.pretrained import load_pretrained
from tests.model.conftest import SIZE, randomise

HIDDEN, HEADS, LAYERS = SIZE["hidden_size"], SIZE["num_attention_heads"], SIZE["num_hidden_layers"]


@pytest.fixture
def model():
    return randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE)), std=0.1)


@pytest.fixture
def text() -> PackedDataset:
    """7 samples of 12 tokens: the last batch of 3 or of 5 is a small one."""
    return PackedDataset(np.random.default_rng(0).integers(2, 97, (7, 13), dtype=np.uint16))


def gather(model, text, layers=range(LAYERS), batch_size=3, seed=0):
    """The statistics of each layer by itself."""
    contexts = [Readers((layer,)) for layer in layers]
    found = collect(model, text, contexts, batch_size=batch_size, seed=seed, progress=False)
    return {readers.layers[0]: held for readers, held in found.items()}


def plain_moments(model, text, readers: Readers, batch_size: int, seed: int) -> LayerStatistics:
    """A sample at a time, from torch.autograd.grad of the loss of labels drawn as `collect` draws them."""
    layers = [layer.attention.query_key_value for layer in model.gpt_neox.layers]
    held = LayerStatistics.zeros(HIDDEN, len(readers.inputs), len(readers.layers))
    for start in range(0, len(text), batch_size):
        ids = torch.stack([text[i]["input_ids"] for i in range(start, min(start + batch_size, len(text)))])
        seen = {}

        def keep(module, inputs, output, seen=seen):
            seen[layers.index(module)] = inputs[0], output

        handles = [layer.register_forward_hook(keep) for layer in layers]
        logits = model(ids).logits
        for handle in handles:
            handle.remove()
        generators = [torch.Generator().manual_seed(1_000_003 * seed + start + i) for i in range(len(ids))]
        drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(logits.softmax(-1), generators, strict=True)]
        labels = torch.cat(drawn)[:, 0]
        losses = -logits.log_softmax(-1).flatten(0, 1)[torch.arange(len(labels)), labels]
        gradients = torch.autograd.grad(losses.sum(), [seen[layer][1] for layer in readers.layers])
        inputs = torch.cat([seen[layer][0] for layer in readers.inputs], dim=-1).detach().double()
        for sample, *by_layer in zip(inputs, *(gradient.double() for gradient in gradients), strict=True):
            held.tokens += len(sample)
            held.input_sum += sample.sum(0)
            held.input_moment += sample.T @ sample
            parts = [by_head.view(-1, HEADS, 3, HIDDEN // HEADS) for by_head in by_layer]
            both = torch.cat([part[:, :, kind].flatten(1) for kind in (1, 2) for part in parts], dim=1)
            weight_gradient = sum(torch.outer(g, h) for g, h in zip(both, sample, strict=True))
            with_bias = torch.cat([weight_gradient, both.sum(0)[:, None]], dim=1)
            held.column_moment += with_bias.T @ with_bias
            held.row_moment += weight_gradient @ weight_gradient.T
    return held


def assert_same(got: LayerStatistics, expected: LayerStatistics, rtol: float) -> None:
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(got, name), value, rtol=rtol, atol=rtol * float(value.abs().max()))


@pytest.mark.parametrize(
    "contexts",
    [[Readers((0,)), Readers((1, 2))], [Readers((0,), True), Readers((1, 2), True)]],
    ids=["layers", "and the embedding"],
)
def test_moments_are_those_of_plain_hooks_and_autograd(contexts, model, text):
    expected = [plain_moments(model, text, readers, 3, seed=5) for readers in contexts]
    found = collect(model, text, contexts, batch_size=3, seed=5, progress=False)
    assert list(found) == contexts
    for plain, held in zip(expected, found.values(), strict=True):
        assert held.tokens == text.num_tokens == 84
        assert held.row_moment.norm() > 0 and held.column_moment.norm() > 0
        assert_same(held, plain, rtol=1e-4)


def test_layers_in_one_pass_or_in_groups_are_equal_to_the_bit(model, text):
    together = gather(model, text)
    for group in ([1], [2, 0]):
        for layer, held in gather(model, text, group).items():
            for name, value in vars(together[layer]).items():
                assert torch.equal(getattr(held, name), value), name


def test_the_size_of_batches_only_rounds_and_the_seed_draws_other_labels(model, text):
    first = gather(model, text)[1]
    assert_same(gather(model, text, batch_size=5)[1], first, rtol=1e-5)
    other = gather(model, text, seed=1)[1]
    assert torch.equal(other.input_moment, first.input_moment)
    assert not torch.allclose(other.row_moment, first.row_moment, rtol=1e-2)


def test_predictions_of_few_tokens_at_once_draw_from_the_same_distribution(model, text, monkeypatch):
    whole = gather(model, text)[0]
    monkeypatch.setattr(calibrate, "HEAD_TOKENS", 5)
    parts = gather(model, text)[0]
    assert torch.equal(parts.input_moment, whole.input_moment)
    assert float(parts.row_moment.trace() / whole.row_moment.trace()) == pytest.approx(1, rel=0.2)


@pytest.fixture
def deep(tmp_path):
    """Folder of a model of 12 layers whose weights, 151 MB, are far more than all that a pass computes."""
    config = GPTNeoXConfig(**SIZE | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12})
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(tmp_path)
    return str(tmp_path)


def test_weights_on_disk_give_the_same_statistics_and_are_never_held_together(deep, text):
    whole = load_pretrained(deep, torch.float32)
    expected = gather(whole, text, [1], batch_size=7)[1]
    weights = weight_bytes(whole)
    del whole
    model = load_pretrained(deep, torch.float32, {"": "disk"})
    found, peak = peak_during(lambda: gather(model, text, [1], batch_size=7), torch.device("cpu"))
    for name, value in vars(expected).items():
        assert torch.equal(getattr(found[1], name), value), name
    assert all(parameter.is_meta for parameter in model.parameters())
    assert weights > 1.5e8 and peak < weights / 2


def test_an_interrupted_pass_leaves_no_hooks(model):
    with pytest.raises(KeyboardInterrupt), observed(model, {Readers((1,)): LayerStatistics.zeros(HIDDEN)}):
        raise KeyboardInterrupt
    assert not any(module.training for module in model.modules()) and not model.is_gradient_checkpointing
    assert not model.gpt_neox.layers[1].attention.query_key_value._forward_hooks
    assert not model.get_input_embeddings()._forward_hooks


def test_a_bfloat16_model_gives_finite_moments_near_the_exact_ones(model, text):
    exact = gather(model, text)[0]
    rounded = gather(model.bfloat16(), text)[0]
    assert rounded.input_moment.dtype == torch.float64
    assert float((rounded.input_moment - exact.input_moment).norm() / exact.input_moment.norm()) < 0.02


def test_predictions_that_are_not_finite_are_an_error(model, text):
    with torch.no_grad():
        model.gpt_neox.layers[0].mlp.dense_4h_to_h.bias[3] = torch.inf
    with pytest.raises(RuntimeError, match="predictions are not finite in torch.float32: the checkpoint is damaged"):
        gather(model, text)


def test_gradients_that_are_not_finite_are_an_error_naming_the_layer(model, text):
    def spoil(module, inputs, output):
        output.register_hook(lambda gradient: gradient * torch.nan)

    model.gpt_neox.layers[1].register_forward_hook(spoil)
    with pytest.raises(RuntimeError, match="layer 0 has inputs or gradients that are not finite"):
        gather(model, text)


def test_statistics_are_saved_and_loaded_to_the_bit(model, text, tmp_path):
    held = gather(model, text, [2])[2]
    held.save(tmp_path / "statistics-002.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["statistics-002.safetensors"]
    loaded = LayerStatistics.load(tmp_path / "statistics-002.safetensors")
    for name, value in vars(held).items():
        assert torch.equal(getattr(loaded, name), value), name


@pytest.mark.parametrize("damage", ["cut off", "other tensors"])
def test_a_damaged_file_is_one_line_that_says_what_to_do(damage, tmp_path):
    path = tmp_path / "statistics-000.safetensors"
    LayerStatistics.zeros(8).save(path)
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-30])
    else:
        save_file({"tokens": torch.zeros(1)}, path)
    with pytest.raises(RuntimeError, match="delete it to calibrate again") as error:
        LayerStatistics.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_weightings_compare_with_the_inputs_moments_or_with_nothing(model, text):
    held = gather(model, text, [1])[1]
    mean, covariance, metric = WEIGHTINGS["inputs"](held)
    torch.testing.assert_close(mean, held.input_sum / 84)
    torch.testing.assert_close(covariance + torch.outer(mean, mean), held.input_moment / 84)
    assert torch.equal(metric, torch.eye(2 * HIDDEN, dtype=torch.float64))
    plain = WEIGHTINGS["none"](held)
    assert not plain[0].any() and torch.equal(plain[1], torch.eye(HIDDEN, dtype=torch.float64))


def test_fisher_factors_are_those_of_gradients_that_are_a_kronecker_product():
    """dW = B Z A with Z of independent numbers: its moments are tr(Aᵀ A) B Bᵀ and tr(B Bᵀ) Aᵀ A."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (HIDDEN + 1, 2 * HIDDEN))
    columns, rows = a.T @ a, b @ b.T
    inputs = torch.randn(50, HIDDEN, generator=generator, dtype=torch.float64)
    free_of_bias = columns.inverse()[:-1, :-1].inverse()
    held = LayerStatistics(
        torch.tensor(50.0, dtype=torch.float64),
        inputs.sum(0),
        inputs.T @ inputs,
        rows.trace() * columns,
        columns[:-1, :-1].trace() * rows,
    )
    mean, covariance, metric = WEIGHTINGS["gradients"](held)
    torch.testing.assert_close(mean, inputs.mean(0))
    torch.testing.assert_close(covariance.trace(), inputs.var(0, correction=0).sum())
    ratio = free_of_bias.trace() / covariance.trace()
    torch.testing.assert_close(covariance * ratio, free_of_bias)
    torch.testing.assert_close(metric / ratio, rows / 50)


@pytest.mark.parametrize("nothing", ["gradients", "inputs"])
def test_statistics_of_nothing_have_finite_factors(nothing):
    held = LayerStatistics.zeros(HIDDEN)
    held.tokens += 5
    if nothing == "gradients":
        held.input_moment += torch.eye(HIDDEN)
    else:
        held.column_moment[-1, -1] = held.row_moment[0, 0] = 1.0
    assert all(bool(part.isfinite().all()) for part in held.fisher_factors())


def test_the_bytes_that_a_conversion_plans_for_are_those_of_a_layers_statistics():
    held = sum(value.nbytes for value in vars(LayerStatistics.zeros(HIDDEN)).values())
    assert held == pytest.approx(Readers((1,)).statistics_bytes(HIDDEN), rel=0.01)


def test_every_weighting_can_be_asked_for():
    assert tuple(calibrate.WEIGHTINGS) == options.WEIGHTINGS
