"""Writes the report of a folder: Markdown, one self-contained HTML page and its pictures, in English or Japanese.

It reads only the JSON files of the folder. So it can write a report again at any time, in another language, or before
the run has finished. The folder is one of `compare`, `sweep`, `bench`, `eval` or `convert`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from context_pythia.files import damaged, read_record
from context_pythia.report.bench import DecodeReport, ServeReport, TrainReport
from context_pythia.report.card import RECORD, write_card
from context_pythia.report.document import Block, Table, to_console, write_documents
from context_pythia.report.evaluation import EvaluationReport
from context_pythia.report.run import RunReport
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


def write_report(folder: Path, *langs: str) -> list[Path]:
    """Write report.md, report.html (report.ja.md, ... in Japanese) and the pictures; English by default.

    The folder of a converted model gets an English card, README.md, instead.

    Returns:
        the paths of the new files.

    Raises:
        UsageError: metrics.json or provenance.json is damaged.
        FileNotFoundError: metrics.json or provenance.json is missing.
    """
    if (folder / RECORD).is_file():
        return [write_card(folder)]
    metrics = read_record(folder / "metrics.json")
    # Records of runs and of older evaluations have no kind.
    kind = metrics.get("kind") or ("evaluation" if "settings" in metrics else "run")
    if kind not in REPORTS or (kind == "run" and not {"models", "data", "recipe"} <= metrics.keys()):
        raise damaged(folder / "metrics.json", "no command of context-pythia has written it")
    compose, prefix = REPORTS[kind]
    record = read_record(folder / "provenance.json")
    documents = {lang: _filled(compose(metrics, record, Texts(lang, prefix)).blocks()) for lang in langs or ("en",)}
    written = write_documents(folder, documents)
    return written + [write_card(path.parent) for path in sorted(folder.glob(f"models/*/{RECORD}"))]


def show(metrics: Mapping[str, Any]) -> None:
    """Print the newest figures of a bench, or all of an evaluation."""
    compose, prefix = REPORTS[metrics["kind"]]
    print("\n" + to_console(_filled(compose(metrics, {}, Texts("en", prefix)).newest())), flush=True)


def _filled(blocks: Iterable[Block]) -> list[Block]:
    """The blocks without the empty tables."""
    return [block for block in blocks if not isinstance(block, Table) or block.rows]
