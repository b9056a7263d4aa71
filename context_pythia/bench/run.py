"""`context-pythia bench`: speed of prefill, decoding or training, and memory, compared with GPT-NeoX.

metrics.json has every single time of every run. It is written after each cell (a batch size and a length) or round of
training steps, so an interruption loses little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from context_pythia.bench.decode import decode_metrics
from context_pythia.bench.models import sized_models
from context_pythia.bench.options import COMPILED, CONVERSATION, BenchOptions, Source
from context_pythia.bench.training import train_metrics
from context_pythia.config.recipe import Recipe
from context_pythia.errors import UsageError
from context_pythia.evaluation.pretrained import load_pretrained, model_names, quiet_transformers
from context_pythia.files import write_json
from context_pythia.runs.build import best_device, build_model, expected_rows
from context_pythia.runs.provenance import provenance


@quiet_transformers()
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
        sources: sources of the Context-Pythias of that size.
        train: time training steps of the recipe's models instead of prefill and decoding.
        out: gets metrics.json and provenance.json whenever there are new figures.
        show: is called with the figures whenever there are new ones.

    Raises:
        UsageError: something that cannot be measured; raised before anything is timed.
        FileNotFoundError: there is no such model.
    """
    converted = [model.name for model in recipe.models if model.from_baseline] if recipe else []
    if converted:
        raise UsageError(
            f"{converted[0]} is converted from the trained baseline: leave it out (--only), or bench its folder"
        )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "metrics.json").exists():
            raise UsageError(f"--out {out}: holds results already, which would be lost; choose another folder")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = best_device()
    own = {"threads": torch.get_num_threads(), "device": device.type, "compiled": COMPILED in options.caches}
    metrics: dict[str, Any] = {"kind": "train" if train else "decode", "settings": asdict(options) | own, "notes": []}
    record = provenance(device)

    def write() -> None:
        if out is not None:
            write_json(out / "metrics.json", metrics)
            write_json(out / "provenance.json", record)

    def write_and_show() -> None:
        write()
        show(metrics)

    if train:
        assert recipe is not None
        train_metrics(recipe, options, metrics, progress, write)
        show(metrics)
    else:
        decode_metrics(_load(models, recipe, size, sources, options), options, metrics, progress, write_and_show)
    return metrics


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
        return sized_models(size, sources, positions, dtype)
    if recipe is None:
        return {name: load_pretrained(path, dtype) for name, path in model_names(models).items()}
    rows = expected_rows(recipe)
    return {one.name: build_model(one, recipe, rows).to(dtype) for one in recipe.models}
