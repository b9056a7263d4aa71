"""Phase 2: language-model training on transformers' Trainer, as the report did it.

One evaluation an epoch over all validation tokens, early stop, best weights kept. What the Trainer lacks is added here:
labels that are already the next tokens, streamed perplexity and accuracy, a stop at a loss that is not a number, and
checkpoints from which an interrupted run goes on to the very metrics of an uninterrupted one.

A folder in training holds `checkpoints/`; a finished one holds the best model in Hugging Face form and `train.json`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.utils import logging

from context_pythia.recipe import TrainOptions
from context_pythia.training.allocator import keep_freed_memory

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedData

RESULT_FILE = "train.json"
SETTINGS_FILE = "settings.json"
WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "trainer_state.json"
EARLY_STOP, ALL_EPOCHS = "early stop", "all epochs"
# These change neither the weights nor the metrics, so a run may go on with other values.
FREE_OPTIONS = ("tensorboard", "checkpoint_steps", "gradient_checkpointing")
# On an accelerator each look at the loss waits for the device.
STEPS_BETWEEN_LOOKS = 16


@dataclass
class TrainResult:
    """What phase 2 reached. `stop_reason` is `"early stop"` or `"all epochs"`; seconds are those of training alone.

    A row of `history` has epoch, train_loss (mean over the epoch's steps), val_ppl, val_accuracy, seconds and best.
    """

    best_val_ppl: float
    best_epoch: int
    val_accuracy: float
    history: list[dict[str, Any]]
    seconds_per_epoch: float
    stop_reason: str


def train_language_model(
    model: PreTrainedModel,
    data: PackedData,
    options: TrainOptions,
    *,
    seed: int,
    folder: Path,
    name: str,
    progress: bool = True,
) -> TrainResult:
    """Trains `model` and leaves its best weights in it and, with the tokenizer, in `folder`.

    A finished folder is loaded and returned at once; an unfinished one goes on from its last sound checkpoint. Ctrl-C
    finishes the step (or the evaluation), writes a checkpoint and raises KeyboardInterrupt; a second one stops at once.

    Args:
        model: a causal language model of transformers; parameters without `requires_grad` stay as they are.
        name: the model's name on the console.
        progress: show a progress bar on stderr where that is a terminal.

    Raises:
        ValueError: options that cannot be, or a folder that holds another run.
        RuntimeError: a loss that is not finite (checkpoints and best weights stay), or only damaged checkpoints.
        OSError: a folder that cannot be written.
    """
    check_options(options, data)
    folder = Path(folder)
    settings = run_settings(model, data, options, seed)
    with quiet_transformers():
        if (folder / RESULT_FILE).exists():
            finished = read_json(folder / RESULT_FILE)
            check_same_run(finished.pop("settings"), settings, folder)
            load_weights(model, folder)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            return TrainResult(**finished)
        log = train_or_go_on(model, data, options, seed, folder, name, settings, progress)
        load_weights(model, folder / "checkpoints" / f"checkpoint-{log['best_global_step']}")
        result = make_result(epoch_rows(log["log_history"]), options)
        if int(os.environ.get("RANK", 0)) == 0:
            publish(model, data.tokenizer, folder)
            write_json(folder / RESULT_FILE, {**asdict(result), "settings": settings})
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            print(describe_end(result, options))
    return result


def train_or_go_on(
    model: PreTrainedModel,
    data: PackedData,
    options: TrainOptions,
    seed: int,
    folder: Path,
    name: str,
    settings: dict[str, Any],
    progress: bool,
) -> dict[str, Any]:
    """Trains to the end, from the last sound checkpoint where there is one; returns the Trainer's last state."""
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
        if stop_reason(epoch_rows(state["log_history"]), options) is not None:
            return state
    return run_trainer(model, data, options, seed, folder, name, resume_from, progress)


def run_trainer(
    model: PreTrainedModel,
    data: PackedData,
    options: TrainOptions,
    seed: int,
    folder: Path,
    name: str,
    resume_from: Path | None,
    progress: bool,
) -> dict[str, Any]:
    """Runs the Trainer to its end and returns its last state."""
    arguments = training_arguments(options, seed, folder / "checkpoints")
    if arguments.device.type == "cpu":
        keep_freed_memory()
    report = EpochReport(name, options, progress)
    callbacks: list[TrainerCallback] = [report]
    if options.tensorboard:
        callbacks.append(TensorBoardCallback(summary_writer(folder / "tensorboard")))
    use_cache = model.config.use_cache
    trainer = LanguageModelTrainer(report, options, model=model, args=arguments, data=data, callbacks=callbacks)
    try:
        with checkpoint_on_interrupt(report):
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


class LanguageModelTrainer(Trainer):
    """The Trainer for samples whose labels are already the next tokens, with a streamed validation."""

    def __init__(self, report: EpochReport, options: TrainOptions, *, data: PackedData, **arguments: Any):
        super().__init__(
            train_dataset=data.train, eval_dataset=data.validation, data_collator=stack_samples, **arguments
        )
        self.remove_callback(PrinterCallback)
        self.report = report
        self.bfloat16 = options.precision == "bfloat16"

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast to bfloat16, entered here because accelerate's own copies all logits to fp32 once more."""
        stack = super().compute_loss_context_manager()
        if self.bfloat16:
            stack.enter_context(torch.autocast(self.args.device.type, dtype=torch.bfloat16))
        return stack

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One forward and backward pass; its loss joins the epoch's sum.

        Raises:
            RuntimeError: the loss is not finite. No weight has taken it yet, or at least no checkpoint has.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.report.add(loss)
        look = self.args.device.type == "cpu" or self.state.global_step % STEPS_BETWEEN_LOOKS == 0
        if look and not math.isfinite(self.report.loss_sum):
            raise self._not_finite("training loss", float(loss))
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Perplexity and top-1 accuracy over every validation token; one batch of logits is held at a time."""
        model = self.model_wrapped
        model.eval()
        totals: Any = 0.0
        batches = tqdm(self.get_eval_dataloader(), desc="validation", leave=False, disable=self.report.no_bars)
        with torch.no_grad():
            for batch in batches:
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    outputs = model(**batch)
                labels = batch["shift_labels"]
                counted = labels.ne(-100)
                correct = (outputs.logits.argmax(-1).eq(labels) & counted).sum()
                tokens = counted.sum()
                totals = torch.stack([wide(outputs.loss) * tokens, wide(correct), wide(tokens)]) + totals
        loss_sum, correct, tokens = self.accelerator.reduce(totals, "sum").tolist()
        loss = loss_sum / tokens
        if not math.isfinite(loss):
            raise self._not_finite("validation loss", loss)
        metrics = {
            "eval_perplexity": math.exp(min(loss, 700.0)),
            "eval_accuracy": correct / tokens,
            "epoch_loss": self.report.train_loss,
            "epoch_seconds": self.report.seconds,
        }
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """All weights or an error: the Trainer's own way passes over those that the file names otherwise."""
        load_weights(self.model, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model, trial) -> None:
        """A checkpoint of finite weights; one that cannot be written whole is taken away again."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self._not_finite("weights", math.nan)
        self.report.pause()
        checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise OSError(f"cannot write {checkpoint}: {first_line(error)}; free some disk space and rerun") from error
        self.report.resume()

    def _not_finite(self, what: str, value: float) -> RuntimeError:
        step = self.state.global_step + 1
        kept = self.args.output_dir if self.state.best_global_step else "not yet written"
        return RuntimeError(
            f"{what} became {value} at or before step {step}: try a learning_rate below {self.args.learning_rate} "
            f"(last good checkpoint and best weights: {kept})"
        )


class EpochReport(TrainerCallback, ExportableState):
    """The epoch's mean loss and seconds, the console, the early stop, and the checkpoints between evaluations.

    Its `state` travels in each checkpoint, so that an epoch which was interrupted half-way still reports all its steps.
    """

    def __init__(self, name: str, options: TrainOptions, progress: bool):
        self.name, self.options = name, options
        # None lets tqdm look whether stderr is a terminal.
        self.no_bars = None if progress else True
        self.bar: tqdm | None = None
        self.loss_sum: Any = 0.0
        self.steps = 0
        self.seconds = 0.0
        self.started: float | None = None
        self.train_loss = math.nan
        self.interrupted = False

    def state(self) -> dict[str, Any]:
        attributes = {"loss_sum": float(self.loss_sum), "steps": self.steps, "seconds": self.seconds}
        return {"args": {}, "attributes": attributes}

    def add(self, loss: torch.Tensor) -> None:
        """Adds the loss of one batch; with gradient accumulation the batches of a step sum up to its mean."""
        self.loss_sum = wide(loss) + self.loss_sum

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
        due = self.options.checkpoint_steps and state.global_step % self.options.checkpoint_steps == 0
        # At an epoch's end the checkpoint must wait for the evaluation: a resumed run would not make up for it.
        if (due or self.interrupted) and not at_epoch_end(state):
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        # Reading the sum waits for the device, so that the clock stops after the last step's work.
        self.train_loss = float(self.loss_sum) / self.steps
        self.pause()

    def on_evaluate(self, args, state, control, **kwargs):
        history = epoch_rows(state.log_history)
        if state.is_world_process_zero:
            row = history[-1]
            line = (
                f"Epoch {row['epoch']:2d}/{self.options.epochs}: train_loss={row['train_loss']:.4f}, "
                f"val_ppl={row['val_ppl']:.2f}, val_acc={row['val_accuracy']:.4f}, {row['seconds']:.1f} s"
            )
            tqdm.write(line + " *" * row["best"], file=sys.stdout)
            sys.stdout.flush()
        control.should_training_stop = stop_reason(history, self.options) is not None

    def on_save(self, args, state, control, **kwargs):
        if self.interrupted:
            raise KeyboardInterrupt


def training_arguments(options: TrainOptions, seed: int, checkpoints: Path) -> TrainingArguments:
    """The Trainer's arguments for `options`; `checkpoints` is its folder."""
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        activation_checkpointing=options.gradient_checkpointing,
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
    )


