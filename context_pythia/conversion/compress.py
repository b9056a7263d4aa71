"""From a GPT-NeoX model and the options to its converted model, a layer at a time.

Statistics of the calibration text say what each layer's directions are worth; the budget is shared out by them, and
each layer is factorized anew as its weights are written. Statistics that an interrupted run left are taken over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXForCausalLM

from context_pythia.config.convert import ConvertOptions
from context_pythia.conversion.calibrate import LayerStatistics, collect
from context_pythia.conversion.factorize import Factors, LayerFactorizer, allocate, exact_factors
from context_pythia.conversion.transplant import context_config, keys_and_values, transplant
from context_pythia.data.packing import PackedData, PackedDataset
from context_pythia.errors import Failure, UsageError
from context_pythia.evaluation.memory import free_memory
from context_pythia.model import ContextPythiaForCausalLM

WIDTH_MULTIPLE = 8  # widths that memory and vector units like
STATISTICS_BYTES = 48  # of a layer, times D^2
PASS_TOKENS = 4096  # each layer's weights are read twice a pass, so a pass should not be short


def checked_width(options: ConvertOptions, original: GPTNeoXForCausalLM) -> int:
    """The mean width of a layer's context; UsageError for one that the model cannot have."""
    config, attention = original.config, original.gpt_neox.layers[0].attention
    hidden, rotary = config.hidden_size, attention.rotary_ndims
    width = options.width(hidden)
    asked = f"context_dim {width}" if options.kv_reduction is None else f"kv_reduction {options.kv_reduction}"
    if width > hidden:
        raise UsageError(
            f"{asked}: {hidden} numbers, the model's width, are exact already; give at most that, or a kv_reduction "
            "of at least 0.5"
        )
    if rotary == attention.head_size and width < hidden:
        raise UsageError(
            f"{asked}: the keys of this model are rotary as a whole, so the smallest exact cache is the "
            f"keys alone, {hidden} numbers a layer (kv_reduction 0.5), and no smaller one is made"
        )
    if width < rotary + 1:
        raise UsageError(
            f"{asked}: leaves no room for one rotary key of {rotary} dims and a latent; give a context_dim of at least "
            f"{rotary + 1}"
        )
    return width


def compressed(
    original: GPTNeoXForCausalLM,
    width: int,
    options: ConvertOptions,
    packed: PackedData | None,
    partial: Path,
    progress: bool,
) -> tuple[ContextPythiaForCausalLM, dict[str, Any]]:
    """The converted model, on disk (see `transplant`), and what the record says of its layers.

    Args:
        width: the layers' mean context_dim, from `checked_width`.
        packed: its training split calibrates; None for an exact conversion, which needs none.
        partial: folder for statistics and weights.

    Raises:
        UsageError: the text is too short.
        Failure: a damaged checkpoint, or damaged statistics.
    """
    layers = range(original.config.num_hidden_layers)
    started = calibrated = time.perf_counter()
    make: Callable[[int], Factors]
    if packed is None:
        widths = [width for _ in layers]
        frequencies = original.gpt_neox.layers[0].attention.rotary_ndims // 2
        pairs = [[original.config.num_attention_heads] * frequencies for _ in layers]

        def make(layer: int) -> Factors:
            try:
                return exact_factors(keys_and_values(original, layer))
            except Failure as error:
                raise Failure(f"layer {layer}: {error}") from error

    else:
        statistics = _statistics(original, options, packed.train, partial, progress)
        calibrated = time.perf_counter()

        def factorizer(layer: int) -> LayerFactorizer:
            return LayerStatistics.load(statistics[layer]).factorizer(
                keys_and_values(original, layer), options.weighting
            )

        frontiers, choices, counts = [], [], []
        for layer in layers:
            prepared = factorizer(layer)
            errors, chosen = prepared.frontier()
            frontiers.append(errors)
            counts.append({total: prepared.pair_counts(total) for total in chosen.unique().tolist()})
            choices.append(chosen)
        multiple = WIDTH_MULTIPLE if width % WIDTH_MULTIPLE == 0 else 1
        widths = [width] * len(layers) if options.uniform else allocate(frontiers, width * len(layers), multiple)
        pairs = [counts[layer][int(choices[layer][widths[layer]])] for layer in layers]

        def make(layer: int) -> Factors:
            return factorizer(layer).factors(pairs[layer], widths[layer] - 2 * sum(pairs[layer]))

    described: list[dict[str, Any]] = []

    def factors() -> Iterator[Factors]:
        for layer in layers:
            made = make(layer)
            described.append(
                {
                    "width": widths[layer],
                    "rotary_pairs": made.pairs,
                    "latent": widths[layer] - 2 * sum(made.pairs),
                    "error": made.error,
                    "spectrum": made.spectrum.tolist(),
                    "condition": made.condition,
                }
            )
            yield made

    config = context_config(original.config, width, pairs, widths)
    model = transplant(original, factors(), config, partial, getattr(torch, options.dtype))
    seconds = {"calibration": calibrated - started, "factorization": time.perf_counter() - calibrated}
    return model, {"exact": packed is None, "layers": described, "seconds_of": seconds}


def _statistics(
    original: GPTNeoXForCausalLM, options: ConvertOptions, train: PackedDataset, partial: Path, progress: bool
) -> list[Path]:
    """A file of statistics for each layer; those that an interrupted run left are taken over."""
    hidden = original.config.hidden_size
    needed = 2 * hidden
    if options.calibration_tokens < needed:
        raise UsageError(
            f"calibration_tokens {options.calibration_tokens}: a width of {hidden} takes at least {needed} tokens"
        )
    if train.num_tokens < options.calibration_tokens:
        raise UsageError(
            f"calibration_tokens {options.calibration_tokens}: the training split has {train.num_tokens} tokens; give "
            f"more text or samples, or calibrate on fewer tokens (at least {needed})"
        )
    # Samples from the whole split: its first ones may be of a single document.
    chosen = torch.linspace(0, len(train) - 1, -(-options.calibration_tokens // train.sequence_length)).long()
    text = PackedDataset(train.tokens[chosen.numpy()])
    files = [partial / f"statistics-{layer:03d}.safetensors" for layer in range(original.config.num_hidden_layers)]
    missing = [layer for layer, file in enumerate(files) if not file.exists()]
    free = free_memory(torch.device("cpu"))
    room = min(options.statistics_gb * 2**30, float("inf") if free is None else free / 2)
    at_once = max(1, int(room / (STATISTICS_BYTES * hidden**2)))
    for start in range(0, len(missing), at_once):
        held = collect(
            original,
            text,
            missing[start : start + at_once],
            batch_size=options.batch_size or max(1, PASS_TOKENS // text.sequence_length),
            seed=options.seed,
            progress=progress,
        )
        for layer, layer_statistics in held.items():
            layer_statistics.save(files[layer])
    return files
