"""Tests recall: can a model find earlier facts at known distances? The texts are made from the tokenizer's words.

There are two tasks. Each text is as long as a training sample and ends before a word that the model must predict:

    key      only facts "KEY is VALUE.", each with its own key and value; the last question asks for one of them
    passkey  one such fact between repeated sentences (arXiv 2305.16300)

The distance counts tokens from the value to the predicted token. The answer is the likeliest of several candidates:
the values in the text, or for `passkey` the true value and as many other words. So a model that only knows which words
are values is right by chance.

Papers on caches that layers or heads share report perplexity, which changes little when a few facts are lost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from context_pythia.errors import UsageError

TASKS = ("key", "passkey")
SHORTEST_DISTANCE = 32
SEED = 0
_FILLER = " The sky is wide and the day is long. We walk here and there, and then we go home."


@dataclass(frozen=True)
class Words:
    """Token ids: `keys` and `values` are words of one token each, the others join them to a text."""

    keys: list[int]
    values: list[int]
    joint: list[int]
    end: list[int]
    filler: list[int]

    @property
    def fact_length(self) -> int:
        """Tokens of a fact: key, joint, value, end."""
        return 2 + len(self.joint) + len(self.end)

    def fact(self, key: int, value: int) -> list[int]:
        return [key, *self.joint, value, *self.end]

    def question(self, key: int) -> list[int]:
        return [key, *self.joint]


def choose_words(tokenizer: PreTrainedTokenizerFast, length: int) -> Words:
    """Keys and values for texts of `length` tokens: twice as many as one text of facts needs.

    Raises:
        UsageError: the tokenizer has too few whole words, or no distance fits the texts.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    words = Words([], [], ids(" is"), ids("."), ids(_FILLER))
    distances(words, TASKS[0], length)
    taken = {*words.joint, *words.end, *words.filler, *tokenizer.all_special_ids}
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    whole = [i for i, text in enumerate(texts) if re.fullmatch(" [a-z]{3,}", text) and i not in taken]
    facts = max(1, length // words.fact_length)
    if len(whole) < 4 * facts:
        raise UsageError(
            f"texts of {facts} facts need {4 * facts} whole words, the tokenizer has {len(whole)}: "
            "shorten --sequence-length, or use a larger vocabulary"
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(SEED)).tolist()
    chosen = [whole[i] for i in order[: 4 * facts]]
    return replace(words, keys=chosen[: 2 * facts], values=chosen[2 * facts :])


def recall_texts(words: Words, task: str, distance: int, length: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Texts that ask for a value `distance` tokens back.

    Args:
        task: one of `TASKS`.
        distance: tokens from the value to the predicted token, one of `distances`.
        length: tokens per text.

    Returns:
        ids `[N, length]`, candidates `[N, K]`, and the answers' columns among the candidates `[N]`.
    """
    generator = torch.Generator().manual_seed(SEED + distance)  # other words and questions at each distance
    size = words.fact_length
    texts, candidates, answers = [], [], []
    for _ in range(samples):
        keys = [words.keys[i] for i in torch.randperm(len(words.keys), generator=generator).tolist()]
        values = [words.values[i] for i in torch.randperm(len(words.values), generator=generator).tolist()]
        question = words.question(keys[0])
        facts = (length - len(question)) // size
        if task == "key":
            back = distance // size  # facts from the right one to the end, itself included
            order = [*range(1, facts - back + 1), 0, *range(facts - back + 1, facts)]
            body = [token for i in order for token in words.fact(keys[i], values[i])]
        else:
            room = length - len(question) - size
            after = distance - len(question) - len(words.end) - 1
            filler = words.filler * (room // len(words.filler) + 2)
            start = int(torch.randint(len(words.filler), (), generator=generator))
            around = filler[start : start + room]
            body = [*around[: room - after], *words.fact(keys[0], values[0]), *around[room - after :]]
        # Fill the front with the repeated sentences, so every text has the trained length.
        front = length - len(question) - len(body)
        texts.append([*(words.filler * (front // len(words.filler) + 1))[:front], *body, *question])
        column = int(torch.randint(facts, (), generator=generator))
        choice = values[1:facts]
        candidates.append([*choice[:column], values[0], *choice[column:]])
        answers.append(column)
    return torch.tensor(texts), torch.tensor(candidates), torch.tensor(answers)


def distances(words: Words, task: str, length: int) -> list[int]:
    """The distances of a task in texts of `length` tokens: 32, 64, 128, ... and the longest that fits. For `key` they
    are rounded down to whole facts.

    Raises:
        UsageError: the texts are too short for any distance.
    """
    size = words.fact_length
    longest = length - len(words.joint) - 1
    if longest < SHORTEST_DISTANCE:
        raise UsageError(f"recall in texts of {length} tokens: give {length + SHORTEST_DISTANCE - longest} or more")
    doubled = [SHORTEST_DISTANCE << i for i in range(longest.bit_length()) if SHORTEST_DISTANCE << i < longest]
    wanted = [*doubled, longest]
    if task == "passkey":
        return wanted
    return sorted({distance // size * size for distance in wanted})


@torch.no_grad()
def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    samples: int = 256,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """How often a model finds the value, by task and distance.

    Args:
        length: tokens per text, the length of the training samples.
        samples: texts per task and distance.

    Returns:
        rows of `task`, `distance`, `accuracy`, `chance` (accuracy of a guess among the candidates) and `samples`.

    Raises:
        UsageError: a text too short for any distance, or a tokenizer without enough words.
    """
    model.eval()
    words = choose_words(tokenizer, length)
    rows = []
    for task in TASKS:
        for distance in distances(words, task, length):
            ids, candidates, answers = recall_texts(words, task, distance, length, samples)
            right = 0
            for part, choice, answer in zip(*(t.split(batch_size) for t in (ids, candidates, answers)), strict=True):
                logits = model(input_ids=part.to(model.device), logits_to_keep=1, use_cache=False).logits[:, -1].cpu()
                right += int((logits.gather(1, choice).argmax(-1) == answer).sum())
            rows.append(
                {
                    "task": task,
                    "distance": distance,
                    "accuracy": right / samples,
                    "chance": 1 / candidates.shape[1],
                    "samples": samples,
                }
            )
    return rows
