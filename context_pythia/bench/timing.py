"""Where the time of a training step goes: the Trainer of phase 2 with a stopwatch, and a plain loop to compare with.

Steps come in turns: a turn waits for its start, makes one step that does not count (the warm-up) and then the timed
ones, so that several models, each in a process of its own, can take turns on one machine.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPTNeoXConfig, PreTrainedModel, TrainerCallback

from context_pythia.config.recipe import TrainOptions
from context_pythia.data.packing import PackedData
from context_pythia.training.phase2 import run_trainer
from context_pythia.training.trainer import LanguageModelTrainer, stack_samples

PARTS = ("body", "head_and_loss", "context_block", "backward", "optimizer", "rest")


class TurnsOverError(Exception):
    """There is no further turn."""


class Stopwatch:
    """Adds up spans by name. On CUDA it puts events into the stream, so that no measurement makes the GPU wait."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.begun: dict[str, Any] = {}
        self.spans: list[tuple[str, Any, Any]] = []

    def start(self, name: str) -> None:
        self.begun[name] = self._now()

    def stop(self, name: str) -> None:
        self.spans.append((name, self.begun.pop(name), self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by name since the last reading; waits for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, begin, end in self.spans:
            span = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            seconds[name] = seconds.get(name, 0.0) + span
        self.spans.clear()
        return seconds

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Turns:
    """Counts the steps of a turn, and waits between turns.

    Args:
        wait: blocks until the next turn and returns how many steps it times; 0 means that there is none.
        hand_in: takes a finished turn: for each timed step the seconds of the whole (`step`) and of `PARTS`.
    """

    def __init__(self, watch: Stopwatch, wait: Callable[[], int], hand_in: Callable[[list[dict[str, float]]], None]):
        self.watch, self.wait, self.hand_in = watch, wait, hand_in
        self.steps, self.warm, self.finished = 0, False, list[dict[str, float]]()

    def begin(self) -> None:
        """Wait for a turn; raises `TurnsOverError` if there is none."""
        self.steps, self.warm, self.finished = self.wait(), False, []
        if self.steps == 0:
            raise TurnsOverError
        self.watch.start("step")

    def step_ended(self) -> None:
        """To be called after each step; after a turn's last one it waits for the next turn."""
        self.watch.stop("step")
        seconds = self.watch.read()
        if self.warm:
            self.finished.append(_parts(seconds))
        self.warm = True
        if len(self.finished) == self.steps:
            self.hand_in(self.finished)
            self.begin()
        else:
            self.watch.start("step")


def _parts(seconds: dict[str, float]) -> dict[str, float]:
    """What the stopwatch says, as parts that add up to the step."""
    forward, backward = seconds.get("context_forward", 0.0), seconds.get("context_backward", 0.0)
    parts = {
        "body": seconds["body"] - forward,
        "head_and_loss": seconds["forward"] - seconds["body"],
        "context_block": forward + backward,
        "backward": seconds["backward"] - backward,
        "optimizer": seconds["optimizer"],
    }
    return {"step": seconds["step"]} | parts | {"rest": seconds["step"] - sum(parts.values())}


def time_parts(model: PreTrainedModel, watch: Stopwatch) -> None:
    """Let the stopwatch see the model's body, and in it the ContextBlock, forward and backward.

    The backward pass comes to the ContextBlock last, when all layers that read its contexts are done, so what lies
    between the gradients of its output and of its input is its own.
    """
    body: nn.Module = model.base_model
    body.register_forward_pre_hook(lambda *_: watch.start("body"))
    body.register_forward_hook(lambda *_: watch.stop("body"))
    block: Any = getattr(body, "context_block", None)
    if block is None:
        return
    scan = block.scan

    def timed_scan(embeddings: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        watch.start("context_forward")
        contexts = scan(embeddings, *args, **kwargs)
        watch.stop("context_forward")
        if embeddings.requires_grad and contexts.requires_grad:
            contexts.register_hook(lambda _: watch.start("context_backward"))
            embeddings.register_hook(lambda _: watch.stop("context_backward"))
        return contexts

    block.scan = timed_scan


class TimedTrainer(LanguageModelTrainer):
    """The Trainer of phase 2, its steps timed and cut into turns. It neither evaluates nor saves."""

    def __init__(self, *positional: Any, turns: Turns, args: Any, callbacks: list[Any], **arguments: Any):
        args.eval_strategy = args.save_strategy = "no"
        args.eval_on_start = False
        super().__init__(*positional, args=args, callbacks=[*callbacks, _TurnCallback(turns)], **arguments)
        self.watch = turns.watch

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.start("forward")
        loss = super().compute_loss(*args, **kwargs)
        self.watch.stop("forward")
        self.watch.start("backward")
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.watch.stop("backward")
        # Of several batches a step the last one's start stands.
        self.watch.start("optimizer")
        return loss


class _TurnCallback(TrainerCallback):
    def __init__(self, turns: Turns):
        self.turns = turns

    def on_train_begin(self, args, state, control, **kwargs):
        self.turns.begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.turns.watch.stop("optimizer")
        self.turns.step_ended()


def train_as_phase2(
    model: PreTrainedModel, data: PackedData, options: TrainOptions, turns: Turns, folder: Path
) -> None:
    """Steps of phase 2 itself, turn by turn, until there is no further turn."""
    time_parts(model, turns.watch)
    steps = len(data.train) // (options.batch_size * options.gradient_accumulation)
    make_trainer: Any = partial(TimedTrainer, turns=turns)
    try:
        run_trainer(model, data, options, 0, folder, "", None, False, steps=steps, make_trainer=make_trainer)
    except TurnsOverError:
        return
    raise AssertionError("more turns than data")


def train_plainly(model: PreTrainedModel, data: PackedData, options: TrainOptions, turns: Turns) -> None:
    """The loop of a textbook: fp32, all logits at once, AdamW as PyTorch gives it, memory as the system gives it."""
    watch = turns.watch
    time_parts(model, watch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    batches = DataLoader(data.train, options.batch_size * options.gradient_accumulation, collate_fn=stack_samples)
    model.train()
    try:
        turns.begin()
        for batch in itertools.cycle(batches):
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
            turns.step_ended()
    except TurnsOverError:
        return


def step_flops(model: PreTrainedModel, tokens: int, length: int) -> int:
    """Floating-point operations of a training step's matrix products (PaLM, arXiv 2204.02311, appendix B).

    6 a weight and token, 4 where the weight is frozen, and 12 a layer, width, length and token for attention. What is
    computed a second time (checkpointing) is not counted.
    """
    config = model.config
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    products = sum((6 if weight.requires_grad else 4) * weight.numel() for weight in weights)
    return tokens * (products + 12 * config.num_hidden_layers * config.hidden_size * length)


def product_shapes(config: GPTNeoXConfig, tokens: int) -> list[tuple[int, int, int, int]]:
    """The matrix products of GPT-NeoX's forward pass: rows, inner width, columns, and how many there are."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    return [
        (tokens, hidden, 3 * hidden, layers),
        (tokens, hidden, hidden, layers),
        (tokens, hidden, inner, layers),
        (tokens, inner, hidden, layers),
        (tokens, hidden, config.vocab_size, 1),
    ]


def product_rate(shapes: Sequence[tuple[int, int, int, int]], dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of these products alone, one after another into memory that is already there."""
    watch, work, seconds = Stopwatch(device), 0, 0.0
    for rows, inner, columns, count in shapes:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(columns, inner, device=device).to(dtype).T  # as nn.Linear holds its weight
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        torch.mm(left, right, out=out)
        watch.start("product")
        torch.mm(left, right, out=out)
        watch.stop("product")
        work += count * 2 * rows * inner * columns
        seconds += count * watch.read()["product"]
    return work / seconds
