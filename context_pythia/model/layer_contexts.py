"""The contexts of a forward pass, on their way from the layers that make them to the layers that read them.

A token id is cached as its digits in base 256. Every floating-point type has these numbers exactly, so a context with
an id stays one tensor, which caches crop, reorder, offload and copy like any other.

Shapes: B batch, Q new tokens, T tokens in the cache, the new ones included, W width, N digits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import embedding


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

    def __init__(
        self,
        ids: torch.Tensor | None = None,
        embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
        table: torch.Tensor | None = None,
        room: int = 0,
    ):
        """With `cache_token_ids`: the new tokens' ids `[B, Q]`, ids -> embeddings, and, if there is one, the table of
        all embeddings, `[V, room + hidden]`, with room before them for a context."""
        self.ids, self.embed, self.table, self.room = ids, embed, table, room
        self._embeddings: Any = None  # of all cached tokens, `[B, 1, T, hidden]` or `[B, 1, T, room + hidden]`
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
            rows = self.embed(ids) if self.table is None else embedding(ids, self.table)
            self._embeddings = rows.unsqueeze(1)
        if self.table is None:
            return torch.cat([context, self._embeddings.to(context.device)], dim=-1)
        # The contexts take turns in the room, so that the embeddings are copied once.
        joined = self._embeddings[..., self.room - context.shape[-1] :]
        joined[..., : context.shape[-1]] = context
        return joined
