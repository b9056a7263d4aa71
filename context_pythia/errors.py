"""Errors for users, and how the command shows an error: one line and an exit code.

Any other error is a bug of ours and keeps its traceback, except those of the machine (files, network, memory).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class UsageError(ValueError):
    """A request that cannot be met. The message is one line that names the value and the mend; exit code 2."""


class Failure(RuntimeError):
    """A valid request that failed: a damaged file, a loss that is not finite. One line; exit code 1."""


@contextlib.contextmanager
def fitting(what: str) -> Iterator[None]:
    """In the `with` block, a configuration that no model can have raises `UsageError`: `what`, then the reason."""
    # Only here, because help must answer at once.
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except StrictDataclassError as error:
        raise UsageError(f"{what}: {error.__cause__ or error}") from error


def is_failure(error: BaseException) -> bool:
    """Whether `error` ends the work on one model but not on the others: a `Failure`, or out of memory.

    The text of the error tells: torch has a class for out of memory only on CUDA.
    """
    if isinstance(error, Failure | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search("out of memory|can't allocate memory", str(error)))


def attempt(run: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of `run`, or a line with the reason of its failure, such as too little memory. Bugs are raised."""
    try:
        return run(), None
    except (RuntimeError, MemoryError) as error:
        if not is_failure(error):
            raise
        return None, first_line(error)


def exit_code(error: BaseException) -> int | None:
    """2 for wrong usage, 1 for a failure, None for a bug of ours."""
    if isinstance(error, UsageError | FileNotFoundError | NotADirectoryError):
        return 2
    return 1 if isinstance(error, OSError) or is_failure(error) else None


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank, or the name of its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
