"""Padding wherever it stands, packed texts and masks of every form: each token as in its text alone."""

import pytest
import torch
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, StaticCache

from .conftest import SIZE, build, randomise

CLOSE = dict(rtol=0, atol=1e-5)
MODELS = ["GPT-NeoX", "input", "shared, 2 block layers", "layer", "layer, rotary pairs", "layer, token ids"]


@pytest.fixture(params=MODELS)
def model(request):
    if request.param == "GPT-NeoX":
        return randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE)))
    return build(request.param)


def counted(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_turns_that_are_padded_on_either_side_go_on(model, ids, kind):
    turns = [  # a chat of two rows: left padded, right padded, one token, padded between
        torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
        torch.tensor([[1], [1]]),
        torch.tensor([[1, 0, 1], [0, 1, 1]]),
    ]
    mask, start = torch.cat(turns, 1), 0
    ids = ids[:2, : mask.shape[1]] * mask
    cache = DynamicCache(config=model.config) if kind is DynamicCache else StaticCache(model.config, max_cache_len=16)
    parts = []
    for turn in turns:
        end = start + turn.shape[1]
        positions = counted(mask[:, :end])[:, start:]
        parts.append(
            model(ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions, past_key_values=cache)
        )
        start = end
    logits = torch.cat([part.logits for part in parts], 1)
    at_once = model(ids, attention_mask=mask, position_ids=counted(mask), use_cache=False).logits
    for row in range(2):
        text = mask[row].bool()
        alone = model(ids[row : row + 1, text], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, text], alone, **CLOSE)
        torch.testing.assert_close(at_once[row, text], alone, **CLOSE)


@torch.no_grad()
def test_packed_texts_are_apart(model, ids):
    positions = torch.tensor([[*range(5), *range(4), *range(8)], [*range(9), *range(1), *range(7)], [*range(17)]])
    block = (positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
    mask = (block.unsqueeze(1) == block.unsqueeze(2)).tril().unsqueeze(1)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    packed = [
        model(ids, attention_mask=m, position_ids=positions, use_cache=False).logits for m in (None, mask, additive)
    ]
    for row in range(3):
        for text in block[row].unique():
            here = block[row] == text
            alone = model(ids[row : row + 1, here], use_cache=False).logits[0]
            for logits in packed:
                torch.testing.assert_close(logits[row, here], alone, **CLOSE)


@torch.no_grad()
def test_a_mask_of_four_dimensions_tells_the_padding(model, ids):
    padding = torch.tensor([[0, 0, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1, 0]])
    mask = (torch.ones(7, 7, dtype=torch.bool).tril() & padding[:, None].bool()).unsqueeze(1)
    logits = model(ids[:2, :7], attention_mask=mask, position_ids=counted(padding), use_cache=False).logits
    for row in range(2):
        text = padding[row].bool()
        alone = model(ids[row : row + 1, :7][:, text], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, text], alone, **CLOSE)


@torch.no_grad()
def test_positions_that_a_cache_does_not_imply_are_refused_in_one_line(ids):
    model = build("layer, rotary pairs")
    whole = model(ids[:, :5]).logits
    for mask, positions in ((None, [0, 1, 2, 5, 6]), ([1, 1, 0, 1, 1], [0, 1, 1, 3, 3])):
        masks = None if mask is None else torch.tensor([mask] * 3)
        with pytest.raises(ValueError, match="^position_ids: .*(reuse_rotary_keys)"):
            model(ids[:, :5], attention_mask=masks, position_ids=torch.tensor([positions]), use_cache=True)
    places = torch.arange(5).unsqueeze(0)
    torch.testing.assert_close(model(ids[:, :5], position_ids=places, use_cache=True).logits, whole, **CLOSE)


@torch.no_grad()
def test_a_four_dimensional_mask_says_the_same_beside_a_cache(model, ids):
    """Two packed texts, the second with padding amid it: in one call that makes a cache, and in two calls."""
    is_text = torch.tensor([1] * 5 + [1, 1, 0, 0, 1, 1]).bool()
    text = torch.tensor([0] * 5 + [1] * 6)
    mask = ((text[:, None] == text) & is_text & is_text[:, None]).tril().expand(2, 1, -1, -1)
    positions, ids = torch.tensor([[*range(5), 0, 1, 1, 1, 2, 3]]), ids[:2, : len(text)]
    wanted = model(ids[:, 5:][:, is_text[5:]], use_cache=False).logits
    at_once, cache = {"attention_mask": mask, "position_ids": positions}, DynamicCache(config=model.config)
    if getattr(model.config, "reuse_rotary_keys", False):
        with pytest.raises(ValueError, match="caches no positions"):
            model(ids, **at_once)
        return
    torch.testing.assert_close(model(ids, **at_once).logits[:, 5:][:, is_text[5:]], wanted, **CLOSE)
    model(ids[:, :7], attention_mask=mask[:, :, :7, :7], position_ids=positions[:, :7], past_key_values=cache)
    last = model(ids[:, 7:], attention_mask=mask[:, :, 7:], position_ids=positions[:, 7:], past_key_values=cache)
    torch.testing.assert_close(last.logits[:, 2:], wanted[:, 2:], **CLOSE)
