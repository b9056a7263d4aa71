"""Writes the report of a run: Markdown, one self-contained HTML page and two pictures, in English or Japanese.

It reads the run folder's metrics.json and provenance.json and nothing else, so a report can be made again at any
time, in another language, or of a run that is still unfinished. `context-pythia report RUN` calls `write_report`.
"""

from __future__ import annotations

import os
from pathlib import Path

from context_pythia.experiments.document import to_html, to_markdown
from context_pythia.experiments.record import read_metrics, read_record
from context_pythia.experiments.sections import Report
from context_pythia.experiments.sweep.report import write_sweep
from context_pythia.experiments.translations import TRANSLATIONS


def write_report(run: Path, lang: str = "en") -> list[Path]:
    """Writes report.md, report.html (report.ja.md, ... in other languages than English) and the pictures into `run`.

    Returns the paths written; a picture for which no model has figures yet is left out. Raises ValueError for an
    unknown language or a damaged metrics.json or provenance.json, FileNotFoundError where one is missing.
    """
    if lang not in TRANSLATIONS:
        raise ValueError(f"unknown report language {lang!r}: choose one of {', '.join(TRANSLATIONS)}")
    if read_record(run / "metrics.json").get("kind") == "sweep":
        return write_sweep(run, lang)
    metrics, provenance = read_metrics(run / "metrics.json"), read_record(run / "provenance.json")
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
