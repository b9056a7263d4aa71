"""Files that appear whole: written under another name, then renamed."""

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
    """Where to write what `path` is to hold: a file beside it, which takes its name when all is written.

    Whoever reads `path` meanwhile, or after an error, finds the old file.
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
    """As `write_bytes`; `content` is of JSON's types alone."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a command; FileNotFoundError or UsageError, in one line, if there is none."""
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
    """The error for a file that does not hold what it should."""
    return UsageError(f"{path} is damaged ({reason}): restore it, or remove it and run the command that wrote it again")
