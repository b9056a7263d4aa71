"""The contents of a folder's provenance.json: where, when, with what and by which command its figures were made."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import context_pythia
from context_pythia import processes
from context_pythia.files import read_record, write_json

VERSIONS_OF = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "datasets", "numpy")


def write_call(path: Path, facts: dict[str, Any]) -> None:
    """Add the `provenance` of a call to the file, which keeps those of earlier calls. The caller has the lock."""
    last = read_record(path) if path.exists() else {}
    created, earlier = last.pop("created", facts["created"]), last.pop("earlier", [])
    if last:
        earlier.append(last)
    write_json(path, facts | {"created": created, "updated": facts["created"], "earlier": earlier})


def machine(device: torch.device) -> dict[str, Any]:
    """The facts that decide the speed of a training on `device`. Times are comparable only if these are equal."""
    return {
        "device": _device_name(device),
        "processes": processes.count(),
        "threads": torch.get_num_threads(),
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """Where, when and with what figures were made on `device`."""
    return {
        "versions": {
            "python": platform.python_version(),
            "context_pythia": context_pythia.__version__,
            **{name: version(name) for name in VERSIONS_OF},
        },
        "platform": platform.platform(),
        **machine(device),
        "commit": _commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([_program(Path(sys.argv[0])), *map(without_password, sys.argv[1:])]),
    }


def without_password(text: str) -> str:
    """`text` with `***` for the secrets of its URLs: passwords, user names that are tokens, secret query options."""
    text = re.sub(r"(://[^:/@\s]*:)\S*@", r"\1***@", text)
    text = re.sub(r"://[^:/@\s]+@", "://***@", text)
    return re.sub(r"([?&](?:password|passwd|pwd|token|secret|key)=)[^&\s]*", r"\1***", text, flags=re.IGNORECASE)


def _program(path: Path) -> str:
    """The command line, with the installed command's name for `python -m context_pythia`."""
    return "context-pythia" if path.parts[-2:] == ("context_pythia", "__main__.py") else path.name


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpu.read_text()) if cpu.exists() else []
    return f"CPU ({names[0] if names else platform.machine()})"


def _commit() -> str | None:
    """Commit of the source tree that the package runs from; None for an installed package.

    An environment may be inside another repository, which does not track this file.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40") or None
    except (OSError, subprocess.SubprocessError):
        return None
