"""What vLLM's engine answers is what transformers answers, however it batches, cuts, shares or evicts."""

import random

import pytest
import torch

from context_pythia.model import ContextPythiaForCausalLM
from tests.serving.engines import LENGTH, engine, prompts

NEW = 8
# Around the blocks of 32 and the chunks of 64, and up to 900 tokens; two blocks and a half are the same in all. Behind
# the first 32, more of them.
LENGTHS = [1, 2, 3, 31, 32, 33, 63, 64, 65, 95, 96, 97, 900, 700, 512, 300, *range(100, 260, 10)]
ASKED = prompts([*LENGTHS, *range(81, 97)], common=80)


def answers(llm, asked):
    """For each prompt the new tokens and their log-probabilities."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=1)
    outputs = llm.generate([dict(prompt_token_ids=ids) for ids in asked], greedy, use_tqdm=False)
    found = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        steps = zip(tokens, output.outputs[0].logprobs, strict=True)
        found.append((tokens, torch.tensor([step[token].logprob for token, step in steps])))
    return found


@torch.no_grad()
def generated(model: ContextPythiaForCausalLM, asked):
    """The same from `generate()`, on one batch with padding on the left."""
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in asked])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = output.sequences[:, longest:]
    logprobs = torch.stack(output.logits, dim=1).float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return list(zip(tokens.tolist(), logprobs, strict=True))


def assert_same(found, expected, tolerance):
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(found, expected, strict=True):
        assert tokens == wanted
        torch.testing.assert_close(logprobs, wanted_logprobs, atol=tolerance, rtol=0)


def counter(llm, name: str) -> int:
    return next(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


@pytest.fixture(scope="module")
def expected(saved):
    return generated(saved[0], ASKED)


# Chunks, below, are tried with every kind: whole prompts with one of each attention.
@pytest.mark.parametrize("saved", ["layer, contexts by layers", "shared", "converted, -75 %"], indirect=True)
def test_32_whole_prompts_in_one_batch(saved, expected):
    assert len(LENGTHS) == 32
    with engine(saved[1], enable_prefix_caching=False, max_num_batched_tokens=8192) as llm:
        assert_same(answers(llm, ASKED[:32]), expected[:32], 1e-4)


def test_48_in_chunks_of_64_tokens_with_shared_prefixes_and_a_cache_that_is_too_small(saved, expected):
    order = random.Random(1).sample(range(48), 48)
    asked, wanted = [ASKED[i] for i in order], [expected[i] for i in order]
    with engine(saved[1], max_num_batched_tokens=64, num_gpu_blocks_override=LENGTH // 32 + 4) as llm:
        assert_same(answers(llm, asked), wanted, 1e-4)
        assert counter(llm, "num_preemptions") > 0
        assert counter(llm, "prefix_cache_hits") > 0


@pytest.mark.parametrize("saved", ["shared", "converted, -75 %"], indirect=True)
@torch.no_grad()
def test_bfloat16(saved, tmp_path):
    model, _ = saved
    # bfloat16 knows no numbers between 8 and 8.06: logits are to stay below that.
    model.lm_head.weight.mul_(0.25)
    model.save_pretrained(tmp_path)
    model.lm_head.weight.mul_(4)
    asked = prompts([1, 40, 300])
    rounded = ContextPythiaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with engine(tmp_path, dtype="bfloat16") as llm:
        for prompt, (tokens, logprobs) in zip(asked, answers(llm, asked), strict=True):
            ids = torch.tensor([prompt + tokens])
            expected = rounded(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            expected = expected.gather(-1, ids[0, len(prompt) :, None])[:, 0]
            torch.testing.assert_close(logprobs, expected, atol=0.05, rtol=0)
