"""Bands of positions in a sample, and a model's perplexity in each of them.

A cache that keeps less can lose early in a sample, where there is little to attend to, or late, where there is much to
keep; one mean over all tokens hides which. Training's validation and `eval` report the same bands, which are chosen
here.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

_FIRST_EDGES = (0, 16, 32, 64, 96, 128)


def position_bands(length: int) -> list[tuple[int, int]]:
    """The bands, `from <= position < to`, of samples of `length` tokens.

    0-16, 16-32, 32-64, 64-96, 96-128, then each as long as all before it together (128-256, 256-512); the last ends at
    `length`. A position is the index of an input token: at position p the next token is predicted from p + 1 tokens.
    """
    edges = list(_FIRST_EDGES)
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return list(pairwise([*(edge for edge in edges if edge < length), length]))


def perplexity(loss: float) -> float:
    """Of a mean loss in nats; one beyond what a float holds stays finite."""
    return math.exp(min(loss, 700.0))


def perplexity_by_position(losses: Tensor, tokens: Tensor) -> list[dict[str, float]]:
    """The perplexity of each band, as plain values of JSON: `from`, `to`, `tokens` and `perplexity`.

    The bands' log-perplexities, weighed by their tokens, have the total log-perplexity as their mean.

    Args:
        losses: sum of the losses at each position, in nats, `[S]`.
        tokens: how many tokens were predicted there, `[S]`; a band without any is left out.
    """
    bands = []
    for start, stop in position_bands(len(losses)):
        count = int(tokens[start:stop].sum())
        if count:
            mean = float(losses[start:stop].sum()) / count
            bands.append({"from": start, "to": stop, "tokens": count, "perplexity": perplexity(mean)})
    return bands
