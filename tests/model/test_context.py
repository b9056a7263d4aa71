import pytest
import torch

from context_pythia.model.context import ContextBlock

from .conftest import randomise


@pytest.fixture(params=[1, 3])
def block(request) -> ContextBlock:
    return randomise(ContextBlock(12, 16, request.param)).double()


@pytest.fixture
def embeddings() -> torch.Tensor:
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def by_formula(block: ContextBlock, previous: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    context = previous
    for layer in block.layers:
        pre = torch.cat([context, embedding], -1) @ layer.dense.weight.T + layer.dense.bias
        residual = context + 0.5 * pre * (1 + torch.erf(pre / 2**0.5))
        centered = residual - residual.mean(-1, keepdim=True)
        context = (
            centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias
        )
    return context


def test_step_is_the_formula(block, embeddings):
    previous = torch.randn(2, 12, dtype=torch.float64)
    torch.testing.assert_close(
        block.step(previous, embeddings[:, 0]), by_formula(block, previous, embeddings[:, 0]), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_scan_is_step_by_step_gradients_included(block, embeddings, padded, frozen):
    block.requires_grad_(not frozen)
    embeddings.requires_grad_()
    initial = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    mask, starts = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    if padded:  # before, between and after texts, two of which begin at padding
        mask[0, :3] = mask[0, 6] = mask[1, 5:7] = mask[1, 8] = False
        starts[0, 4] = starts[0, 6] = starts[1, 2] = starts[1, 5] = True

    def steps():
        context, contexts = initial, []
        for t in range(9):
            previous = context * ~starts[:, t, None]
            context = torch.where(mask[:, t, None], by_formula(block, previous, embeddings[:, t]), previous)
            contexts.append(context)
        return torch.stack(contexts, 1)

    weights = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    inputs = [embeddings, initial, *(() if frozen else block.parameters())]
    masks = (mask, starts) if padded else (None, None)
    results = []
    for run in (
        steps,
        lambda: block.scan(embeddings, initial, *masks),
        lambda: block._scan_by_steps(embeddings, initial, *masks),
    ):
        contexts = run()
        results.append([contexts.detach(), *torch.autograd.grad((contexts * weights).sum(), inputs)])
    for plain, at_once, by_steps in zip(*results, strict=True):
        torch.testing.assert_close(at_once, plain, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(by_steps, plain, rtol=1e-9, atol=1e-9)


def test_under_autocast_the_state_is_not_rounded(block, embeddings):
    block, embeddings = block.float(), embeddings.float()
    with torch.autocast("cpu", torch.bfloat16):
        projected = [layer.project(embeddings).float() for layer in block.layers]
        contexts = block.scan(embeddings)
    context = torch.zeros(2, 12)
    for t in range(9):
        for layer, parts in zip(block.layers, projected, strict=True):
            context = layer(context, parts[:, t])
        torch.testing.assert_close(contexts[:, t], context, rtol=1e-5, atol=1e-5)


def test_as_many_parallel_steps_as_tokens_are_the_scan(block, embeddings):
    exact = block.scan(embeddings)
    contexts = torch.randn(2, 9, 12, dtype=torch.float64)
    for k in range(9):
        assert k == 0 or not torch.allclose(contexts, exact, atol=1e-3)
        contexts = block.step(torch.nn.functional.pad(contexts[:, :-1], (0, 0, 1, 0)), embeddings)
        torch.testing.assert_close(contexts[:, : k + 1], exact[:, : k + 1], rtol=0, atol=1e-10)
