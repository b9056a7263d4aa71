"""Phase 2: language-model training, as the report did it.

Each epoch ends with a validation over all validation tokens. Training can stop early, and the best weights are the
result. An interrupted run resumes and reaches the same metrics as an uninterrupted one.

During training the folder has `checkpoints/`, with the last state and the best weights in Hugging Face form. A finished
folder has the best model and `train.json`.
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
    """Train `model`, load its best weights into it, and save them with the tokenizer in `folder`.

    If the folder is finished, it is loaded without training. If it is unfinished, training resumes from the last
    checkpoint. After ctrl-C it finishes the step (or the evaluation), writes a checkpoint and raises KeyboardInterrupt;
    a second ctrl-C stops at once.

    Args:
        model: a causal language model of transformers. It moves to the GPU if there is one. Parameters without
            `requires_grad` do not change.
        name: the model's name on the console.
        progress: show a progress bar if stderr is a terminal.
        steps: number of optimizer steps, instead of `options.epochs`. The model is then also evaluated before the
            first step, because the first weights may be the best.
        loss: takes a model and a batch, returns the sum of the loss over the batch's tokens in nats.
        identity: further settings that determine the weights, as plain JSON values.

    Raises:
        UsageError: the options are invalid, or `folder` has another run or a damaged state.
        Failure: the loss is not finite (checkpoint and best weights stay), or weights in `folder` are damaged.
        OSError: `folder` cannot be written.
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
    """Raise UsageError for options that contradict each other or do not fit this machine."""
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
    """TensorBoard's writer; raises UsageError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("tensorboard is not installed: pip install 'context-pythia[tensorboard]'") from error
    return SummaryWriter
