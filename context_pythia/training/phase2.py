"""Phase 2: language-model training on transformers' Trainer, as the report did it.

One evaluation an epoch over all validation tokens, early stop, best weights kept; an interrupted run goes on to the
very metrics of an uninterrupted one.

A folder in training holds `checkpoints/`; a finished one holds the best model in Hugging Face form and `train.json`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import TensorBoardCallback

from context_pythia import processes
from context_pythia.config.recipe import TrainOptions
from context_pythia.errors import UsageError
from context_pythia.files import write_json
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
from context_pythia.training.epochs import (
    EpochReport,
    TrainResult,
    describe_end,
    epoch_rows,
    make_result,
    samples_of_pass,
    stop_reason,
)
from context_pythia.training.interrupts import deferred_interrupt
from context_pythia.training.shares import check_shares
from context_pythia.training.trainer import (
    CHECKPOINTING,
    LanguageModelTrainer,
    faster_attention,
    quiet_transformers,
    training_arguments,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from context_pythia.data.packing import PackedData

RESULT_FILE = "train.json"
SETTINGS_FILE = "settings.json"


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
        UsageError: options that cannot be, or a folder that holds another run.
        Failure: a loss that is not finite (checkpoints and best weights stay), or only damaged checkpoints.
        OSError: a folder that cannot be written.
    """
    check_options(options)
    for split in ("train", "validation"):
        if len(getattr(data, split)) == 0:
            raise UsageError(f"the {split} split has no samples: give more text or another validation_fraction")
    if options.tokens is not None and not 0 < samples_of_pass(options, data.train.sequence_length) <= len(data.train):
        held = len(data.train) * data.train.sequence_length
        raise UsageError(
            f"{options.section}.tokens {options.tokens}: the training split holds {held} tokens, a step takes "
            f"{options.batch_size * options.gradient_accumulation * data.train.sequence_length}: give a number between"
        )
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
    """Runs the Trainer to its end and returns its last state."""
    arguments = training_arguments(options, seed, folder / "checkpoints", steps)
    # A checkpoint has the first evaluation in its log.
    arguments.eval_on_start = steps is not None and resume_from is None
    if arguments.device.type == "cpu":
        keep_freed_memory()
    report = EpochReport(name, options, progress)
    callbacks: list[TrainerCallback] = [report]
    if options.tensorboard:
        callbacks.append(TensorBoardCallback(summary_writer()(log_dir=str(folder / "tensorboard"))))
    use_cache = model.config.use_cache
    with faster_attention(model, arguments.device, data.train.sequence_length):
        trainer = make_trainer(report, options, model=model, args=arguments, data=data, callbacks=callbacks)
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
                getattr(model, f"{CHECKPOINTING}_disable")()
            model.config.use_cache = use_cache
            model.zero_grad(set_to_none=True)
            model.eval()
    return asdict(trainer.state)


def check_options(options: TrainOptions) -> None:
    """Raises UsageError, in one line, for options that cannot be here, or not together."""
    if options.warmup_ratio and options.schedule == "constant":
        section = options.section
        raise UsageError(f"{section}.warmup_ratio {options.warmup_ratio}: needs the schedule constant_with_warmup")
    if options.precision == "float16" and not torch.cuda.is_available():
        raise UsageError(f"{options.section}.precision float16: needs a CUDA GPU, choose bfloat16 or float32")
    check_shares(options)
    if options.tensorboard:
        summary_writer()


def summary_writer() -> type[SummaryWriter]:
    """TensorBoard's writer; UsageError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("tensorboard is not installed: pip install 'context-pythia[tensorboard]'") from error
    return SummaryWriter
