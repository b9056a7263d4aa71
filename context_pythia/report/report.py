"""Writes the report of a run: Markdown, one self-contained HTML page and its pictures, in English or Japanese.

It reads the run folder's metrics.json and provenance.json and nothing else, so a report can be made again at any
time, in another language, or of a run that is still unfinished. `context-pythia report RUN` knows the folders of
`sweep`, `bench` and `eval` too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from context_pythia.bench.report import write_bench
from context_pythia.errors import UsageError
from context_pythia.report.document import write_document, wrote
from context_pythia.report.evaluation_report import write_evaluation
from context_pythia.report.sections import Report
from context_pythia.report.translations import TRANSLATIONS
from context_pythia.runs.record import read_metrics, read_record
from context_pythia.sweep.report import write_sweep

# By the kind of record; a run of `compare` names none.
WRITERS: dict[str, Callable[[Path, str], list[Path]]] = {
    "sweep": write_sweep,
    "train": write_bench,
    "decode": write_bench,
    "evaluation": write_evaluation,
}


def report(run: Path, lang: str = "en") -> None:
    """`write_report`, and what it wrote on the console."""
    print(wrote(write_report(run, lang)))


def write_report(run: Path, lang: str = "en") -> list[Path]:
    """Writes report.md, report.html (report.ja.md, ... in other languages than English) and the pictures into `run`.

    Returns the paths written; a picture for which no model has figures yet is left out. Raises ValueError for an
    unknown language or a damaged metrics.json or provenance.json, FileNotFoundError where one is missing.
    """
    if lang not in TRANSLATIONS:
        raise UsageError(f"unknown report language {lang!r}: choose one of {', '.join(TRANSLATIONS)}")
    kind = read_record(run / "metrics.json").get("kind")
    if kind in WRITERS:
        return WRITERS[kind](run, lang)
    metrics, provenance = read_metrics(run / "metrics.json"), read_record(run / "provenance.json")
    composed = Report(metrics, provenance, TRANSLATIONS[lang])
    pictures = composed.pictures()
    return write_document(run, composed.blocks(pictures), lang, pictures)
