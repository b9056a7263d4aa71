"""Phase 2: language-model training on transformers' Trainer, as the report did it.

One evaluation an epoch over all validation tokens, early stop, best weights kept; an interrupted run goes on to the
very metrics of an uninterrupted one.

A folder in training holds `checkpoints/`; a finished one holds the best model in Hugging Face form and `train.json`.
"""

from __future__ import annotations

import copy
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from context_pythia import processes
from context_pythia.files import write_json
from context_pythia.recipe import TrainOptions
from context_pythia.training.allocator import keep_freed_memory
from context_pythia.training.checkpoints import (
    STATE_FILE,
    check_same_run,
    last_checkpoint,
    load_weights,
    publish,
    read_json,
    run_settings,
)
from context_pythia.training.interrupts import deferred_interrupt
from context_pythia.training.shares import check_shares
from context_pythia.training.trainer import (
    LanguageModelTrainer,
    faster_attention,
    quiet_transformers,
    training_arguments,
    wide,
)

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedData

RESULT_FILE = "train.json"
SETTINGS_FILE = "settings.json"
EARLY_STOP, ALL_EPOCHS = "early stop", "all epochs"


@dataclass
class TrainResult:
    """What phase 2 reached. `stop_reason` is `"early stop"` or `"all epochs"`; seconds are those of training alone,
    and of an epoch their median.

    `val_ppl_by_position` is `best_val_ppl` in bands (see `perplexity_by_position`); None from an older version.
    A row of `history` has epoch, step, train_loss (mean over the epoch's steps), val_ppl, val_accuracy, seconds and
    best. A run by steps begins with a row of step 0, without a train_loss, and may end within an epoch: then `epoch` is
    not whole.
    """

    best_val_ppl: float
    best_epoch: float
    val_accuracy: float
    history: list[dict[str, Any]]
    seconds_per_epoch: float
    stop_reason: str
    val_ppl_by_position: list[dict[str, Any]] | None = None


def train_language_model(
    model: PreTrainedModel,
    data: PackedData,
    options: TrainOptions,
    *,
    seed: int,
    folder: Path,
    name: str,
    progress: bool = True,
    steps: int | None = None,
    make_trainer: Callable[..., LanguageModelTrainer] = LanguageModelTrainer,
    identity: dict[str, Any] | None = None,
) -> TrainResult:
    """Trains `model` and leaves its best weights in it and, with the tokenizer, in `folder`.

    A finished folder is loaded and returned at once; an unfinished one goes on from its last sound checkpoint. Ctrl-C
    finishes the step (or the evaluation), writes a checkpoint and raises KeyboardInterrupt; a second one stops at once.

    Args:
        model: a causal language model of transformers; parameters without `requires_grad` stay as they are.
        name: the model's name on the console.
        progress: show a progress bar on stderr where that is a terminal.
        steps: optimizer steps in place of `options.epochs`; evaluated before them (the first weights may be the best),
            at each epoch's end and after the last.
        make_trainer: what trains, called as `LanguageModelTrainer` is.
        identity: what decides the weights besides the other arguments, as plain values of JSON.

    Raises:
        ValueError: options that cannot be, or a folder that holds another run.
        RuntimeError: a loss that is not finite (checkpoints and best weights stay), or only damaged checkpoints.
        OSError: a folder that cannot be written.
    """
    check_options(options, data)
    folder = Path(folder)
    settings = run_settings(model, data, options, seed) | {"steps": steps} | (identity or {})
    with quiet_transformers():
        if (folder / RESULT_FILE).exists():
            finished = read_json(folder / RESULT_FILE)
            check_same_run(finished.pop("settings"), settings, folder)
            load_weights(model, folder)
            if processes.is_main():
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            return TrainResult(**finished)
        with processes.main_first():
            resume_from, log = open_checkpoints(folder, settings, options)
        if log is None:
            log = run_trainer(
                model, data, options, seed, folder, name, resume_from, progress, steps=steps, make_trainer=make_trainer
            )
        load_weights(model, folder / "checkpoints" / f"checkpoint-{log['best_global_step']}")
        result = make_result(log["log_history"], options)
        processes.wait()
        if processes.is_main():
            publish(model, data.tokenizer, folder)
            write_json(folder / RESULT_FILE, {**asdict(result), "settings": settings})
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            print(describe_end(result, options))
    return result


