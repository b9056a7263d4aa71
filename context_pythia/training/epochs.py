"""What a training tells epoch by epoch: the console's lines, the history, the early stop and the result."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from context_pythia import processes
from context_pythia.config.recipe import TrainOptions

EARLY_STOP, ALL_EPOCHS, ALL_TOKENS = "early stop", "all epochs", "all tokens"
EVALUATIONS_OF_PASS = 10
LOOK_STEPS = 16  # after how many several processes ask one another about ctrl-C, which takes a network's way


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
    history: list[dict[str, Any]]
    seconds_per_epoch: float
    stop_reason: str
    val_ppl_by_position: list[dict[str, Any]] | None = None


class EpochReport(TrainerCallback, ExportableState):
    """The epoch's mean loss and seconds, the console, the early stop, and the checkpoints between evaluations.

    Its `state` travels in each checkpoint, so that an epoch which was interrupted half-way still reports all its steps.
    """

    def __init__(self, name: str, options: TrainOptions, progress: bool):
        self.name, self.options = name, options
        # None lets tqdm look whether stderr is a terminal.
        self.no_bars = None if progress and processes.is_main() else True
        self.bar: tqdm | None = None
        self.loss_sum: Any = 0.0
        self.steps = 0
        self.seconds = 0.0
        self.started: float | None = None
        self.train_loss: float | None = None
        self.asked_to_stop = threading.Event()
        self.stopping = False  # what the processes know together

    @property
    def interrupted(self) -> bool:
        """Whether ctrl-C was pressed in a process; several learn of it together, at their next look."""
        return self.asked_to_stop.is_set() if processes.count() == 1 else self.stopping

    def state(self) -> dict[str, Any]:
        attributes = {"loss_sum": float(self.loss_sum), "steps": self.steps, "seconds": self.seconds}
        return {"args": {}, "attributes": attributes}

    def add(self, loss: torch.Tensor) -> None:
        """Adds the loss of one batch; with gradient accumulation the batches of a step sum up to its mean."""
        self.loss_sum = wide(loss) + self.loss_sum

    def share_loss(self) -> None:
        """Makes the sum that of all processes: each has the loss of its share, scaled up to a whole batch's."""
        if processes.count() > 1:
            loss_sum = torch.as_tensor(self.loss_sum, dtype=torch.float64)
            self.loss_sum = processes.total(loss_sum) / processes.count()

    def pause(self) -> None:
        if self.started is not None:
            self.seconds += time.perf_counter() - self.started
        self.started = None

    def resume(self) -> None:
        self.started = time.perf_counter()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(self, args, state, control, **kwargs):
        for attribute, value in state.stateful_callbacks[type(self).__name__]["attributes"].items():
            setattr(self, attribute, value)
        if state.is_world_process_zero:
            if state.global_step:
                print(f"{self.name}: goes on after step {state.global_step} of {state.max_steps}")
            disable = self.no_bars
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", disable=disable
            )

    def on_epoch_begin(self, args, state, control, **kwargs):
        if at_epoch_end(state):
            self.loss_sum, self.steps, self.seconds = 0.0, 0, 0.0
        self.resume()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if self.bar is not None:
            self.bar.update()
        if state.global_step % LOOK_STEPS == 0 or at_epoch_end(state):
            self.stopping = bool(processes.highest(int(self.asked_to_stop.is_set())))
        if self.options.tokens is not None and state.global_step in pass_evaluations(state.max_steps):
            self.on_epoch_end(args, state, control)
            # The best weights can only be kept where each evaluation has a checkpoint.
            control.should_evaluate = control.should_save = True
        due = self.options.checkpoint_steps and state.global_step % self.options.checkpoint_steps == 0
        # At an epoch's end the checkpoint must wait for the evaluation: a resumed run would not make up for it.
        if (due or self.interrupted) and not at_epoch_end(state):
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        self.share_loss()
        # Reading the sum waits for the device, so that the clock stops after the last step's work.
        self.train_loss = float(self.loss_sum) / self.steps
        self.pause()

    def on_evaluate(self, args, state, control, **kwargs):
        history = epoch_rows(state.log_history)
        if state.is_world_process_zero:
            row = history[-1]
            by_steps = f"Step {row['step']}/{state.max_steps}"
            line = by_steps if args.max_steps > 0 else f"Epoch {row['epoch']:2}/{self.options.epochs}"
            if self.options.tokens is not None:
                line = f"{row['tokens']:,} of {self.options.tokens:,} tokens"
            line += ": " if row["train_loss"] is None else f": train_loss={row['train_loss']:.4f}, "
            line += f"val_ppl={row['val_ppl']:.2f}, val_acc={row['val_accuracy']:.4f}, {row['seconds']:.1f} s"
            tqdm.write(line + " *" * row["best"], file=sys.stdout)
            sys.stdout.flush()
        at_end = state.global_step >= state.max_steps
        control.should_training_stop = stop_reason(history, self.options, at_end) is not None
        if self.options.tokens is not None and not at_end:
            self.loss_sum, self.steps, self.seconds = 0.0, 0, 0.0
            self.resume()

    def on_save(self, args, state, control, **kwargs):
        if self.interrupted:
            raise KeyboardInterrupt


