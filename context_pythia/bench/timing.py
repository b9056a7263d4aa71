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

from context_pythia.errors import attempt

T = TypeVar("T")


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
