"""One run in several processes (`torchrun`, `accelerate launch`); in a single process these functions do nothing.

The launcher's environment gives their number (RANK, WORLD_SIZE, LOCAL_RANK). All processes run the same program. Only
process 0 prints, packs data and writes records. The first process that fails says why, and the launcher ends the
others. Functions import torch themselves, because `--help` must answer without it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from context_pythia.errors import UsageError

if TYPE_CHECKING:
    import torch

# The others wait while process 0 packs a corpus; a closed connection shows that it died. Other collectives keep the
# backend's timeout of minutes: one that hangs should not keep a cluster for a day.
LONGEST_WAIT = timedelta(hours=24)
_failed_first = False  # whether this process failed before the others
_patient: Any = None  # process group on the CPU with the long timeout


def count() -> int:
    """How many processes run together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def index() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    """Whether this process prints and writes."""
    return index() == 0


def says_why() -> bool:
    """Whether this process prints the reason of a failure: one line is enough for all processes."""
    return _failed_first or int(os.environ.get("LOCAL_RANK", 0)) == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """In the `with` block the processes can exchange tensors, and only process 0 prints on stdout.

    Raises:
        UsageError: more processes on this machine than GPUs.
        SystemExit: in a process that fails after another one.
    """
    if count() == 1:
        yield
        return
    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        local, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= devices:
            raise UsageError(
                f"process {local} of this machine has no GPU: start at most {devices} processes on this machine"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend)
    global _patient
    _patient = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    wait()  # If one failed now, another could still be connecting and would print an error of its own.
    with contextlib.ExitStack() as stack:
        if not is_main():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            yield
        except KeyboardInterrupt:
            if not is_main():
                raise SystemExit(130) from None
            raise
        except Exception as error:
            global _failed_first
            _failed_first = _is_first_failure()
            if not _failed_first:
                raise SystemExit(1) from error
            raise
    distributed.destroy_process_group()


def _is_first_failure() -> bool:
    from torch import distributed

    try:
        # The launcher keeps this store. If process 0 keeps it and is gone, process 0 failed first.
        return distributed.distributed_c10d._get_default_store().add("context-pythia failed", 1) == 1
    except RuntimeError:
        return False


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over the processes, in place. All processes must call it."""
    from torch import distributed

    if count() > 1:
        distributed.all_reduce(values)
    return values


def highest(value: int) -> int:
    """The highest `value` of all processes. All must call it, and each waits for the last."""
    import torch
    from torch import distributed

    if count() == 1:
        return value
    tensor = torch.tensor(value)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=_patient)
    return int(tensor)


def wait() -> None:
    """Return once all processes have called it."""
    highest(0)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Process 0 runs the `with` block first; the others start when it is done."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()
