"""Phase 2: language-model training, as the report did it.

One validation an epoch over all validation tokens, early stop, best weights kept; an interrupted run goes on to the
very metrics of an uninterrupted one.

A folder in training holds `checkpoints/`: the state after the last checkpoint, and the best weights in Hugging Face
form. A finished one holds the best model and `train.json`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from context_pythia import processes
from context_pythia.config.recipe import TrainOptions
from context_pythia.config.same import check_same
from context_pythia.errors import UsageError
from context_pythia.files import write_json
from context_pythia.training.batches import Batch, check_shares
from context_pythia.training.checkpoints import (
    OTHER_FOLDER,
    load_weights,
    publish,
    quiet_transformers,
    read_json,
    run_settings,
)
from context_pythia.training.history import ALL_EPOCHS, Plan, TrainResult, best_row, seconds_per_epoch
from context_pythia.training.loop import Loop
from context_pythia.training.optimization import text_loss

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from context_pythia.data.packing import PackedData

RESULT_FILE = "train.json"


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
    loss: Callable[[nn.Module, Batch], Tensor] = text_loss,
    identity: dict[str, Any] | None = None,
) -> TrainResult:
    """Trains `model` and leaves its best weights in it and, with the tokenizer, in `folder`.

    A finished folder is loaded and returned at once; an unfinished one goes on from its last checkpoint. Ctrl-C
    finishes the step (or the evaluation), writes a checkpoint and raises KeyboardInterrupt; a second one stops at once.

    Args:
        model: a causal language model of transformers, which moves to the GPU if there is one; parameters without
            `requires_grad` stay as they are.
        name: the model's name on the console.
        progress: show a progress bar on stderr where that is a terminal.
        steps: optimizer steps in place of `options.epochs`; evaluated before them (the first weights may be the best),
            at each epoch's end and after the last.
        loss: of a model and a batch, the sum over its tokens in nats.
        identity: what decides the weights besides the other arguments, as plain values of JSON.

    Raises:
        UsageError: options that cannot be, or a folder that holds another run or a damaged state.
        Failure: a loss that is not finite (checkpoint and best weights stay), or damaged weights.
        OSError: a folder that cannot be written.
    """
    check_options(options)
    for split in ("train", "validation"):
        if len(getattr(data, split)) == 0:
            raise UsageError(f"the {split} split has no samples: give more text or another validation_fraction")
    plan = Plan(options, len(data.train), data.train.sequence_length, steps)
    if not 0 < plan.samples <= len(data.train):
        raise UsageError(
            f"{options.section}.tokens {options.tokens}: must be between "
            f"{plan.step_samples * plan.sequence_length} (one step) and "
            f"{len(data.train) * plan.sequence_length} (the training split)"
        )
    if torch.cuda.is_available():
        model.to("cuda")
    settings = run_settings(model, data, options, seed) | {"steps": steps} | (identity or {})
    with quiet_transformers():
        if (folder / RESULT_FILE).exists():
            finished = read_json(folder / RESULT_FILE)
            check_same(finished.pop("settings"), settings, f"{folder} holds a run", OTHER_FOLDER)
            load_weights(model, folder)
            if processes.is_main():
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            return TrainResult(**finished)
        writer = summary_writer()(str(folder / "tensorboard")) if options.tensorboard and processes.is_main() else None
        checkpoints = folder / "checkpoints"
        loop = Loop(model, data, options, plan, seed, checkpoints, name, settings, loss, progress, writer)
        loop.run()
        best = best_row(loop.history)
        assert loop.best_weights is not None, "the last step is evaluated"
        load_weights(model, loop.best_weights, checkpoints)
        result = TrainResult(
            best_val_ppl=best["val_ppl"],
            best_epoch=best["epoch"],
            val_accuracy=best["val_accuracy"],
            history=loop.history,
            seconds_per_epoch=seconds_per_epoch(loop.history),
            stop_reason=plan.stop_reason(loop.history, loop.step) or ALL_EPOCHS,
            val_ppl_by_position=loop.bands,
        )
        processes.wait()
        if processes.is_main():
            publish(model, data.tokenizer, folder)
            write_json(folder / RESULT_FILE, {**asdict(result), "settings": settings})
            shutil.rmtree(checkpoints, ignore_errors=True)
            print(plan.describe_end(result))
    return result


def check_options(options: TrainOptions) -> None:
    """Raises UsageError, in one line, for options that cannot be here, or not together."""
    if options.warmup_ratio and options.schedule == "constant":
        section = options.section
        raise UsageError(
            f"{section}.warmup_ratio {options.warmup_ratio}: schedule constant has no warm-up, use constant_with_warmup"
        )
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
