"""One training by OACD: its state, the step from a batch to the next, and what a checkpoint and the result hold.

The contexts of the whole training stream are one tensor `[N, C]`. An iteration is one parallel fixed-point sweep over
it, in batches, with a loss that spreads the contexts around their centroid and draws the centroid to the origin; one
Adam step follows.

Shapes: N tokens of the stream, n tokens of a batch, C context_dim, E width of the token embeddings.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from context_pythia import processes
from context_pythia.config.options import deciding
from context_pythia.config.recipe import Phase1Options
from context_pythia.errors import Failure, UsageError
from context_pythia.files import write_json
from context_pythia.training.oacd import (
    TokenProjections,
    effective_rank,
    fused_oacd_loss,
    held_out_contexts,
    sweep_tokens,
)
from context_pythia.training.pieces import (
    drop_checkpoints,
    last_piece,
    read_rows,
    read_tensors,
    save_piece,
    write_tensors,
)

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
        count, index = processes.count(), processes.index()
        if self.batches < count:
            raise UsageError(
                f"phase1.batch_tokens {options.batch_tokens}: makes {self.batches} batches for {count} processes, "
                f"give at most {data.train.num_tokens // count}"
            )
        # This process's batches, and how many the busiest one has.
        self.piece = range(index * self.batches // count, (index + 1) * self.batches // count)
        self.turns = math.ceil(self.batches / count)
        self.folder, self.weights, self.record = folder, folder / "context_block.safetensors", folder / "phase1.json"
        self.identity = self._identity()
        self.history: list[dict[str, float]] = []
        held = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        for batch in self.piece:
            held[self._ids(batch)] = True
        self.projections = TokenProjections(model, held.nonzero().squeeze(1).to(self.device))

    def _identity(self) -> dict[str, Any]:
        """What must be equal for work in the folder to be this run's."""
        embeddings = self.model.get_input_embeddings().weight.detach().cpu().contiguous().view(torch.uint8).numpy()
        return deciding(self.options) | {
            "seed": self.seed,
            "data_fingerprint": self.data.summary["fingerprint"],
            "tokens": self.data.train.num_tokens,
            "context_dim": self.block.context_dim,
            "context_block_layers": len(self.block.layers),
            "embeddings_crc32": zlib.crc32(embeddings),
        }

    def normal(self, rows: int, iteration: int, batch: int, deviation: float = 1.0) -> torch.Tensor:
        """Normal numbers `[rows, C]` around 0; iteration 0 is for the first contexts, later ones for the noise."""
        words = np.random.SeedSequence((self.seed % 2**64, iteration, batch)).generate_state(1)
        generator = torch.Generator(self.device).manual_seed(int(words[0]))
        numbers = torch.empty(rows, self.block.context_dim, device=self.device)
        return numbers.normal_(0, deviation, generator=generator)

    def _ids(self, batch: int) -> torch.Tensor:
        first = batch * self.options.batch_tokens
        return self.data.train.stream(first, first + self.options.batch_tokens)

    def _empty_contexts(self) -> torch.Tensor:
        tokens = min(self.piece.stop * self.options.batch_tokens, self.data.train.num_tokens)
        tokens -= self.piece.start * self.options.batch_tokens
        dtype = getattr(torch, self.options.state_dtype)
        return torch.empty(tokens, self.block.context_dim, dtype=dtype, device=self.device)

    def start(self) -> None:
        self.contexts = self._empty_contexts()
        for batch, rows in zip(self.piece, self.contexts.split(self.options.batch_tokens), strict=True):
            rows.copy_(self.normal(len(rows), 0, batch, 0.01))
        self._begin_iteration()

    def _begin_iteration(self) -> None:
        self.batch, self.loss, self.converged, self.seconds = 0, 0.0, 0, 0.0
        # A piece goes on from the last context of the piece before it, the first from zero.
        before = processes.gathered(self.contexts[-1].float())[processes.index() - 1]
        self.boundary = before.to(self.contexts.dtype) if processes.index() else torch.zeros_like(self.contexts[0])
        for parameter in self.block.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with self._precision():
            self.projections.refresh()

    def _precision(self) -> torch.autocast:
        """That of the matrix products."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16")

    @property
    def finished(self) -> bool:
        """The first iteration moves away from random contexts, so its rate says nothing and never ends training."""
        done = len(self.history)
        return done >= self.options.max_iterations or (
            done > 1 and self.history[-1]["convergence_rate"] >= self.options.convergence_rate
        )

    def advance(self) -> None:
        """One batch: its gradient, its convergence, its contexts in place; after the last batch, the Adam step.

        A process whose piece is a batch shorter than others' sits out the last turn.
        """
        began = time.perf_counter()
        if self.batch < len(self.piece):
            self._sweep_batch(self.piece[self.batch])
        self.batch += 1
        self.seconds += time.perf_counter() - began
        if self.batch == self.turns:
            self._end_iteration()

    def _sweep_batch(self, batch: int) -> None:
        options, first = self.options, self.batch * self.options.batch_tokens
        rows, ids = self.contexts[first : first + options.batch_tokens], self._ids(batch).to(self.device)
        dtype = next(self.block.parameters()).dtype
        old, initial = rows.to(dtype), self.boundary.to(dtype)
        noise = self.normal(len(rows), len(self.history) + 1, batch, options.noise).to(dtype)
        projected = self.projections.rows(ids)
        with self._precision():
            new = sweep_tokens(self.block.layers, projected, old, initial, noise)
        loss = fused_oacd_loss(new, options.mean_penalty)
        (loss / self.batches).backward()
        self.projections.collect(ids, projected)
        with torch.no_grad():
            # The next batch starts from this batch's last context as it was before the iteration.
            self.boundary = rows[-1].clone()
            converged = (old.sub_(new).square_().mean(dim=-1) < options.threshold).sum()
            rows.copy_(new)
        self._require_finite(loss.item(), "loss")
        self.loss += loss.item()
        self.converged += int(converged.item())

    def _end_iteration(self) -> None:
        began = time.perf_counter()
        with self._precision():
            self.projections.backward()
        for parameter in self.block.parameters():
            assert parameter.grad is not None
            processes.total(parameter.grad)
        loss, converged = processes.total(torch.tensor([self.loss, self.converged], dtype=torch.float64)).tolist()
        norm = nn.utils.clip_grad_norm_(self.block.parameters(), self.options.max_grad_norm)
        self._require_finite(norm.item(), "gradient")
        self.optimizer.step()
        self.history.append(
            {
                "iteration": len(self.history) + 1,
                "loss": loss / self.batches,
                "convergence_rate": converged / self.data.train.num_tokens,
                "seconds": self.seconds + time.perf_counter() - began,
            }
        )
        self._begin_iteration()

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            last = last_piece(self.folder)
            kept = "no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
            raise Failure(
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
        for layer, gradient in enumerate(self.projections.gradients):
            tensors[f"projection_gradient.{layer}"] = gradient
        state = {"identity": self.identity} | {name: getattr(self, name) for name in COUNTERS}
        moment = len(self.history) * self.turns + self.batch
        save_piece(self.folder, moment, tensors, {"phase1": json.dumps(state)})

    def load_checkpoint(self) -> None:
        """Go on from the folder's checkpoint, or start."""
        checkpoint = last_piece(self.folder)
        if checkpoint is None:
            return self.start()
        tensors, metadata = read_tensors(checkpoint, self.device, without="contexts")
        state = json.loads(metadata.get("phase1", "{}"))
        self._require_same(state.get("identity", {}), checkpoint)
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.contexts, self.boundary = self._empty_contexts(), tensors["boundary"]
        read_rows(checkpoint, "contexts", self.contexts)
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
        with self._precision():
            self.projections.refresh()
        for layer, gradient in enumerate(self.projections.gradients):
            gradient.copy_(tensors[f"projection_gradient.{layer}"])

    def _require_same(self, identity: dict[str, Any], path: Path) -> None:
        # What was made before there was an option was made with its default.
        identity = asdict(Phase1Options()) | identity
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise UsageError(
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
            raise UsageError(f"{self.record} is damaged: delete it and run phase 1 again") from error
        self._require_same(identity, self.record)
        self.block.load_state_dict(read_tensors(self.weights, self.device)[0])
        return result

    def finish(self) -> Phase1Result:
        """Write the result, then drop the checkpoint; of several processes one does, and the others read the result."""
        if not processes.is_main():
            processes.wait()
            finished = self.load_finished()
            assert finished is not None
            return finished
        result = Phase1Result(
            iterations=len(self.history),
            convergence_rate=self.history[-1]["convergence_rate"],
            effective_rank=effective_rank(held_out_contexts(self.model, self.data.validation)),
            history=self.history,
            seconds=sum(entry["seconds"] for entry in self.history),
        )
        write_tensors(self.weights, self.block.state_dict(), {"format": "pt"})
        write_json(self.record, asdict(result) | {"identity": self.identity})
        drop_checkpoints(self.folder)
        processes.wait()
        return result
