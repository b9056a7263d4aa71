"""Batches divided among processes, so that a recipe means the same with any number of them.

A batch is that of a single process: the same samples in the same order, of which each process takes every n-th. The
last batch of an epoch is shorter; accelerate would fill it up with samples taken a second time, here the process that
gets none takes part with a sample whose labels count nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from context_pythia import processes
from context_pythia.config.recipe import TrainOptions
from context_pythia.errors import UsageError
from context_pythia.training.loss import IGNORED


def check_shares(options: TrainOptions) -> None:
    """Raises UsageError where the processes cannot share a batch evenly."""
    if options.batch_size % processes.count():
        raise UsageError(
            f"{options.section}.batch_size {options.batch_size}: {processes.count()} processes share a batch, "
            f"give a multiple of {processes.count()}"
        )


class SampleOrNone(Dataset[dict[str, torch.Tensor]]):
    """The samples of `dataset`, and for the index None one of ignored labels."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        if index is not None:
            return self.dataset[index]
        sample = self.dataset[0]
        return sample | {"labels": torch.full_like(sample["labels"], IGNORED)}


class ProcessBatches(BatchSampler):
    """This process's share of each batch of `batch_size` samples, never empty; `[None]` where there is none for it."""

    def __init__(self, sampler: Sampler[int], batch_size: int):
        super().__init__(sampler, batch_size, drop_last=False)

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in super().__iter__():
            yield batch[processes.index() :: processes.count()] or [None]


def process_loader(dataset: Any, sampler: Sampler[int], batch_size: int, args: Any, collate: Any) -> DataLoader:
    """A loader of this process's shares, as the Trainer with arguments `args` expects it to be.

    Args:
        sampler: the order of all samples, the same in every process.
        batch_size: samples of all processes together.
    """
    batches = ProcessBatches(sampler, batch_size)
    loader = DataLoader(
        SampleOrNone(dataset), batch_sampler=batches, collate_fn=collate, pin_memory=args.dataloader_pin_memory
    )
    # Alone, since the batches are divided already; the wrapper sets the sampler's epoch and resumes amid one.
    return prepare_data_loader(loader, num_processes=1, process_index=0)
