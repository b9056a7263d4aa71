"""transformers' quantised cache, for GPT-NeoX and, stacked on the smaller cache, for Context-Pythia.

The backend is HQQ: it runs on any device, and alone has both int8 and packed int4 (Quanto's cache has no int8).
GPT-NeoX gets the stock layers. Contexts need one of their own: their width is free, and their values have none.

Groups of at most 64 neighbouring numbers of one token (axis 1, as HQQ's cache wants it) share a scale and a zero
point, both in the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GPTNeoXConfig
from transformers.cache_utils import Cache, DynamicCache, HQQQuantizedLayer

from context_pythia.errors import UsageError
from context_pythia.model.cache import CacheMeasurement, RecurrentContext
from context_pythia.model.configuration import ContextPythiaConfig

BITS = {"int8": 8, "int4": 4}
GROUP = 64


class QuantisedContextLayer(HQQQuantizedLayer):
    """Contexts `[B, 1, T, W]` quantised. A token's W numbers make groups of equal size, the last one filled up."""

    def _quantize(self, tensor: Tensor, axis: int) -> Any:
        width = tensor.shape[-1]
        if width == 0:
            return tensor
        groups, self.q_group_size = _groups(width)
        filled = tensor[..., -1:].expand(*tensor.shape[:-1], groups * self.q_group_size - width)
        rows = torch.cat([tensor, filled], dim=-1).reshape(-1, self.q_group_size)
        # Two int4 numbers, one of each half of the rows, go into a byte.
        return super()._quantize(pad(rows, (0, 0, 0, len(rows) % 2)), axis), tensor.shape

    def _dequantize(self, qtensor: Any) -> Tensor:
        if isinstance(qtensor, Tensor):
            return qtensor
        held, shape = qtensor
        groups, size = _groups(shape[-1])
        rows = super()._dequantize(held)[: math.prod(shape[:-1]) * groups]
        return rows.view(*shape[:-1], groups * size)[..., : shape[-1]]


class QuantisedSharedContextLayer(RecurrentContext, QuantisedContextLayer):
    """Contexts quantised; the ContextBlock goes on from the last one as it was (context source `shared`)."""


class QuantisedRecurrentContextLayer(RecurrentContext, HQQQuantizedLayer):
    """Keys and values quantised; the ContextBlock's state (context source `input`) stays as it is."""


def require_quantiser() -> None:
    """Raise `UsageError`, with the mend, if HQQ is not installed."""
    if find_spec("hqq") is None:
        raise UsageError("a quantised cache needs HQQ: pip install 'context-pythia[quantised]'")


def residual_length(length: int) -> int:
    """Tokens that wait unquantised until they are quantised together, for sequences of `length` tokens.

    transformers' default, 128, would leave a short sequence unquantised. A sixteenth of the sequence leaves at most 15
    tokens unquantised at its end, and quantises some sixteen times.
    """
    return max(1, (length - 1) // 16)


def quantised_cache(config: GPTNeoXConfig, kind: str, length: int) -> Cache:
    """An empty quantised cache for sequences of `length` tokens.

    Args:
        kind: `int8` or `int4`.

    Raises:
        UsageError: HQQ is not installed.
    """
    require_quantiser()
    head_size = config.hidden_size // config.num_attention_heads
    largest = max(size for size in range(1, min(GROUP, head_size) + 1) if head_size % size == 0)
    settings = {"nbits": BITS[kind], "axis_key": 1, "axis_value": 1, "residual_length": residual_length(length)}
    shared = isinstance(config, ContextPythiaConfig) and config.context_source == "shared"
    kinds = {
        "context": QuantisedSharedContextLayer if shared else QuantisedContextLayer,
        "recurrent_context": QuantisedRecurrentContextLayer,
    }
    cache = DynamicCache(config=config)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for i, layer_type in enumerate(types):
        if layer_type != "dummy":
            cache.layers[i] = kinds.get(layer_type, HQQQuantizedLayer)(**settings, q_group_size=largest)
    return cache


def measure_quantised(cache: Cache) -> CacheMeasurement:
    """Bytes of all that a quantised cache holds: packed integers, scales, zero points and unquantised tokens."""
    tensors = [tensor for layer in cache.layers for tensor in _tensors(vars(layer))]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    filled = sum(tensor.nbytes for tensor in tensors)
    return CacheMeasurement(int(cache.get_seq_length()), filled, max(0, sum(storages.values()) - filled))


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        yield from _tensors(list(held.values()))
    elif isinstance(held, list | tuple):
        for part in held:
            yield from _tensors(part)


def _groups(width: int) -> tuple[int, int]:
    """Number and size of the groups of one token's numbers."""
    groups = -(-width // GROUP)
    return groups, -(-width // groups)
