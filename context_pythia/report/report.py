"""Writes the report of a folder: Markdown, one self-contained HTML page and its pictures, in English or Japanese.

It reads only the JSON files of the folder. So it can write a report again at any time, in another language, or before
the run has finished. The folder is one of `compare`, `sweep`, `bench`, `eval` or `convert`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from context_pythia.files import damaged, read_record
from context_pythia.report.bench import DecodeReport, TrainReport
from context_pythia.report.card import RECORD, write_card
from context_pythia.report.document import Block, Table, to_console, write_documents
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


def write_report(run: Path, *langs: str) -> list[Path]:
    """Write report.md, report.html (report.ja.md, ... in Japanese) and the pictures into `run`; English by default.

    The folder of a converted model gets an English card, README.md, instead. There is no picture if no model has
    figures for it.

    Returns:
        the paths of the new files.

    Raises:
        UsageError: a language is unknown, or metrics.json or provenance.json is damaged.
        FileNotFoundError: metrics.json or provenance.json is missing.
    """
    if (run / RECORD).is_file():
        return write_card(run)
    metrics = read_record(run / "metrics.json")
    # Records of runs and of older evaluations have no kind.
    kind = metrics.get("kind") or ("evaluation" if "settings" in metrics else "run")
    if kind not in REPORTS or (kind == "run" and not {"models", "data", "recipe"} <= metrics.keys()):
        raise damaged(run / "metrics.json", "no command of context-pythia has written it")
    compose, prefix = REPORTS[kind]
    record = read_record(run / "provenance.json")
    documents = {
        lang: _without_empty_tables(compose(metrics, record, Texts(lang, prefix)).blocks()) for lang in langs or ("en",)
    }
    written = write_documents(run, documents)
    return written + [path for record in sorted(run.glob(f"models/*/{RECORD}")) for path in write_card(record.parent)]


def show(metrics: Mapping[str, Any]) -> None:
    """Print the newest figures of a bench, or all of an evaluation."""
    compose, prefix = REPORTS[metrics["kind"]]
    print("\n" + to_console(_without_empty_tables(compose(metrics, {}, Texts("en", prefix)).newest())), flush=True)


def _without_empty_tables(blocks: Iterable[Block]) -> list[Block]:
    return [block for block in blocks if not isinstance(block, Table) or block.rows]
