"""One run by several processes, as `torchrun` and `accelerate launch` start them; in a single one all of it is idle.

The launcher's environment says how many there are (RANK, WORLD_SIZE, LOCAL_RANK). The processes run the same program in
step. Process 0 alone prints, packs data and writes records; the first one that fails says why, and the launcher ends
the others. torch is imported where it is used, because `--help` must answer without it.
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

# Others wait for as long as process 0 packs a corpus; one that died is noticed by its closed connection. Elsewhere the
# backends' own minutes hold: a collective that hangs should not keep a cluster for a day.
LONGEST_WAIT = timedelta(hours=24)
_first_failed: bool | None = None  # known once processes that have joined fail
_patient: Any = None  # their group for waiting, on the CPU


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
    """Whether it falls to this process to say why the run ends: of a joint failure one line is enough."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 if _first_failed is None else _first_failed


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within it the processes can exchange tensors, and those other than process 0 print nothing on stdout.

    Raises:
        UsageError: more processes on this machine than GPUs, or accelerate's DeepSpeed or FSDP.
        SystemExit: in a process that failed after another one had said why.
    """
    if count() == 1:
        yield
        return
    for engine in ("DeepSpeed", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true":
            raise UsageError(
                f"accelerate's {engine} is not supported: start without it, because each process loads the whole model"
            )
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
    wait()  # One that failed at once would leave another in the middle of connecting, with an error of its own.
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
            if not _first_to_fail():
                raise SystemExit(1) from error
            raise
    distributed.destroy_process_group()


def _first_to_fail() -> bool:
    from torch import distributed

    global _first_failed
    try:
        # The launcher keeps this store. Where process 0 keeps it and has gone, that one has failed before.
        _first_failed = distributed.distributed_c10d._get_default_store().add("context-pythia failed", 1) == 1
    except RuntimeError:
        _first_failed = False
    return _first_failed


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over the processes, which all call it; `values` takes it."""
    from torch import distributed

    if count() > 1:
        distributed.all_reduce(values)
    return values


def gathered(values: torch.Tensor) -> list[torch.Tensor]:
    """The `values` of every process, in their order; all call it, with one shape."""
    import torch
    from torch import distributed

    if count() == 1:
        return [values]
    held = [torch.empty_like(values) for _ in range(count())]
    distributed.all_gather(held, values.contiguous())
    return held


def highest(value: int) -> int:
    """The highest `value` that a process brings; all call it, and each waits for the last."""
    import torch
    from torch import distributed

    if count() == 1:
        return value
    held = torch.tensor(value)
    distributed.all_reduce(held, distributed.ReduceOp.MAX, group=_patient)
    return int(held)


def wait() -> None:
    """Until all processes have come here."""
    highest(0)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """What stands within it is done by process 0 before any other begins with it."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()
