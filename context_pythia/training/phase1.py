"""Phase 1: train the ContextBlock alone, by OACD (Origin-Anchored Centroid Dispersion).

The contexts of the whole training stream are one tensor `[N, C]`. An iteration is one parallel fixed-point sweep over
it, in batches, with a loss that spreads the contexts around their centroid and draws the centroid to the origin; one
Adam step follows. Embeddings are looked up batch by batch and stay fixed. Training stops when nearly all contexts
have come to rest.

All randomness comes from (seed, iteration, batch), so an interrupted run goes on in the middle of an iteration and
ends with the same bits (on CPU) as one that was never interrupted.

Shapes: N tokens of the stream, n tokens of a batch, C context_dim, E width of the token embeddings.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from context_pythia.recipe import Phase1Options
from context_pythia.training.oacd import effective_rank, held_out_contexts, oacd_loss, sweep_tokens

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedData
    from context_pythia.model import ContextPythiaForCausalLM

COUNTERS = ("history", "batch", "loss", "converged", "seconds")  # a checkpoint's numbers beside its tensors


@dataclass
class Phase1Result:
    """What phase 1 reached; `asdict` of it is JSON.

    Attributes:
        iterations: iterations done.
        convergence_rate: share of tokens (0 to 1) at rest in the last one.
        effective_rank: of the held-out contexts, 1 to C (see `effective_rank`).
        history: one `{"iteration", "loss", "convergence_rate", "seconds"}` an iteration.
        seconds: time spent in the iterations, interruptions not counted.
    """

    iterations: int
    convergence_rate: float
    effective_rank: float
    history: list[dict[str, float]]
    seconds: float


def train_context_block(
    model: ContextPythiaForCausalLM,
    data: PackedData,
    options: Phase1Options,
    *,
    seed: int,
    folder: Path,
    progress: bool = True,
) -> Phase1Result:
    """Train `model.gpt_neox.context_block` in place, or load it if `folder` holds the finished result.

    Ctrl-C writes a checkpoint at the end of the batch and then raises KeyboardInterrupt; a second one stops at once.

    Args:
        model: of source `input` or `shared`; the rest of it is only read. Runs on its device.
        data: `train` is the stream, `validation` gives the effective rank.
        options: settings of OACD.
        seed: of the first contexts and of the noise.
        folder: gets `context_block.safetensors` and `phase1.json`; `checkpoint.safetensors` until then.
        progress: show a progress bar.

    Raises:
        ValueError: the model has no ContextBlock, or `folder` holds a damaged file or the work of another run (other
            options, seed, text, widths or embeddings).
        RuntimeError: the loss is not finite; the last good checkpoint stays.
        OSError: `folder` cannot be written.
    """
    if getattr(model.gpt_neox, "context_block", None) is None:
        raise ValueError("phase 1 trains a ContextBlock and this model has none: choose context source input or shared")
    run = OacdRun(model, data, options, seed, folder)
    if (finished := run.load_finished()) is not None:
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    run.load_checkpoint()
    frozen = [parameter for parameter in run.block.parameters() if not parameter.requires_grad]
    try:
        run.block.requires_grad_(True)
        _iterate(run, progress)
    finally:
        run.block.zero_grad()
        for parameter in frozen:
            parameter.requires_grad_(False)
    return run.finish()


class OacdRun:
    """The state of one training: what a checkpoint holds, and the step from one batch to the next.

    Use: `start()` or `load_checkpoint()`, then `advance()` until `finished`, then `finish()`.
    """

    def __init__(
        self, model: ContextPythiaForCausalLM, data: PackedData, options: Phase1Options, seed: int, folder: Path
    ):
        self.model, self.data, self.options, self.seed = model, data, options, seed
        self.block = model.gpt_neox.context_block
        self.device = model.get_input_embeddings().weight.device
        self.optimizer = torch.optim.Adam(self.block.parameters(), lr=options.learning_rate)
        self.batches = math.ceil(data.train.num_tokens / options.batch_tokens)
        self.checkpoint, self.weights, self.record = (
            folder / name for name in ("checkpoint.safetensors", "context_block.safetensors", "phase1.json")
        )
        self.identity = self._identity()
        self.history: list[dict[str, float]] = []

    def _identity(self) -> dict[str, Any]:
        """What must be equal for work in the folder to be this run's."""
        embeddings = self.model.get_input_embeddings().weight.detach().cpu().contiguous().view(torch.uint8).numpy()
        options = {
            f.name: getattr(self.options, f.name) for f in fields(self.options) if f.name != "checkpoint_seconds"
        }
        return options | {
            "seed": self.seed,
            "data_fingerprint": self.data.summary["fingerprint"],
            "tokens": self.data.train.num_tokens,
            "context_dim": self.block.context_dim,
            "context_block_layers": len(self.block.layers),
            "embeddings_crc32": zlib.crc32(embeddings),
        }

    def normal(self, rows: int, iteration: int, batch: int) -> torch.Tensor:
        """Standard normal numbers `[rows, C]`; iteration 0 is for the first contexts, later ones for the noise."""
        words = np.random.SeedSequence((self.seed % 2**64, iteration, batch)).generate_state(1)
        generator = torch.Generator(self.device).manual_seed(int(words[0]))
        return torch.randn(rows, self.block.context_dim, generator=generator, device=self.device)

    def start(self) -> None:
        dtype = getattr(torch, self.options.state_dtype)
        self.contexts = torch.empty(self.data.train.num_tokens, self.block.context_dim, dtype=dtype, device=self.device)
        for batch, rows in enumerate(self.contexts.split(self.options.batch_tokens)):
            rows.copy_(0.01 * self.normal(len(rows), 0, batch))
        self._begin_iteration()

    def _begin_iteration(self) -> None:
        self.batch, self.loss, self.converged, self.seconds = 0, 0.0, 0, 0.0
        self.boundary = self.contexts.new_zeros(self.block.context_dim)
        for parameter in self.block.parameters():
            parameter.grad = torch.zeros_like(parameter)

    @property
    def finished(self) -> bool:
        """The first iteration moves away from random contexts, so its rate says nothing and never ends training."""
        done = len(self.history)
        return done >= self.options.max_iterations or (
            done > 1 and self.history[-1]["convergence_rate"] >= self.options.convergence_rate
        )

    def advance(self) -> None:
        """One batch: its gradient, its convergence, its contexts in place; after the last batch, the Adam step."""
        began = time.perf_counter()
        options, first = self.options, self.batch * self.options.batch_tokens
        rows = self.contexts[first : first + options.batch_tokens]
        ids = self.data.train.stream(first, first + len(rows)).to(self.device)
        dtype = next(self.block.parameters()).dtype
        old, initial = rows.to(dtype), self.boundary.to(dtype)
        noise = options.noise * self.normal(len(rows), len(self.history) + 1, self.batch).to(dtype)
        new = sweep_tokens(self.model, ids, old, initial, noise)
        loss = oacd_loss(new, options.mean_penalty)
        (loss / self.batches).backward()
        with torch.no_grad():
            converged = ((new - old).square().mean(dim=-1) < options.threshold).sum()
            # The next batch starts from this batch's last context as it was before the iteration.
            self.boundary = rows[-1].clone()
            rows.copy_(new)
        self._require_finite(loss.item(), "loss")
        self.loss += loss.item()
        self.converged += int(converged.item())
        self.batch += 1
        self.seconds += time.perf_counter() - began
        if self.batch == self.batches:
            self._end_iteration()

    def _end_iteration(self) -> None:
        norm = nn.utils.clip_grad_norm_(self.block.parameters(), self.options.max_grad_norm)
        self._require_finite(norm.item(), "gradient")
        self.optimizer.step()
        self.history.append(
            {
                "iteration": len(self.history) + 1,
                "loss": self.loss / self.batches,
                "convergence_rate": self.converged / len(self.contexts),
                "seconds": self.seconds,
            }
        )
        self._begin_iteration()

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint.exists() else "no checkpoint yet"
            raise RuntimeError(
                f"phase 1 diverged: {what} {value} in iteration {len(self.history) + 1}; lower its learning rate "
                f"({self.options.learning_rate:g}) and use another output folder ({kept})"
            )

    def save_checkpoint(self) -> None:
        tensors = {"contexts": self.contexts, "boundary": self.boundary}
        for name, parameter in self.block.named_parameters():
            assert parameter.grad is not None
            tensors |= {f"weight.{name}": parameter.detach(), f"gradient.{name}": parameter.grad}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{key}": value for key, value in state.items()}
        state = {"identity": self.identity} | {name: getattr(self, name) for name in COUNTERS}
        _write(self.checkpoint, tensors, {"phase1": json.dumps(state)})

    def load_checkpoint(self) -> None:
        """Go on from the folder's checkpoint, or start."""
        if not self.checkpoint.exists():
            return self.start()
        tensors, metadata = _read(self.checkpoint, self.device)
        state = json.loads(metadata.get("phase1", "{}"))
        self._require_same(state.get("identity", {}), self.checkpoint)
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.contexts, self.boundary = tensors["contexts"], tensors["boundary"]
        adam: dict[int, dict[str, torch.Tensor]] = {}
        for name in tensors:
            if name.startswith("adam."):
                _, index, key = name.split(".")
                adam.setdefault(int(index), {})[key] = tensors[name]
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": adam})
        with torch.no_grad():
            for name, parameter in self.block.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
                parameter.grad = tensors[f"gradient.{name}"]

    def _require_same(self, identity: dict[str, Any], path: Path) -> None:
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise ValueError(
                    f"{path} was made with {name} {identity.get(name)}, not {value}: "
                    "use that setting, another output folder, or delete the file"
                )

    def load_finished(self) -> Phase1Result | None:
        if not self.record.exists():
            return None
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            identity, result = record.pop("identity"), Phase1Result(**record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.record} is damaged: delete it and run phase 1 again") from error
        self._require_same(identity, self.record)
        self.block.load_state_dict(_read(self.weights, self.device)[0])
        return result

    def finish(self) -> Phase1Result:
        """Write the result, then drop the checkpoint."""
        result = Phase1Result(
            iterations=len(self.history),
            convergence_rate=self.history[-1]["convergence_rate"],
            effective_rank=effective_rank(held_out_contexts(self.model, self.data.validation)),
            history=self.history,
            seconds=sum(entry["seconds"] for entry in self.history),
        )
        _write(self.weights, self.block.state_dict(), {"format": "pt"})
        temporary = self.record.with_suffix(".tmp")
        temporary.write_text(
            json.dumps(asdict(result) | {"identity": self.identity}, indent=2) + "\n", encoding="utf-8"
        )
        os.replace(temporary, self.record)
        self.checkpoint.unlink(missing_ok=True)
        return result


