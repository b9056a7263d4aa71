"""Checks whether two shortcuts are safe: reading a module's parameters without calling it, and writing in place.

Absorbed attention and the ContextBlock's scan read the matrix of a map and never call the map. This is wrong for maps
with an adapter, a quantized or offloaded weight, a parametrization or a hook.
"""

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is a `kind` and no more: `weight` and `bias` are ordinary parameters, and it has no hooks."""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    # accelerate adds its hooks by replacing the instance's `forward`.
    if type(module) is not kind or hooks or "forward" in vars(module) or _has_any_global_hook():
        return False
    parameters = [p for p in (module.weight, getattr(module, "bias", None)) if p is not None]
    return all(type(p) is nn.Parameter and p.layout == torch.strided and not p.is_meta for p in parameters)


def is_recorded() -> bool:
    """Whether operations are recorded for other values now, so that none may depend on these: vmap, or a trace."""
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling() or torch.jit.is_tracing()


def only_values() -> bool:
    """Whether only values are computed now: no forward or backward derivative, no vmap, no trace."""
    return not (torch.is_grad_enabled() or forward_ad._current_level >= 0 or is_recorded())
