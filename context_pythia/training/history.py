"""When a training validates and when it ends, its result, and the lines that the console prints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from context_pythia.config.recipe import HealOptions, TrainOptions

EARLY_STOP, ALL_EPOCHS, ALL_TOKENS = "early stop", "all epochs", "all tokens"
EVALUATIONS_OF_PASS = 10

Row = dict[str, Any]


@dataclass
class TrainResult:
    """The result of phase 2.

    Attributes:
        best_epoch: the epoch of the best validation; may be a fraction.
        history: one row per evaluation: epoch, step, tokens (read so far; None from an older version), train_loss
            (mean over the steps since the last row), val_ppl, val_accuracy, seconds and best. A single pass has one
            row per tenth. Healing begins with a row of step 0, whose train_loss is None.
        seconds_per_epoch: median, without validation and checkpoints.
        stop_reason: `"early stop"`, `"all epochs"` or, after a single pass, `"all tokens"`; None if unknown.
        val_ppl_by_position: `best_val_ppl` in bands (see `perplexity_by_position`); None from an older version.
    """

    best_val_ppl: float
    best_epoch: float
    val_accuracy: float
    history: list[Row]
    seconds_per_epoch: float
    stop_reason: str | None
    val_ppl_by_position: list[Row] | None = None


class Plan:
    """How many optimizer steps a training has, and after which of them it validates.

    A training runs for epochs or for a single pass over `options.tokens`; healing runs for `options.steps`, and
    validation never stops it. The last step of an epoch may have fewer batches.

    Attributes:
        samples: samples of an epoch. A single pass is cut to whole steps, so all steps have the same size.
        epoch_steps, steps: optimizer steps of an epoch, and of the whole training.
        evaluations: the steps after which the model is validated: the last step of each epoch, or every tenth of a
            single pass; also the last step of all. Healing validates its first weights too (step 0), because they may
            be the best.
    """

    def __init__(self, options: TrainOptions | HealOptions, samples: int, sequence_length: int):
        self.options, self.samples, self.sequence_length = options, samples, sequence_length
        self.step_samples = options.batch_size * options.gradient_accumulation
        if isinstance(options, TrainOptions) and options.tokens is not None:
            self.samples = options.tokens // (self.step_samples * sequence_length) * self.step_samples
        self.epoch_steps = math.ceil(self.samples / self.step_samples)
        if isinstance(options, HealOptions):
            self.steps = options.steps
            self.evaluations = {0, *range(self.epoch_steps, self.steps, self.epoch_steps), self.steps}
        elif options.tokens is None:
            self.steps = options.epochs * self.epoch_steps
            self.evaluations = set(range(self.epoch_steps, self.steps + 1, self.epoch_steps))
        else:
            self.steps = self.epoch_steps
            parts = range(1, EVALUATIONS_OF_PASS + 1)
            self.evaluations = {round(i * self.steps / EVALUATIONS_OF_PASS) for i in parts} - {0}

    def order(self, seed: int, epoch: int) -> list[int]:
        """The indices of an epoch's samples, in the order of training."""
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(seed + epoch)).tolist()

    def epochs(self, step: int) -> float:
        """Epochs done after `step`; an int at the end of an epoch."""
        return step / self.epoch_steps if step % self.epoch_steps else step // self.epoch_steps

    def tokens(self, step: int) -> int:
        """Tokens of the training split that are read after `step`, counted again in each epoch."""
        whole, rest = divmod(step, self.epoch_steps)
        return (whole * self.samples + rest * self.step_samples) * self.sequence_length

    def stop_reason(self, history: list[Row], step: int) -> str | None:
        """Why training ends after `step` and the last row of `history`; None if it continues."""
        end = ALL_EPOCHS if step >= self.steps else None
        if isinstance(self.options, HealOptions):
            return end
        if self.options.tokens is not None:
            return end and ALL_TOKENS
        since_best = next((since for since, row in enumerate(reversed(history)) if row["best"]), 0)
        return EARLY_STOP if since_best >= self.options.patience else end

    def describe(self, row: Row) -> str:
        """The console's line for an evaluation."""
        if isinstance(self.options, HealOptions):
            line = f"Step {row['step']}/{self.steps}: "
        elif self.options.tokens is None:
            line = f"Epoch {row['epoch']:2}/{self.options.epochs}: "
        else:
            line = f"{row['tokens']:,} of {self.options.tokens:,} tokens: "
        if row["train_loss"] is not None:
            line += f"train_loss={row['train_loss']:.4f}, "
        line += f"val_ppl={row['val_ppl']:.2f}, val_acc={row['val_accuracy']:.4f}, {row['seconds']:.1f} s"
        return line + " *" * row["best"]


def result_of(history: list[Row], stop_reason: str | None, bands: list[Row]) -> TrainResult:
    """The result of a training that has ended."""
    best = best_row(history)
    return TrainResult(
        best_val_ppl=best["val_ppl"],
        best_epoch=best["epoch"],
        val_accuracy=best["val_accuracy"],
        history=history,
        seconds_per_epoch=seconds_per_epoch(history),
        stop_reason=stop_reason,
        val_ppl_by_position=bands,
    )


def describe_end(result: TrainResult) -> str:
    """The console's last line."""
    end = "Early stop" if result.stop_reason == EARLY_STOP else "Done"
    best, last = best_row(result.history)["step"], result.history[-1]["step"]
    return f"{end} after step {last}: best val_ppl={result.best_val_ppl:.2f} after step {best}"


def best_row(history: list[Row]) -> Row:
    return [row for row in history if row["best"]][-1]


def seconds_per_epoch(history: list[Row]) -> float:
    """The median. It ignores an epoch in which the machine slept or was busy with other work."""
    trained = [row for row in history if row["step"] > 0]
    starts = [0, *(row["epoch"] for row in trained)]
    return median(row["seconds"] / (row["epoch"] - start) for row, start in zip(trained, starts, strict=False))
