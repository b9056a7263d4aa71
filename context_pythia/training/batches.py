"""Batches, divided among processes. A recipe means the same with any number of processes.

All processes together see the batches of a single process: the same samples in the same order, and each of n processes
takes every n-th sample. The last batch may have fewer samples than there are processes. A process without a sample then
takes one whose labels are ignored, because all processes must step equally often.

Shapes: B samples of one process, S tokens of a sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from context_pythia import processes
from context_pythia.config.recipe import OptimizationOptions
from context_pythia.training.loss import IGNORED

Batch = dict[str, Tensor]  # input_ids and labels, [B, S] each


def batches(dataset: Any, order: list[int], batch_size: int, device: torch.device) -> Iterator[Batch]:
    """This process's share of each batch of `batch_size` samples (of all processes), on `device`."""
    starts = range(0, len(order), batch_size)
    shares = [order[start : start + batch_size][processes.index() :: processes.count()] for start in starts]
    indices = [share or order[:1] for share in shares]
    loader = DataLoader(dataset, batch_sampler=indices, pin_memory=device.type == "cuda")
    for share, batch in zip(shares, loader, strict=True):
        if not share:
            batch["labels"].fill_(IGNORED)
        yield {name: values.to(device, non_blocking=True) for name, values in batch.items()}


def step_batches(
    dataset: Any, order: list[int], options: OptimizationOptions, device: torch.device, skip: int = 0
) -> Iterator[list[Batch]]:
    """The batches of each optimizer step of an epoch, without its first `skip` steps.

    Args:
        order: indices of the epoch's samples.
    """
    skipped = skip * options.gradient_accumulation * options.batch_size
    loader = batches(dataset, order[skipped:], options.batch_size, device)
    # A loader draws from torch's generator when it starts. A resumed epoch drew before its interruption.
    with torch.random.fork_rng(devices=[], enabled=skip > 0):
        remaining = itertools.chain([next(loader)], loader)
    while step := list(itertools.islice(remaining, options.gradient_accumulation)):
        yield step
