"""Converts a GPT-NeoX model, one context at a time.

Calibration statistics give the value of each layer's directions and decide how the budget is split. Each context is
factorized again when its weights are written. A resumed run uses the statistics that it finds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXForCausalLM

from context_pythia.config.convert import ConvertOptions
from context_pythia.conversion.calibrate import WEIGHTINGS, LayerStatistics, collect
from context_pythia.conversion.factorize import Factors, LayerFactorizer
from context_pythia.conversion.readers import Readers, readers_of
from context_pythia.conversion.transplant import context_config, keys_and_values, transplant
from context_pythia.data.packing import PackedData, PackedDataset
from context_pythia.errors import Failure, UsageError, fitting
from context_pythia.model import ContextPythiaForCausalLM

WIDTH_MULTIPLE = 8  # alignment for memory and vector units
MOST_STATISTICS = 2 * 2**30  # bytes at once; if all layers need more, the text is read several times
PASS_TOKENS = 4096  # a pass reads each layer's weights twice, so it should not be short
EXACT = 1e-12  # share of the squared weights that an exact conversion may lose to rounding


@dataclass(frozen=True)
class Form:
    """What a converted model caches.

    Attributes:
        contexts: the readers of each context.
        numbers: widths of all contexts together.
        widths: width of each context; None if calibration decides it.
        exact: whether the conversion is exact and needs no text.
    """

    contexts: list[Readers]
    numbers: int
    widths: list[int] | None
    exact: bool


def checked_form(options: ConvertOptions, original: GPTNeoXForCausalLM) -> Form:
    """The form that the options ask for; UsageError if it does not fit the model."""
    config, attention = original.config, original.gpt_neox.layers[0].attention
    hidden, layers, rotary = config.hidden_size, config.num_hidden_layers, attention.rotary_ndims
    dims = options.layer_context_dims
    with fitting("convert"):
        ours = context_config(config, None, dims or [hidden] * layers, options.context_layers, options.cache_token_ids)
    contexts, digits = readers_of(ours), ours.id_digits
    widths = [ours.context_width(readers.layers[0]) for readers in contexts] if dims else None
    numbers = sum(widths) if widths else options.width(hidden) * layers - digits
    most, least = hidden * len(contexts), (rotary + (digits == 0)) * len(contexts)
    exact = numbers == most and not digits and len(contexts) == layers
    if numbers > most or max(widths or [0]) > hidden:
        width = (most + digits) // layers
        mend = f"a context_dim of at most {width} (a kv_reduction of at least {1 - width / (2 * hidden):g})"
        raise UsageError(
            f"{options.asked}: the layers have {len(contexts)} contexts, each at most as wide as the model, {hidden}: "
            f"give {f'layer_context_dims of at most {hidden}' if dims else mend}"
        )
    if rotary == attention.head_size and not exact:
        raise UsageError(
            f"{options.asked}: RoPE turns whole keys in this model, so the smallest cache is its keys, {hidden} "
            "numbers per layer: give kv_reduction 0.5"
        )
    if numbers < least:
        latent = "" if digits else " and a latent"
        raise UsageError(
            f"{options.asked}: is too small for one rotary key of {rotary} dims{latent} in each context: give a "
            f"context_dim of at least {-(-(least + digits) // layers)}"
        )
    return Form(contexts, numbers, widths, exact)


def compressed(
    original: GPTNeoXForCausalLM,
    form: Form,
    options: ConvertOptions,
    packed: PackedData | None,
    partial: Path,
    progress: bool,
) -> tuple[ContextPythiaForCausalLM, dict[str, Any]]:
    """The converted model, on disk (see `transplant`), and the record's entries on its layers.

    Args:
        form: from `checked_form`.
        packed: its training split calibrates; None for an exact conversion, which needs no text.
        partial: folder for statistics and weights.

    Raises:
        UsageError: the text is too short.
        Failure: a damaged checkpoint, or damaged statistics.
    """
    started = calibrated = time.perf_counter()
    statistics: list[Path] = []
    if packed is not None:
        statistics = _statistics(original, form.contexts, options, packed.train, partial, progress)
        calibrated = time.perf_counter()

    def factorizer_of(context: int) -> LayerFactorizer:
        # Built on each call, to keep only one context's moments in memory.
        readers = form.contexts[context]
        weights = [keys_and_values(original, layer) for layer in readers.layers]
        if form.exact:
            nothing = LayerStatistics.zeros(original.config.hidden_size)
            factorizer = readers.factorizer(weights, *WEIGHTINGS["none"](nothing))
            factorizer.keep_heads()
            return factorizer
        return readers.factorizer(weights, *WEIGHTINGS[options.weighting](LayerStatistics.load(statistics[context])))

    widths, pairs = _exact(original) if form.exact else _least_error(form, options, factorizer_of)
    described: list[dict[str, Any]] = []

    def factors() -> Iterator[Factors]:
        for i, (readers, width, counts) in enumerate(zip(form.contexts, widths, pairs, strict=True)):
            factorizer, latent = factorizer_of(i), width - 2 * sum(counts)
            result, condition = factorizer.factors(counts, latent), None
            if form.exact:
                if result.error > EXACT * float(factorizer.gram.trace()):
                    raise Failure(
                        f"layer {i}: its rotary keys are linearly dependent, so {width} numbers are not exact: give a "
                        "smaller context_dim"
                    )
                # The factor by which an exact context amplifies rounding.
                condition = float(torch.linalg.cond(result.context_weight))
            row = {"width": width, "rotary_pairs": counts, "latent": latent, "error": result.error}
            described.append(row | {"condition": condition})
            for _ in readers.layers[1:]:  # they cache nothing
                described.append(described[-1] | {"width": 0, "latent": 0, "error": 0.0})
            yield from readers.split(result)

    context_of = [i for i, readers in enumerate(form.contexts) for _ in readers.layers]
    config = context_config(
        original.config,
        [pairs[i] for i in context_of],
        [widths[i] for i in context_of],
        options.context_layers,
        options.cache_token_ids,
    )
    model = transplant(original, factors(), config, partial, getattr(torch, options.dtype))
    seconds = {"calibration": calibrated - started, "factorization": time.perf_counter() - calibrated}
    return model, {"exact": form.exact, "layers": described, "seconds_of": seconds}


def _exact(original: GPTNeoXForCausalLM) -> tuple[list[int], list[list[int]]]:
    """Widths and rotary pairs of exact contexts: all rotary keys, and a latent for the rest of the model's width."""
    config, frequencies = original.config, original.gpt_neox.layers[0].attention.rotary_ndims // 2
    layers = config.num_hidden_layers
    return [config.hidden_size] * layers, [[config.num_attention_heads] * frequencies] * layers


