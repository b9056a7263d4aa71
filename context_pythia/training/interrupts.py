"""Ctrl-C and SIGTERM at a moment that suits: work that is cut in two could not be saved."""

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
    """Within it ctrl-C, or SIGTERM, sets the event, and says so, instead of breaking into half-done work; a second one
    acts at once.

    Only the handlers that a Python process begins with are replaced: a host that ignores or handles a signal itself
    keeps doing so. One of several processes leaves SIGTERM alone, by which the launcher ends those that wait for a dead
    one.
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
