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
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, HQQQuantizedLayer, QuantizedCache

from .cache import RecurrentContext
from .configuration import ContextPythiaConfig


class QuantizedContextLayer(HQQQuantizedLayer):
    """Contexts `[B, 1, T, W]` of any width W: a token's numbers form groups of `q_group_size`, the last one padded,
    whatever the axis. Values of width 0 pass unchanged."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        if not tensor.shape[-1]:
            return tensor, None
        filled = tensor[..., -1:].expand(*tensor.shape[:-1], -tensor.shape[-1] % self.q_group_size)
        rows = torch.cat([tensor, filled], dim=-1).reshape(-1, self.q_group_size)
        # A byte packs several numbers, each from another part of the rows.
        rows = pad(rows, (0, 0, 0, -len(rows) % (8 // self.nbits)))
        return super()._quantize(rows, 1), tensor.shape

    def _dequantize(self, qtensor: Any) -> torch.Tensor:
        packed, shape = qtensor
        if shape is None:
            return packed
        groups = math.ceil(shape[-1] / self.q_group_size)
        rows = super()._dequantize(packed)[: math.prod(shape[:-1]) * groups]
        return rows.view(*shape[:-1], groups * self.q_group_size)[..., : shape[-1]]


class QuantizedRecurrentLayer(RecurrentContext, HQQQuantizedLayer):
    """Keys and values, and the state of context source `input`."""


class QuantizedSharedLayer(RecurrentContext, QuantizedContextLayer):
    """The contexts of source `shared`, and their exact state."""


LAYERS = {"input": QuantizedRecurrentLayer, "shared": QuantizedSharedLayer, "layer": QuantizedContextLayer}


def full_attention(config: GPTNeoXConfig) -> GPTNeoXConfig:
    """The config of a GPT-NeoX with as many layers: the host builds quantized caches only for its layer type."""
    return GPTNeoXConfig(num_hidden_layers=config.num_hidden_layers)


def hold_contexts(cache: QuantizedCache, config: GPTNeoXConfig) -> QuantizedCache:
    """Adapt an empty cache, built for `full_attention(config)`, to the model of `config`.

    A layer keeps its settings except `q_group_size`: a context's W numbers form groups of equal size, at most the
    given one, to need little padding.

    Raises:
        ValueError: contexts with another backend than `hqq`, or with token ids, which must stay exact.
    """
    if not isinstance(config, ContextPythiaConfig):
        return cache
    if config.cache_token_ids:
        raise ValueError("quantized cache: this model caches token ids (cache_token_ids), which must stay exact")
    for i, (layer, kind) in enumerate(zip(cache.layers, config.layer_types, strict=True)):
        if kind == "dummy":
            cache.layers[i] = DYNAMIC_LAYER_TYPE_MAPPING[kind]()
        elif kind in ("context", "recurrent_context"):
            if not isinstance(layer, HQQQuantizedLayer):
                raise ValueError(
                    f"quantized cache of {type(layer).__name__}: contexts need the backend 'hqq': give "
                    "cache_config={'backend': 'hqq'}"
                )
            group = layer.q_group_size
            if kind == "context":
                width = config.cached_width(i)
                group = math.ceil(width / math.ceil(width / group))
            settings = layer.nbits, layer.axis_key, layer.axis_value, group, layer.residual_length
            cache.layers[i] = LAYERS[config.context_source](*settings)
    return cache
