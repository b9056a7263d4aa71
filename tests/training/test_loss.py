"""The chunked loss equals the plain one, gradients included, and never holds all logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from context_pythia.training import loss as loss_module
from context_pythia.training.loss import linear_cross_entropy, linear_distillation, token_scores

TOKENS, WIDTH, WORDS = 37, 12, 50


def plain(hidden, weight, labels):
    logits = torch.nn.functional.linear(hidden, weight)
    return torch.nn.functional.cross_entropy(
        logits.float() if logits.dtype != torch.float64 else logits, labels, reduction="sum"
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Four chunks, the last of them smaller, of blocks of three rows."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 10 * WORDS)
    monkeypatch.setattr(loss_module, "ROW_BLOCK_LOGITS", 3 * WORDS)


def make(dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    hidden = (scale * torch.randn(TOKENS, WIDTH)).to(dtype).requires_grad_()
    weight = torch.randn(WORDS, WIDTH).to(dtype).requires_grad_()
    labels = torch.randint(WORDS, (TOKENS,))
    labels[::5] = -100
    return hidden, weight, labels


def value_and_gradients(function, hidden, weight, labels, factor=1.0):
    value = function(hidden, weight, labels)
    return value, *torch.autograd.grad(factor * value, (hidden, weight))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equals_the_plain_loss_and_its_gradients_in_fp64(scale):
    arguments = make(torch.float64, scale)
    for ours, theirs in zip(
        value_and_gradients(linear_cross_entropy, *arguments, factor=0.3),
        value_and_gradients(plain, *arguments, factor=0.3),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_equals_the_plain_loss_in_fp32_and_keeps_dtypes():
    arguments = make()
    ours = value_and_gradients(linear_cross_entropy, *arguments)
    for mine, theirs in zip(ours, value_and_gradients(plain, *arguments), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)


def test_under_autocast_the_logits_alone_are_narrow():
    hidden, weight, labels = make()
    with torch.autocast("cpu", torch.bfloat16):
        ours = value_and_gradients(linear_cross_entropy, hidden, weight, labels)
        theirs = value_and_gradients(plain, hidden, weight, labels)
    exact = value_and_gradients(plain, hidden, weight, labels)
    assert ours[1].dtype == ours[2].dtype == torch.float32
    # The same logits, so the same loss, which differs from that of exact logits.
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    assert abs(ours[0].item() - exact[0].item()) > 1e-4
    for mine, plain_one, true in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert (mine - true).norm() <= 1.5 * (plain_one - true).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_get_narrow_gradients_and_a_wide_loss(dtype):
    loss, *gradients = value_and_gradients(linear_cross_entropy, *make(dtype))
    assert loss.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels = make()
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    torch.testing.assert_close(hidden.grad, value_and_gradients(plain, hidden, weight, labels)[1])
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_tokens_that_do_not_count_give_neither_loss_nor_gradient():
    hidden, weight, labels = make()
    loss, *gradients = value_and_gradients(linear_cross_entropy, hidden, weight, torch.full_like(labels, -100))
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


def test_the_scores_of_tokens_are_those_of_all_logits():
    hidden, weight, labels = make(torch.float64)
    logits = torch.nn.functional.linear(hidden, weight).detach()
    labels[1::2] = logits.argmax(-1)[1::2]
    losses, hits = token_scores(hidden, weight, labels)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(hits, logits.argmax(-1) == labels) and 0 < hits.sum() < TOKENS
    assert not losses.requires_grad


def teacher_of(hidden, weight, width=7):
    torch.manual_seed(1)
    return torch.randn(TOKENS, width, dtype=hidden.dtype), torch.randn(WORDS, width, dtype=weight.dtype)


def plain_distillation(hidden, weight, labels, teacher_hidden, teacher_weight, ce_weight):
    """From torch's own divergence and cross-entropy."""
    kept = labels != -100
    logits, expected = (hidden @ weight.t())[kept], (teacher_hidden @ teacher_weight.t())[kept]
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), expected.log_softmax(-1), reduction="sum", log_target=True
    )
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels[kept], reduction="sum")
    return (1 - ce_weight) * divergence + ce_weight * cross_entropy


@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_distillation_equals_the_plain_loss_and_its_gradients(dtype, tolerance, ce_weight):
    hidden, weight, labels = make(dtype)
    further = *teacher_of(hidden, weight), ce_weight
    ours, theirs = (
        value_and_gradients(lambda *given, f=function: f(*given, *further), hidden, weight, labels, factor=0.3)
        for function in (linear_distillation, plain_distillation)
    )
    for mine, plain_one in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, plain_one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("narrow", [None, torch.bfloat16])
def test_a_student_that_agrees_has_no_divergence_and_no_gradient_at_all(narrow):
    hidden, weight, labels = make(scale=10.0)
    with torch.autocast("cpu", narrow, enabled=narrow is not None):
        loss = linear_distillation(hidden, weight, labels, hidden, weight, 0.0)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_only_a_teacher_in_fp32_follows_autocast():
    hidden, weight, labels = make()
    teacher = teacher_of(hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        single, narrow, other = (
            linear_distillation(hidden, weight, labels, *(part.to(dtype) for part in teacher), 0.0).item()
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        )
    assert single == narrow != other


class LargestTensor(TorchDispatchMode):
    """Sees each tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def self_taught(hidden, weight, labels):
    return linear_distillation(hidden, weight, labels, hidden, weight, 0.5)


@pytest.mark.parametrize(
    ("function", "most"), [(linear_cross_entropy, 10 * WORDS), (self_taught, 10 * WORDS), (plain, TOKENS * WORDS)]
)
def test_never_holds_more_logits_than_a_chunk(function, most):
    hidden, weight, labels = make()
    narrow = hidden[:, :1].detach().requires_grad_(), weight[:, :1].detach().requires_grad_()
    with LargestTensor() as seen:
        function(*narrow, labels).backward()
    assert seen.numbers == most


def test_scoring_holds_a_chunk_at_most():
    hidden, weight, labels = make()
    with LargestTensor() as seen:
        token_scores(hidden[:, :1], weight[:, :1], labels)
    assert seen.numbers == 10 * WORDS
