"""Healing: some training steps that make a converted model match its original, in the loop of phase 2.

The loss per token is `(1 - ce_weight) KL(original || student) + ce_weight CE(text || student)`, on logits at
temperature 1. The original only gives targets: it runs without gradients and is in no checkpoint.

The control of healing is the original itself, trained for as many steps: a plain GPT-NeoX as student, with a copy of
itself or None as teacher.
"""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from context_pythia.config.recipe import HealOptions, TrainOptions
from context_pythia.errors import UsageError
from context_pythia.training.batches import Batch
from context_pythia.training.loss import linear_distillation
from context_pythia.training.optimization import hidden_states, text_loss, unwrapped
from context_pythia.training.phase2 import train_language_model

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedData


@dataclass
class HealResult:
    """The result of healing; its `asdict` is JSON.

    Attributes:
        steps: optimizer steps done.
        kept_step: the step of the kept weights, the one with the lowest validation perplexity (0: before healing).
        val_ppl_before: validation perplexity of the student before healing.
        val_ppl: validation perplexity of the kept weights.
        val_accuracy: top-1 accuracy of the kept weights, 0 to 1.
        val_ppl_by_position: `val_ppl` in bands (see `perplexity_by_position`).
        seconds: time in training steps, without evaluations and interruptions.
        history: one row per evaluation, as in `TrainResult.history`; train_loss is the healing loss.
    """

    steps: int
    kept_step: int
    val_ppl_before: float
    val_ppl: float
    val_accuracy: float
    val_ppl_by_position: list[dict[str, Any]] | None
    seconds: float
    history: list[dict[str, Any]]


@dataclass
class HealTraining(TrainOptions):
    """`TrainOptions` whose errors name the options of healing."""

    section: ClassVar[str] = "heal"


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    data: PackedData,
    options: HealOptions,
    *,
    seed: int,
    folder: Path,
    progress: bool = True,
) -> HealResult:
    """Trains `student` towards `teacher`, and saves the healed student with its tokenizer in `folder`.

    `options.parameters` chooses the trained parameters. "attention" means all in `gpt_neox.layers.*.attention` except
    `dense`. This includes the query: the conversion changes it too (it absorbs the maps of the rotary keys), and in a
    plain GPT-NeoX, the control, it is part of one matrix with keys and values.

    Checkpoints, resumption and ctrl-C work as in `train_language_model`; a finished folder is loaded and returned at
    once. To resume, give the student of the first call, before healing.

    Args:
        student: a causal GPT-NeoX or Context-Pythia; its dtype may differ from the teacher's.
        teacher: the original; it moves to the training device and takes the student's attention implementation. None
            means cross-entropy only, whatever `options.ce_weight` is.
        data: `train` heals; `validation` gives perplexities before, at the end of each epoch and after the last step.
        seed: seed of the samples' order and of dropout.

    Raises:
        UsageError: no steps, different vocabularies, impossible options, or a folder with another run.
        Failure: a loss that is not finite, or only damaged checkpoints.
        OSError: a folder that cannot be written.
    """
    if options.steps == 0:
        raise UsageError("heal.steps 0: nothing to heal, give at least 1")
    if teacher is student:
        raise UsageError("the teacher is the student itself: give a copy, or None for cross-entropy alone")
    ce_weight = 1.0 if teacher is None else options.ce_weight
    identity = {"parameters": options.parameters, "ce_weight": ce_weight, "student_crc32": fingerprint(student)}
    loss: Callable[[nn.Module, Batch], torch.Tensor] = text_loss
    if teacher is not None and ce_weight < 1:
        rows, wanted = (model.get_output_embeddings().weight.shape[0] for model in (student, teacher))
        if rows != wanted:
            raise UsageError(f"the student has {rows} logits and the teacher {wanted}: give models of one vocabulary")
        identity["teacher_crc32"] = fingerprint(teacher)
        loss = Distillation(teacher, ce_weight)
    with trained_alone(student, options):
        result = train_language_model(
            student,
            data,
            training_options(options),
            seed=seed,
            folder=folder,
            name="Healing",
            progress=progress,
            steps=options.steps,
            loss=loss,
            identity=identity,
        )
    kept = [row for row in result.history if row["best"]][-1]
    return HealResult(
        steps=options.steps,
        kept_step=kept["step"],
        val_ppl_before=result.history[0]["val_ppl"],
        val_ppl=kept["val_ppl"],
        val_accuracy=kept["val_accuracy"],
        val_ppl_by_position=result.val_ppl_by_position,
        seconds=sum(row["seconds"] for row in result.history),
        history=result.history,
    )


class Distillation:
    """The loss of healing, in place of `text_loss`."""

    def __init__(self, teacher: PreTrainedModel, ce_weight: float):
        self.teacher, self.ce_weight = teacher.eval(), ce_weight

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum over the batch's tokens, in nats, a scalar."""
        hidden, head = hidden_states(model, batch["input_ids"])
        # The same arithmetic in both: equal models then have no loss.
        self.teacher.to(hidden.device)
        self.teacher.set_attn_implementation(unwrapped(model).config._attn_implementation)
        with torch.no_grad(), self._precision():
            expected = self.teacher.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        teacher_head = self.teacher.get_output_embeddings().weight
        labels = batch["labels"].flatten()
        return linear_distillation(hidden, head, labels, expected.flatten(0, 1), teacher_head, self.ce_weight)

    def _precision(self) -> contextlib.AbstractContextManager:
        """A teacher in float32 follows the student's autocast. One of another dtype runs without it: autocast would
        mix dtypes."""
        if self.teacher.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.teacher.device.type, enabled=False)


@contextlib.contextmanager
def trained_alone(model: PreTrainedModel, options: HealOptions) -> Iterator[None]:
    """In the `with` block only the parameters to heal require gradients."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(options.trains(name))
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def training_options(options: HealOptions) -> TrainOptions:
    """The options that both kinds share. Validation never stops healing, it only chooses the weights."""
    names = {f.name for f in fields(options)} & {f.name for f in fields(TrainOptions)}
    return HealTraining(**{name: getattr(options, name) for name in names}, patience=sys.maxsize)


def fingerprint(model: PreTrainedModel) -> int:
    """CRC-32 of all weights, which identifies a folder's models."""
    crc = 0
    for name, parameter in model.named_parameters():
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(parameter.detach().cpu().contiguous().view(torch.uint8).numpy(), crc)
    return crc
