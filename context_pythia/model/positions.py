"""Reads padding, beginnings of texts, and positions from attention masks and `position_ids`.

Shapes: B batch, Q new tokens, T tokens in the cache, the new ones included.
"""

import torch

from .shortcuts import is_recorded


def visible(mask: torch.Tensor) -> torch.Tensor:
    """A four-dimensional mask as booleans: which keys a query sees."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def text_masks(
    attention_mask: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    queries: int,
    past: int | torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Padding and beginnings of texts among the new tokens, for what reads a text token by token: the recurrence, and
    the search for the token before another.

    Texts packed into one row are separated as in attention: by a four-dimensional mask; or, without a mask and a cache,
    where `position_ids` do not count on (as in transformers).

    Args:
        attention_mask: `[B, >= Q]`, `[B, 1, Q, T]` or None, the model's argument.
        token_mask: `[B, Q]` or None, the model's argument.
        position_ids: `[B or 1, Q]` or None, the model's argument.
        past: tokens in the cache; None without a cache.

    Returns:
        `[B, Q]`, false for padding, or None without padding; `[B or 1, Q]`, true where a new text begins, or None.

    Raises:
        ValueError: a four-dimensional mask by which a text goes on elsewhere than after the last of its new tokens, as
            in a tree of continuations (not checked while a graph is recorded).
    """
    is_text = None if token_mask is None else token_mask.bool()
    if attention_mask is not None and attention_mask.ndim == 2:
        return attention_mask[:, -queries:].bool() if is_text is None else is_text, None
    if attention_mask is not None:
        sees = visible(attention_mask[:, 0])
        keys = torch.arange(sees.shape[-1], device=sees.device)
        own = (torch.arange(queries, device=sees.device) + (0 if past is None else past)).unsqueeze(-1)
        if is_text is None:
            is_text = (sees & (keys == own)).any(dim=-1)
        begins = is_text & ~(sees & (keys < own)).any(dim=-1)
        if not is_recorded():
            latest = torch.where(is_text, own[:, 0], -1).cummax(dim=-1).values[:, :-1]
            seen = sees[:, 1:].expand(len(is_text), -1, -1).gather(-1, latest.clamp(min=0).unsqueeze(-1))[..., 0]
            if (is_text & ~begins)[:, 1:].logical_and((latest >= 0) & ~seen).any():
                raise ValueError(
                    "attention_mask: a token does not see the one before it, but an earlier one: this model reads a "
                    "text token by token; give each continuation a row of its own"
                )
        return is_text, begins
    if past is None and position_ids is not None:
        return is_text, position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    return is_text, None


def positions_in_cache(
    position_ids: torch.Tensor, causal_mask: torch.Tensor | None, length: int, new: torch.Tensor
) -> torch.Tensor:
    """Positions of all tokens in a cache, old and new, `[B or 1, T]`, up to a constant per row: RoPE depends only on
    distances.

    The cache stores no positions. They are either places in the cache (padding counts) or the positions of
    `generate()` (padding does not count); `position_ids` show which.

    Args:
        position_ids: of the new tokens, `[B or 1, Q]`.
        causal_mask: `[B, 1, Q, T]`, or None without padding.
        length: T.
        new: places of the new tokens, `[Q]`.

    Raises:
        ValueError: positions that are neither (not checked while a graph is compiled).
    """
    places = torch.arange(length, device=new.device).unsqueeze(0)
    if causal_mask is None:
        by_place = by_count = (position_ids == places[:, new]).all(dim=-1, keepdim=True)
        counts = places
    else:
        is_text = visible(causal_mask[:, 0]).any(dim=-2)
        counts = is_text.cumsum(dim=-1) - 1
        padding = ~is_text[:, new]
        by_place, by_count = (
            (padding | (position_ids == expected[:, new])).all(dim=-1, keepdim=True) for expected in (places, counts)
        )
    if torch.compiler.is_compiling():
        return places if causal_mask is None else torch.where(by_place, places, counts)
    if not (by_place | by_count).all():
        raise ValueError(
            "position_ids: this model (reuse_rotary_keys) caches no positions: leave position_ids out, or give those "
            "of generate()"
        )
    if causal_mask is None or by_place.all():
        return places
    # If padding is only before and after a text, places give the same distances, with one table for all rows.
    begins = is_text[:, 1:] & ~is_text[:, :-1]
    return torch.where(by_place, places, counts) if (begins.sum(dim=-1) + is_text[:, 0] > 1).any() else places
