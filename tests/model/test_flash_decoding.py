import pytest
import torch

from context_pythia.model import attention
from context_pythia.model.flash_decoding import LEAST_TOKENS, attend_in_splits, splits_for

from .conftest import build


def masks(kind: str, batch: int, queries: int, length: int) -> torch.Tensor | None:
    """`none`; `empty end`, as a static cache has it; `padding` that hides the whole first part of a row; `scores`."""
    seen = torch.ones(batch, 1, queries, length, dtype=torch.bool)
    if kind == "empty end":
        seen[..., length // 2 - 3 :] = False
    elif kind == "padding":
        seen[0, ..., : length // 2 + 1] = False
    elif kind == "scores":
        return torch.randn(batch, 1, queries, length, generator=torch.Generator().manual_seed(2)).where(seen, -1e30)
    return None if kind == "none" else seen


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", ["none", "empty end", "padding", "scores"])
@pytest.mark.parametrize("splits, length", [(2, 64), (3, 70)])
@torch.no_grad()
def test_parts_weighed_together_are_the_whole(kind, splits, length, dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    room = torch.randn(2, 1, length + 9, 24, generator=generator).to(dtype)
    context, query = room[:, :, :length], torch.randn(2, 1, 8, 24, generator=generator).to(dtype)
    mask = masks(kind, 2, 8, length)
    added = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else mask
    whole = torch.nn.functional.scaled_dot_product_attention(query, context, context, attn_mask=added, scale=0.7)
    parts = attend_in_splits(query, context, added, 0.7, splits)
    assert whole.std() > 0.3
    torch.testing.assert_close(parts.transpose(1, 2), whole, rtol=0, atol=tolerance)


@torch.no_grad()
def test_a_long_sequence_is_cut_where_threads_would_stand_idle(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    query, context = torch.empty(1, 1, 8, 24), torch.empty(1, 1, 4 * LEAST_TOKENS, 24)
    assert splits_for(query, context, "sdpa") == 4
    assert splits_for(query, context[:, :, : 2 * LEAST_TOKENS + 1], "sdpa") == 2
    assert splits_for(query.expand(2, -1, -1, -1), context.expand(2, -1, -1, -1), "sdpa") == 2
    for other in (context[:, :, : LEAST_TOKENS - 1], context.expand(5, -1, -1, -1)):
        assert splits_for(query.expand(len(other), -1, -1, -1), other, "sdpa") == 1
    assert splits_for(query, context, "eager") == 1
    with torch.enable_grad():  # the kernel's logarithms carry no gradient
        assert splits_for(query, context, "sdpa") == 1


@torch.no_grad()
def test_expanded_attention_of_a_single_head_is_never_cut(monkeypatch):
    model = build("layer", num_attention_heads=1, rotary_pct=0.25)
    ids = torch.randint(2, 97, (1, 24), generator=torch.Generator().manual_seed(1))
    whole = model(ids).logits
    monkeypatch.setattr(attention, "splits_for", lambda *_: 2)
    torch.testing.assert_close(model(ids).logits, whole, rtol=0, atol=0)


def test_parts_that_are_masked_as_a_whole_weigh_nothing():
    query, context = torch.randn(2, 1, 4, 8) * 5, torch.randn(2, 1, 12, 8)
    for least in (float("-inf"), torch.finfo(torch.float32).min):
        mask = torch.zeros(2, 1, 1, 12)
        mask[..., 4:8] = mask[1, ..., :4] = least
        expected = torch.nn.functional.scaled_dot_product_attention(query, context, context, mask.expand(2, 1, 4, 12))
        for splits in (2, 3):
            actual = attend_in_splits(query, context, mask, 8**-0.5, splits)
            torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=0, atol=1e-5)
