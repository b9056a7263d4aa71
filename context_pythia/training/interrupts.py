"""Ctrl-C at a moment that suits: work that is cut in two could not be saved."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from context_pythia import processes


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Within it ctrl-C sets the event, and says so, instead of breaking into half-done work; a second one acts at once.

    Only Python's own handler is replaced: a host that ignores or handles the signal itself keeps doing so.
    """
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        asked.set()
        if processes.is_main():
            print("\nStopping at the next checkpoint; ctrl-C again stops at once.", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
