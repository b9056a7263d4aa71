"""Converts a GPT-NeoX model, one layer at a time.

Calibration statistics give the value of each layer's directions and decide how the budget is split. Each layer is
factorized again when its weights are written. A resumed run uses the statistics that it finds.
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
from context_pythia.conversion.original import keys_and_values
from context_pythia.conversion.transplant import context_config, transplant
from context_pythia.data.packing import PackedData, PackedDataset
from context_pythia.errors import Failure, UsageError
from context_pythia.evaluation.memory import free_memory
from context_pythia.model import ContextPythiaForCausalLM

WIDTH_MULTIPLE = 8  # alignment for memory and vector units
STATISTICS_BYTES = 48  # per layer, times D^2
MOST_STATISTICS = 8 * 2**30  # bytes at once; if all layers need more, the text is read several times
PASS_TOKENS = 4096  # a pass reads each layer's weights twice, so it should not be short

# The layers' widths, their rotary pairs at each frequency, and the function that makes a layer's factors.
LayerPlan = tuple[list[int], list[list[int]], Callable[[int], Factors]]


def checked_width(options: ConvertOptions, original: GPTNeoXForCausalLM) -> int:
    """The layers' mean context width; UsageError if it does not fit the model."""
    config, attention = original.config, original.gpt_neox.layers[0].attention
    hidden, rotary = config.hidden_size, attention.rotary_ndims
    width = options.width(hidden)
    asked = f"context_dim {width}" if options.kv_reduction is None else f"kv_reduction {options.kv_reduction}"
    if width > hidden:
        raise UsageError(
            f"{asked}: a context of {hidden}, the model's width, is already exact: give a context_dim of at most "
            f"{hidden}, or a kv_reduction of at least 0.5"
        )
    if rotary == attention.head_size and width < hidden:
        raise UsageError(
            f"{asked}: RoPE turns whole keys in this model, so the smallest cache is its keys, {hidden} numbers per "
            "layer: give kv_reduction 0.5"
        )
    if width < rotary + 1:
        raise UsageError(
            f"{asked}: is too small for one rotary key of {rotary} dims and a latent: give a context_dim of at least "
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
    """The converted model, on disk (see `transplant`), and the record's entries on its layers.

    Args:
        width: the layers' mean context_dim, from `checked_width`.
        packed: its training split calibrates; None for an exact conversion, which needs no text.
        partial: folder for statistics and weights.

    Raises:
        UsageError: the text is too short.
        Failure: a damaged checkpoint, or damaged statistics.
    """
    started = calibrated = time.perf_counter()
    if packed is None:
        widths, pairs, factors_of = _exact(original)
    else:
        statistics = _statistics(original, options, packed.train, partial, progress)
        calibrated = time.perf_counter()
        widths, pairs, factors_of = _calibrated(original, width, options, statistics)
    described: list[dict[str, Any]] = []

    def factors() -> Iterator[Factors]:
        for layer, layer_width in enumerate(widths):
            result = factors_of(layer)
            described.append(
                {
                    "width": layer_width,
                    "rotary_pairs": result.pairs,
                    "latent": layer_width - 2 * sum(result.pairs),
                    "error": result.error,
                    "spectrum": result.spectrum.tolist(),
                    "condition": result.condition,
                }
            )
            yield result

    config = context_config(original.config, width, pairs, widths)
    model = transplant(original, factors(), config, partial, getattr(torch, options.dtype))
    seconds = {"calibration": calibrated - started, "factorization": time.perf_counter() - calibrated}
    return model, {"exact": packed is None, "layers": described, "seconds_of": seconds}


def _exact(original: GPTNeoXForCausalLM) -> LayerPlan:
    """Exact contexts, all rotary keys and a latent for the rest of the model's width: half the cache, no error."""
    config, frequencies = original.config, original.gpt_neox.layers[0].attention.rotary_ndims // 2

    def factors(layer: int) -> Factors:
        try:
            return exact_factors(keys_and_values(original, layer))
        except Failure as error:
            raise Failure(f"layer {layer}: {error}") from error

    layers = config.num_hidden_layers
    return [config.hidden_size] * layers, [[config.num_attention_heads] * frequencies] * layers, factors


def _calibrated(original: GPTNeoXForCausalLM, width: int, options: ConvertOptions, statistics: list[Path]) -> LayerPlan:
    """Widths and rotary pairs with the least weighted error."""

    def factorizer_of(layer: int) -> LayerFactorizer:
        # Built on each call, to keep only one layer's moments in memory.
        held = LayerStatistics.load(statistics[layer])
        return held.factorizer(keys_and_values(original, layer), options.weighting)

    frontiers, splits = zip(*(factorizer_of(layer).frontier() for layer in range(len(statistics))), strict=True)
    widths = [width] * len(statistics)
    if not options.uniform:
        multiple = WIDTH_MULTIPLE if width % WIDTH_MULTIPLE == 0 else 1
        widths = allocate(frontiers, sum(widths), multiple)
    pairs = [split[layer_width] for split, layer_width in zip(splits, widths, strict=True)]

    def factors(layer: int) -> Factors:
        return factorizer_of(layer).factors(pairs[layer], widths[layer] - 2 * sum(pairs[layer]))

    return widths, pairs, factors


def _statistics(
    original: GPTNeoXForCausalLM, options: ConvertOptions, train: PackedDataset, partial: Path, progress: bool
) -> list[Path]:
    """One file of statistics per layer; existing files of an interrupted run are used."""
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
    # Samples from the whole split, since the first ones may come from a single document.
    chosen = torch.linspace(0, len(train) - 1, -(-options.calibration_tokens // train.sequence_length)).long()
    text = PackedDataset(train.tokens[chosen.numpy()])
    files = [partial / f"statistics-{layer:03d}.safetensors" for layer in range(original.config.num_hidden_layers)]
    missing = [layer for layer, file in enumerate(files) if not file.exists()]
    room = min(MOST_STATISTICS, (free_memory(torch.device("cpu")) or MOST_STATISTICS) / 2)
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