def open_checkpoints(
    folder: Path, settings: dict[str, Any], options: TrainOptions
) -> tuple[Path | None, dict[str, Any] | None]:
    """The last sound checkpoint, if there is one, and the Trainer's last state if training is at its end."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    if (checkpoints / SETTINGS_FILE).exists():
        check_same_run(read_json(checkpoints / SETTINGS_FILE), settings, folder)
    else:
        write_json(checkpoints / SETTINGS_FILE, settings)
    resume_from = last_checkpoint(checkpoints)
    if resume_from:
        state = read_json(resume_from / STATE_FILE)
        # Interrupted between its last checkpoint and its end: the Trainer would not know of an early stop.
        at_end = state["global_step"] >= state["max_steps"]
        if stop_reason(epoch_rows(state["log_history"]), options, at_end) is not None:
            return resume_from, state
    return resume_from, None


def run_trainer(
    model: PreTrainedModel,
    data: PackedData,
    options: TrainOptions,
    seed: int,
    folder: Path,
    name: str,
    resume_from: Path | None,
    progress: bool,
    *,
    steps: int | None,
    make_trainer: Callable[..., LanguageModelTrainer],
) -> dict[str, Any]:
    """Runs the Trainer to its end and returns its last state.

    Raises:
        ValueError: FSDP where accelerate does not offer it.
    """
    arguments = training_arguments(options, seed, folder / "checkpoints", steps)
    # A checkpoint has the first evaluation in its log.
    arguments.eval_on_start = steps is not None and resume_from is None
    if arguments.device.type == "cpu":
        keep_freed_memory()
    report = EpochReport(name, options, progress)
    callbacks: list[TrainerCallback] = [report]
    if options.tensorboard:
        callbacks.append(TensorBoardCallback(summary_writer(folder / "tensorboard")))
    if processes.divide_model():
        # What FSDP has divided stays so: the caller's model is kept from it, and takes the best weights in the end.
        model = copy.deepcopy(model)
    use_cache = model.config.use_cache
    with faster_attention(model, arguments.device, data.train.sequence_length):
        trainer = make_trainer(report, options, model=model, args=arguments, data=data, callbacks=callbacks)
        if processes.divide_model() and not trainer.is_fsdp_enabled:
            raise ValueError("accelerate divides a model (FSDP) only among GPUs or the like: drop the option")
        try:
            with deferred_interrupt() as report.asked_to_stop:
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
            if report.interrupted:
                raise KeyboardInterrupt
        finally:
            report.close()
            # The Trainer leaves these behind: a wrapped forward (float16), no cache in the config, gradients.
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            trainer.accelerator.free_memory()
            if options.gradient_checkpointing:
                model.gradient_checkpointing_disable()
            model.config.use_cache = use_cache
            model.zero_grad(set_to_none=True)
            model.eval()
    return asdict(trainer.state)


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

    @property
    def interrupted(self) -> bool:
        """Whether ctrl-C was pressed, as far as this process knows."""
        return self.asked_to_stop.is_set()

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
        if processes.highest(int(self.interrupted)):
            self.asked_to_stop.set()
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
            line = by_steps if args.max_steps > 0 else f"Epoch {row['epoch']:2d}/{self.options.epochs}"
            line += ": " if row["train_loss"] is None else f": train_loss={row['train_loss']:.4f}, "
            line += f"val_ppl={row['val_ppl']:.2f}, val_acc={row['val_accuracy']:.4f}, {row['seconds']:.1f} s"
            tqdm.write(line + " *" * row["best"], file=sys.stdout)
            sys.stdout.flush()
        at_end = state.global_step >= state.max_steps
        control.should_training_stop = stop_reason(history, self.options, at_end) is not None

    def on_save(self, args, state, control, **kwargs):
        if self.interrupted:
            raise KeyboardInterrupt


def check_options(options: TrainOptions, data: PackedData) -> None:
    """Raises ValueError, in one line, for what the options alone cannot tell to be wrong."""
    if options.warmup_ratio and options.schedule == "constant":
        section = options.section
        raise ValueError(f"{section}.warmup_ratio {options.warmup_ratio}: needs the schedule constant_with_warmup")
    if options.precision == "float16" and not torch.cuda.is_available():
        raise ValueError(f"{options.section}.precision float16: needs a CUDA GPU, choose bfloat16 or float32")
    check_shares(options)
    for split in ("train", "validation"):
        if len(getattr(data, split)) == 0:
            raise ValueError(f"the {split} split has no samples: give more text or another validation_fraction")


def summary_writer(folder: Path):
    """A TensorBoard writer to `folder`; ValueError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard is not installed: pip install 'context-pythia[tensorboard]'") from error
    return SummaryWriter(log_dir=str(folder))


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
    best = f"best val_ppl={result.best_val_ppl:.2f} in epoch {result.best_epoch}"
    if result.stop_reason == EARLY_STOP:
        return f"Early stop after epoch {len(result.history)} (patience {options.patience}): {best}"
    return f"All {len(result.history)} epochs done: {best}"
