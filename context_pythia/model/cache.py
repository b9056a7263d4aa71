"""What a Context-Pythia caches: the layers of the cache, and its bytes by formula and by measurement.

transformers builds a cache from `config.layer_types`; the classes below register themselves for the two types that it
lacks, so `generate()`, `DynamicCache(config=...)` and `StaticCache(config=...)` all use them.

Shapes: B batch, T cached tokens, W cached width, C context_dim.
"""

from dataclasses import dataclass

import torch
from transformers import GPTNeoXConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    StaticLayer,
)

from .configuration import ContextPythiaConfig


class ContextLayer(DynamicLayer):
    """Contexts `[B, 1, T, W]` as `keys`, with `values` of no width: keys and values are rebuilt from them.

    The stock layer copies the whole cache at each token. This one writes into spare room behind the last token, which a
    prefill leaves and which grows by half when it is used up, so that a token costs its own bytes.
    """

    _layer_type = "context"

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (torch.empty_like(new[..., :0, :]) for new in (key_states, value_states))
        if torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad):
            # Autograd still needs the old contents, which writing in place would change.
            return super().update(key_states, value_states)
        length = self.keys.shape[-2]
        self._reserve(length + key_states.shape[-2])
        self.keys[..., length:, :] = key_states
        return self.keys, self.values

    def _reserve(self, length: int) -> None:
        """Make `keys` a view of `length` tokens. How many fit is read off its strides and its storage, so every tensor
        that the stock operations (crop, reorder, repeat, select, a move to another device) leave in `keys` is a valid
        state."""
        batch, heads, used, width = self.keys.shape
        strides, held = self.keys.stride(), self.keys.untyped_storage().nbytes() // self.keys.itemsize
        # A copy of a single sequence may keep strides that its storage has no room for.
        end = self.keys.storage_offset() + (batch - 1) * strides[0] + length * width
        if used and strides[-2:] == (width, 1) and strides[0] // (heads * width) >= length and held >= end:
            self.keys = self.keys.as_strided((batch, heads, length, width), strides)
            return
        room = self.keys.new_empty(batch, heads, length + max(length // 2, 32), width)
        room[:, :, :used] = self.keys
        self.keys = room[:, :, :length]


class StaticContextLayer(StaticLayer):
    """`ContextLayer` of a fixed size: the stock layer holds contexts as they are."""

    _layer_type = "context"


class EmptyLayer(DynamicLayer):
    """Caches nothing: a layer that reads the context of another. Newer transformers has one of its own, "dummy"."""

    is_compileable = True
    supports_early_init = False

    def crop(self, tokens_to_remove: int) -> None:
        pass


for layer_classes in (DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING):
    layer_classes.setdefault("dummy", EmptyLayer)


class RecurrentContext:
    """Adds the ContextBlock's state to a layer of keys and values (context source `input`), or of contexts that it
    cannot be read back from to the digit (`shared` in a quantised cache).

    `contexts` `[B, k, C]` ends with the context of the last token. k is 1, or, once transformers asks for a past to
    roll back to (assisted decoding), all tokens since the last `crop`.
    """

    contexts: torch.Tensor | None = None
    record_past = False

    def update_contexts(self, contexts: torch.Tensor) -> None:
        if self.record_past and self.contexts is not None:
            self.contexts = torch.cat([self.contexts, contexts], dim=1)
        else:
            self.contexts = contexts if self.record_past else contexts[:, -1:].clone()

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        kept = 0 if self.contexts is None else self.contexts.shape[1] - abs(tokens_to_remove)
        if self.contexts is not None and kept < 1:
            raise RuntimeError(
                f"crop({tokens_to_remove}): the context before the last {abs(tokens_to_remove)} tokens was not kept; "
                "call `activate_past_recording()` on the cache before the tokens that may be cropped"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if self.contexts is not None:
            self.contexts = self.contexts[:, kept - 1 : kept]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.contexts = None

    def _select(self, batch: torch.Tensor) -> None:
        if self.contexts is not None:
            self.contexts = self.contexts[batch.to(self.contexts.device)]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.contexts is not None:
            self.contexts = self.contexts.repeat_interleave(repeats, dim=0)


class RecurrentContextLayer(RecurrentContext, DynamicLayer):
    _layer_type = "recurrent_context"


class StaticRecurrentContextLayer(RecurrentContext, StaticLayer):
    _layer_type = "recurrent_context"


def previous_context(config: ContextPythiaConfig, cache: Cache | None) -> torch.Tensor | None:
    """The ContextBlock's state in `cache`, `[B, C]`, or None before the first token.

    Raises:
        ValueError: the cache keeps no state (`input` with a cache that was made without the model's config).
    """
    if cache is None or not cache.layers or not getattr(cache.layers[0], "is_initialized", False):
        return None
    length, layer = cache.get_seq_length(), cache.layers[0]
    if isinstance(length, torch.Tensor) and config.context_source == "shared":
        # A static cache's length is known to the device alone: reading it would compile each decoding step anew.
        last = layer.keys[:, 0].index_select(1, (length - 1).clamp(min=0).view(1))
        return last[:, 0, config.rotary_dim :] * (length > 0)
    if int(length) == 0:
        return None
    if config.context_source == "shared" and not isinstance(layer, RecurrentContext):
        return layer.keys[:, 0, int(length) - 1, config.rotary_dim :]
    if not isinstance(layer, RecurrentContext) or layer.contexts is None:
        raise ValueError(f"{type(cache).__name__} keeps no recurrent context; make it with config=model.config")
    return layer.contexts[:, -1]


def keep_context(cache: Cache | None, contexts: torch.Tensor) -> None:
    """Hand the new tokens' contexts `[B, T, C]` to a cache that keeps them apart from keys and values."""
    if cache is not None and cache.layers and isinstance(cache.layers[0], RecurrentContext):
        cache.layers[0].update_contexts(contexts)


def cached_numbers_per_token(config: GPTNeoXConfig) -> int:
    """Numbers that the model caches for one token of one sequence, all layers together (formula)."""
    if isinstance(config, ContextPythiaConfig) and config.context_source != "input":
        return sum(config.cached_width(i) for i in range(config.num_hidden_layers) if config.context_layer(i) == i)
    return 2 * config.hidden_size * config.num_hidden_layers


def cache_bytes(config: GPTNeoXConfig, length: int, batch_size: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a cache of `length` tokens (formula): the tokens' numbers, and for `input` the recurrent state."""
    numbers = length * cached_numbers_per_token(config)
    if isinstance(config, ContextPythiaConfig) and config.context_source == "input":
        numbers += config.context_dim
    return batch_size * numbers * dtype.itemsize


@dataclass(frozen=True)
class CacheMeasurement:
    """Bytes of a cache as they stand in memory.

    Attributes:
        length: cached tokens.
        filled: bytes of the tensors' parts that hold these tokens (and the recurrent state, where there is one).
        slack: bytes of storage held beyond that, room to grow.
    """

    length: int
    filled: int
    slack: int


def measure_cache(cache: Cache) -> CacheMeasurement:
    """Measure the tensors in a filled cache (DynamicCache or StaticCache, of any model)."""
    length = int(cache.get_seq_length())
    filled, storages = 0, {}
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values, getattr(layer, "contexts", None)):
            if tensor is None:
                continue
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            filled += (tensor[:, :, :length] if tensor.ndim == 4 else tensor).nbytes
    return CacheMeasurement(length, filled, sum(storages.values()) - filled)
