"""The Trainer of phase 2: what transformers' Trainer lacks for it.

Labels that are already the next tokens, streamed perplexity (by position, too) and accuracy, a stop at a loss that is
not a number, and checkpoints that are whole and hold finite weights.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from safetensors import SafetensorError
from torch.utils.data import DataLoader, SequentialSampler, Subset
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from context_pythia import processes
from context_pythia.config.recipe import TrainOptions
from context_pythia.errors import Failure, first_line
from context_pythia.evaluation.positions import perplexity, perplexity_by_position
from context_pythia.training.checkpoints import load_weights
from context_pythia.training.epochs import EpochReport, samples_of_pass, wide
from context_pythia.training.loss import IGNORED, linear_cross_entropy, token_scores
from context_pythia.training.shares import process_loader

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedData

# What the host's arguments and methods call recomputing in the backward pass: later versions warn of the former name.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)
# On an accelerator each look at the loss waits for the device.
STEPS_BETWEEN_LOOKS = 16
# On a CPU the backward pass of PyTorch's fused attention costs more than all weights of so few tokens: at 128 tokens in
# bfloat16 a step of Pythia-70M's size took 0.93 of its time without it, one of a quarter of the width 0.8, and 0.8 too
# at 256. Beyond, what the weights hold in memory counts.
EAGER_ATTENTION_LENGTH = 256


class LanguageModelTrainer(Trainer):
    """The Trainer for samples whose labels are already the next tokens, with a streamed validation."""

    def __init__(self, report: EpochReport, options: TrainOptions, *, data: PackedData, **arguments: Any):
        train: Any = data.train
        if options.tokens is not None:
            train = Subset(train, range(samples_of_pass(options, train.sequence_length)))
        super().__init__(train_dataset=train, eval_dataset=data.validation, data_collator=stack_samples, **arguments)
        self.sequence_length = data.train.sequence_length
        self.remove_callback(PrinterCallback)
        self.report = report
        self.bfloat16 = options.precision == "bfloat16"
        self.batch_size = options.batch_size

    def get_train_dataloader(self) -> DataLoader:
        if processes.count() == 1:
            return super().get_train_dataloader()
        # The order that accelerate gives a single process.
        order = SeedableRandomSampler(self.train_dataset, data_seed=self.args.data_seed)
        return process_loader(self.train_dataset, order, self.batch_size, self.args, self.data_collator)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        if processes.count() == 1:
            return super().get_eval_dataloader(eval_dataset)
        order = SequentialSampler(self.eval_dataset)
        return process_loader(self.eval_dataset, order, self.batch_size, self.args, self.data_collator)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast to bfloat16, entered here because accelerate's own copies all logits to fp32 once more."""
        stack = super().compute_loss_context_manager()
        if self.bfloat16:
            stack.enter_context(torch.autocast(self.args.device.type, dtype=torch.bfloat16))
        return stack

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean cross-entropy over the tokens of a step (of all its batches), a scalar."""
        # Bfloat16's autocast is entered before; float16's is accelerate's own, which ends with the model's forward.
        with self.accelerator.autocast():
            outputs, hidden, head = self.run_body(model, inputs)
            loss = linear_cross_entropy(hidden, head.weight, inputs["shift_labels"].flatten())
        loss = self.mean_over_step(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def run_body(self, model, inputs) -> tuple[Any, torch.Tensor, Any]:
        """The model's outputs with the logits of one token only, the last hidden states `[N, D]` and the head."""
        # Through the model's own forward, not its body's: DDP does its work there.
        outputs = model(input_ids=inputs["input_ids"], output_hidden_states=True, logits_to_keep=1, use_cache=False)
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        return outputs, outputs.hidden_states[-1].flatten(0, 1), head

    def mean_over_step(self, loss_sum: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """A batch's sum over tokens as its share of the mean over the step's tokens."""
        assert num_items_in_batch is not None, "the Trainer counts the tokens where the model takes loss arguments"
        loss = loss_sum / torch.as_tensor(num_items_in_batch).max()
        if self.args.average_tokens_across_devices and self.args.n_gpu <= 1:
            # The tokens are those of all processes, whose gradients are averaged.
            loss = loss * self.accelerator.num_processes
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One forward and backward pass; its loss joins the epoch's sum.

        Raises:
            Failure: the loss is not finite. No weight has taken it yet, or at least no checkpoint has.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.report.add(loss)
        look = self.args.device.type == "cpu" or self.state.global_step % STEPS_BETWEEN_LOOKS == 0
        if look and not math.isfinite(self.report.loss_sum):
            raise self._not_finite("training loss", float(loss))
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Perplexity (by position, too) and top-1 accuracy over every validation token, a chunk of logits at a time."""
        model = self.model_wrapped
        model.eval()
        totals: Any = 0.0
        batches = tqdm(self.get_eval_dataloader(), desc="validation", leave=False, disable=self.report.no_bars)
        with torch.no_grad():
            for batch in batches:
                batch = self._prepare_inputs(batch)
                labels = batch["shift_labels"]
                with self.compute_loss_context_manager(), self.accelerator.autocast():
                    _, hidden, head = self.run_body(model, batch)
                    losses, correct = token_scores(hidden, head.weight, labels.flatten())
                scores = (losses.view_as(labels), correct.view_as(labels), labels.ne(IGNORED))
                sums = [wide(values).sum(0) for values in scores]
                totals = torch.stack(sums) + totals  # [3, S]
        by_position = self.accelerator.reduce(totals, "sum").cpu()
        loss_sum, correct, tokens = by_position.sum(1).tolist()
        loss = loss_sum / tokens
        if not math.isfinite(loss):
            raise self._not_finite("validation loss", loss)
        metrics = {
            "eval_perplexity": perplexity(loss),
            "eval_accuracy": correct / tokens,
            "eval_by_position": perplexity_by_position(by_position[0], by_position[2]),
            "tokens": self._tokens_read(),
            "epoch_loss": self.report.train_loss,
            "epoch_seconds": self.report.seconds,
        }
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _tokens_read(self) -> int:
        """Tokens of the training split up to now, counted again in each epoch."""
        samples = self.batch_size * self.args.gradient_accumulation_steps
        steps = -(-len(self.train_dataset) // samples)
        epochs, rest = divmod(self.state.global_step, steps)
        return (epochs * len(self.train_dataset) + rest * samples) * self.sequence_length

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False) -> dict[str, float]:
        """As the Trainer's; before the first step (`eval_on_start`) the first weights become the best checkpoint."""
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if self.state.global_step == 0:
            self._determine_best_metric(metrics, trial)
            # The Trainer takes a best step of 0 for none, and would rotate its checkpoint out.
            self.state.best_model_checkpoint = str(Path(self.args.output_dir, "checkpoint-0"))
            self._save_checkpoint(self.model_wrapped, trial)
            self.callback_handler.on_save(self.args, self.state, self.control)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """All weights or an error: the Trainer's own way passes over those that the file names otherwise."""
        load_weights(self.model, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model, trial) -> None:
        """A checkpoint of finite weights; one that cannot be written whole is taken away again."""
        finite = all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())
        if processes.highest(int(not finite)):
            raise self._not_finite("weights", math.nan)
        self.report.pause()
        self.report.share_loss()
        checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise OSError(f"cannot write {checkpoint}: {first_line(error)}; free some disk space and rerun") from error
        self.report.resume()

    def _not_finite(self, what: str, value: float) -> Failure:
        step = self.state.global_step + 1
        kept = self.args.output_dir if self.state.best_global_step is not None else "not yet written"
        return Failure(
            f"{what} became {value} at or before step {step}: try a {self.report.options.section}.learning_rate "
            f"below {self.args.learning_rate} and another output folder (last good checkpoint and best weights: {kept})"
        )


