"""Associative recall as a corpus: to predict the answers, a model must find earlier tokens of the sample.

Multi-query associative recall (MQAR, arXiv 2312.04927): a sample lists pairs of a key and a value. Then it asks for one
of the keys, at random, again and again. Only the answers have labels, so validation accuracy is recall. Samples share
nothing but the task, so a model can answer only from its cache.

Samples have few pairs or many: the few teach a model to look back at all, which it then does among many too.

Token 0 is the end of a text, 1 is for unknown words; the next half of the vocabulary are keys, the rest values.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from context_pythia.config.recipe import DataOptions
from context_pythia.errors import UsageError

NAME = "recall"
_FORMAT = 2  # of the samples that a seed gives
_END, _UNKNOWN, _FIRST_KEY = 0, 1, 2
_TOKENS_OF_A_PAIR = 8  # at least so many sample tokens per pair: two list it, six ask three times


def associations(
    samples: int, length: int, vocab_size: int, seed: int, mixed: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Samples, and a mask of the answers in them.

    Args:
        mixed: samples of 1 to `length // 8` pairs, and not all with the most.

    Returns:
        tokens `[N, length + 1]` of uint16 or uint32, and booleans of the same shape.

    Raises:
        UsageError: a sample too short for a pair, or a vocabulary too small for its pairs.
    """
    most, keys = length // _TOKENS_OF_A_PAIR, (vocab_size - _FIRST_KEY) // 2
    if most < 1:
        raise UsageError(f"data.sequence_length {length}: recall takes at least {_TOKENS_OF_A_PAIR} tokens a sample")
    if keys < most:
        raise UsageError(
            f"data.vocab_size {vocab_size}: samples of {length} tokens take at least {2 * most + _FIRST_KEY}"
        )
    random = np.random.default_rng(seed)
    words = length // 2 + 1  # pairs and questions; an odd length ends with a key
    tokens = np.empty((samples, words, 2), dtype=np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    answers = np.zeros(tokens.shape, dtype=bool)
    for row, answer in zip(tokens, answers, strict=True):
        pairs = random.integers(1, most + 1) if mixed else most
        row[:pairs, 0] = _FIRST_KEY + random.choice(keys, pairs, replace=False)
        row[:pairs, 1] = _FIRST_KEY + keys + random.choice(keys, pairs, replace=False)
        row[pairs:] = row[random.integers(pairs, size=words - pairs)]
        answer[pairs:, 1] = True
    return tokens.reshape(samples, -1)[:, : length + 1], answers.reshape(samples, -1)[:, : length + 1]


def tokenizer_of_numbers(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer that writes token i as the number i."""
    backend = Tokenizer(WordLevel({str(i): i for i in range(vocab_size)}, unk_token=str(_UNKNOWN)))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=str(_END))


def fingerprint(options: DataOptions) -> str:
    """The name of these samples, as for packed text."""
    train, validation = options.split_sizes(options.samples)
    key = {"data": NAME, "format": _FORMAT, "train": train, "validation": validation}
    key |= {name: getattr(options, name) for name in ("sequence_length", "vocab_size")}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
