"""Phase 2: language-model training, as the founding report did it: steps, evaluations and checkpoints, in their order.

Each epoch ends with a validation over all validation tokens. Training can stop early, and the best weights are the
result. An interrupted run resumes and reaches the same metrics as an uninterrupted one.

During training the folder has the best model so far in Hugging Face form, and `checkpoints/state.pt`, from which
training resumes. A finished folder has `train.json` in place of the checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
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
from context_pythia.config.recipe import HealOptions, OptimizationOptions, TrainOptions
from context_pythia.config.same import check_same
from context_pythia.errors import Failure, UsageError
from context_pythia.evaluation.perplexity import perplexity, perplexity_by_position
from context_pythia.evaluation.pretrained import load_pretrained, quiet_transformers
from context_pythia.files import read_record, write_json
from context_pythia.training.batches import Batch, batches, step_batches
from context_pythia.training.checkpoints import publish, read_state, run_settings, write_state
from context_pythia.training.history import Plan, Row, TrainResult, describe_end, result_of
from context_pythia.training.interrupts import deferred_interrupt
from context_pythia.training.optimization import Optimization, text_loss, training_mode

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from context_pythia.data.packing import PackedData

RESULT_FILE, CHECKPOINTS = "train.json", "checkpoints"
OTHER_FOLDER = "choose another output folder, or delete it"
# Every LOOK_STEPS steps the loop reads the loss from the accelerator, and processes ask one another about ctrl-C.
LOOK_STEPS = 16
# The loop's own fields in a checkpoint. Sums and seconds count from the last evaluation.
PROGRESS = ("step", "history", "bands", "loss_sum", "loss_steps", "seconds")


@quiet_transformers()
def train_language_model(
    model: PreTrainedModel,
    data: PackedData,
    options: TrainOptions | HealOptions,
    *,
    seed: int,
    folder: Path,
    name: str,
    progress: bool = True,
    loss: Callable[[nn.Module, Batch], Tensor] = text_loss,
) -> TrainResult:
    """Train `model`, load its best weights into it, and save them with the tokenizer in `folder`.

    If the folder is finished, it is loaded without training. If it is unfinished, training resumes from the last
    checkpoint. After ctrl-C it finishes the step (or the evaluation), writes a checkpoint and raises KeyboardInterrupt;
    a second ctrl-C stops at once.

    Args:
        model: a causal language model of transformers. It moves to the GPU if there is one. Parameters without
            `requires_grad` do not change.
        options: `HealOptions` train for a number of steps, and evaluate the first weights too (see `Plan`).
        name: the model's name on the console.
        progress: show a progress bar if stderr is a terminal.
        loss: takes a model and a batch, returns the sum of the loss over the batch's tokens in nats.

    Raises:
        UsageError: the options are invalid, or `folder` has another run or a damaged state.
        Failure: the loss is not finite (checkpoint and best weights stay), or weights in `folder` are damaged.
        OSError: `folder` cannot be written.
    """
    check_options(options)
    if torch.cuda.is_available():
        model.to("cuda")
    settings = run_settings(model, data, options, seed)
    if (folder / RESULT_FILE).exists():
        finished = read_record(folder / RESULT_FILE)
        check_same(finished.pop("settings"), settings, f"{folder} holds a run", OTHER_FOLDER)
        result = TrainResult(**finished)
    else:
        plan = Plan(options, len(data.train), data.train.sequence_length)
        result = Training(model, data, options, plan, seed, folder, name, settings, loss, progress).run()
    model.load_state_dict(load_pretrained(str(folder), model.dtype).state_dict())
    model.eval()
    if processes.is_main():
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return result


def check_options(options: OptimizationOptions) -> None:
    """Raise UsageError for options that contradict each other or do not fit the number of processes."""
    section, count = options.section, processes.count()
    if options.warmup_ratio and options.schedule == "constant":
        raise UsageError(
            f"{section}.warmup_ratio {options.warmup_ratio}: schedule constant has no warm-up, use constant_with_warmup"
        )
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
class Training:
    """One training. The arguments are those of `train_language_model`; `settings` is all that determines the weights.

    Attributes:
        step: optimizer steps done.
        history: the evaluations so far (see `TrainResult`).
        bands: perplexities by position of the best evaluation.
    """

    model: PreTrainedModel
    data: PackedData
    options: TrainOptions | HealOptions
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
        # With None, tqdm shows bars only if stderr is a terminal.
        self.no_bars = None if self.progress and processes.is_main() else True
        self.state = self.folder / CHECKPOINTS / "state.pt"
        self.state.parent.mkdir(parents=True, exist_ok=True)
        self.writer = None
        if self.options.tensorboard and processes.is_main():
            self.writer = summary_writer()(str(self.folder / "tensorboard"))
        with training_mode(self.model, self.options, self.plan.sequence_length):
            torch.manual_seed(self.seed)
            self.optimization = Optimization(self.model, self.options, self.plan.steps, self.loss)
            self._load()
            try:
                self._train()
            finally:
                self.model.zero_grad()
        reason = self.plan.stop_reason(self.history, self.step)
        assert reason is not None
        result = result_of(self.history, reason, self.bands)
        if processes.is_main():
            write_json(self.folder / RESULT_FILE, asdict(result) | {"settings": self.settings})
            print(describe_end(result))
        return result

    def _train(self) -> None:
        plan, every = self.plan, self.options.checkpoint_steps
        bar = tqdm(total=plan.steps, initial=self.step, desc=self.name, unit="step", disable=self.no_bars)
        with deferred_interrupt() as asked, bar:
            self.started = time.perf_counter()
            if 0 in plan.evaluations and not self.history:
                self._evaluate()
                self._save()
            while plan.stop_reason(self.history, self.step) is None:
                epoch, skip = divmod(self.step, plan.epoch_steps)
                order = plan.order(self.seed, epoch)
                steps = step_batches(self.data.train, order, self.options, self.model.device, skip)
                for step in itertools.islice(steps, plan.steps - self.step):
                    loss = self.optimization.backward(step)
                    self.optimization.update()
                    self.loss_sum = loss + self.loss_sum
                    self.loss_steps += 1
                    self.step += 1
                    bar.update()
                    evaluation, look = self.step in plan.evaluations, self.step % LOOK_STEPS == 0
                    checkpoint = evaluation or (every and self.step % every == 0)
                    if look or checkpoint:
                        self._look(loss)
                    if evaluation:
                        self._evaluate()
                    # The answer of several processes is the same in all of them.
                    stop = (look or evaluation or processes.count() == 1) and processes.highest(int(asked.is_set()))
                    if checkpoint or stop:
                        self._save()
                    if stop:
                        raise KeyboardInterrupt

    def _look(self, loss: Tensor) -> None:
        """Log the loss of a step. Raise `Failure` if one since the last evaluation was not finite."""
        if self.writer is not None:
            self.writer.add_scalar("train/loss", float(loss), self.step)
        if not math.isfinite(self.loss_sum):
            raise self._not_finite("training loss", float(self.loss_sum))

    def _evaluate(self) -> None:
        with self._clock_stopped():
            held_out = self.data.validation
            rows = batches(held_out, list(range(len(held_out))), self.options.batch_size, self.model.device)
            bar = tqdm(rows, desc="validation", leave=False, disable=self.no_bars)
            by_position = self.optimization.validate(bar)
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
                "train_loss": float(self.loss_sum) / self.loss_steps if self.loss_steps else None,
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
        with self._clock_stopped():
            if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
                raise self._not_finite("weights", math.nan)
            if processes.is_main():
                if self.history and self.history[-1]["best"] and self.history[-1]["step"] == self.step:
                    publish(self.model, self.data.tokenizer, self.folder)
                progress = {name: getattr(self, name) for name in PROGRESS} | {"loss_sum": float(self.loss_sum)}
                write_state(self.state, progress | self.optimization.state_dict(), self.settings)
            processes.wait()

    def _load(self) -> None:
        """Resume from the last checkpoint, if there is one."""
        state = read_state(self.state, self.settings, f"{self.folder} holds a run", OTHER_FOLDER)
        if state is None:
            return
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.optimization.load_state_dict(state)
        if processes.is_main():
            print(f"{self.name}: resumes after step {self.step} of {self.plan.steps}")

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        float(self.loss_sum)  # waits for the device, so the last step counts
        self.seconds += time.perf_counter() - self.started
        yield
        self.started = time.perf_counter()

    def _not_finite(self, what: str, value: float) -> Failure:
        kept = self.folder if self.history else "not yet written"
        return Failure(
            f"{what} became {value} at or before step {self.step}: try a {self.options.section}.learning_rate below "
            f"{self.options.learning_rate} and another output folder (last good checkpoint and best weights: {kept})"
        )
