"""Perplexity and accuracy over packed samples: in one parallel pass, and token by token through the cache.

Both passes score the same targets, so their perplexities must agree; if they do not, decoding is wrong. Only one batch
of logits is in memory at a time, with those of the reference model, if there is one.

A smaller cache can cost quality early in a sample, where there is little to attend to, or late, where there is much to
remember; one mean over all tokens hides this. So training and `eval` report bands of positions too.

Shapes: B samples of a batch, S tokens a sample, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from context_pythia.errors import Failure
from context_pythia.evaluation.memory import CACHE
from context_pythia.evaluation.pretrained import check_length
from context_pythia.model.cache import CacheMeasurement, measure_cache

# A sized Dataset whose items have `input_ids` `[S]` and `labels` `[S]`: the target of each input token, -100 for none.
Samples = Any

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


@dataclass(frozen=True)
class Score:
    """How well a model predicts the tokens of some samples.

    Attributes:
        perplexity: exp of the mean loss.
        accuracy: share of tokens that were the likeliest prediction.
        tokens: number of predicted tokens.
        losses: loss of each sample, summed over its tokens, in nats.
        by_position: perplexity by position in the sample (`perplexity_by_position`).
        kl: mean KL(reference || model) in nats per token; None without a reference of the same vocabulary.
        agreement: share of tokens for which model and reference have the same likeliest token; None without a
            reference.
        difference: largest difference between a logit and the reference's; None if `kl` is None.
    """

    perplexity: float
    accuracy: float
    tokens: int
    losses: tuple[float, ...]
    by_position: list[dict[str, float]]
    kl: float | None
    agreement: float | None
    difference: float | None

    def perplexity_of_first(self, samples: int) -> float:
        """Perplexity of the first `samples` samples, at least 1."""
        return perplexity(math.fsum(self.losses[:samples]) * len(self.losses) / (self.tokens * samples))


@dataclass(frozen=True)
class CachedScore(Score):
    """A score through the cache; `measurement` is of the first batch's cache, for `sequences` samples."""

    measurement: CacheMeasurement
    sequences: int


class _Tally:
    """Sums over the tokens of samples of `length` tokens, and the comparison with a reference model if there is one."""

    def __init__(self, model: PreTrainedModel, samples: int, length: int, reference: PreTrainedModel | None):
        self.dtype, self.has_reference = model.dtype, reference is not None
        self.same_vocabulary = reference is not None and reference.config.vocab_size == model.config.vocab_size
        self.losses = torch.zeros(samples, dtype=torch.float64)
        # The losses' sum and the tokens at each position.
        self.by_position = torch.zeros(2, length, dtype=torch.float64)
        self.correct = self.agreeing = 0
        self.divergence = self.difference = 0.0

    def add(self, first: int, logits: Tensor, labels: Tensor, reference: Tensor | None, position: int = 0) -> None:
        """Add the tokens of a batch that begins with sample `first`, at `position` and after.

        Shapes: logits and reference `[B, T, V]`, labels `[B, T]`.
        """
        log_probabilities = logits.float().log_softmax(-1)
        known = labels >= 0
        losses = -log_probabilities.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        losses = (losses * known).cpu().double()
        self.losses[first : first + len(labels)] += losses.sum(1)
        self.by_position[:, position : position + labels.shape[1]] += torch.stack(
            [losses.sum(0), known.sum(0).cpu().double()]
        )
        predicted = logits.argmax(-1)
        self.correct += int((predicted == labels).sum())
        if reference is not None:
            self.agreeing += int(((predicted == reference.argmax(-1)) & known).sum())
        if reference is not None and self.same_vocabulary:
            wanted = reference.float().log_softmax(-1)
            divergence = (wanted.exp() * (wanted - log_probabilities)).sum(-1) * known
            self.divergence += float(divergence.cpu().double().sum())
            self.difference = max(self.difference, float((logits.float() - reference.float()).abs().max()))

    def figures(self) -> dict[str, Any]:
        """The fields of `Score`; Failure if the loss is not a number."""
        tokens = int(self.by_position[1].sum())
        loss = float(self.losses.sum()) / tokens
        if not math.isfinite(loss):
            raise Failure(
                f"the validation loss is {loss}: the model's weights are damaged, or {self.dtype} is too narrow for it"
            )
        return {
            "perplexity": perplexity(loss),
            "accuracy": self.correct / tokens,
            "tokens": tokens,
            "losses": tuple(self.losses.tolist()),
            "by_position": perplexity_by_position(*self.by_position),
            "kl": self.divergence / tokens if self.same_vocabulary else None,
            "agreement": self.agreeing / tokens if self.has_reference else None,
            "difference": self.difference if self.same_vocabulary else None,
        }


