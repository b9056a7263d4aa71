"""Writes the report of a run: Markdown, one self-contained HTML page and its pictures, in English or Japanese.

It reads the run folder's metrics.json and provenance.json and nothing else, so a report can be made again at any
time, in another language, or of a run that is still unfinished. `context-pythia report RUN` knows the folders of
`sweep`, `bench` and `eval` too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from context_pythia.errors import UsageError
from context_pythia.files import damaged, read_record
from context_pythia.report.bench import write_bench
from context_pythia.report.card import write_card
from context_pythia.report.document import write_document
from context_pythia.report.evaluation_report import write_evaluation
from context_pythia.report.sections import Report
from context_pythia.report.sweep import write_sweep
from context_pythia.report.translations import TRANSLATIONS

# By the kind of record; a run of `compare` names none.
WRITERS: dict[str, Callable[[Path, str], list[Path]]] = {
    "sweep": write_sweep,
    "train": write_bench,
    "decode": write_bench,
    "evaluation": write_evaluation,
}


def report(run: Path, lang: str = "en") -> None:
    """`write_report`, and what it wrote on the console."""
    print("\n".join(f"wrote {path}" for path in write_report(run, lang)))


def write_report(run: Path, lang: str = "en") -> list[Path]:
    """Writes report.md, report.html (report.ja.md, ... in other languages than English) and the pictures into `run`.

    Returns the paths written; a picture for which no model has figures yet is left out. Raises ValueError for an
    unknown language or a damaged metrics.json or provenance.json, FileNotFoundError where one is missing.
    """
    if lang not in TRANSLATIONS:
        raise UsageError(f"unknown report language {lang!r}: choose one of {', '.join(TRANSLATIONS)}")
    metrics = read_record(run / "metrics.json")
    kind = metrics.get("kind")
    if kind in WRITERS:
        return WRITERS[kind](run, lang)
    _check(metrics, run / "metrics.json")
    provenance = read_record(run / "provenance.json")
    for folder in sorted((run / "models").glob("*/conversion.json")):
        write_card(folder.parent)
    composed = Report(metrics, provenance, TRANSLATIONS[lang])
    pictures = composed.pictures()
    return write_document(run, composed.blocks(pictures), lang, pictures)


def _check(metrics: dict[str, Any], path: Path) -> None:
    for key, kind in {"models": list, "data": dict, "recipe": dict}.items():
        if not isinstance(metrics.get(key), kind):
            raise damaged(path, f"it has no {key!r}")
    for number, model in enumerate(metrics["models"], start=1):
        missing = sorted(_KEYS - set(model)) if isinstance(model, dict) else ["name"]
        if missing:
            raise damaged(path, f"model {number} has no {missing[0]!r}")


_KEYS = {
    "best_epoch", "best_val_ppl", "cache", "context_dim", "context_sharing", "context_source", "error", "history",
    "name", "parameters", "phase1", "seconds_per_epoch", "stop_reason", "trainable_parameters", "val_accuracy",
}  # fmt: skip
