"""Linear maps that infer in fp32 on a CPU by oneDNN, as torch's own do in bfloat16.

In fp32 torch multiplies by MKL, which on some processors is far from what memory and cores allow: on an AMD EPYC (2
cores, the only processor tried) a head of 512 x 50,304 took 17.2 ms for 16 rows where oneDNN takes 8.3, 9.1 against 3.7
ms for one row, and a map of 512 x 2,048 took 23.7 against 19.7 ms for the 2,048 rows of a prefill.
`torch.backends.mkldnn.enabled = False` switches it off.
"""

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.modeling_utils import PreTrainedModel

# oneDNN copies what it takes for the weight into blocks of its own at each call. For so many rows it is faster to take
# them for the weight, and to turn the result around: 6.3 ms for the 16 rows above.
FEW_ROWS = range(8, 33)


class Linear(nn.Linear):
    """`nn.Linear`, to the rounding. What looks for that very type, as `torch.ao.quantization` does, passes it over."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self._by_onednn(input):
            return super().forward(input)
        input = input.contiguous()  # the last states of a prefill lie far apart, which oneDNN takes seconds for
        rows = input.numel() // self.in_features
        if rows in FEW_ROWS:
            output = _product(self.weight, input.view(rows, self.in_features)).t()
            # A sum turns the result around by all threads, a copy by one.
            turned = output.new_empty(output.shape)
            torch.add(output, 0.0 if self.bias is None else self.bias, out=turned)
            return turned.view(*input.shape[:-1], self.out_features)
        return _product(input, self.weight, self.bias)

    def _by_onednn(self, input: torch.Tensor) -> bool:
        weight = self.weight
        return (
            only_values()
            and weight.dtype == input.dtype == torch.float32
            and weight.device.type == input.device.type == "cpu"
            and weight.layout == input.layout == torch.strided
            and input.shape[-1:] == weight.shape[-1:] != (0,)
            and not torch.is_autocast_enabled("cpu")
            and type(weight) is nn.Parameter  # not a shard of one, nor a quantised one
            and _HAS_OPERATOR
            and bool(torch.backends.mkldnn.enabled)
        )


def use_onednn(model: PreTrainedModel) -> None:
    """Make each plain `nn.Linear` in `model` a `Linear`: its parameters, names and hooks stay as they are. A model that
    is to be quantised keeps them, since quantisers look for them."""
    if getattr(model.config, "quantization_config", None) is not None:
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def only_values() -> bool:
    """Whether nothing but values is computed now: no derivative of either kind, no batch by vmap, no trace."""
    return not (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    )


def _product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # The operator that torch.compile puts in place of an nn.Linear.
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


# A torch without oneDNN has no such operator.
_HAS_OPERATOR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
