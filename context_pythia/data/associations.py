"""Associative recall as a corpus: to predict the answers, a model must find earlier tokens of the sample.

Multi-query associative recall (MQAR, arXiv 2312.04927): a sample lists pairs of a key and a value. It then asks for
each key once, with filler tokens between; short distances are likelier. Only the answers have labels, so validation
accuracy is recall. Samples share nothing but the task, so a model can answer only from its cache.

Token 0 is the end of a text, 1 the filler; the next half of the vocabulary are keys, the rest values.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from context_pythia.config.recipe import DataOptions
from context_pythia.errors import UsageError

NAME = "recall"
_END, _NOTHING, _FIRST_KEY = 0, 1, 2
_TOKENS_OF_A_PAIR = 8  # sample tokens per pair: two list it, two ask for it, four are left for filler
_DISTANCE_POWER = 0.1


def associations(samples: int, length: int, vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples, and a mask of the answers in them.

    Returns:
        tokens `[N, length + 1]` of uint16 or uint32, and booleans of the same shape.

    Raises:
        UsageError: a sample too short for a pair, or a vocabulary too small for its pairs.
    """
    pairs, keys = length // _TOKENS_OF_A_PAIR, (vocab_size - _FIRST_KEY) // 2
    if pairs < 1:
        raise UsageError(f"data.sequence_length {length}: recall takes at least {_TOKENS_OF_A_PAIR} tokens a sample")
    if keys < pairs:
        raise UsageError(
            f"data.vocab_size {vocab_size}: samples of {length} tokens take at least {2 * pairs + _FIRST_KEY}"
        )
    random = np.random.default_rng(seed)
    tokens = np.full((samples, length + 1), _NOTHING, dtype=np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    answers = np.zeros(tokens.shape, dtype=bool)
    places = np.arange((length + 1 - 2 * pairs) // 2)
    weights = (places + 1.0) ** (_DISTANCE_POWER - 1)
    for row, answer in zip(tokens, answers, strict=True):
        key = _FIRST_KEY + random.choice(keys, pairs, replace=False)
        value = _FIRST_KEY + keys + random.choice(keys, pairs, replace=False)
        row[: 2 * pairs : 2], row[1 : 2 * pairs : 2] = key, value
        asked = 2 * pairs + 2 * random.choice(places, pairs, replace=False, p=weights / weights.sum())
        row[asked], row[asked + 1] = key, value
        answer[asked + 1] = True
    return tokens, answers


def tokenizer_of_numbers(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer that writes token i as the number i."""
    backend = Tokenizer(WordLevel({str(i): i for i in range(vocab_size)}, unk_token=str(_NOTHING)))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=str(_END))


def summary(options: DataOptions) -> dict[str, Any]:
    """The facts that a report shows of the samples, as for packed text."""
    train, validation = options.split_sizes(options.samples)
    key = {"data": NAME, "train": train, "validation": validation}
    key |= {name: getattr(options, name) for name in ("sequence_length", "vocab_size")}
    return {
        "source": NAME,
        "documents_train": train,
        "documents_validation": validation,
        "samples_train": train,
        "samples_validation": validation,
        "sequence_length": options.sequence_length,
        "tokens_train": train * options.sequence_length,
        "tokenizer": "numbers",
        "vocab_size": options.vocab_size,
        "fingerprint": hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32],
    }
