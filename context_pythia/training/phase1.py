"""Phase 1: train the ContextBlock alone, by OACD (Origin-Anchored Centroid Dispersion).

One tensor has the contexts of the whole training stream. An iteration is one parallel fixed-point sweep over it, in
batches. The loss spreads the contexts around their centroid and draws the centroid to the origin. One Adam step
follows. Training stops when nearly all contexts hardly change from one iteration to the next.

All random numbers depend only on (seed, iteration, batch). So an interrupted run resumes from its last complete
iteration, and its result on a CPU equals that of an uninterrupted run bit by bit. With several processes the first one
trains, and the others wait for its result.

Shapes: S tokens of a sample, C context_dim.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from context_pythia import processes
from context_pythia.config.options import deciding
from context_pythia.config.recipe import Phase1Options
from context_pythia.config.same import check_same
from context_pythia.errors import UsageError, first_line
from context_pythia.files import read_record, write_bytes, write_json
from context_pythia.training.allocator import KEEP_FREED, set_malloc
from context_pythia.training.checkpoints import read_state, write_state
from context_pythia.training.interrupts import deferred_interrupt
from context_pythia.training.oacd import Oacd

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedData, PackedDataset
    from context_pythia.model import ContextPythiaForCausalLM

WEIGHTS_FILE, RESULT_FILE, CHECKPOINT_FILE = "context_block.safetensors", "phase1.json", "checkpoint.pt"
MEND = "use that setting, another output folder, or delete the file"
SCAN_TOKENS = 32_768  # held-out tokens per scan
BAR = "{desc} |{bar:20}| {elapsed}<{remaining}{postfix}"


@dataclass
class Phase1Result:
    """The result of phase 1; `asdict` of it is JSON.

    Attributes:
        iterations: iterations done.
        convergence_rate: share of converged tokens (0 to 1) in the last iteration.
        effective_rank: of the held-out contexts, 1 to C (see `effective_rank`).
        history: one `{"iteration", "loss", "convergence_rate", "seconds"}` per iteration.
        seconds: time of the iterations, without interruptions.
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
    """Train `model.gpt_neox.context_block` in place, or load it if `folder` has the finished result.

    After ctrl-C it finishes the iteration, writes a checkpoint and raises KeyboardInterrupt; a second ctrl-C stops at
    once.

    Args:
        model: has the context source `input` or `shared`. Only its ContextBlock changes. Training runs on its device.
        data: `train` is the stream, `validation` gives the effective rank.
        seed: of the first contexts and of the noise.
        folder: gets `context_block.safetensors` and `phase1.json`, and a checkpoint during training.

    Raises:
        UsageError: `folder` has a damaged file, or files of another run (other options, seed, text, widths or
            embeddings).
        Failure: the loss or its gradient is not finite; the last good checkpoint stays.
        OSError: `folder` cannot be written.
    """
    settings, block = _settings(model, data, options, seed), model.gpt_neox.context_block
    with processes.main_first():
        if (folder / RESULT_FILE).exists():
            return _load_result(block, folder, settings)
        folder.mkdir(parents=True, exist_ok=True)
        trained, checkpoint = next(block.parameters()).requires_grad, folder / CHECKPOINT_FILE
        block.requires_grad_(True)
        try:
            history = _iterate(Oacd(model, data.train, options, seed), checkpoint, settings, progress)
        finally:
            block.zero_grad()
            block.requires_grad_(trained)
        result = Phase1Result(
            iterations=len(history),
            convergence_rate=history[-1]["convergence_rate"],
            effective_rank=effective_rank(held_out_contexts(model, data.validation)),
            history=history,
            seconds=sum(row["seconds"] for row in history),
        )
        write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(block.state_dict(), {"format": "pt"}))
        write_json(folder / RESULT_FILE, asdict(result) | {"identity": settings})
        checkpoint.unlink()
    return result


def _iterate(oacd: Oacd, checkpoint: Path, settings: dict[str, Any], progress: bool) -> list[dict[str, float]]:
    """Iterate to the end, from the checkpoint if there is one. Returns the history."""
    if oacd.device.type == "cpu":
        set_malloc(KEEP_FREED)
    state = read_state(checkpoint, settings, f"{checkpoint} was made", MEND, oacd.device)
    if state is not None:
        oacd.load_state_dict(state)
    options, saved = oacd.options, time.monotonic()
    total, done = options.max_iterations * oacd.batches, len(oacd.history) * oacd.batches
    with (
        deferred_interrupt() as asked_to_stop,
        tqdm(total=total, initial=done, bar_format=BAR, mininterval=0.5, disable=None if progress else True) as bar,
    ):
        while not oacd.finished:
            oacd.iterate(bar)
            # The checkpoint of the last iteration protects the work if the scan that follows is interrupted.
            due = oacd.finished or time.monotonic() - saved >= options.checkpoint_seconds
            if due or asked_to_stop.is_set():
                write_state(checkpoint, oacd.state_dict(), settings)
                saved = time.monotonic()
            if asked_to_stop.is_set():
                raise KeyboardInterrupt
    return oacd.history


def _settings(model: ContextPythiaForCausalLM, data: PackedData, options: Phase1Options, seed: int) -> dict[str, Any]:
    """All settings that determine the result. A run resumes only with equal settings."""
    block = model.gpt_neox.context_block
    embeddings = model.get_input_embeddings().weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return deciding(options) | {
        "seed": seed,
        "data_fingerprint": data.summary["fingerprint"],
        "tokens": data.train.num_tokens,
        "context_dim": block.context_dim,
        "context_block_layers": len(block.layers),
        "embeddings_crc32": zlib.crc32(embeddings),
    }


def _load_result(block: nn.Module, folder: Path, settings: dict[str, Any]) -> Phase1Result:
    record, path = read_record(folder / RESULT_FILE), folder / WEIGHTS_FILE
    # Older files lack newer options; they used the defaults.
    recorded = deciding(Phase1Options()) | record.pop("identity")
    check_same(recorded, settings, f"{folder / RESULT_FILE} was made", MEND)
    try:
        block.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{path} is missing or damaged ({first_line(error)}): delete {folder} and run phase 1 again"
        ) from error
    return Phase1Result(**record)


def effective_rank(batches: Iterable[torch.Tensor]) -> float:
    """Effective rank of the matrix of all rows, 1 to C: the exponential of its normalized singular values' entropy.

    The singular values come from the Gram matrix `[C, C]` in fp64, so memory does not grow with the rows.

    Args:
        batches: rows, `[..., C]`.
    """
    gram = sum(rows.T @ rows for rows in (batch.flatten(0, -2).cpu().double() for batch in batches))
    assert isinstance(gram, torch.Tensor), "no rows"
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


@torch.no_grad()
def held_out_contexts(model: ContextPythiaForCausalLM, dataset: PackedDataset) -> Iterator[torch.Tensor]:
    """The exact contexts of every sample, in batches `[b, S, C]`. Each sample starts from zero, as in phase 2."""
    length, device = dataset.sequence_length, model.get_input_embeddings().weight.device
    rows = max(1, SCAN_TOKENS // length)
    for first in range(0, len(dataset), rows):
        ids = dataset.stream(first * length, min(first + rows, len(dataset)) * length).view(-1, length)
        yield model.gpt_neox.context_block.scan(model.gpt_neox.embed_context_input(ids.to(device)))