def _iterate(run: OacdRun, progress: bool) -> None:
    if run.finished:
        return
    saved = time.monotonic()
    total = run.options.max_iterations * run.batches
    layout = "{desc} |{bar:20}| {elapsed}<{remaining}{postfix}"
    with (
        _deferred_interrupt() as interrupt,
        tqdm(
            total=total,
            initial=len(run.history) * run.batches + run.batch,
            bar_format=layout,
            mininterval=0.5,
            disable=not progress,
        ) as bar,
    ):
        while not run.finished:
            bar.set_description(
                f"phase 1, iteration {len(run.history) + 1}/{run.options.max_iterations}", refresh=False
            )
            run.advance()
            if run.batch == 0:
                bar.set_postfix_str(f"converged {run.history[-1]['convergence_rate']:.1%}", refresh=False)
            bar.update()
            if interrupt.is_set():
                run.save_checkpoint()
                raise KeyboardInterrupt
            # The last one covers the held-out scan that follows.
            if run.finished or time.monotonic() - saved >= run.options.checkpoint_seconds:
                run.save_checkpoint()
                saved = time.monotonic()


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of breaking into a half-done batch; a second one acts as usual.

    Only Python's own handler is replaced: a host that ignores or handles the signal itself keeps doing so.
    """
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    os.replace(temporary, path)


def _read(path: Path, device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            # Copies: on the CPU they would be maps of a file that the next checkpoint replaces.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): delete it and run phase 1 again") from error
