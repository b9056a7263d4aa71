"""Errors that are meant for users, and what the command makes of an error: one line and an exit code.

An error of neither class here, nor of the machine (files, network, memory), is our own mistake: it keeps its traceback.
"""

from __future__ import annotations

import re


class UsageError(ValueError):
    """What was asked for cannot be done. The message is one line that names the value and the mend; exit code 2."""


class Failure(RuntimeError):
    """What was asked for failed on the way: a damaged file, a loss that is not finite. One line; exit code 1."""


def is_failure(error: BaseException) -> bool:
    """Whether `error` ends the work on one model and says nothing against the next: a `Failure`, or too little memory.

    Memory is told by the text: torch has a class for it on CUDA alone.
    """
    if isinstance(error, Failure | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search("out of memory|can't allocate memory", str(error)))


def exit_code(error: BaseException) -> int | None:
    """2 for a fault in what was asked, 1 for a failure on the way, None for a mistake of our own."""
    if isinstance(error, UsageError | FileNotFoundError | NotADirectoryError):
        return 2
    return 1 if isinstance(error, OSError) or is_failure(error) else None


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank, or the name of its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