def _least_error(
    form: Form, options: ConvertOptions, factorizer_of: Callable[[int], LayerFactorizer]
) -> tuple[list[int], list[list[int]]]:
    """Widths and rotary pairs of the contexts with the least weighted error."""
    count = len(form.contexts)
    layers = sum(len(readers.layers) for readers in form.contexts)
    frontiers, splits = zip(*(factorizer_of(context).frontier() for context in range(count)), strict=True)
    widths = form.widths or [form.numbers // count] * count
    if not (form.widths or options.uniform):
        multiple = WIDTH_MULTIPLE if form.numbers % (WIDTH_MULTIPLE * layers) == 0 else 1
        widths = allocate(frontiers, form.numbers, multiple)
    return widths, [split[width] for split, width in zip(splits, widths, strict=True)]


def allocate(frontiers: Sequence[torch.Tensor], total: int, multiple: int = 1) -> list[int]:
    """Widths of the contexts with sum `total` and the least error, by marginal error along each one's convex hull.

    Args:
        frontiers: each context's least error at widths 0, 1, … D (`LayerFactorizer.frontier`).
        total: a multiple of `multiple`.
        multiple: widths are multiples of it.
    """
    segments, widths = [], []
    for layer, errors in enumerate(frontiers):
        hull: list[int] = []
        for width in range(0, len(errors), multiple):
            if not errors[width].isfinite():
                continue
            while len(hull) > 1 and _slope(errors, hull[-1], width) <= _slope(errors, hull[-2], hull[-1]):
                hull.pop()
            hull.append(width)
        widths.append(hull[0])
        segments += [(_slope(errors, a, b), layer, b - a) for a, b in zip(hull, hull[1:], strict=False)]
    left = total - sum(widths)
    assert left >= 0, "the contexts' least widths take more than there is"
    for _, layer, width in sorted(segments):
        share = min(width, left)
        widths[layer] += share
        left -= share
    return widths


def _slope(errors: torch.Tensor, start: int, stop: int) -> float:
    return float(errors[stop] - errors[start]) / (stop - start)


def _statistics(
    original: GPTNeoXForCausalLM,
    contexts: list[Readers],
    options: ConvertOptions,
    train: PackedDataset,
    partial: Path,
    progress: bool,
) -> list[Path]:
    """One file of statistics per context; existing files of an interrupted run are used."""
    hidden = original.config.hidden_size
    inputs = max(len(readers.inputs) for readers in contexts)
    needed = 2 * hidden * inputs
    if options.calibration_tokens < needed:
        raise UsageError(
            f"calibration_tokens {options.calibration_tokens}: a width of {hidden * inputs} takes at least {needed} "
            "tokens"
        )
    if train.num_tokens < options.calibration_tokens:
        raise UsageError(
            f"calibration_tokens {options.calibration_tokens}: the training split has {train.num_tokens} tokens; give "
            f"more text or samples, or calibrate on fewer tokens (at least {needed})"
        )
    # Samples from the whole split, since the first ones may come from a single document.
    chosen = torch.linspace(0, len(train) - 1, -(-options.calibration_tokens // train.sequence_length)).long()
    text = PackedDataset(train.tokens[chosen.numpy()])
    files = {readers: partial / f"statistics-{readers.layers[0]:03d}.safetensors" for readers in contexts}
    missing = [readers for readers, file in files.items() if not file.exists()]
    at_once = max(1, MOST_STATISTICS // max(readers.statistics_bytes(hidden) for readers in contexts))
    for start in range(0, len(missing), at_once):
        collected = collect(
            original,
            text,
            missing[start : start + at_once],
            batch_size=options.batch_size or max(1, PASS_TOKENS // text.sequence_length),
            seed=options.seed,
            progress=progress,
        )
        for readers, statistics in collected.items():
            statistics.save(files[readers])
    return list(files.values())
