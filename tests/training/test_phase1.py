"""Phase 1 against a twin written out by hand, and its promises: resumable to the bit, refusing foreign work."""

import json
import math
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

from context_pythia.config.recipe import Phase1Options
from context_pythia.data.packing import PackedData, PackedDataset
from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.training import oacd, phase1
from context_pythia.training.oacd import Oacd, TokenProjections, oacd_loss, sweep_tokens
from context_pythia.training.phase1 import effective_rank, held_out_contexts, train_context_block


def make_data(tokens=400, fingerprint="a"):
    draw = np.random.default_rng(1)
    train, validation = (PackedDataset(draw.integers(40, size=(n // 4, 5), dtype=np.uint16)) for n in (tokens, 80))
    return PackedData(train, validation, tokenizer=None, summary={"fingerprint": fingerprint})


def make_model(context_dim=16, source="shared", layers=1, hidden_size=32):
    torch.manual_seed(0)
    return ContextPythiaForCausalLM(
        ContextPythiaConfig(
            vocab_size=40,
            hidden_size=hidden_size,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            context_source=source,
            context_dim=context_dim,
            context_block_layers=layers,
        )
    )


def settings(**changes):
    defaults = {"batch_tokens": 150, "max_iterations": 6, "convergence_rate": 1.0}
    return Phase1Options(**{**defaults, **changes})


def train(folder, model=None, data=None, seed=3, **changes):
    model = model or make_model()
    result = train_context_block(
        model, data or make_data(), settings(**changes), seed=seed, folder=folder, progress=False
    )
    return result, model.gpt_neox.context_block.state_dict()


def figures(result):
    return [(entry["iteration"], entry["loss"], entry["convergence_rate"]) for entry in result.history]


def assert_same_bits(weights, expected):
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def at_sweep(monkeypatch, number, action):
    """Call `action` in the middle of the batch of that number, counted over all iterations from 1."""
    calls = []

    def sweep(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            action()
        return sweep_tokens(*arguments)

    monkeypatch.setattr(oacd, "sweep_tokens", sweep)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def killed():
    raise MemoryError


def iterate(run, times=1):
    with tqdm(disable=True) as bar:
        for _ in range(times):
            run.iterate(bar)


def twin_loss(contexts):
    mean = contexts.mean(0)
    return 0.1 * mean.square().sum() - (contexts - mean).square().sum().sqrt() / len(contexts)


def test_the_gradient_of_the_loss_is_that_of_autograd():
    contexts = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = twin_loss(contexts)
    (expected / 3).backward()
    loss, gradient = oacd_loss(contexts, 0.1, 3)
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, contexts.grad, rtol=0, atol=1e-12)
    _, gradient = oacd_loss(torch.ones(5, 2), 0.1, 1)
    assert gradient.tolist() == [pytest.approx([0.04, 0.04])] * 5


def test_converges_and_stops_early_with_bfloat16_products_too(tmp_path):
    reached = []
    for precision in ("float32", "bfloat16"):
        model = make_model(source="input", hidden_size=256)
        changes = {"max_iterations": 100, "convergence_rate": 0.95, "precision": precision}
        reached.append(train(tmp_path / precision, model, **changes)[0])
    plain, fast = reached
    assert figures(plain) != figures(fast)
    assert 1 < plain.iterations < 60 and 1 < plain.effective_rank <= 16
    assert plain.convergence_rate >= 0.95 > plain.history[-2]["convergence_rate"]
    assert abs(fast.iterations - plain.iterations) <= 2 and fast.convergence_rate >= 0.95
    assert fast.effective_rank == pytest.approx(plain.effective_rank, rel=0.05)


def test_iterations_equal_a_twin_that_copies_the_whole_stream():
    """Three batches, two iterations: sweep, loss, gradient, clipping and Adam, each written out from its definition."""
    model, data = make_model(context_dim=4), make_data(tokens=12)
    options = settings(batch_tokens=5, max_grad_norm=0.02)
    run = Oacd(model, data.train, options, 3)
    layer = model.gpt_neox.context_block.layers[0]
    weights = [p.detach().double() for p in (layer.dense.weight, layer.dense.bias, layer.norm.weight, layer.norm.bias)]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    embeddings = model.gpt_neox.embed_context_input(data.train.stream(0, 12)).detach().double()
    contexts = run.contexts.double().clone()
    expected = []
    for iteration in (1, 2):
        noise = torch.cat([run.normal(rows, iteration, batch, 1.0) for batch, rows in enumerate((5, 5, 2))]).double()
        weights = [w.requires_grad_() for w in weights]
        matrix, bias, scale, offset = weights
        previous = torch.cat([torch.zeros(1, 4).double(), contexts[:-1]]) + 0.05 * noise
        hidden = torch.cat([previous, embeddings], 1) @ matrix.T + bias
        hidden = previous + hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        centered = hidden - hidden.mean(1, keepdim=True)
        new = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt() * scale + offset
        loss = sum(twin_loss(batch) for batch in new.split(5))
        gradients = torch.autograd.grad(loss / 3, weights, retain_graph=True)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        assert norm > 0.02, "the case must clip"
        iterate(run)
        rate = ((new - contexts).square().mean(1) < options.threshold).sum().item() / 12
        for i, gradient in enumerate(g * 0.02 / (norm + 1e-6) for g in gradients):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            step = first[i] / (1 - 0.9**iteration) / ((second[i] / (1 - 0.999**iteration)).sqrt() + 1e-8)
            weights[i] = weights[i].detach() - 0.003 * step
        contexts = new.detach()
        expected.append((loss.item() / 3, rate))

    assert [entry["loss"] for entry in run.history] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [entry["convergence_rate"] for entry in run.history] == [rate for _, rate in expected]
    torch.testing.assert_close(run.contexts.double(), contexts, rtol=0, atol=2e-5)
    for parameter, weight in zip(layer.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=0, atol=2e-5)


def test_sweep_over_distinct_tokens_equals_the_blocks_step(monkeypatch):
    monkeypatch.setattr(oacd, "PROJECTED_TOKENS", 7)
    model, ids = make_model(layers=2), make_data().train.stream(0, 60)
    block = model.gpt_neox.context_block
    contexts, noise, initial = torch.randn(60, 16), torch.randn(60, 16), torch.randn(16)
    outputs, gradients = [], []
    for fast in (True, False):
        block.zero_grad()
        if fast:
            projections = TokenProjections(model, ids.unique())
            projections.refresh()
            rows = projections.rows(ids)
            new = sweep_tokens(block.layers, rows, contexts, initial, noise.clone())
        else:
            previous = torch.cat([initial[None], contexts[:-1]]) + noise
            new = block.step(previous, model.gpt_neox.embed_context_input(ids).detach())
        twin_loss(new).backward()
        if fast:
            projections.collect(ids, rows)
            projections.backward()
        outputs.append(new)
        gradients.append([p.grad.clone() for p in block.parameters()])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    for fast_gradient, plain_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(fast_gradient, plain_gradient, rtol=1e-5, atol=1e-6)
    assert model.gpt_neox.embed_in.weight.grad is None


def test_never_stops_at_the_first_iteration(tmp_path):
    result, _ = train(tmp_path, convergence_rate=0.5, threshold=1e9)
    assert result.iterations == 2


def test_trains_the_block_only_and_leaves_it_frozen_if_it_was(tmp_path):
    model, before = make_model(), make_model().state_dict()
    model.gpt_neox.context_block.requires_grad_(False)
    train(tmp_path, model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".context_block." in name}
    assert not any(p.requires_grad or p.grad is not None for p in model.gpt_neox.context_block.parameters())


@pytest.mark.parametrize(
    ("action", "error", "sweep", "iterations", "changes"),
    [
        (ctrl_c, KeyboardInterrupt, 8, 3, {"state_dtype": "bfloat16"}),
        (ctrl_c, KeyboardInterrupt, 18, 6, {}),
        (killed, MemoryError, 8, 2, {"checkpoint_seconds": 0}),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(
    tmp_path, monkeypatch, action, error, sweep, iterations, changes
):
    """Three batches an iteration: ctrl-C finishes its iteration, and what is killed goes on from the last whole one."""
    whole, weights = train(tmp_path / "whole", **changes)
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        at_sweep(patch, sweep, action)
        with pytest.raises(error):
            train(parts, **changes)
    state = torch.load(parts / "checkpoint.pt", weights_only=True)
    assert len(state["history"]) == iterations
    assert state["contexts"].dtype == getattr(torch, changes.get("state_dtype", "float32"))
    with monkeypatch.context() as patch:
        at_sweep(patch, 3 * (6 - iterations) + 1, lambda: pytest.fail("an iteration is done again"))
        resumed, resumed_weights = train(parts, **changes)
    assert figures(resumed) == figures(whole)
    assert resumed.effective_rank == whole.effective_rank
    assert_same_bits(resumed_weights, weights)
    assert sorted(path.name for path in parts.iterdir()) == ["context_block.safetensors", "phase1.json"]


def test_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    def twice():
        ctrl_c()
        ctrl_c()
        pytest.fail("not reached")

    at_sweep(monkeypatch, 1, twice)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_finished_result_is_loaded_without_training(tmp_path, monkeypatch):
    result, weights = train(tmp_path)
    monkeypatch.setattr(Oacd, "iterate", None)
    # A record of an older version lacks newer options, which had today's defaults.
    record = json.loads((tmp_path / "phase1.json").read_text())
    del record["identity"]["precision"]
    (tmp_path / "phase1.json").write_text(json.dumps(record))
    again, loaded = train(tmp_path)
    assert again == result
    assert_same_bits(loaded, weights)
    assert_same_bits(load_file(tmp_path / "context_block.safetensors"), weights)
    assert json.loads((tmp_path / "phase1.json").read_text())["iterations"] == 6


@pytest.mark.parametrize("finished", [False, True])
def test_work_of_another_run_is_refused(tmp_path, monkeypatch, finished):
    if finished:
        train(tmp_path)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            at_sweep(patch, 4, ctrl_c)
            train(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = make_model()
    torch.nn.init.normal_(other.gpt_neox.embed_in.weight)
    for changes, named in [
        ({"seed": 4}, "seed 3, not 4"),
        ({"data": make_data(fingerprint="b")}, "data_fingerprint a, not b"),
        ({"learning_rate": 0.1}, "learning_rate 0.003, not 0.1"),
        ({"model": make_model(context_dim=8)}, "context_dim 16, not 8"),
        ({"model": other}, "embeddings_crc32"),
    ]:
        with pytest.raises(ValueError, match=named):
            train(tmp_path, **changes)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["checkpoint.pt", "phase1.json", "context_block.safetensors"])
def test_damaged_file_is_named(tmp_path, name):
    if name == "context_block.safetensors":
        train(tmp_path)
    (tmp_path / name).write_bytes(b"{ damaged")
    with pytest.raises(ValueError, match=f"{name} is missing or damaged|{name} is damaged") as error:
        train(tmp_path)
    assert "\n" not in str(error.value)


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    calls = []

    def sweep(*arguments):
        calls.append(arguments)
        return sweep_tokens(*arguments) * (math.nan if len(calls) == 8 else 1)

    monkeypatch.setattr(oacd, "sweep_tokens", sweep)
    with pytest.raises(RuntimeError, match="diverged: loss nan in iteration 3") as error:
        train(tmp_path, checkpoint_seconds=0)
    assert "\n" not in str(error.value)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(state["history"]) == 2 and state["contexts"].isfinite().all()


def test_effective_rank_of_known_matrices():
    identity, line = torch.eye(8), torch.outer(torch.arange(1.0, 9.0), torch.ones(8))
    assert effective_rank([identity]) == pytest.approx(8)
    assert effective_rank(3 * identity.view(2, 4, 8)) == pytest.approx(8)
    assert effective_rank([line]) == pytest.approx(1, abs=1e-5)
    # Singular values 3 and 1: entropy of (3/4, 1/4).
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank([torch.diag(torch.tensor([3.0, 1.0]))]) == pytest.approx(math.exp(entropy))


def test_held_out_contexts_start_each_sample_at_zero(monkeypatch):
    monkeypatch.setattr(phase1, "SCAN_TOKENS", 24)  # six samples at once, of twenty
    model, data = make_model(), make_data()
    contexts = torch.cat(list(held_out_contexts(model, data.validation)))
    assert contexts.shape == (20, 4, 16)
    for sample, ids in zip(contexts, data.validation.stream(0, 80).view(20, 4), strict=True):
        context = torch.zeros(16)
        for t in range(4):
            context = model.gpt_neox.context_block.step(context, model.gpt_neox.embed_context_input(ids[t]))
            torch.testing.assert_close(sample[t], context, rtol=0, atol=1e-5)
