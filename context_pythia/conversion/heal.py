"""Healing: some training steps that make a converted model match its original, in the loop of phase 2.

The loss per token is `(1 - ce_weight) KL(original || student) + ce_weight CE(text || student)`, on logits at
temperature 1. The original only gives targets: it runs without gradients and is in no checkpoint.

The control of healing is the original itself, trained for as many steps: a plain GPT-NeoX as student, with a copy of
itself or None as teacher.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from context_pythia.config.recipe import HealOptions
from context_pythia.training.batches import Batch
from context_pythia.training.history import TrainResult
from context_pythia.training.loss import linear_distillation
from context_pythia.training.optimization import hidden_states, text_loss, unwrapped
from context_pythia.training.phase2 import train_language_model

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedData


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    data: PackedData,
    options: HealOptions,
    *,
    seed: int,
    folder: Path,
    progress: bool = True,
) -> TrainResult:
    """Train `student` towards `teacher`, and save the healed student with its tokenizer in `folder`.

    `options.parameters` chooses the trained parameters. "attention" means all in `gpt_neox.layers.*.attention` except
    `dense`. This includes the query: the conversion changes it too (it absorbs the maps of the rotary keys), and in a
    plain GPT-NeoX, the control, it is part of one matrix with keys and values.

    Checkpoints, resumption, ctrl-C and errors are those of `train_language_model`. The first row of the history is of
    step 0, before healing; the train_loss of the others is the healing loss. To resume, give the student of the first
    call, before healing.

    Args:
        student, teacher: models of one vocabulary, in any dtypes. Without a teacher the loss is the cross-entropy.
    """
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(options.trains(name))
    return train_language_model(
        student,
        data,
        options,
        seed=seed,
        folder=folder,
        name="Healing",
        progress=progress,
        loss=text_loss if teacher is None else Distillation(teacher, options.ce_weight),
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
        # A teacher in float32 follows the student's autocast, which would mix the dtypes of any other.
        as_student = self.teacher.dtype == torch.float32
        precision = contextlib.nullcontext() if as_student else torch.autocast(hidden.device.type, enabled=False)
        with torch.no_grad(), precision:
            expected = self.teacher.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        teacher_head = self.teacher.get_output_embeddings().weight
        labels = batch["labels"].flatten()
        return linear_distillation(hidden, head, labels, expected.flatten(0, 1), teacher_head, self.ce_weight)
