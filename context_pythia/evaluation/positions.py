"""Bands of positions in a sample, and a model's perplexity in each of them.

A smaller cache can cost quality early in a sample, where there is little to attend to, or late, where there is much to
remember; one mean over all tokens hides this. Validation in training and `eval` report the same bands.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

_FIRST_EDGES = (0, 16, 32, 64, 96, 128)


def position_bands(length: int) -> list[tuple[int, int]]:
    """The bands, `from <= position < to`, of samples of `length` tokens.

    0-16, 16-32, 32-64, 64-96, 96-128, then each as long as all before it (128-256, 256-512); the last ends at
    `length`. A position is the index of an input token: at position p the model predicts from p + 1 tokens.
    """
    edges = list(_FIRST_EDGES)
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return list(pairwise([*(edge for edge in edges if edge < length), length]))


def perplexity(loss: float) -> float:
    """Perplexity of a mean loss in nats; a huge loss gives a finite number."""
    return math.exp(min(loss, 700.0))


def perplexity_by_position(losses: Tensor, tokens: Tensor) -> list[dict[str, float]]:
    """The perplexity of each band, as plain values of JSON: `from`, `to`, `tokens` and `perplexity`.

    The mean of the bands' log-perplexities, weighted by their tokens, is the total log-perplexity.

    Args:
        losses: sum of the losses at each position, in nats, `[S]`.
        tokens: number of predicted tokens at each position, `[S]`; bands without tokens are omitted.
    """
    bands = []
    for start, stop in position_bands(len(losses)):
        count = int(tokens[start:stop].sum())
        if count:
            mean = float(losses[start:stop].sum()) / count
            bands.append({"from": start, "to": stop, "tokens": count, "perplexity": perplexity(mean)})
    return bands
