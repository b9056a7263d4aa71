"""Phase 2: language-model training, as the report did it: steps, evaluations and checkpoints, in their order.

Each epoch ends with a validation over all validation tokens. Training can stop early, and the best weights are the
result. An interrupted run resumes and reaches the same metrics as an uninterrupted one.

During training the folder has the best model so far in Hugging Face form, and `checkpoints/state.pt`, from which
training resumes. A finished folder has `train.json` in place of the checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from context_pythia import processes
from context_pythia.config.recipe import TrainOptions
from context_pythia.config.same import check_same
from context_pythia.errors import Failure, UsageError
from context_pythia.evaluation.positions import perplexity, perplexity_by_position
from context_pythia.evaluation.pretrained import load_pretrained
from context_pythia.files import read_record, write_json
from context_pythia.training.allocator import keep_freed_memory
from context_pythia.training.batches import Batch, batches, step_batches
from context_pythia.training.checkpoints import publish, quiet_transformers, read_state, run_settings, write_state
from context_pythia.training.history import Plan, Row, TrainResult
from context_pythia.training.interrupts import deferred_interrupt
from context_pythia.training.optimization import Optimization, faster_attention, recompute_activations, text_loss

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from context_pythia.data.packing import PackedData

RESULT_FILE, CHECKPOINTS = "train.json", "checkpoints"
OTHER_FOLDER = "choose another output folder"
LOG_STEPS = 10
# Every LOOK_STEPS steps the loop reads the loss from the accelerator, and processes ask one another about ctrl-C.
LOOK_STEPS = 16
# The loop's own fields in a checkpoint. Sums and seconds count from the last evaluation.
PROGRESS = ("step", "history", "bands", "loss_sum", "loss_steps", "seconds")


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
    plan = Plan(options, len(data.train), data.train.sequence_length, steps)
    if torch.cuda.is_available():
        model.to("cuda")
    settings = run_settings(model, data, options, seed) | {"steps": steps} | (identity or {})
    with quiet_transformers():
        if (folder / RESULT_FILE).exists():
            finished = read_record(folder / RESULT_FILE)
            check_same(finished.pop("settings"), settings, f"{folder} holds a run", OTHER_FOLDER)
            result = TrainResult(**finished)
        else:
            result = Loop(model, data, options, plan, seed, folder, name, settings, loss, progress).run()
        model.load_state_dict(load_pretrained(str(folder), model.dtype).state_dict())
    model.eval()
    if processes.is_main():
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return result


def check_options(options: TrainOptions) -> None:
    """Raise UsageError for options that contradict each other or do not fit this machine or number of processes."""
    section, count = options.section, processes.count()
    if options.warmup_ratio and options.schedule == "constant":
        raise UsageError(
            f"{section}.warmup_ratio {options.warmup_ratio}: schedule constant has no warm-up, use constant_with_warmup"
        )
    if options.precision == "float16" and not torch.cuda.is_available():
        raise UsageError(f"{section}.precision float16: needs a CUDA GPU, choose bfloat16 or float32")
    if options.batch_size % count:
        raise UsageError(
            f"{section}.batch_size {options.batch_size}: must be a multiple of {count}, the number of processes"
        )
    if options.tensorboard:
        summary_writer()


def summary_writer() -> type[SummaryWriter]:
    """TensorBoard's writer; raises UsageError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("tensorboard is not installed: pip install 'context-pythia[tensorboard]'") from error
    return SummaryWriter


