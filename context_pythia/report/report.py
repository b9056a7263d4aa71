"""Writes the report of a folder: Markdown, one self-contained HTML page and its pictures, in English or Japanese.

It reads only the JSON files of the folder. So it can write a report again at any time, in another language, or before
the run has finished. The folder is one of `compare`, `sweep`, `bench`, `eval` or `convert`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from context_pythia.files import damaged, read_record
from context_pythia.report.bench import DecodeReport, TrainReport
from context_pythia.report.card import RECORD, write_card
from context_pythia.report.document import write_document
from context_pythia.report.evaluation import EvaluationReport
from context_pythia.report.run import RunReport
from context_pythia.report.serving import ServeReport
from context_pythia.report.sweep import SweepReport
from context_pythia.report.texts import Texts

# The class of the report and the prefix of its texts, by the kind of record.
REPORTS: dict[str, tuple[Any, str]] = {
    "run": (RunReport, "run"),
    "sweep": (SweepReport, "sweep"),
    "train": (TrainReport, "bench"),
    "decode": (DecodeReport, "bench"),
    "serve": (ServeReport, "bench"),
    "evaluation": (EvaluationReport, "eval"),
}


def report(run: Path, lang: str = "en") -> None:
    """`write_report`, then print the paths on the console."""
    print("\n".join(f"wrote {path}" for path in write_report(run, lang)))


def write_report(run: Path, lang: str = "en") -> list[Path]:
    """Write report.md, report.html (report.ja.md, ... in other languages than English) and the pictures into `run`.

    The folder of a converted model gets an English card, README.md, instead. There is no picture if no model has
    figures for it.

    Returns:
        the paths of the new files.

    Raises:
        UsageError: the language is unknown, or metrics.json or provenance.json is damaged.
        FileNotFoundError: metrics.json or provenance.json is missing.
    """
    if (run / RECORD).is_file():
        return write_card(run)
    metrics = read_record(run / "metrics.json")
    # Records of runs and of older evaluations have no kind.
    kind = metrics.get("kind") or ("evaluation" if "settings" in metrics else "run")
    if kind not in REPORTS:
        raise damaged(run / "metrics.json", f"its kind is {kind!r}")
    if kind == "run":
        _check(metrics, run / "metrics.json")
    compose, prefix = REPORTS[kind]
    composed = compose(metrics, read_record(run / "provenance.json"), Texts(lang, prefix))
    pictures = composed.pictures()
    written = write_document(run, composed.blocks(pictures), lang, pictures)
    return written + [path for record in sorted(run.glob(f"models/*/{RECORD}")) for path in write_card(record.parent)]


def _check(metrics: dict[str, Any], path: Path) -> None:
    for key, kind in {"models": list, "data": dict, "recipe": dict}.items():
        if not isinstance(metrics.get(key), kind):
            raise damaged(path, f"it has no {key!r}")
    for number, model in enumerate(metrics["models"], start=1):
        if not isinstance(model, dict) or "name" not in model:
            raise damaged(path, f"model {number} has no 'name'")
