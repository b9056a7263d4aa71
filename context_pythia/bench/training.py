"""`bench --train`: times training steps of a recipe's models beside a plain training loop.

A turn is a short training with a new optimizer; its first step does not count.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from context_pythia.bench.options import BenchOptions
from context_pythia.bench.timing import interleave, seconds_of
from context_pythia.config.recipe import ModelOptions, Recipe, TrainOptions
from context_pythia.data.packing import PackedData, PackedDataset
from context_pythia.evaluation.memory import peak_during, weight_bytes
from context_pythia.runs.build import build_model, describe_parameters, expected_rows
from context_pythia.training.allocator import SYSTEM, set_malloc
from context_pythia.training.batches import step_batches
from context_pythia.training.history import Plan
from context_pythia.training.optimization import Optimization, training_mode
from context_pythia.training.phase2 import check_options

PLAIN = "plain fp32 GPT-NeoX"

Turn = list[dict[str, float]]  # the seconds of each timed step, as `step`


def train_metrics(
    recipe: Recipe, options: BenchOptions, metrics: dict[str, Any], progress: bool, write: Callable[[], None]
) -> None:
    """Fill `metrics` with the rows of all models, and call `write` after each round.

    Raises:
        UsageError: impossible training options.
    """
    train = dataclasses.replace(recipe.train, epochs=1, tokens=None)
    check_options(train)
    device, vocabulary = torch.device(metrics["settings"]["device"]), expected_rows(recipe)
    length = recipe.data.sequence_length
    tokens = train.batch_size * train.gradient_accumulation * length
    data = random_data((1 + options.steps) * tokens // length, length, vocabulary)
    models = [dataclasses.replace(ModelOptions(), name=PLAIN), *recipe.models]
    rates: dict[str, list[float]] = {precision: [] for precision in dict.fromkeys(["float32", train.precision])}
    metrics |= {"recipe": dataclasses.asdict(recipe), "tokens_per_step": tokens, "rates": rates, "rows": []}
    runs: dict[str, Callable[[], Any]] = {}
    results: dict[str, list[Any]] = {}
    rows: dict[str, dict[str, Any]] = {}

    def timed_turn(turn: Callable[[], Turn], row: dict[str, Any], weights: int) -> Turn:
        steps, peak = peak_during(turn, device)
        if peak is not None:
            row["peak_bytes"] = max(row["peak_bytes"] or 0, weights + peak)
        return steps

    for chosen in models:
        name, plain = chosen.name, chosen is models[0]
        model = build_model(chosen, recipe, vocabulary).to(device)
        rows[name] = {
            "name": name,
            "plain": plain,
            "peer": not plain and chosen.context_source is None,
            "precision": "float32" if plain else train.precision,
            "rounds": [],
            "peak_bytes": None,
            "error": None,
            "flops_per_step": step_flops(model, tokens, length),
        } | describe_parameters(model)
        if plain:
            batch_tokens = tokens // train.gradient_accumulation
            for precision, found in rates.items():
                runs[f"{precision} products"] = partial(product_rate, model, batch_tokens, getattr(torch, precision))
                results[f"{precision} products"] = found
        turn = partial(plain_turn if plain else phase2_turn, model, data, train)
        runs[name] = partial(timed_turn, turn, rows[name], weight_bytes(model))
        results[name] = rows[name]["rounds"]
    metrics["rows"] += rows.values()
    for name, error in interleave(runs, results, options.rounds, "training steps", progress, write).items():
        if name in rows:
            rows[name]["error"] = error


def random_data(samples: int, length: int, vocabulary: int) -> PackedData:
    """Training samples of random tokens; there is no tokenizer."""
    tokens = np.random.default_rng(0).integers(vocabulary, size=(samples, length + 1), dtype=np.int32)
    tokenizer: Any = None
    return PackedData(PackedDataset(tokens), PackedDataset(tokens[:1]), tokenizer, {})


def phase2_turn(model: PreTrainedModel, data: PackedData, options: TrainOptions) -> Turn:
    """Steps of phase 2 itself."""
    plan = Plan(options, len(data.train), data.train.sequence_length)
    with training_mode(model, options, plan.sequence_length):
        optimization = Optimization(model, options, plan.steps)

        def step(batches: Any) -> None:
            optimization.backward(batches)
            optimization.update()

        return _timed(step, step_batches(data.train, plan.order(0, 0), options, model.device), model.device)


def plain_turn(model: PreTrainedModel, data: PackedData, options: TrainOptions) -> Turn:
    """A textbook loop: fp32, all logits at once, PyTorch's default AdamW, the system's default allocator."""
    set_malloc(SYSTEM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    model.train()

    def step(batch: Any) -> None:
        logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits
        labels = batch["labels"].to(model.device)
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        if options.max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return _timed(step, DataLoader(data.train, options.batch_size * options.gradient_accumulation), model.device)


def _timed(step: Callable[[Any], None], batches: Iterable[Any], device: torch.device) -> Turn:
    return [{"step": seconds_of(partial(step, batch), device)} for batch in batches][1:]


def step_flops(model: PreTrainedModel, tokens: int, length: int) -> int:
    """Floating-point operations of a training step's matrix products (PaLM, arXiv 2204.02311, appendix B).

    Per token: 6 per weight, 4 per frozen weight, and 12 * layers * width * length for attention. Recomputation
    (checkpointing) does not count.
    """
    config = model.config
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    products = sum((6 if weight.requires_grad else 4) * weight.numel() for weight in weights)
    return tokens * (products + 12 * config.num_hidden_layers * config.hidden_size * length)


def product_rate(model: PreTrainedModel, tokens: int, dtype: torch.dtype) -> float:
    """FLOP/s of the matrix products of the model's linear maps in a forward pass of `tokens` tokens, computed one after
    another into preallocated memory."""
    work, seconds, device = 0, 0.0, model.device
    shapes = Counter((m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear))
    for (inner, columns), count in shapes.items():
        left = torch.randn(tokens, inner, device=device).to(dtype)
        right = torch.randn(columns, inner, device=device).to(dtype).T  # as nn.Linear holds its weight
        out = torch.empty(tokens, columns, dtype=dtype, device=device)
        product = partial(torch.mm, left, right, out=out)
        product()
        seconds += count * seconds_of(product, device)
        work += count * 2 * tokens * inner * columns
    return work / seconds
