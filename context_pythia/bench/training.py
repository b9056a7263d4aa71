"""`context-pythia bench --train`: training steps of a recipe's models beside a plain loop, in turns.

Each model trains in a process of its own. So the plain loop keeps the allocator as the system sets it while phase 2
changes it, each process's high-water mark is its model's peak memory, and what one of them keeps for its next turn is
given back before the next one's begins. While one works the others wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from context_pythia.bench.options import BenchOptions
from context_pythia.bench.timing import (
    Stopwatch,
    Turns,
    product_rate,
    product_shapes,
    step_flops,
    train_as_phase2,
    train_plainly,
)
from context_pythia.config.recipe import ModelOptions, Recipe
from context_pythia.data.packing import PackedData, PackedDataset
from context_pythia.evaluation.memory import process_memory, release_memory
from context_pythia.runs.build import best_device, build_model, describe_parameters, expected_rows
from context_pythia.training.phase2 import check_options
from context_pythia.training.trainer import quiet_transformers

FIRST_STEPS = 2
PLAIN = "plain fp32 GPT-NeoX"
SPAWN = multiprocessing.get_context("spawn")  # a fork would take torch's threads for its own


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process trains: a model of the recipe, or the plain loop, on how many steps of made-up tokens."""

    recipe: Recipe
    model: ModelOptions
    plain: bool
    rows: int
    steps: int
    threads: int
    folder: Path

    @property
    def name(self) -> str:
        return PLAIN if self.plain else self.model.name


class Worker:
    """The process of a job, seen from outside; what it hands in, or why it failed, is put into `entry`."""

    def __init__(self, job: Job, entry: dict[str, Any]):
        self.entry = entry
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_work, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()

    def get_ready(self) -> None:
        """Wait until the model is built, and have it make its first steps, which are slow beyond a turn's warm-up."""
        self.entry.update(self._receive())
        if self.entry["error"] is None:
            self.connection.send(FIRST_STEPS)
            self._receive()

    def take_turn(self, steps: int) -> None:
        """One turn of the worker; it has none after a failure."""
        if self.entry["error"] is not None:
            return
        self.connection.send(steps)
        turn = self._receive()
        if turn:
            self.entry["rounds"].append(turn["steps"])
            self.entry["peak_bytes"] = turn["peak_bytes"]

    def _receive(self) -> dict[str, Any]:
        """The worker's next message, empty if it failed."""
        try:
            failure, content = self.connection.recv()
        except EOFError:
            self.process.join()
            failure, content = f"its process ended with code {self.process.exitcode}: out of memory?", {}
        self.entry["error"] = failure
        return content

    def close(self) -> None:
        """End the process: at once if it waits for its turn, by force if it is at work (ctrl-C)."""
        with contextlib.suppress(OSError):
            self.connection.send(0)
        self.process.join(timeout=1)
        self.process.terminate()
        self.process.join()
        self.connection.close()


def train_metrics(
    recipe: Recipe,
    options: BenchOptions,
    metrics: dict[str, Any],
    progress: bool,
    show: Callable[[dict[str, Any]], None],
) -> Iterator[None]:
    """Fill `metrics` with the rows of all models, yield after each round, and show them.

    Raises:
        ValueError: training options that cannot be.
    """
    rows, train = expected_rows(recipe), recipe.train
    threads, device = metrics["settings"]["threads"], torch.device(metrics["settings"]["device"])
    tokens = train.batch_size * train.gradient_accumulation * recipe.data.sequence_length
    precisions = list(dict.fromkeys(["float32", train.precision]))
    shapes = product_shapes(_baseline_config(recipe, rows), tokens // train.gradient_accumulation)
    bar_format = "{desc}: {percentage:3.0f}% [{elapsed}, about {remaining} to go]"
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        steps = (1 + FIRST_STEPS) + options.rounds * (1 + options.steps) + 1
        plain = Job(recipe, ModelOptions(), True, rows, steps, threads, Path(folder))
        check_options(train)
        jobs = [plain, *(dataclasses.replace(plain, model=model, plain=False) for model in recipe.models)]
        metrics |= {
            "recipe": dataclasses.asdict(recipe),
            "tokens_per_step": tokens,
            "rates": {precision: [] for precision in precisions},
            "rows": [_row(job) for job in jobs],
        }
        total = len(jobs) * (1 + options.rounds)
        bar = ends.enter_context(tqdm(total=total, bar_format=bar_format, disable=None if progress else True))
        for job, entry in zip(jobs, metrics["rows"], strict=True):
            workers.append(Worker(job, entry))
            ends.callback(workers[-1].close)
        for worker in workers:
            bar.set_description(f"building {worker.entry['name']}")
            worker.get_ready()
            bar.update()
        for round in range(options.rounds):
            for precision in precisions:
                metrics["rates"][precision].append(product_rate(shapes, getattr(torch, precision), device))
            for worker in workers:
                bar.set_description(f"round {round + 1} of {options.rounds}, {worker.entry['name']}")
                worker.take_turn(options.steps)
                bar.update()
            yield
    show(metrics)


def _row(job: Job) -> dict[str, Any]:
    source = job.model.context_source
    return {
        "name": job.name,
        "plain": job.plain,
        "peer": not job.plain and source is None,
        "precision": "float32" if job.plain else job.recipe.train.precision,
        "rounds": [],
        "peak_bytes": None,
        "error": None,
    }


def _baseline_config(recipe: Recipe, rows: int) -> Any:
    with torch.device("meta"):
        return build_model(ModelOptions(), recipe, rows).config


def synthetic_data(job: Job) -> PackedData:
    """Random tokens of the recipe's length, as many samples as the steps take; there is no tokenizer."""
    train, length = job.recipe.train, job.recipe.data.sequence_length
    samples = train.batch_size * train.gradient_accumulation * job.steps
    tokens = np.random.default_rng(0).integers(job.rows, size=(samples, length + 1), dtype=np.int32)
    tokenizer: Any = None
    return PackedData(PackedDataset(tokens), PackedDataset(tokens[:1]), tokenizer, {})


def _work(connection: Connection, job: Job) -> None:
    """The process: builds the model, then trains when it is told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C goes to the whole group; the parent ends its workers itself
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and left behind by one that is ended by force
    torch.set_num_threads(job.threads)
    warnings.filterwarnings("ignore")
    empty = process_memory("VmRSS")
    device = best_device()
    try:
        model = build_model(job.model, job.recipe, job.rows).to(device)
        tokens = job.recipe.train.batch_size * job.recipe.train.gradient_accumulation
        length = job.recipe.data.sequence_length
        facts = describe_parameters(model) | {
            "flops_per_step": step_flops(model, tokens * length, length),
            "process_bytes": empty,
        }
        connection.send((None, facts))

        def hand_in(steps: list[dict[str, float]]) -> None:
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else process_memory("VmHWM")
            release_memory(device)
            connection.send((None, {"steps": steps, "peak_bytes": peak}))

        turns = Turns(Stopwatch(device), connection.recv, hand_in)
        if job.plain:
            train_plainly(model, synthetic_data(job), job.recipe.train, turns)
        else:
            with quiet_transformers():
                train_as_phase2(model, synthetic_data(job), job.recipe.train, turns, job.folder)
    except EOFError:
        os._exit(0)  # the parent has gone
    except Exception as error:
        connection.send((next(iter(str(error).splitlines()), type(error).__name__), {}))
