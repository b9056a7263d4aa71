"""The contexts of a forward pass, on their way from the layers that make them to the layers that read them.

A token id is cached as its digits in base 256. Every floating-point type has these numbers exactly, so a context with
an id stays one tensor, which caches crop, reorder, offload and copy like any other. Where a text begins, a digit d is
cached as -1 - d; padding has no id, and is skipped when the token before another is looked up.

Shapes: B batch, Q new tokens, T tokens in the cache, the new ones included, W width, N digits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding, embedding_bag

# The digits of padding: below each -1 - d, and exact in every floating-point type too.
PADDING = -512


def to_digits(
    ids: torch.Tensor, count: int, is_text: torch.Tensor | None = None, begins: torch.Tensor | None = None
) -> torch.Tensor:
    """Ids `[B, Q]` -> `[B, Q, N]`, the last digit first.

    Args:
        is_text: `[B, Q]`, false for padding.
        begins: `[B or 1, Q]`, true where a new text begins.
    """
    digits = torch.stack([(ids >> (8 * i)) & 255 for i in range(count)], dim=-1)
    if begins is not None:
        digits = torch.where(begins.unsqueeze(-1), -1 - digits, digits)
    return digits if is_text is None else digits.masked_fill(~is_text.unsqueeze(-1), PADDING)


def from_digits(digits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, T, N]` -> ids `[B, T]`, 0 for padding; and for each token that is none, the place of the token before it in
    its text, `[B, T]`, -1 for the first."""
    digits = digits.long()
    is_text, begins = digits[..., 0] > PADDING, digits[..., 0] < 0
    digits = torch.where(begins.unsqueeze(-1), -1 - digits, digits) * is_text.unsqueeze(-1)
    ids = torch.stack([column << (8 * i) for i, column in enumerate(digits.unbind(-1))]).sum(dim=0)
    places = torch.arange(ids.shape[1], device=ids.device)
    latest = torch.where(is_text, places, -1).cummax(dim=-1).values
    return ids, nn.functional.pad(latest, (1, -1), value=-1).masked_fill(begins, -1)


class TokenShift(nn.Module):
    """Mixes a token's embedding with that of the token before it, channel by channel (RWKV, arXiv 2305.13048).

        e_t = x_t + m (x_{t-1} - x_t),    x = LN(embedding), and 0 before the first token

    So a key can say which token came before its own. Attention then finds what followed an earlier occurrence of the
    current token in one layer; without it, two layers must learn that together ("smeared keys", arXiv 2209.11895).
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, embeddings: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Embeddings `[B, T, hidden]` and the places of the tokens before, `[B, T]` -> `[B, T, hidden]`."""
        rows = before.clamp(min=0) + before.shape[1] * torch.arange(len(before), device=before.device).unsqueeze(1)
        previous = embedding(rows, embeddings.flatten(0, 1)) * (before >= 0).unsqueeze(-1)
        return embeddings + self.weight * (previous - embeddings)

    def table(self, embeddings: torch.Tensor, room: int) -> torch.Tensor:
        """What each of V tokens adds to its own mix, then what it adds to the next token's, then a row of zeros,
        `[2 V + 1, room + hidden]`; with room before it for a context."""
        size, hidden = embeddings.shape
        table = embeddings.new_zeros(2 * size + 1, room + hidden)
        own, later = table[:size, room:], table[size:-1, room:]
        torch.mul(self.weight, embeddings, out=later)
        torch.sub(embeddings, later, out=own)
        return table

    def look_up(self, ids: torch.Tensor, before: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """`forward` by a `table`: `[B, T]` each -> `[B, T, room + hidden]`."""
        vocab_size = len(table) // 2
        previous = torch.where(before < 0, vocab_size, ids.gather(1, before.clamp(min=0)))
        rows = torch.stack([ids, vocab_size + previous], dim=-1)
        return embedding_bag(rows.flatten(0, 1), table, mode="sum").unflatten(0, ids.shape)


class Contexts:
    """Contexts that layers pass on: index of a layer -> its context, `[B, 1, T, W]`.

    Not a Mapping: the hooks of accelerate and FSDP rebuild mappings among a layer's arguments, and entries that the
    layer wrote would be lost.
    """

    def __init__(
        self,
        digits: torch.Tensor | None = None,
        embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        room: int = 0,
    ):
        """The arguments are for `cache_token_ids`.

        Args:
            digits: of the new tokens' ids, `[B, Q, N]`.
            embed: ids and the places of the tokens before, `[B, T]` each, -> embeddings `[B, T, room + hidden]`.
            room: numbers before an embedding, where a context can stand.
        """
        self.digits, self.embed, self.room = digits, embed, room
        self._embeddings: Any = None  # of all cached tokens, `[B, 1, T, room + hidden]`
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
            self._embeddings = self.embed(*from_digits(context[:, 0, :, -digits:])).unsqueeze(1)
            context = context[..., :-digits]
        if not self.room:
            return torch.cat([context, self._embeddings.to(context.device)], dim=-1)
        # The contexts take turns in the room, so that the embeddings are copied once.
        joined = self._embeddings[..., self.room - context.shape[-1] :]
        joined[..., : context.shape[-1]] = context
        return joined
