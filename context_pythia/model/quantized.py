"""transformers' quantized cache with contexts in it: `generate(cache_implementation="quantized", cache_config=...)`.

The host's quantized cache accepts only layers of keys and values. `hold_contexts` adapts these to contexts: widths that
no group size divides, values of width 0, and a recurrent state that stays exact.

Shapes: B batch, T cached tokens, W cached width.
"""

import math
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import GPTNeoXConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, CacheLayerMixin, HQQQuantizedLayer, QuantizedCache

from .cache import RecurrentContext
from .configuration import ContextPythiaConfig


class WithoutValues:
    """Adds to a quantized layer: values of width 0 pass unchanged."""

    def _quantize(self, tensor: torch.Tensor, *args, **kwargs) -> Any:
        return super()._quantize(tensor, *args, **kwargs) if tensor.shape[-1] else (tensor, None)  # type: ignore[misc]

    def _dequantize(self, qtensor: Any) -> torch.Tensor:
        return qtensor[0] if qtensor[1] is None else super()._dequantize(qtensor)  # type: ignore[misc]


class TokenGroups:
    """Adds to an HQQ layer contexts `[B, 1, T, W]` of any width W: a token's numbers form groups of `q_group_size`,
    the last one padded, whatever the axis."""

    nbits: int
    q_group_size: int

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        filled = tensor[..., -1:].expand(*tensor.shape[:-1], -tensor.shape[-1] % self.q_group_size)
        rows = torch.cat([tensor, filled], dim=-1).reshape(-1, self.q_group_size)
        # A byte packs several numbers, each from another part of the rows.
        rows = pad(rows, (0, 0, 0, -len(rows) % (8 // self.nbits)))
        return super()._quantize(rows, 1), tensor.shape  # type: ignore[misc]

    def _dequantize(self, qtensor: Any) -> torch.Tensor:
        packed, shape = qtensor
        groups = math.ceil(shape[-1] / self.q_group_size)
        rows = super()._dequantize(packed)[: math.prod(shape[:-1]) * groups]  # type: ignore[misc]
        return rows.view(*shape[:-1], groups * self.q_group_size)[..., : shape[-1]]


def full_attention(config: GPTNeoXConfig) -> GPTNeoXConfig:
    """The config of a GPT-NeoX with as many layers: the host builds quantized caches only for its layer type."""
    return GPTNeoXConfig(num_hidden_layers=config.num_hidden_layers)


def hold_contexts(cache: QuantizedCache, config: GPTNeoXConfig) -> QuantizedCache:
    """Adapt an empty cache, built for `full_attention(config)`, to the model of `config`.

    A layer keeps its settings except `q_group_size`: a context's W numbers form groups of equal size, at most the
    given one, to need little padding.

    Raises:
        ValueError: contexts with another backend than `hqq` or `fp8`, or with token ids, which must stay exact.
    """
    if not isinstance(config, ContextPythiaConfig):
        return cache
    if config.cache_token_ids:
        raise ValueError("quantized cache: this model caches token ids (cache_token_ids), which must stay exact")
    recurrent = config.context_source in ("input", "shared")
    for i, (layer, kind) in enumerate(zip(cache.layers, config.layer_types, strict=True)):
        if kind == "dummy":
            cache.layers[i] = DYNAMIC_LAYER_TYPE_MAPPING[kind]()
            continue
        parts: list[type] = [RecurrentContext] if recurrent and i == 0 else []
        if kind == "context":
            parts.append(WithoutValues)
            if isinstance(layer, HQQQuantizedLayer):
                parts.append(TokenGroups)
                width = config.cached_width(i)
                layer.q_group_size = math.ceil(width / math.ceil(width / layer.q_group_size))
            elif hasattr(layer, "q_group_size"):
                raise ValueError(
                    f"quantized cache of {type(layer).__name__}: contexts need the backend 'hqq' or 'fp8'; give "
                    "cache_config={'backend': 'hqq'}"
                )
        if parts:
            cache.layers[i] = _with(layer, parts)
    return cache


def _with(layer: CacheLayerMixin, parts: list[type]) -> CacheLayerMixin:
    """`layer` with its settings, in a new class that has `parts` before the layer's own class."""
    bases = (*parts, type(layer))
    new: CacheLayerMixin = object.__new__(type("".join(base.__name__ for base in bases), bases, {}))
    vars(new).update(vars(layer))
    return new
