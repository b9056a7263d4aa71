"""What transformers' generate() promises of any model: every mode that it ships, every output.

Its own tests of this (GenerationTesterMixin) are in no distribution. The modes that it fetches from the Hub
(contrastive search, DoLa, group and constrained beams) need a network.
"""

from itertools import product

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia.evaluation.memory import cache_of

from .conftest import KINDS, SIZE, randomise

CLOSE = dict(rtol=0, atol=1e-5)
MODES = {
    "greedy": dict(do_sample=False),
    "samples": dict(do_sample=True, top_k=20, num_return_sequences=2),
    "beams": dict(do_sample=False, num_beams=3, num_return_sequences=2),
}


@pytest.fixture
def ids(ids):
    return ids[:2, :9]


def generate(model, ids=None, mode="greedy", tokens=7, **settings):
    torch.manual_seed(3)
    if ids is not None:
        settings["attention_mask"] = torch.ones_like(ids)  # a random model writes the padding's token as any other
    return model.generate(ids, max_new_tokens=tokens, **MODES[mode], **settings)


# Samples are greedy text to the cache, so one source is enough; beams reorder it.
@pytest.mark.parametrize(("source", "mode"), [*product(KINDS, ["greedy", "beams"]), ("layer, token ids", "samples")])
def test_every_mode_writes_with_each_cache_what_it_writes_without(model, ids, mode):
    expected = generate(model, ids, mode, 5, use_cache=False).tolist()
    assert generate(model, ids, mode, 5).tolist() == expected
    assert generate(model, ids, mode, 5, cache_implementation="static").tolist() == expected
    assert generate(model, ids, mode, 5, prefill_chunk_size=4).tolist() == expected


def test_a_text_that_ends_is_padded_while_the_others_go_on(model, ids):
    plain = generate(model, ids)
    end = int(plain[0, 11])
    ended = generate(model, ids, eos_token_id=end)
    assert ended.tolist() == generate(model, ids, eos_token_id=end, use_cache=False).tolist()
    for row, whole in zip(ended.tolist(), plain.tolist(), strict=True):
        stop = whole.index(end, 9) + 1 if end in whole[9:] else len(whole)
        assert row == (whole[:stop] + [SIZE["pad_token_id"]] * len(row))[: len(row)]


def test_assistants_and_the_prompts_own_words_change_no_greedy_text(model, ids):
    expected = generate(model, ids[:1], tokens=9).tolist()
    assistant = randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE)))
    assert generate(model, ids[:1], tokens=9, assistant_model=assistant).tolist() == expected
    assert generate(model, ids[:1], tokens=5, assistant_model=model).tolist() == [expected[0][:14]]
    assert generate(model, ids[:1], tokens=9, prompt_lookup_num_tokens=3).tolist() == expected


def shapes(cache) -> list[list[int]]:
    """What a layer holds, `[B, heads, T, width]`, where it holds something."""
    filled = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return [[*layer.keys.shape, layer.values.shape[-1]] for layer in filled]


OWN_SHAPES = {
    "input": [[2, 4, 15, 16, 16]] * 3,
    "shared, 2 block layers": [[2, 1, 15, 25, 0]],
    "layer, contexts by layers": [[2, 1, 15, width, 0] for width in (7, 23)],
    "layer, rotary pairs": [[2, 1, 15, width, 0] for width in (25, 21, 26)],
    "layer, token ids": [[2, 1, 15, width, 0] for width in (4 + 1, 23)],
    "grouped, shared by 2": [[2, 1, 15, 16, 16]] * 2,
}


