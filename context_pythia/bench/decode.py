"""`context-pythia bench`: how fast models prefill and decode beside GPT-NeoX, and what they hold in memory.

metrics.json holds every single time of every run, and is written after each finished cell (a batch size and a length),
so that what was measured survives an interruption. `bench --train` is in `training.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from context_pythia.bench.models import (
    is_peer,
    recipe_models,
    saved_models,
    sized_models,
    subjects,
)
from context_pythia.bench.options import COMPILED, CONVERSATION, BenchOptions, Source, default_sources
from context_pythia.bench.speed import FAILURES, Subject, measure_cell, measure_conversation, turns
from context_pythia.bench.training import train_metrics
from context_pythia.config.recipe import Recipe
from context_pythia.errors import UsageError, first_line
from context_pythia.evaluation.memory import weight_bytes
from context_pythia.files import write_json
from context_pythia.runs.build import best_device
from context_pythia.runs.record import provenance
from context_pythia.training.trainer import quiet_transformers

GIGABYTE = 2**30


def bench(
    models: Sequence[str],
    recipe: Recipe | None,
    size: str | None,
    sources: Sequence[Source] | None,
    options: BenchOptions,
    train: bool = False,
    out: Path | None = None,
    progress: bool = True,
    show: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Write the figures into `out` if it is given, and return them.

    Args:
        models: folders or Hub names; or give a `recipe`, whose models get random weights, or a `size`.
        sources: of the Context-Pythias of that size.
        train: time training steps of the recipe's models in place of prefill and decoding.
        out: gets metrics.json after each finished cell, and provenance.json at the end, or when interrupted.
        show: is called with the figures whenever there are new ones.

    Raises:
        ValueError: something that cannot be measured as asked; found before anything is timed.
        FileNotFoundError: there is no such model.
    """
    if out is not None:
        _make_folder(out)
    recipe, notes = _of_first_weights(recipe, train)
    device = best_device()
    with _threads(options.threads), quiet_transformers():
        settings = _settings(options, device)
        metrics: dict[str, Any] = {"kind": "train" if train else "decode", "settings": settings, "notes": []}
        made = provenance(device)
        _note(notes, metrics)
        try:
            if train:
                assert recipe is not None
                finished = train_metrics(recipe, options, metrics, progress, show)
            else:
                loaded = _load(models, recipe, size, sources, options)
                finished = _decode_metrics(loaded, options, metrics, progress, show)
            for _ in finished:
                if out is not None:
                    write_json(out / "metrics.json", metrics)
        finally:
            if out is not None and (out / "metrics.json").exists():
                write_json(out / "provenance.json", made)
    return metrics


def _of_first_weights(recipe: Recipe | None, train: bool) -> tuple[Recipe | None, list[str]]:
    """The recipe without models that are made of its trained baseline, and a line for each of these.

    Raises:
        ValueError: all of them are.
    """
    if recipe is None:
        return None, []
    made = [model.name for model in recipe.models if model.from_baseline]
    if len(made) == len(recipe.models):
        mend = "name models that are trained from their first weights" if train else "name its folder, not the recipe"
        raise UsageError(f"{made[0]} is made of the trained baseline: {mend}")
    kept = [model for model in recipe.models if not model.from_baseline]
    mend = "healing is not timed" if train else "bench its folder when it is"
    notes = [f"{name} is left out, it is made of the trained baseline: {mend}" for name in made]
    return replace(recipe, models=kept), notes


def _note(notes: Sequence[str], metrics: dict[str, Any]) -> None:
    """Say what was left out or added, at once and in the report."""
    metrics["notes"] += notes
    for note in notes:
        print(f"note: {note}", flush=True)


def _load(
    models: Sequence[str],
    recipe: Recipe | None,
    size: str | None,
    sources: Sequence[Source] | None,
    options: BenchOptions,
) -> dict[str, PreTrainedModel]:
    dtype: torch.dtype = getattr(torch, options.dtype)
    if size is not None:
        positions = max(CONVERSATION, *options.lengths)
        return sized_models(size, default_sources(size) if sources is None else sources, positions, dtype)
    return saved_models(models, dtype) if recipe is None else recipe_models(recipe, dtype)


