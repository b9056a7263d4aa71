"""Defers ctrl-C and SIGTERM until a checkpoint can be written."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from context_pythia import processes


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """A context in which the first ctrl-C or SIGTERM sets the event and prints a line. The second one acts at once.

    It replaces only Python's default handlers: a host that ignores or handles a signal itself still does. With several
    processes SIGTERM keeps its effect, because the launcher uses it to end processes that wait for a dead one.
    """
    asked = threading.Event()
    own: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler}
    if processes.count() == 1:
        own[signal.SIGTERM] = signal.SIG_DFL
    in_main_thread = threading.current_thread() is threading.main_thread()
    replaced = {number: first for number, first in own.items() if in_main_thread and signal.getsignal(number) is first}

    def restore() -> None:
        for number, first in replaced.items():
            signal.signal(number, first)

    def ask(number: int, frame: object) -> None:
        asked.set()
        if processes.is_main():
            print("\nStopping at the next checkpoint; ctrl-C again stops at once.", file=sys.stderr)
        restore()

    for number in replaced:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()