def check_options(options: TrainOptions, data: PackedData) -> None:
    """Raises ValueError, in one line, for what the options alone cannot tell to be wrong."""
    if options.warmup_ratio and options.schedule == "constant":
        raise ValueError(f"train.warmup_ratio {options.warmup_ratio}: needs the schedule constant_with_warmup")
    if options.precision == "float16" and not torch.cuda.is_available():
        raise ValueError("train.precision float16: needs a CUDA GPU, choose bfloat16 or float32")
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


def stack_samples(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch [B, S]. `shift_labels` tells transformers' loss that the labels are already the next tokens."""
    labels = torch.stack([sample["labels"] for sample in samples])
    return {
        "input_ids": torch.stack([sample["input_ids"] for sample in samples]),
        "labels": labels,
        "shift_labels": labels,
    }


def wide(value: torch.Tensor) -> torch.Tensor:
    """`value` in the dtype of long sums: float64, which Apple's GPUs lack."""
    return value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)


def at_epoch_end(state) -> bool:
    """Whether a whole number of epochs is done."""
    return state.global_step % (state.max_steps // state.num_train_epochs) == 0


def epoch_rows(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `TrainResult.history` in the Trainer's log."""
    rows: list[dict[str, Any]] = []
    for entry in log_history:
        if "eval_perplexity" in entry:
            perplexity = entry["eval_perplexity"]
            rows.append(
                {
                    "epoch": round(entry["epoch"]),
                    "train_loss": entry["epoch_loss"],
                    "val_ppl": perplexity,
                    "val_accuracy": entry["eval_accuracy"],
                    "seconds": entry["epoch_seconds"],
                    "best": all(perplexity < row["val_ppl"] for row in rows),
                }
            )
    return rows


def stop_reason(history: list[dict[str, Any]], options: TrainOptions) -> str | None:
    """Why training ends after the last row of `history`; None where it goes on."""
    since_best = next((since for since, row in enumerate(reversed(history)) if row["best"]), 0)
    if since_best >= options.patience:
        return EARLY_STOP
    return ALL_EPOCHS if len(history) >= options.epochs else None


def make_result(history: list[dict[str, Any]], options: TrainOptions) -> TrainResult:
    best = [row for row in history if row["best"]][-1]
    return TrainResult(
        best_val_ppl=best["val_ppl"],
        best_epoch=best["epoch"],
        val_accuracy=best["val_accuracy"],
        history=history,
        seconds_per_epoch=sum(row["seconds"] for row in history) / len(history),
        stop_reason=stop_reason(history, options) or ALL_EPOCHS,
    )


def describe_end(result: TrainResult, options: TrainOptions) -> str:
    best = f"best val_ppl={result.best_val_ppl:.2f} in epoch {result.best_epoch}"
    if result.stop_reason == EARLY_STOP:
        return f"Early stop after epoch {len(result.history)} (patience {options.patience}): {best}"
    return f"All {len(result.history)} epochs done: {best}"


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


@contextlib.contextmanager
def checkpoint_on_interrupt(report: EpochReport) -> Iterator[None]:
    """Within it the first ctrl-C only marks `report`: an optimizer step cut in two could not be saved."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is not signal.default_int_handler:
        yield
        return

    def mark(signum, frame) -> None:
        report.interrupted = True
        signal.signal(signal.SIGINT, handler)
        print("\nStopping at the next checkpoint; ctrl-C again stops at once.", file=sys.stderr)

    signal.signal(signal.SIGINT, mark)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def run_settings(model: PreTrainedModel, data: PackedData, options: TrainOptions, seed: int) -> dict[str, Any]:
    """All that decides a run's weights; two runs may share a folder only if theirs are equal."""
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    for key in ("transformers_version", "use_cache", "dtype", "architectures"):
        config.pop(key, None)
    settings = {
        "seed": seed,
        "data": data.summary["fingerprint"],
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "model_class": type(model).__name__,
        **{f.name: getattr(options, f.name) for f in fields(options) if f.name not in FREE_OPTIONS},
        **{f"config.{key}": value for key, value in config.items()},
    }
    return json.loads(json.dumps(settings, default=str))


def check_same_run(held: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    """Raises ValueError where `folder` holds a run with other settings, naming the first that differs."""
    for key in [*settings, *held]:
        if held.get(key) != settings.get(key):
            raise ValueError(
                f"{folder} holds a run with {key} {held.get(key)}, not {settings.get(key)}: "
                "choose another output folder"
            )


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The newest sound checkpoint; newer ones that are not sound are removed.

    Raises:
        RuntimeError: there are checkpoints, and all of them are damaged.
    """
    found = [path for path in checkpoints.glob("checkpoint-*") if path.is_dir()]
    found.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    unsound: dict[Path, str] = {}
    for checkpoint in found:
        damage = find_damage(checkpoint)
        if damage is None:
            break
        unsound[checkpoint] = damage
    else:
        # The state is written last, so without it the process ended amid its first checkpoint: nothing is lost.
        finished = [path for path in unsound if (path / STATE_FILE).exists()]
        if finished:
            raise RuntimeError(
                f"{finished[0]} is damaged ({unsound[finished[0]]}) and there is no earlier one: "
                f"delete {checkpoints} to train from the start"
            )
    for path, damage in unsound.items():
        print(f"{path} is damaged ({damage}): removed, training goes on from before it", file=sys.stderr)
        shutil.rmtree(path)
    return next((path for path in found if path not in unsound), None)


def find_damage(checkpoint: Path) -> str | None:
    """What keeps training from going on from `checkpoint`, None where nothing does. Nothing is unpickled."""
    try:
        best_step = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["best_global_step"]
        weights = [checkpoint / WEIGHTS_FILE]
        if best_step is not None:
            weights.append(checkpoint.with_name(f"checkpoint-{best_step}") / WEIGHTS_FILE)
        for path in weights:
            # Opening compares the header with the file's length.
            with safe_open(path, framework="pt"):
                pass
        for path in [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("*.pth")]:
            with zipfile.ZipFile(path) as archive:
                if member := archive.testzip():
                    return f"{path.name}: {member} is corrupt"
    except (OSError, ValueError, KeyError, SafetensorError, zipfile.BadZipFile) as error:
        return first_line(error)
    return None


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Fills `model` from a Hugging Face folder and sets it to evaluation.

    Raises:
        RuntimeError: the folder lacks weights of the model or is not sound.
    """
    try:
        # By `from_pretrained`, because a file's names need not be the module's: GPT-NeoX saves lm_head as embed_out.
        loaded, mended = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
        if wrong := {key: names for key, names in mended.items() if names}:
            raise ValueError(f"{wrong}")
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise RuntimeError(
            f"the weights in {folder} are damaged ({first_line(error)}): delete it to train again"
        ) from error
    model.load_state_dict(loaded.state_dict())
    model.eval()


def publish(model: PreTrainedModel, tokenizer, folder: Path) -> None:
    """Model and tokenizer in Hugging Face form, each file whole from the moment that it appears; weights last."""
    partial = folder / ".saving"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        path.replace(folder / path.name)
    partial.rmdir()


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; RuntimeError, in one line, if it is not one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RuntimeError(f"{path} is damaged ({error}): delete {path.parent} to train again") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