@torch.no_grad()
def test_outputs_of_each_step_are_those_of_one_forward(source, model, ids):
    model.double().set_attn_implementation("eager")
    wanted = dict(output_logits=True, output_scores=True, output_attentions=True, output_hidden_states=True)
    steps = generate(model, ids, return_dict_in_generate=True, **wanted)
    assert steps.sequences.shape == (2, 16) and shapes(cache_of(steps)) == OWN_SHAPES[source]
    whole = model(steps.sequences[:, :-1], output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(torch.stack(steps.logits, dim=1), whole.logits[:, 8:], **CLOSE, check_dtype=False)
    torch.testing.assert_close(torch.stack(steps.scores, dim=1), whole.logits[:, 8:], **CLOSE, check_dtype=False)
    assert len(steps.hidden_states) == len(steps.attentions) == 7
    for layer in range(4):
        states = torch.cat([step[layer] for step in steps.hidden_states], dim=1)
        torch.testing.assert_close(states, whole.hidden_states[layer], **CLOSE)
    for layer in range(3):
        for step, length in zip(steps.attentions, range(9, 16), strict=True):
            own = step[layer]
            assert own.shape == (2, 4, 9 if length == 9 else 1, length)
            expected = whole.attentions[layer][:, :, length - own.shape[2] : length, :length]
            torch.testing.assert_close(own, expected, **CLOSE)


def test_beams_return_their_scores_and_where_they_came_from(model, ids):
    found = generate(model, ids, mode="beams", return_dict_in_generate=True, output_scores=True, length_penalty=0.0)
    assert found.sequences.shape == (4, 16) and found.beam_indices.shape == (4, 7)
    along = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    torch.testing.assert_close(along.sum(dim=1), found.sequences_scores, **CLOSE)
    with torch.no_grad():
        logits = model(found.sequences[:, :-1]).logits[:, 8:].log_softmax(-1)
    own = logits.gather(-1, found.sequences[:, 9:, None])[..., 0].sum(1)
    torch.testing.assert_close(found.sequences_scores, own, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # the name that 5.16 knows
def test_a_conversation_goes_on_from_the_cache_that_was_returned(model, ids):
    expected = generate(model, ids, tokens=10).tolist()
    first = generate(model, ids, tokens=4, return_dict_in_generate=True)
    assert generate(model, first.sequences, tokens=6, past_key_values=cache_of(first)).tolist() == expected
    if model.config.to_dict().get("cache_token_ids"):
        return  # embeddings without ids are refused (test_token_ids.py)
    # By embeddings, the first turn and the second.
    embed = model.get_input_embeddings()
    first = generate(model, tokens=4, inputs_embeds=embed(ids), return_dict_in_generate=True)
    written = torch.cat([ids, first.sequences], dim=1)
    assert generate(model, written, tokens=6, past_key_values=cache_of(first)).tolist() == expected


@torch.no_grad()
def test_only_the_logits_that_are_wanted_are_computed(model, ids):
    whole = model(ids).logits
    for wanted, expected in ((1, whole[:, -1:]), (4, whole[:, -4:]), (torch.tensor([2, 5]), whole[:, [2, 5]])):
        torch.testing.assert_close(model(ids, logits_to_keep=wanted).logits, expected, **CLOSE)


IN_ROWS = [*KINDS[:2], "layer, token ids"]


def tree(ids):
    """Two continuations of one prompt side by side, each blind for the other, as speculative trees have them: prompt,
    continuations, and the arguments of a forward."""
    prompt, one, other = ids[:1, :5], ids[:1, 5:7], ids[1:2, 5:7]
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    seen[7:, 5:7] = False
    mask = torch.zeros(9, 9).masked_fill(~seen, torch.finfo(torch.float32).min).view(1, 1, 9, 9)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 5, 6]])
    inputs = dict(input_ids=torch.cat([prompt, one, other], dim=1), attention_mask=mask, position_ids=positions)
    return prompt, (one, other), inputs


@pytest.mark.parametrize("source", [source for source in KINDS if source not in IN_ROWS])
@torch.no_grad()
def test_a_mask_of_four_dimensions_picks_the_tokens_that_are_read(model, ids):
    prompt, ends, inputs = tree(ids)
    expected = torch.cat([model(torch.cat([prompt, end], dim=1)).logits[:, 5:] for end in ends], dim=1)
    logits = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits[:, 5:], expected, **CLOSE)


@pytest.mark.parametrize("source", IN_ROWS)
@torch.no_grad()
def test_padding_that_sees_itself_is_named_by_the_mask_of_tokens(model, ids):
    is_text = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    sees = (torch.ones(8, 8).tril() * is_text[0] + torch.eye(8)).bool().view(1, 1, 8, 8)
    positions = (is_text.cumsum(-1) - 1).clamp(min=0)
    inputs = dict(attention_mask=sees, token_mask=is_text, position_ids=positions, use_cache=False)
    logits = model(ids[:1, :8], **inputs).logits[is_text.bool()]
    alone = model(ids[:1, :8][is_text.bool()].unsqueeze(0), use_cache=False).logits[0]
    torch.testing.assert_close(logits, alone, **CLOSE)


@pytest.mark.parametrize("source", IN_ROWS)
@torch.no_grad()
def test_a_tree_is_refused_by_a_model_that_reads_its_tokens_in_a_row(model, ids):
    prompt, _, inputs = tree(ids)
    with pytest.raises(ValueError, match="attention_mask: a token does not see the one before it"):
        model(**inputs, use_cache=False)
    cache = model(prompt, use_cache=True).past_key_values
    rest = dict(input_ids=inputs["input_ids"][:, 5:], attention_mask=inputs["attention_mask"][:, :, 5:])
    with pytest.raises(ValueError, match="give each continuation a row of its own"):
        model(**rest, position_ids=inputs["position_ids"][:, 5:], past_key_values=cache)
