"""The contexts of a forward pass, on their way from the layers that make them to the layers that read them.

A token id is cached as its digits in base 256. Every floating-point type has these numbers exactly, so a context with
an id stays one tensor, which caches crop, reorder, offload and copy like any other.

Shapes: B batch, Q new tokens, T tokens in the cache, the new ones included, W width, N digits.
"""

from collections.abc import Callable
from typing import Any

import torch


def to_digits(ids: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Ids `[B, T]` -> `[B, T, N]`, the last digit first."""
    return torch.stack([(ids >> (8 * i)) & 255 for i in range(count)], dim=-1).to(dtype)


def from_digits(digits: torch.Tensor) -> torch.Tensor:
    """`[B, T, N]` -> ids `[B, T]`."""
    columns = digits.long().unbind(-1)
    return torch.stack([column << (8 * i) for i, column in enumerate(columns)]).sum(dim=0)


class Contexts:
    """Contexts that layers pass on: index of a layer -> its context, `[B, 1, T, W]`.

    Not a Mapping: the hooks of accelerate and FSDP rebuild mappings among a layer's arguments, and entries that the
    layer wrote would be lost.
    """

    def __init__(self, ids: torch.Tensor | None = None, embed: Callable[[torch.Tensor], torch.Tensor] | None = None):
        """With `cache_token_ids`: the new tokens' ids `[B, Q]`, and ids -> embeddings."""
        self.ids, self.embed = ids, embed
        self._embeddings: Any = None  # of all cached tokens, `[B, 1, T, hidden]`
        # Each context, and whether gradients were recorded for it.
        self._made: dict[int, tuple[Any, bool]] = {}

    def __setitem__(self, layer_idx: int, context: Any) -> None:
        # Only the layers up to the next context read this one. Keeping it longer would keep an offloaded cache on its
        # device. With gradients it stays, because a backward pass that recomputes a layer reads it again.
        if not torch.is_grad_enabled():
            self._made.clear()
        self._made[layer_idx] = context, torch.is_grad_enabled()

    def __getitem__(self, layer_idx: int) -> Any:
        """Raises `RuntimeError` if a layer is recomputed for gradients, but its context was computed without them."""
        context, with_gradients = self._made.get(layer_idx, (None, False))
        if context is None or with_gradients != torch.is_grad_enabled():
            raise RuntimeError(
                "activation checkpointing with use_reentrant=True loses the gradients of a context that layers share: "
                "give use_reentrant=False"
            )
        return context

    def with_embeddings(self, context: torch.Tensor, digits: int) -> torch.Tensor:
        """`[B, 1, T, W]` with the tokens' embeddings behind it. The context with the ids has `digits` in its last
        columns, which the embeddings replace; they serve the contexts after it too."""
        assert self.embed is not None
        if digits:
            ids, context = from_digits(context[:, 0, :, -digits:]), context[..., :-digits]
            self._embeddings = self.embed(ids).unsqueeze(1)
        return torch.cat([context, self._embeddings.to(context.device)], dim=-1)
