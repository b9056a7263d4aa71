"""Writes the report of a run: Markdown, one self-contained HTML page and two pictures, in English or Japanese.

It reads the run folder's metrics.json and provenance.json and nothing else, so a report can be made again at any
time, in another language, or of a run that is still unfinished. `context-pythia report RUN` calls `write_report`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from context_pythia.experiments.document import to_html, to_markdown
from context_pythia.experiments.sections import Report
from context_pythia.experiments.translations import TRANSLATIONS

_MODEL_KEYS = {
    "name", "context_source", "context_dim", "context_sharing", "parameters", "trainable_parameters", "best_val_ppl",
    "best_epoch", "val_accuracy", "history", "stop_reason", "seconds_per_epoch", "phase1", "cache", "error",
}  # fmt: skip


def write_report(run: Path, lang: str = "en") -> list[Path]:
    """Writes report.md, report.html (report.ja.md, ... in other languages than English) and the pictures into `run`.

    Returns the paths written; a picture for which no model has figures yet is left out. Raises ValueError for an
    unknown language or a damaged metrics.json or provenance.json, FileNotFoundError where one is missing.
    """
    if lang not in TRANSLATIONS:
        raise ValueError(f"unknown report language {lang!r}: choose one of {', '.join(TRANSLATIONS)}")
    metrics, provenance = _load_metrics(run / "metrics.json"), _load(run / "provenance.json")
    report = Report(metrics, provenance, TRANSLATIONS[lang])
    pictures = report.pictures()
    blocks = list(report.blocks(pictures))
    suffix = "" if lang == "en" else f".{lang}"
    files = dict(pictures)
    files[f"report{suffix}.md"] = to_markdown(blocks).encode()
    files[f"report{suffix}.html"] = to_html(blocks, lang, pictures).encode()
    return [_write(run / name, data) for name, data in files.items()]


def _write(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
    return path


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: name a run folder that `context-pythia compare` has written")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no object")
    return content


def _load_metrics(path: Path) -> dict[str, Any]:
    metrics = _load(path)
    for key, kind in {"models": list, "data": dict, "recipe": dict}.items():
        if not isinstance(metrics.get(key), kind):
            raise _damaged(path, f"it has no {key!r}")
    for number, model in enumerate(metrics["models"], start=1):
        missing = sorted(_MODEL_KEYS - set(model)) if isinstance(model, dict) else ["name"]
        if missing:
            raise _damaged(path, f"model {number} has no {missing[0]!r}")
    return metrics


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}): restore it, or remove it and run `context-pythia compare` again")
