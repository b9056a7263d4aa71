"""Compares the speed of prefill and decoding, and the memory, of several models.

For batch size B and length T (a cell), prefill reads T tokens into an empty cache. Decoding starts from a cache of
T - N tokens and produces the last N by `generate()`. That cache has random numbers of the right shapes, because its
contents do not affect the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from context_pythia.bench.models import Subject, is_peer, subjects
from context_pythia.bench.options import CONVERSATION, BenchOptions
from context_pythia.bench.timing import interleave, seconds_of
from context_pythia.errors import UsageError, attempt
from context_pythia.evaluation.memory import (
    CACHE,
    generate_tokens,
    measure_generated_cache,
    peak_during,
    random_ids,
    weight_bytes,
)
from context_pythia.model.cache import CacheMeasurement, measure_cache
from context_pythia.model.layer_contexts import to_digits

GIGABYTE = 2**30


@dataclass
class Speed:
    """A subject's row of a cell. Each round appends one number to each list.

    Attributes:
        prefill: seconds for all T tokens.
        generate: seconds per token by `generate()`.
        cache: measurement of the cache with T tokens.
        peak_bytes: peak memory above the weights in a `generate()` from an empty cache; None where the system cannot
            tell.
        error: the reason if the row ends early.
    """

    name: str
    prefill: list[float] = field(default_factory=list)
    generate: list[float] = field(default_factory=list)
    cache: CacheMeasurement | None = None
    peak_bytes: int | None = None
    error: str | None = None


def decode_metrics(
    models: dict[str, PreTrainedModel],
    options: BenchOptions,
    metrics: dict[str, Any],
    progress: bool,
    done: Callable[[], None],
) -> None:
    """Fill `metrics`; calls `done` after the memory, and after each cell.

    Raises:
        UsageError: a length beyond a model's positions, or no model to compare with.
    """
    for name, model in models.items():
        positions = model.config.max_position_embeddings
        if max(options.lengths) > positions:
            raise UsageError(f"length {max(options.lengths)}: must be at most {positions}, the positions of {name}")
        model.to(metrics["settings"]["device"])
    timed = subjects(models, options.caches)
    metrics["models"] = [_entry(subject, options) for subject in timed]
    metrics["cells"] = []
    done()
    for length in options.lengths:
        for batch_size in options.batch_sizes:
            rows = measure_cell(timed, batch_size, length, options, progress)
            metrics["cells"].append({"batch_size": batch_size, "length": length, "rows": [asdict(row) for row in rows]})
            done()


def _entry(subject: Subject, options: BenchOptions) -> dict[str, Any]:
    """A subject's facts before timing, and how many conversations fit beside its weights."""
    config, weights = subject.model.config, weight_bytes(subject.model)
    length = min(CONVERSATION, config.max_position_embeddings)
    one, error = attempt(lambda: _measured(subject, 1, length, options.new_tokens))
    room = max(0, int(options.memory_gb * GIGABYTE) - weights)
    return {
        "name": subject.name,
        "cache": subject.cache,
        "peer": is_peer(subject.model),
        "attention": config._attn_implementation,
        "parameters": subject.model.num_parameters(),
        "weight_bytes": weights,
        "conversation": one
        and {
            "length": length,
            "bytes": one.filled,
            "slack": one.slack,
            "fit": room // one.filled,
            "fit_with_slack": room // (one.filled + one.slack),
        },
        "error": error,
    }


@torch.no_grad()
def measure_cell(
    timed: Sequence[Subject], batch_size: int, length: int, options: BenchOptions, progress: bool = True
) -> list[Speed]:
    """All figures of one batch size and length, one row per subject.

    Without `options.prefill` no cell reads its T tokens, which can take minutes. The measured cache is then the one
    that decoding started from, and there is no peak.
    """
    rows = {subject.name: Speed(subject.name) for subject in timed}
    filled: dict[str, Callable[[], Cache]] = {}
    new_tokens = options.new_tokens

    def prefill(subject: Subject) -> float:
        ids, cache = random_ids(subject.model, batch_size, length), subject.empty_cache(length)
        return seconds_of(
            lambda: subject.model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1),
            subject.device,
        )

    def generate(subject: Subject) -> float:
        cache, prompt = filled[subject.name](), length - new_tokens + 1
        seconds = seconds_of(
            lambda: generate_tokens(subject.model, prompt, new_tokens, batch_size, cache, **subject.settings),
            subject.device,
        )
        rows[subject.name].cache = rows[subject.name].cache or measure_cache(cache)
        return seconds / new_tokens

    def first_run(subject: Subject) -> tuple[CacheMeasurement, int | None]:
        _measured(subject, 1, 8, 2)  # one-time allocations must not count for the first cell's peak
        return peak_during(lambda: _measured(subject, batch_size, length, new_tokens), subject.device)

    def take_turns(kind: str, run: Callable[[Subject], float]) -> None:
        runs = {subject.name: partial(run, subject) for subject in timed if rows[subject.name].error is None}
        results = {name: getattr(rows[name], kind) for name in runs}
        what = f"batch {batch_size}, {length:,} tokens, {kind}"
        for name, error in interleave(runs, results, options.rounds, what, progress).items():
            rows[name].error = error

    for subject in timed:
        row = rows[subject.name]
        if options.prefill:
            found, row.error = attempt(partial(first_run, subject))
            row.cache, row.peak_bytes = found or (None, None)
    if options.prefill:
        take_turns("prefill", prefill)
    for subject in timed:
        row = rows[subject.name]
        if row.error is None:
            cache, row.error = attempt(partial(filled_cache, subject, batch_size, length - new_tokens, length))
            if cache is not None:
                filled[subject.name] = cache
    take_turns("generate", generate)
    return list(rows.values())


def filled_cache(subject: Subject, batch_size: int, tokens: int, length: int) -> Callable[[], Cache]:
    """A function that returns a cache of `tokens` random tokens, always the same ones, with room for `length`."""
    cache, example = subject.empty_cache(length), DynamicCache(config=subject.model.config)
    # One real token gives the shapes, and initializes the parts of a cache other than keys and values.
    for one in (example, cache):
        subject.model(input_ids=random_ids(subject.model, batch_size, 1), **{CACHE: one}, use_cache=True)
    for i, layer in enumerate(example.layers):
        if layer.keys is not None and tokens > 1:  # a layer that reads another's context caches nothing
            keys, values = (
                torch.randn(*part.shape[:2], tokens - 1, part.shape[3], dtype=part.dtype, device=part.device)
                for part in (layer.keys, layer.values)
            )
            if i == 0 and (digits := getattr(subject.model.config, "id_digits", 0)):
                ids = random_ids(subject.model, batch_size, tokens - 1)  # any other numbers would be no token's
                keys[..., -digits:] = to_digits(ids, digits).unsqueeze(1).to(keys.dtype)
            cache.update(keys, values, i)

    def fresh() -> Cache:
        if not subject.is_static:
            return copy.deepcopy(cache)  # the copy also gets the cache's room to grow
        # A compiled step is bound to this cache's addresses.
        for layer in cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(tokens)
        return cache

    return fresh


def _measured(subject: Subject, batch_size: int, length: int, decoded: int) -> CacheMeasurement:
    """The measured cache of `length` tokens after `generate()`."""
    cache, decoded = subject.empty_cache(length), min(decoded, length) - 1
    return measure_generated_cache(subject.model, length, batch_size, decoded, cache, **subject.settings)
