from types import SimpleNamespace

import pytest
import torch

from context_pythia.data.tokenizers import vocabulary_rows
from context_pythia.errors import UsageError
from context_pythia.evaluation.recall import TASKS, choose_words, distances, recall, recall_texts

from .conftest import build, tokenizer_of_words

LENGTH = 96


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of_words()


@pytest.fixture(scope="module")
def words(tokenizer):
    return choose_words(tokenizer, LENGTH)


class Reader(torch.nn.Module):
    """Finds the last token's fact as a person would, if it is not too far back."""

    device = torch.device("cpu")

    def __init__(self, words, reach):
        super().__init__()
        self.words, self.reach = words, reach

    def forward(self, input_ids, **kwargs):
        logits = torch.zeros(*input_ids.shape, int(input_ids.max()) + 1000)
        value_after = 1 + len(self.words.joint)
        for row, text in enumerate(input_ids.tolist()):
            found = text.index(text[-value_after]) + value_after
            if len(text) - found <= self.reach:
                logits[row, -1, text[found]] = 1
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("task", TASKS)
def test_the_value_stands_once_at_its_distance_and_among_the_candidates(words, task):
    for distance in distances(words, task, LENGTH):
        ids, candidates, answers = recall_texts(words, task, distance, LENGTH, samples=5)
        assert ids.shape == (5, LENGTH)
        for text, choice, answer in zip(ids.tolist(), candidates.tolist(), answers.tolist(), strict=True):
            value = text[LENGTH - distance]
            assert choice[answer] == value and text.count(value) == 1 and len(set(choice)) == len(choice)
            key = text[-1 - len(words.joint)]
            assert text[LENGTH - distance - 1 - len(words.joint)] == key and text.count(key) == 2
            present = set(text) & set(words.values)
            assert present == ({*choice} if task == "key" else {value})


@pytest.mark.parametrize("task", TASKS)
def test_each_distance_asks_for_other_words(words, task):
    asked = []
    for distance in distances(words, task, LENGTH):
        _, candidates, answers = recall_texts(words, task, distance, LENGTH, samples=5)
        asked.append(tuple(candidates.gather(1, answers[:, None])[:, 0].tolist()))
    assert len(set(asked)) == len(asked) == 3


def test_distances_double_up_to_the_longest(words):
    assert words.fact_length == 4
    assert distances(words, "passkey", LENGTH) == [32, 64, 94]
    assert distances(words, "key", LENGTH) == [32, 64, 92]
    assert distances(words, "passkey", 256) == [32, 64, 128, 254]


def test_a_reader_finds_what_is_within_its_reach_alone(tokenizer):
    words = choose_words(tokenizer, LENGTH)
    rows = recall(Reader(words, reach=70), tokenizer, LENGTH, samples=40)
    assert [(row["task"], row["distance"]) for row in rows] == [
        (task, distance) for task in TASKS for distance in distances(words, task, LENGTH)
    ]
    for row in rows:
        assert row["chance"] == 1 / 23
        if row["distance"] <= 70:
            assert row["accuracy"] == 1
        else:
            assert row["accuracy"] < 0.2


@pytest.mark.parametrize("source", ["pythia", "layer"])
def test_real_models_answer_in_batches_as_alone(source, tokenizer):
    model = build(source, vocab_size=vocabulary_rows(tokenizer), max_position_embeddings=LENGTH)
    alone, batches = (recall(model, tokenizer, LENGTH, samples=6, batch_size=size) for size in (1, 4))
    assert alone == batches and all(0 <= row["accuracy"] <= 1 for row in alone)


def test_what_cannot_be_asked_is_one_line(tokenizer, words):
    with pytest.raises(UsageError, match="texts of 33 tokens: give 34 or more"):
        distances(words, "key", 33)
    with pytest.raises(UsageError, match=r"texts of 500 facts need 2000 whole words, the tokenizer has \d+"):
        choose_words(tokenizer, 2000)