def _decode_metrics(
    models: dict[str, PreTrainedModel],
    options: BenchOptions,
    metrics: dict[str, Any],
    progress: bool,
    show: Callable[[dict[str, Any]], None],
) -> Iterator[None]:
    """Fill `metrics` and show them; yields after the memory, and after each cell."""
    _check_lengths(models, options.lengths)
    memory = int(options.memory_gb * GIGABYTE)
    _check_memory(models, memory, options.memory_gb)
    device = torch.device(metrics["settings"]["device"])
    for model in models.values():
        model.to(device)
    found, notes = subjects(models, options.caches)
    metrics |= {"models": [], "cells": []}
    _note(notes, metrics)
    for subject in found:
        metrics["models"].append(_entry(subject, memory, options.new_tokens))
    show(metrics)
    yield
    cells = [(batch, length) for length in options.lengths for batch in options.batch_sizes]
    work = [batch * length * len(found) * turns(options.rounds, options.prefill) for batch, length in cells]
    bar_format = "{desc}: {percentage:3.0f}% [{elapsed}, about {remaining} to go]"
    with tqdm(total=sum(work), bar_format=bar_format, disable=None if progress else True) as bar:
        for i, (batch, length) in enumerate(cells):
            bar.set_description(f"batch {batch}, {length} tokens")
            rows = measure_cell(
                found,
                batch,
                length,
                new_tokens=options.new_tokens,
                rounds=options.rounds,
                budget=options.budget,
                prefill=options.prefill,
                done=lambda step=batch * length: bar.update(step),  # type: ignore[misc]
            )
            bar.update(sum(work[: i + 1]) - bar.n)  # a row that failed had fewer turns
            metrics["cells"].append({"batch_size": batch, "length": length, "rows": [asdict(row) for row in rows]})
            with tqdm.external_write_mode():
                show(metrics)
            yield


def _entry(subject: Subject, memory: int, new_tokens: int) -> dict[str, Any]:
    """What is known of a subject before it is timed, and how many conversations fit beside its weights."""
    config, weights = subject.model.config, weight_bytes(subject.model)
    entry: dict[str, Any] = {
        "name": subject.name,
        "cache": subject.cache,
        "peer": is_peer(subject.model),
        "attention": config._attn_implementation,
        "parameters": subject.model.num_parameters(),
        "weight_bytes": weights,
        "conversation": None,
    }
    length = min(CONVERSATION, config.max_position_embeddings)
    try:
        measured = measure_conversation(subject, length, min(new_tokens, length - 1))
    except FAILURES as error:
        return entry | {"error": first_line(error)}
    room, held = memory - weights, measured.filled + measured.slack
    entry["conversation"] = {
        "length": length,
        "bytes": measured.filled,
        "slack": measured.slack,
        "fit": room // measured.filled,
        "fit_with_slack": room // held,
        "tokens_fit": room * length // measured.filled,
    }
    return entry | {"error": None}


def _check_lengths(models: dict[str, PreTrainedModel], lengths: Sequence[int]) -> None:
    for name, model in models.items():
        positions = model.config.max_position_embeddings
        if max(lengths) > positions:
            raise UsageError(f"length {max(lengths)}: is more than the {positions} positions of {name}")


def _check_memory(models: dict[str, PreTrainedModel], memory: int, asked: float) -> None:
    for name, model in models.items():
        if weight_bytes(model) >= memory:
            needed = weight_bytes(model) / GIGABYTE
            raise UsageError(f"bench.memory_gb {asked:g}: the weights of {name} alone take {needed:.2f} GB")


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {out} ({error.strerror}): choose another with --out") from error
    if (out / "metrics.json").exists():
        raise UsageError(f"--out {out}: holds results already, which would be lost; choose another folder")


def _settings(options: BenchOptions, device: torch.device) -> dict[str, Any]:
    """The options as plain values, with what they left to the machine."""
    return asdict(options) | {
        "threads": torch.get_num_threads(),
        "device": device.type,
        "compiled": COMPILED in options.caches,
    }


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