@torch.no_grad()
def score(
    model: PreTrainedModel,
    dataset: Samples,
    batch_size: int = 16,
    reference: PreTrainedModel | None = None,
    progress: bool = True,
) -> Score:
    """Score all samples in one parallel pass, without a cache.

    Args:
        reference: model to compare the predictions with; it runs beside `model`, batch by batch.

    Raises:
        UsageError: the samples are longer than the model's positions.
        Failure: the loss is not a number.
    """
    tally = _Tally(model, len(dataset), dataset[0]["input_ids"].shape[-1], reference)
    for first, ids, labels in _batches(model, dataset, batch_size, "scoring", progress):
        logits = model(input_ids=ids, use_cache=False).logits
        wanted = _reference_logits(reference, ids)
        # Convert one sample at a time to fp32: with a large vocabulary, a long one takes a gigabyte.
        for i in range(len(ids)):
            row = slice(i, i + 1)
            tally.add(first + i, logits[row], labels[row], None if wanted is None else wanted[row])
    return Score(**tally.figures())


@torch.no_grad()
def score_cached(
    model: PreTrainedModel,
    dataset: Samples,
    tokens: int,
    make_cache: Callable[[], Cache] | None = None,
    batch_size: int = 16,
    reference: PreTrainedModel | None = None,
    progress: bool = True,
) -> CachedScore:
    """Score the first samples token by token: each step gives the model one true token and the cache of earlier ones.

    Args:
        tokens: score at least this many tokens, in whole samples; all samples if there are fewer.
        make_cache: makes an empty cache; by default the model's own, `DynamicCache(config=model.config)`.
        reference: as in `score`; it runs in one parallel pass.

    Raises:
        as `score`.
    """
    length = dataset[0]["input_ids"].shape[-1]
    samples = min(len(dataset), -(-tokens // length))
    tally, measurement, sequences = _Tally(model, samples, length, reference), None, 0
    chosen = Subset(dataset, range(samples))
    for first, ids, labels in _batches(model, chosen, batch_size, "token by token", progress):
        cache = DynamicCache(config=model.config) if make_cache is None else make_cache()
        wanted = _reference_logits(reference, ids)
        for t in range(length):
            step = slice(t, t + 1)
            logits = model(input_ids=ids[:, step], use_cache=True, **{CACHE: cache}).logits
            tally.add(first, logits, labels[:, step], None if wanted is None else wanted[:, step], t)
        if measurement is None:
            measurement, sequences = measure_cache(cache), len(ids)
    assert measurement is not None
    return CachedScore(**tally.figures(), measurement=measurement, sequences=sequences)


def equal_to_digits(first: float, second: float) -> bool:
    """Whether two positive numbers agree to four significant digits: they differ by at most half a unit of the last."""
    unit = 10.0 ** (math.floor(math.log10(max(first, second))) - 3)
    return abs(first - second) <= unit / 2


def _batches(
    model: PreTrainedModel, dataset: Samples, batch_size: int, what: str, progress: bool
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Index of each batch's first sample, its inputs and its labels `[B, S]` on the model's device."""
    check_length(dataset[0]["input_ids"].shape[-1], model.config)
    model.eval()
    first = 0
    for batch in tqdm(DataLoader(dataset, batch_size), desc=what, leave=False, disable=None if progress else True):
        ids, labels = batch["input_ids"].to(model.device), batch["labels"].to(model.device)
        yield first, ids, labels
        first += len(ids)


def _reference_logits(reference: PreTrainedModel | None, ids: Tensor) -> Tensor | None:
    """`[B, S, V]` on the device of `ids`."""
    if reference is None:
        return None
    return reference.eval()(input_ids=ids.to(reference.device), use_cache=False).logits.to(ids.device)
