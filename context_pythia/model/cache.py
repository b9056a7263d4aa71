"""The cache of a Context-Pythia: its layers, and its bytes by formula and by measurement.

transformers builds a cache from `config.layer_types`. The classes below register themselves for the two types that it
lacks, so `generate()`, `DynamicCache(config=...)` and `StaticCache(config=...)` use them.

Shapes: B batch, T cached tokens, W cached width, C context_dim.
"""

from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves
from transformers import GPTNeoXConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    StaticLayer,
)

from .configuration import ContextPythiaConfig
from .shortcuts import only_values


class ContextLayer(DynamicLayer):
    """Contexts `[B, 1, T, W]` as `keys`, with `values` of width 0: attention rebuilds keys and values from them.

    The stock layer copies the whole cache at each token. This one writes into spare room behind the last token, which
    grows by half when it is full, so a token costs only its own bytes. The room is an attribute of the tensor `keys`,
    and the first writer takes it. A shallow copy of the layer, a crop, a reordering or a foreign tensor has no room and
    is copied once. So a tensor of the cache never changes its contents, as in the stock layer.
    """

    _layer_type = "context"
    keys: torch.Tensor

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not only_values():
            # Autograd needs the old version of the tensor, so no write in place; a trace has no addresses.
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.keys if self.get_seq_length() else key_states[:, :, :0]
        room, used = vars(past).pop("room", None), past.shape[2]
        length, dtype = used + key_states.shape[2], torch.promote_types(past.dtype, key_states.dtype)
        if (
            room is not None
            and room.shape[2] >= length
            and room.shape[:2] == key_states.shape[:2]
            and room.dtype == dtype
            and (torch.is_inference_mode_enabled() or not room.is_inference())
        ):
            room[:, :, used:length] = key_states
        else:
            batch, heads, _, width = past.shape
            room = past.new_empty(batch, heads, length + max(length // 2, 32), width, dtype=dtype)
            torch.cat([past, key_states], dim=2, out=room[:, :, :length])
        self.keys, self.values = room[:, :, :length], room[:, :, :length, :0]
        vars(self.keys)["room"] = room
        return self.keys, self.values


class StaticContextLayer(StaticLayer):
    """`ContextLayer` of a fixed size; the stock layer can store contexts as they are."""

    _layer_type = "context"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # `early_initialization` may give the heads of GPT-NeoX; then the first context initializes the layer.
        if key_states.shape[1] == 1:
            super().lazy_initialization(key_states, value_states[..., :0])


class EmptyLayer(DynamicLayer):
    """Caches nothing, for a layer that reads another's context. Newer transformers has its own, "dummy"."""

    is_compileable = True
    supports_early_init = False

    @property
    def cumulative_length(self) -> torch.Tensor:
        """The number of tokens, always 0; an export of older transformers sets it for every layer."""
        return torch.zeros((), dtype=torch.long)

    def crop(self, tokens_to_remove: int) -> None:
        pass


for layer_classes in (DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING):
    layer_classes.setdefault("dummy", EmptyLayer)


class RecurrentContext:
    """Adds the ContextBlock's state to a layer of keys and values (context source `input`), or of contexts that are
    not exact (`shared` in a quantized cache).

    `contexts` `[B, k, C]` ends with the context of the last token. k is 1; or, once transformers asks for a past to
    roll back to (assisted decoding), k counts all tokens since the last `crop`.
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
        length = int(self.get_seq_length())  # type: ignore[attr-defined]
        # For transformers 5.16 a positive number is the length to keep; newer versions refuse it.
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        if self.contexts is not None:
            last = self.contexts.shape[1] - removed
            if last < 1 and removed < length:
                raise RuntimeError(
                    f"crop({tokens_to_remove}): the cache has no context before the last {removed} tokens; call "
                    "`activate_past_recording()` on the cache before the tokens that may be cropped"
                )
            self.contexts = self.contexts[:, last - 1 : last] if removed < length else None
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.contexts = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self.contexts is not None:
            self.contexts = self.contexts.index_select(0, beam_idx.to(self.contexts.device))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self.contexts is not None:
            self.contexts = self.contexts[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.contexts is not None:
            self.contexts = self.contexts.repeat_interleave(repeats, dim=0)


class RecurrentContextLayer(RecurrentContext, DynamicLayer):
    _layer_type = "recurrent_context"


class StaticRecurrentContextLayer(RecurrentContext, StaticLayer):
    """Writes the state into one tensor, because a CUDA graph overwrites its outputs at its next call."""

    _layer_type = "recurrent_context"

    @property
    def is_compileable(self) -> bool:
        return not self.record_past

    def update_contexts(self, contexts: torch.Tensor) -> None:
        if self.record_past:
            super().update_contexts(contexts)
            return
        if self.contexts is None:
            self.contexts = torch.zeros_like(contexts[:, -1:], memory_format=torch.contiguous_format)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.contexts)
        self.contexts.copy_(contexts[:, -1:])

    def reset(self) -> None:
        contexts = None if self.record_past or self.contexts is None else self.contexts.zero_()
        super().reset()
        self.contexts = contexts


def bring_back(cache: Cache, layer_idx: int) -> None:
    """Move an offloaded layer back to its device. The host prefetches it during the layer before, except if it is the
    first layer, the only one that caches, or follows layers that cache nothing."""
    if getattr(cache, "offloading", False) and layer_idx < len(cache.layers):
        cache.layers[layer_idx].prefetch()


def previous_context(config: ContextPythiaConfig, cache: Cache | None) -> torch.Tensor | None:
    """The ContextBlock's state in `cache`, `[B, C]`, or None before the first token.

    Raises:
        ValueError: the cache cannot store a state (`input` with a cache that was created without the model's config).
    """
    if cache is None or not cache.layers or not getattr(cache.layers[0], "is_initialized", False):
        return None
    length, layer = cache.get_seq_length(), cache.layers[0]
    if isinstance(layer, RecurrentContext):
        if layer.contexts is None:
            return None
        state = layer.contexts[:, -1]
    elif config.context_source == "input":
        raise ValueError(f"{type(cache).__name__} cannot store the recurrent state: create it with config=model.config")
    else:
        bring_back(cache, 0)
        contexts = layer.keys[:, 0, :, config.rotary_dim :]
        if isinstance(length, torch.Tensor):
            # Only the device knows a static cache's length: reading it would recompile each decoding step.
            last = (length - 1).clamp(min=0).view(1)
            state = contexts.index_select(1, last)[:, 0] * (length > 0)
        elif length and layer.keys.shape[-1] == config.cached_width():  # `cache_context` refuses other contents
            state = contexts[:, -1]
        else:
            return None
    # Autograd accepts no tensor of inference mode. A trace cannot ask for the mode, and has no such tensor.
    no_autograd = torch.is_grad_enabled() and not torch.compiler.is_compiling() and state.is_inference()
    return state.clone() if no_autograd else state


def keep_context(cache: Cache | None, contexts: torch.Tensor) -> None:
    """Store the new tokens' contexts `[B, T, C]` in a cache that keeps them apart from keys and values."""
    if cache is not None and cache.layers and isinstance(cache.layers[0], RecurrentContext):
        cache.layers[0].update_contexts(contexts)


def cached_numbers_per_token(config: GPTNeoXConfig) -> int:
    """Numbers that the model caches for one token of one sequence, all layers together (formula)."""
    if isinstance(config, ContextPythiaConfig) and config.context_source != "input":
        return sum(config.cached_width(i) for i, maker in enumerate(config.makers) if maker == i)
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
        filled: bytes of these tokens, and of the recurrent state, if there is one.
        slack: further bytes of storage, the room to grow.
    """

    length: int
    filled: int
    slack: int


def measure_cache(cache: Cache) -> CacheMeasurement:
    """Measure the tensors in a filled cache of any model: dynamic, static, or quantized, where packed integers, scales
    and zero points count."""
    length = int(cache.get_seq_length())
    filled, storages = 0, {}
    for tensor in tree_leaves([vars(layer) for layer in cache.layers]):
        # A static layer counts its tokens in a tensor without dimensions.
        if isinstance(tensor, torch.Tensor) and tensor.ndim:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            filled += (tensor[:, :, :length] if tensor.ndim == 4 else tensor).nbytes
    return CacheMeasurement(length, filled, max(0, sum(storages.values()) - filled))
