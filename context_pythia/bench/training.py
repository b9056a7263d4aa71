"""`bench --train`: times training steps of a recipe's models, whole and by part, beside a plain training loop.

A turn is a short training with a new optimizer; its first step does not count. Phase 2 is timed in its own step, with
a stopwatch inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPTNeoXConfig, PreTrainedModel

from context_pythia.bench.options import BenchOptions
from context_pythia.bench.timing import Stopwatch, interleave, seconds_of
from context_pythia.config.recipe import ModelOptions, Recipe, TrainOptions
from context_pythia.data.packing import PackedData, PackedDataset
from context_pythia.evaluation.memory import peak_during, weight_bytes
from context_pythia.runs.build import build_model, describe_parameters, expected_rows
from context_pythia.training.allocator import SYSTEM, set_malloc
from context_pythia.training.batches import Batch, step_batches
from context_pythia.training.history import Plan
from context_pythia.training.optimization import Optimization, text_loss, training_mode
from context_pythia.training.phase2 import check_options

PARTS = ("body", "head_and_loss", "context_block", "backward", "optimizer", "rest")
PLAIN = "plain fp32 GPT-NeoX"

Turn = list[dict[str, float]]  # for each timed step the seconds of the whole (`step`) and of `PARTS`


def train_metrics(
    recipe: Recipe, options: BenchOptions, metrics: dict[str, Any], progress: bool, write: Callable[[], None]
) -> None:
    """Fill `metrics` with the rows of all models, and call `write` after each round.

    Raises:
        UsageError: impossible training options.
    """
    # One short epoch, without the recipe's checkpoints and logs.
    train = dataclasses.replace(recipe.train, epochs=1, tokens=None, checkpoint_steps=0, tensorboard=False)
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
            shapes = product_shapes(model.config, tokens // train.gradient_accumulation)
            for precision, found in rates.items():
                runs[f"{precision} products"] = partial(product_rate, shapes, getattr(torch, precision), device)
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
    steps: Turn = []
    plan = Plan(options, len(data.train), data.train.sequence_length)
    with timed_parts(model) as watch, training_mode(model, options, plan.sequence_length):
        optimization = Optimization(model, options, plan.steps, partial(_timed_loss, watch))
        watch.start("step")
        for batches in step_batches(data.train, plan.order(0, 0), options, model.device):
            optimization.backward(batches)
            watch.stop("backward")
            watch.start("optimizer")
            optimization.update()
            watch.stop("optimizer")
            watch.stop("step")
            steps.append(_parts(watch.read()))
            watch.start("step")
    return steps[1:]


def _timed_loss(watch: Stopwatch, model: nn.Module, batch: Batch) -> Tensor:
    if "backward" in watch.begun:  # that of the step's batch before
        watch.stop("backward")
    watch.start("forward")
    loss = text_loss(model, batch)
    watch.stop("forward")
    watch.start("backward")
    return loss


def plain_turn(model: PreTrainedModel, data: PackedData, options: TrainOptions) -> Turn:
    """A textbook loop: fp32, all logits at once, PyTorch's default AdamW, the system's default allocator."""
    steps: Turn = []
    set_malloc(SYSTEM)
    batches = DataLoader(data.train, options.batch_size * options.gradient_accumulation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    model.train()
    with timed_parts(model) as watch:
        watch.start("step")
        for batch in batches:
            ids, labels = batch["input_ids"].to(model.device), batch["labels"].to(model.device)
            watch.start("forward")
            logits = model(input_ids=ids, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            watch.stop("forward")
            watch.start("backward")
            loss.backward()
            watch.stop("backward")
            watch.start("optimizer")
            if options.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            watch.stop("optimizer")
            del logits, loss
            watch.stop("step")
            steps.append(_parts(watch.read()))
            watch.start("step")
    del optimizer
    return steps[1:]


def _parts(seconds: dict[str, float]) -> dict[str, float]:
    """The stopwatch's seconds as parts that add up to the step."""
    forward, backward = seconds.get("context_forward", 0.0), seconds.get("context_backward", 0.0)
    parts = {
        "body": seconds["body"] - forward,
        "head_and_loss": seconds["forward"] - seconds["body"],
        "context_block": forward + backward,
        "backward": seconds["backward"] - backward,
        "optimizer": seconds["optimizer"],
    }
    return {"step": seconds["step"]} | parts | {"rest": seconds["step"] - sum(parts.values())}


@contextlib.contextmanager
def timed_parts(model: PreTrainedModel) -> Iterator[Stopwatch]:
    """A stopwatch for the model's body, and within it for the ContextBlock, forward and backward.

    The backward pass reaches the ContextBlock last, after all layers that read its contexts. So its own time is that
    between the gradients of its output and of its input.
    """
    watch, body = Stopwatch(model.device), model.base_model
    block: Any = getattr(body, "context_block", None)

    def timed_scan(embeddings: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        watch.start("context_forward")
        contexts = type(block).scan(block, embeddings, *args, **kwargs)
        watch.stop("context_forward")
        if embeddings.requires_grad and contexts.requires_grad:
            contexts.register_hook(lambda _: watch.start("context_backward"))
            embeddings.register_hook(lambda _: watch.stop("context_backward"))
        return contexts

    hooks = [
        body.register_forward_pre_hook(lambda *_: watch.start("body")),
        body.register_forward_hook(lambda *_: watch.stop("body")),
    ]
    if block is not None:
        block.scan = timed_scan
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
        if block is not None:
            del block.scan


def step_flops(model: PreTrainedModel, tokens: int, length: int) -> int:
    """Floating-point operations of a training step's matrix products (PaLM, arXiv 2204.02311, appendix B).

    Per token: 6 per weight, 4 per frozen weight, and 12 * layers * width * length for attention. Recomputation
    (checkpointing) does not count.
    """
    config = model.config
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    products = sum((6 if weight.requires_grad else 4) * weight.numel() for weight in weights)
    return tokens * (products + 12 * config.num_hidden_layers * config.hidden_size * length)


def product_shapes(config: GPTNeoXConfig, tokens: int) -> list[tuple[int, int, int, int]]:
    """The matrix products of GPT-NeoX's forward pass: rows, inner width, columns, count."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    return [
        (tokens, hidden, 3 * hidden, layers),
        (tokens, hidden, hidden, layers),
        (tokens, hidden, inner, layers),
        (tokens, inner, hidden, layers),
        (tokens, hidden, config.vocab_size, 1),
    ]


def product_rate(shapes: Sequence[tuple[int, int, int, int]], dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of these products alone, computed one after another into preallocated memory."""
    work, seconds = 0, 0.0
    for rows, inner, columns, count in shapes:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(columns, inner, device=device).to(dtype).T  # as nn.Linear holds its weight
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        product = partial(torch.mm, left, right, out=out)
        product()
        seconds += count * seconds_of(product, device)
        work += count * 2 * rows * inner * columns
    return work / seconds
