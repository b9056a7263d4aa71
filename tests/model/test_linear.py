from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from context_pythia.model import ContextPythiaForCausalLM
from context_pythia.model.linear import Linear

from .conftest import build

HAS_ONEDNN = torch.backends.mkldnn.is_available()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Grows at each call of the operator of oneDNN."""
    calls, operator = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: calls.append(1) or operator(*args))
    return calls


@pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (16, 1, 24), (2, 3, 5, 24), (7, 5, 24), (0, 24)])
@torch.no_grad()
def test_by_onednn_it_is_the_plain_map(shape, bias, calls, monkeypatch):
    torch.manual_seed(0)
    linear, states = Linear(24, 37, bias=bias), torch.randn(shape)
    plain = nn.functional.linear(states, linear.weight, linear.bias)
    torch.testing.assert_close(linear(states), plain, rtol=0, atol=1e-5)
    assert calls == [1]
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    torch.testing.assert_close(linear(states), plain, rtol=0, atol=0)
    assert calls == [1]


@pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN")
@torch.no_grad()
def test_strided_states_and_weights_are_read_right():
    torch.manual_seed(0)
    linear = Linear(12, 7)
    linear.weight = nn.Parameter(torch.randn(12, 7).t())
    for states in (torch.randn(5, 6, 48)[::2, 1:, ::4], torch.randn(12, 3).t()):  # 15 rows, and 3
        plain = nn.functional.linear(states, linear.weight, linear.bias)
        torch.testing.assert_close(linear(states), plain, rtol=0, atol=1e-5)


@pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN")
@pytest.mark.parametrize("batch", [3, 16])
@torch.no_grad()
def test_states_that_lie_apart_are_gathered_first(batch, monkeypatch):
    operator, seen = torch.ops.mkldnn._linear_pointwise, []
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: seen.extend(args[:2]) or operator(*args))
    Linear(12, 7)(torch.randn(batch, 100, 12)[:, -1:])
    assert len(seen) == 2 and all(tensor.is_contiguous() for tensor in seen)


@pytest.mark.parametrize("rows", [3, 16])
@torch.no_grad()
def test_forward_derivatives_batches_and_traces_are_torch_s(rows, calls):
    torch.manual_seed(0)
    linear, states, tangent = Linear(12, 7), torch.randn(rows, 12), torch.randn(rows, 12)
    plain = partial(nn.functional.linear, weight=linear.weight, bias=linear.bias)
    for actual, expected in zip(*(torch.func.jvp(f, (states,), (tangent,)) for f in (linear, plain)), strict=True):
        torch.testing.assert_close(actual, expected)
    with forward_ad.dual_level():
        dual = linear(forward_ad.make_dual(states, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent @ linear.weight.t())
    torch.testing.assert_close(torch.vmap(linear)(torch.randn(2, rows, 12) * 0), plain(torch.zeros(2, rows, 12)))
    torch.jit.trace(linear, states, check_trace=False)  # the check is no trace
    assert not calls


@torch.no_grad()
def test_a_wrong_width_has_torch_s_own_message(calls):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Linear(12, 7)(torch.randn(3, 11))
    assert not calls


def test_a_model_to_be_quantised_keeps_the_plain_maps():
    config = build("layer").config
    config.quantization_config = {"quant_method": "bitsandbytes"}
    kinds = {type(m) for m in ContextPythiaForCausalLM(config).modules() if isinstance(m, nn.Linear)}
    assert nn.Linear in kinds and Linear not in kinds


def test_gradients_autocast_and_other_dtypes_are_torch_s(calls):
    linear, states = Linear(4, 3), torch.randn(2, 4)
    linear(states).sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(states).dtype == torch.bfloat16
    with torch.no_grad():
        linear.to(torch.bfloat16)(states.to(torch.bfloat16))
    assert not calls


@torch.no_grad()
def test_every_map_of_a_model_is_by_onednn(source, calls, monkeypatch):
    model = build(source)
    kinds = [type(module) for module in model.modules() if isinstance(module, nn.Linear)]
    assert nn.Linear not in kinds and Linear in kinds
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits
    assert calls or not HAS_ONEDNN
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-5)
