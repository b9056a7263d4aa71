"""How `bench` times anything: models take turns, round after round (A B A B ...).

A machine that becomes slower or faster thus favors no model; only ratios within a round are compared. The first round
is a warm-up and does not count. Decoding, prefill and training steps are timed this way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from context_pythia.errors import first_line, is_failure

T = TypeVar("T")


def attempt(run: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of `run`, or a line with the reason of its failure, such as too little memory. Bugs are raised."""
    try:
        return run(), None
    except (RuntimeError, MemoryError) as error:
        if not is_failure(error):
            raise
        return None, first_line(error)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the work of `run` is done, including work on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleave(
    runs: Mapping[str, Callable[[], T]],
    results: Mapping[str, list[T]],
    rounds: int,
    what: str = "",
    progress: bool = True,
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Call all `runs` in turn: a warm-up round, then the rounds that count.

    Args:
        runs: name -> a run that times itself and returns its result.
        results: name -> the list to which each round appends a result.
        what: label of the progress bar on stderr.
        after_round: called after each round.

    Returns:
        the reason of each run that failed; it does not run again.
    """
    errors: dict[str, str] = {}
    bar = tqdm(total=(1 + rounds) * len(runs), desc=what, leave=False, disable=None if progress else True)
    with bar:
        for number in range(1 + rounds):
            for name, run in runs.items():
                if name not in errors:
                    result, error = attempt(run)
                    if error is not None:
                        errors[name] = error
                    elif number > 0:
                        results[name].append(result)  # type: ignore[arg-type]
                bar.update()
            if number > 0:
                after_round()
    return errors


class Stopwatch:
    """Sums time spans by name. On CUDA it records events in the stream, so the GPU need not stop."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.begun: dict[str, Any] = {}
        self.spans: list[tuple[str, Any, Any]] = []

    def start(self, name: str) -> None:
        self.begun[name] = self._now()

    def stop(self, name: str) -> None:
        self.spans.append((name, self.begun.pop(name), self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by name since the last reading; waits for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, begin, end in self.spans:
            span = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            seconds[name] = seconds.get(name, 0.0) + span
        self.spans.clear()
        return seconds

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