def training_arguments(
    options: TrainOptions, seed: int, checkpoints: Path, steps: int | None = None
) -> TrainingArguments:
    """The Trainer's arguments for `options`, or for so many `steps` in place of epochs; `checkpoints` is its folder."""
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=options.epochs if options.tokens is None else 1,
        max_steps=-1 if steps is None else steps,
        per_device_train_batch_size=options.batch_size // processes.count(),
        per_device_eval_batch_size=options.batch_size // processes.count(),
        # accelerate looks for processes without GPUs only where it is told that there are none.
        use_cpu=processes.count() > 1 and not torch.cuda.is_available(),
        # What is frozen takes no part, and all else does.
        ddp_find_unused_parameters=False,
        gradient_accumulation_steps=options.gradient_accumulation,
        optim="adamw_torch_fused",
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        # Below 1 it is a share of the steps, from 1 on a number of steps.
        warmup_steps=min(options.warmup_ratio, math.nextafter(1, 0)),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        fp16=options.precision == "float16",
        seed=seed,
        data_seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        # The best checkpoint and the last one: `metric_for_best_model` keeps the best from being rotated out.
        save_total_limit=2,
        metric_for_best_model="eval_perplexity",
        greater_is_better=False,
        logging_strategy="steps" if options.tensorboard else "no",
        logging_steps=10,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **{CHECKPOINTING: options.gradient_checkpointing},
    )
    # In a single process the Trainer would give each GPU a whole batch; `torchrun` divides one among the GPUs.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def stack_samples(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch [B, S]. `shift_labels` tells transformers' loss that the labels are already the next tokens."""
    labels = torch.stack([sample["labels"] for sample in samples])
    return {
        "input_ids": torch.stack([sample["input_ids"] for sample in samples]),
        "labels": labels,
        "shift_labels": labels,
    }


@contextlib.contextmanager
def faster_attention(model: PreTrainedModel, device: torch.device, length: int) -> Iterator[None]:
    """Within it `model`, if it has the default attention, has the faster one for training samples of so many tokens."""
    own = model.config._attn_implementation
    if device.type == "cpu" and own == "sdpa" and length <= EAGER_ATTENTION_LENGTH:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers prints errors alone, and no bar for each file that it saves."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
