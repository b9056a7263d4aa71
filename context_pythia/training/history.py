"""When a training validates and ends, what it has reached, and how the console says so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from context_pythia.config.recipe import TrainOptions

EARLY_STOP, ALL_EPOCHS, ALL_TOKENS = "early stop", "all epochs", "all tokens"
EVALUATIONS_OF_PASS = 10

Row = dict[str, Any]


@dataclass
class TrainResult:
    """What phase 2 reached. `stop_reason` is `"early stop"`, `"all epochs"` or, after one pass, `"all tokens"`; seconds
    are those of training alone, and of an epoch their median.

    `val_ppl_by_position` is `best_val_ppl` in bands (see `perplexity_by_position`); None from an older version.
    A row of `history` has epoch, step, tokens (read so far; None from an older version), train_loss (mean over the
    steps since the last row), val_ppl, val_accuracy, seconds and best. One pass has a row for each tenth of it. A run
    by steps begins with a row of step 0, without a train_loss, and may end within an epoch. `epoch` need not be whole.
    """

    best_val_ppl: float
    best_epoch: float
    val_accuracy: float
    history: list[Row]
    seconds_per_epoch: float
    stop_reason: str
    val_ppl_by_position: list[Row] | None = None


class Plan:
    """How many optimizer steps a training has, and after which of them it validates.

    Epochs, or one pass over `options.tokens`, or so many `steps`. An epoch's last step may have fewer batches.

    Attributes:
        samples: of an epoch; of a pass whole steps, so that each weighs the same.
        epoch_steps, steps: optimizer steps of an epoch, and in all.
        evaluations: the steps after which the model is validated: each epoch's last, or every tenth of a pass; the
            last of all; before the first one, if the run is one by steps.
    """

    def __init__(self, options: TrainOptions, samples: int, sequence_length: int, steps: int | None):
        self.options, self.samples, self.sequence_length, self.by_steps = options, samples, sequence_length, steps
        self.step_samples = options.batch_size * options.gradient_accumulation
        if options.tokens is not None:
            self.samples = options.tokens // (self.step_samples * sequence_length) * self.step_samples
        self.batches = math.ceil(self.samples / options.batch_size)
        self.epoch_steps = math.ceil(self.samples / self.step_samples)
        epochs = options.epochs if options.tokens is None else 1
        self.steps = epochs * self.epoch_steps if steps is None else steps
        if options.tokens is None:
            self.evaluations = set(range(self.epoch_steps, self.steps, self.epoch_steps))
        else:
            tenths = range(1, EVALUATIONS_OF_PASS)
            self.evaluations = {round(i * self.steps / EVALUATIONS_OF_PASS) for i in tenths} - {0}
        self.evaluations.add(self.steps)
        if steps is not None:
            self.evaluations.add(0)

    def order(self, seed: int, epoch: int) -> list[int]:
        """The samples of an epoch in their order."""
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(seed + epoch)).tolist()

    def epochs(self, step: int) -> float:
        """Epochs done after `step`, whole ones as an int."""
        whole, rest = divmod(step, self.epoch_steps)
        return whole + rest * self.options.gradient_accumulation / self.batches if rest else whole

    def tokens(self, step: int) -> int:
        """Tokens of the training split that are read after `step`, counted again in each epoch."""
        whole, rest = divmod(step, self.epoch_steps)
        return (whole * self.samples + rest * self.step_samples) * self.sequence_length

    def stop_reason(self, history: list[Row], step: int) -> str | None:
        """Why training ends at `step`, after the last row of `history`; None where it goes on."""
        at_end = step >= self.steps
        if self.options.tokens is not None:
            return ALL_TOKENS if at_end else None
        since_best = next((since for since, row in enumerate(reversed(history)) if row["best"]), 0)
        if since_best >= self.options.patience:
            return EARLY_STOP
        return ALL_EPOCHS if at_end else None

    def describe(self, row: Row) -> str:
        """An evaluation as the console shows it."""
        line = f"Epoch {row['epoch']:2}/{self.options.epochs}: "
        if self.by_steps is not None:
            line = f"Step {row['step']}/{self.steps}: "
        if self.options.tokens is not None:
            line = f"{row['tokens']:,} of {self.options.tokens:,} tokens: "
        if row["train_loss"] is not None:
            line += f"train_loss={row['train_loss']:.4f}, "
        line += f"val_ppl={row['val_ppl']:.2f}, val_acc={row['val_accuracy']:.4f}, {row['seconds']:.1f} s"
        return line + " *" * row["best"]

    def describe_end(self, result: TrainResult) -> str:
        first, last = result.history[0], result.history[-1]
        if self.by_steps is not None:
            line = f"All {last['step']} steps done: val_ppl={first['val_ppl']:.2f} before, {last['val_ppl']:.2f} now"
            step = best_row(result.history)["step"]
            kept = f"; validation got no better, so the weights of step {step} are kept"
            return line if last["best"] else line + kept
        if self.options.tokens is not None:
            return f"All {last['tokens']:,} tokens read: val_ppl={last['val_ppl']:.2f}, best {result.best_val_ppl:.2f}"
        best = f"best val_ppl={result.best_val_ppl:.2f} in epoch {result.best_epoch}"
        if result.stop_reason == EARLY_STOP:
            return f"Early stop after epoch {len(result.history)} (patience {self.options.patience}): {best}"
        return f"All {len(result.history)} epochs done: {best}"


def best_row(history: list[Row]) -> Row:
    return [row for row in history if row["best"]][-1]


def seconds_per_epoch(history: list[Row]) -> float:
    """The median, so that an epoch in which the machine was stopped or busy with other work does not count."""
    trained = [row for row in history if row["step"] > 0]
    starts = [0, *(row["epoch"] for row in trained)]
    return median(row["seconds"] / (row["epoch"] - start) for row, start in zip(trained, starts, strict=False))
