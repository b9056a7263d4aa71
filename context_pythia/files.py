"""Atomic writes: a file is written under another name, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from context_pythia.errors import UsageError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; at the end of the `with` block that file replaces `path`.

    A reader of `path` finds the old file until then, and after an error.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> Path:
    """Write `content` to `path` (see `whole`), which is returned."""
    with whole(path) as partial:
        partial.write_bytes(content)
    return path


def write_json(path: Path, content: Any) -> None:
    """As `write_bytes`; `content` has only JSON's types."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a command wrote; FileNotFoundError or UsageError if it is missing or damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: name a folder that a command of context-pythia has written into")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, str(error)) from None
    if not isinstance(content, dict):
        raise damaged(path, "it holds no object")
    return content


def damaged(path: Path, reason: str) -> UsageError:
    """The error for a file with wrong contents."""
    return UsageError(f"{path} is damaged ({reason}): restore it, or remove it and run the command that wrote it again")