@dataclass
class Loop:
    """One training. The arguments are those of `train_language_model`; `settings` is all that determines the weights.

    Attributes:
        step: optimizer steps done.
        history: the evaluations so far (see `TrainResult`).
        bands: perplexities by position of the best evaluation.
    """

    model: PreTrainedModel
    data: PackedData
    options: TrainOptions
    plan: Plan
    seed: int
    folder: Path
    name: str
    settings: dict[str, Any]
    loss: Callable[[nn.Module, Batch], Tensor]
    progress: bool
    step: int = 0
    history: list[Row] = field(default_factory=list)
    bands: list[Row] = field(default_factory=list)
    loss_sum: Any = 0.0
    loss_steps: int = 0
    seconds: float = 0.0

    def run(self) -> TrainResult:
        """Train from the last checkpoint to the end, and write the result."""
        if self.model.device.type == "cpu":
            keep_freed_memory()
        if self.options.gradient_checkpointing:
            recompute_activations(self.model)
        # With None, tqdm shows bars only if stderr is a terminal.
        self.no_bars = None if self.progress and processes.is_main() else True
        self.state = self.folder / CHECKPOINTS / "state.pt"
        self.state.parent.mkdir(parents=True, exist_ok=True)
        self.writer = None
        if self.options.tensorboard and processes.is_main():
            self.writer = summary_writer()(str(self.folder / "tensorboard"))
        torch.manual_seed(self.seed)
        self.optimization = Optimization(self.model, self.options, self.plan.steps, self.loss)
        try:
            self._load()
            with deferred_interrupt() as self.asked_to_stop, faster_attention(self.model, self.plan.sequence_length):
                self._train()
        finally:
            if self.options.gradient_checkpointing:
                recompute_activations(self.model, False)
            self.model.zero_grad()
        result = self.plan.result(self.history, self.step, self.bands)
        if processes.is_main():
            write_json(self.folder / RESULT_FILE, asdict(result) | {"settings": self.settings})
            print(self.plan.describe_end(result))
        return result

    def _train(self) -> None:
        self.started = time.perf_counter()
        if 0 in self.plan.evaluations and not self.history:
            self._after_step()
        with self._bar(total=self.plan.steps, initial=self.step, desc=self.name, unit="step") as bar:
            while not self._ended():
                epoch, skip = divmod(self.step, self.plan.epoch_steps)
                order = self.plan.order(self.seed, epoch)
                for step in step_batches(self.data.train, order, self.options, self.model.device, skip):
                    losses = self.optimization.step(step)
                    for loss in losses:
                        self.loss_sum = loss.double() + self.loss_sum
                    self.loss_steps += 1
                    self.step += 1
                    bar.update()
                    self._look(losses)
                    self._after_step()
                    if self._ended():
                        break

    def _ended(self) -> bool:
        return self.plan.stop_reason(self.history, self.step) is not None

    def _look(self, losses: list[Tensor]) -> None:
        """Log the loss. Raise `Failure` if it is not finite."""
        if self.writer is not None and self.step % LOG_STEPS == 0:
            self.writer.add_scalar("train/loss", float(sum(losses)) * processes.count(), self.step)
        look = self.model.device.type == "cpu" or self.step % LOOK_STEPS == 0
        if look and not math.isfinite(self.loss_sum):
            raise self._not_finite("training loss", float(self.loss_sum))

    def _after_step(self) -> None:
        """Evaluate, write a checkpoint and stop, each if it is due."""
        evaluated = self.step in self.plan.evaluations
        if evaluated:
            with self._clock_stopped():
                self._evaluate()
        asked = self.asked_to_stop.is_set()
        if processes.count() > 1:
            asked = (evaluated or self.step % LOOK_STEPS == 0) and bool(processes.highest(int(asked)))
        every = self.options.checkpoint_steps
        if evaluated or asked or (every and self.step % every == 0):
            with self._clock_stopped():
                self._save()
        if asked:
            raise KeyboardInterrupt

    def _evaluate(self) -> None:
        held_out = self.data.validation
        rows = batches(held_out, list(range(len(held_out))), self.options.batch_size, self.model.device)
        by_position = self.optimization.validate(self._bar(rows, desc="validation", leave=False))
        loss_sum, correct, tokens = by_position.sum(1).tolist()
        if not math.isfinite(loss_sum):
            raise self._not_finite("validation loss", loss_sum / tokens)
        value = perplexity(loss_sum / tokens)
        best = all(value < row["val_ppl"] for row in self.history)
        self.history.append(
            {
                "epoch": self.plan.epochs(self.step),
                "step": self.step,
                "tokens": self.plan.tokens(self.step),
                "train_loss": self._whole_loss_sum() / self.loss_steps if self.loss_steps else None,
                "val_ppl": value,
                "val_accuracy": correct / tokens,
                "seconds": self.seconds,
                "best": best,
            }
        )
        if best:
            self.bands = perplexity_by_position(by_position[0], by_position[2])
        self.loss_sum, self.loss_steps, self.seconds = 0.0, 0, 0.0
        if self.writer is not None:
            self.writer.add_scalar("eval/perplexity", value, self.step)
            self.writer.add_scalar("eval/accuracy", correct / tokens, self.step)
        if processes.is_main():
            tqdm.write(self.plan.describe(self.history[-1]), file=sys.stdout)
            sys.stdout.flush()

    def _save(self) -> None:
        """Write the model if it is the best so far, then the state. A kill between the two repeats some steps."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self._not_finite("weights", math.nan)
        progress = {name: getattr(self, name) for name in PROGRESS} | {"loss_sum": self._whole_loss_sum()}
        if processes.is_main():
            if self.history and self.history[-1]["best"] and self.history[-1]["step"] == self.step:
                publish(self.model, self.data.tokenizer, self.folder)
            write_state(self.state, progress | self.optimization.state_dict() | {"settings": self.settings})
        processes.wait()

    def _load(self) -> None:
        """Resume from the last checkpoint, if there is one."""
        if not self.state.exists():
            return
        state = read_state(self.state)
        check_same(state["settings"], self.settings, f"{self.folder} holds a run", OTHER_FOLDER)
        for name in PROGRESS:
            setattr(self, name, state[name])
        if not processes.is_main():
            self.loss_sum = 0.0  # the first process has the sum of all processes
        self.optimization.load_state_dict(state)
        if processes.is_main():
            print(f"{self.name}: resumes after step {self.step} of {self.plan.steps}")

    def _whole_loss_sum(self) -> float:
        """The sum of `loss_sum` over all processes."""
        return float(processes.total(torch.tensor(float(self.loss_sum), dtype=torch.float64)))

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        float(self.loss_sum)  # waits for the device, so the last step counts
        self.seconds += time.perf_counter() - self.started
        yield
        self.started = time.perf_counter()

    def _bar(self, *arguments: Any, **settings: Any) -> tqdm:
        return tqdm(*arguments, **settings, disable=self.no_bars)

    def _not_finite(self, what: str, value: float) -> Failure:
        kept = self.folder if self.history else "not yet written"
        return Failure(
            f"{what} became {value} at or before step {self.step}: try a {self.options.section}.learning_rate below "
            f"{self.options.learning_rate} and another output folder (last good checkpoint and best weights: {kept})"
        )