def wide(value: torch.Tensor) -> torch.Tensor:
    """`value` in the dtype of long sums: float64, which Apple's GPUs lack."""
    return value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)


def samples_of_pass(options: TrainOptions, sequence_length: int) -> int:
    """Samples of one pass over `options.tokens`: whole batches, so that each step weighs the same."""
    assert options.tokens is not None
    step = options.batch_size * options.gradient_accumulation
    return options.tokens // (step * sequence_length) * step


def pass_evaluations(steps: int) -> set[int]:
    """The steps of one pass after which it is validated, but for the last: every tenth of it."""
    return {round(i * steps / EVALUATIONS_OF_PASS) for i in range(1, EVALUATIONS_OF_PASS)} - {0, steps}


def at_epoch_end(state) -> bool:
    """Whether a whole number of epochs is done, or all steps."""
    return float(state.epoch).is_integer() or state.global_step >= state.max_steps


def epoch_rows(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `TrainResult.history` in the Trainer's log."""
    rows: list[dict[str, Any]] = []
    for entry in log_history:
        if "eval_perplexity" in entry:
            perplexity, epoch = entry["eval_perplexity"], entry["epoch"]
            rows.append(
                {
                    "epoch": round(epoch) if epoch == round(epoch) else epoch,
                    "step": entry["step"],
                    "tokens": entry.get("tokens"),
                    "train_loss": entry["epoch_loss"],
                    "val_ppl": perplexity,
                    "val_accuracy": entry["eval_accuracy"],
                    "seconds": entry["epoch_seconds"],
                    "best": all(perplexity < row["val_ppl"] for row in rows),
                }
            )
    return rows


def stop_reason(history: list[dict[str, Any]], options: TrainOptions, at_end: bool) -> str | None:
    """Why training ends after the last row of `history`, `at_end` of its steps or not; None where it goes on."""
    if options.tokens is not None:
        return ALL_TOKENS if at_end else None
    since_best = next((since for since, row in enumerate(reversed(history)) if row["best"]), 0)
    if since_best >= options.patience:
        return EARLY_STOP
    return ALL_EPOCHS if at_end else None


def make_result(log_history: list[dict[str, Any]], options: TrainOptions) -> TrainResult:
    history = epoch_rows(log_history)
    best = [row for row in history if row["best"]][-1]
    logged = next(entry for entry in log_history if "eval_perplexity" in entry and entry["step"] == best["step"])
    return TrainResult(
        best_val_ppl=best["val_ppl"],
        best_epoch=best["epoch"],
        val_accuracy=best["val_accuracy"],
        history=history,
        seconds_per_epoch=seconds_per_epoch(history),
        stop_reason=stop_reason(history, options, at_end=True) or ALL_EPOCHS,
        val_ppl_by_position=logged.get("eval_by_position"),
    )


def seconds_per_epoch(history: list[dict[str, Any]]) -> float:
    """The median, so that an epoch in which the machine was stopped or busy with other work does not count."""
    trained = [row for row in history if row["step"] > 0]
    starts = [0, *(row["epoch"] for row in trained)]
    return median(row["seconds"] / (row["epoch"] - start) for row, start in zip(trained, starts, strict=False))


def describe_end(result: TrainResult, options: TrainOptions) -> str:
    first, last = result.history[0], result.history[-1]
    if first["step"] == 0:
        line = f"All {last['step']} steps done: val_ppl={first['val_ppl']:.2f} before, {last['val_ppl']:.2f} now"
        step = max(row["step"] for row in result.history if row["best"])
        return line if last["best"] else f"{line}; validation got no better, so the weights of step {step} are kept"
    if options.tokens is not None:
        return f"All {last['tokens']:,} tokens read: val_ppl={last['val_ppl']:.2f}, best {result.best_val_ppl:.2f}"
    best = f"best val_ppl={result.best_val_ppl:.2f} in epoch {result.best_epoch}"
    if result.stop_reason == EARLY_STOP:
        return f"Early stop after epoch {len(result.history)} (patience {options.patience}): {best}"
    return f"All {len(result.history)} epochs done: {best}"
