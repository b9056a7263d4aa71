"""Checkpoints of phase 1: one file of a single process, or a set of files, one for each process's piece of the stream.

A set appears whole: its files carry the moment in their names, and the one before is deleted when the last file of the
new one is there. Every file is written under a temporary name and renamed; nothing is unpickled.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from context_pythia import processes
from context_pythia.errors import UsageError

ALONE = "checkpoint.safetensors"
PIECE = re.compile(r"checkpoint-(\d+)-(\d+)-of-(\d+)\.safetensors")
ROWS_AT_ONCE = 1 << 18


def save_piece(folder: Path, moment: int, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write this process's checkpoint; all processes call it at the same `moment`, a number that only grows."""
    if processes.count() == 1:
        return write_tensors(folder / ALONE, tensors, metadata)
    name = f"checkpoint-{moment}-{processes.index()}-of-{processes.count()}.safetensors"
    write_tensors(folder / name, tensors, metadata)
    processes.wait()
    if processes.is_main():
        for path, other, _ in _pieces(folder):
            if other != moment:
                path.unlink()


def last_piece(folder: Path) -> Path | None:
    """This process's file of the last checkpoint, None if there is none.

    Raises:
        UsageError: the checkpoint is that of another number of processes, which divided the stream otherwise.
    """
    sets: dict[tuple[int, int], int] = {}
    for _, moment, count in _pieces(folder):
        sets[moment, count] = sets.get((moment, count), 0) + 1
    whole = {count: moment for (moment, count), found in sorted(sets.items()) if found == count}
    if (folder / ALONE).exists():
        whole[1] = 0
    if processes.count() not in whole:
        if whole:
            raise UsageError(
                f"{folder} holds a checkpoint of {min(whole)} processes, not {processes.count()}: "
                f"start {min(whole)}, or delete its checkpoint files to begin phase 1 again"
            )
        return None
    if processes.count() == 1:
        return folder / ALONE
    moment = whole[processes.count()]
    return folder / f"checkpoint-{moment}-{processes.index()}-of-{processes.count()}.safetensors"


def drop_checkpoints(folder: Path) -> None:
    (folder / ALONE).unlink(missing_ok=True)
    for path, _, _ in _pieces(folder):
        path.unlink()


def _pieces(folder: Path) -> list[tuple[Path, int, int]]:
    """Path, moment and number of processes of every file of a set."""
    found = [(path, PIECE.fullmatch(path.name)) for path in folder.glob("checkpoint-*")]
    return [(path, int(match[1]), int(match[3])) for path, match in found if match]


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; OSError if that fails."""
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    os.replace(temporary, path)


def read_tensors(
    path: Path, device: torch.device, without: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (but one) and metadata of a safetensors file; UsageError, which names it, if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            # Copies: on the CPU they would be maps of a file that the next checkpoint replaces.
            names = [name for name in file.keys() if name != without]  # noqa: SIM118
            return {name: file.get_tensor(name).clone() for name in names}, file.metadata() or {}
    except (SafetensorError, FileNotFoundError) as error:
        raise UsageError(f"{path} is missing or damaged ({error}): delete it and run phase 1 again") from error


def read_rows(path: Path, name: str, into: torch.Tensor) -> None:
    """Fill `into` with a tensor of the file, part by part: the whole of a map that is read stays in memory."""
    for first in range(0, len(into), ROWS_AT_ONCE):
        with safe_open(path, framework="pt") as file:
            into[first : first + ROWS_AT_ONCE] = file.get_slice(name)[first : first + ROWS_AT_ONCE]
