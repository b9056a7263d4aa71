"""Runs the work of a command, then shows the results: tables on the console, and the report of its folder.

The work knows nothing of reports, and reports read only its JSON files.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from context_pythia import processes
from context_pythia.errors import Failure, UsageError


def compare(recipe: Any, out: Path, lang: str = "en", **options: Any) -> None:
    """`runs.train.compare`, then the report, even if a model failed."""
    from context_pythia.runs import train

    with _reported(out, lang, after=Failure):
        train.compare(recipe, out, **options)


def sweep(plan: Any, out: Path, lang: str = "en", **options: Any) -> dict[str, Any]:
    """`sweep.worker.sweep`, then the report, even if all trials failed."""
    from context_pythia.sweep import worker

    with _reported(out, lang, after=Failure):
        return worker.sweep(plan, out, **options)


def bench(*args: Any, out: Path | None = None, lang: str = "en", **options: Any) -> dict[str, Any]:
    """`bench.run.bench` with its tables, then the report, even after an interruption."""
    from context_pythia.bench import run
    from context_pythia.report.report import show

    with _reported(out, lang, after=BaseException):
        return run.bench(*args, **options | {"out": out, "show": show})


def serve(*args: Any, out: Path | None = None, lang: str = "en", **options: Any) -> dict[str, Any]:
    """`bench.serve.serve` with its tables, then the report, even after an interruption."""
    from context_pythia.bench import serve as served
    from context_pythia.report.report import show

    with _reported(out, lang, after=BaseException):
        return served.serve(*args, **options | {"out": out, "show": show})


def evaluate(*args: Any, out: Path | None = None, lang: str = "en", **options: Any) -> dict[str, Any]:
    """`runs.evaluate.evaluate`, the table, and the report."""
    from context_pythia.report.report import show
    from context_pythia.runs import evaluate

    with _reported(out, lang):
        metrics = evaluate.evaluate(*args, **options | {"out": out})
        show(metrics)
    return metrics


def convert(model: str, out: Path, *args: Any, **options: Any) -> None:
    """`runs.convert.Conversion`, and the model's card."""
    from context_pythia.report.card import write_card
    from context_pythia.runs.convert import Conversion

    Conversion(model, out, *args, **options).run()
    write_card(out)


def info(*args: Any, as_json: bool = False, **options: Any) -> None:
    """`runs.info.info`, as a table or as JSON."""
    from context_pythia.report.info import info_table
    from context_pythia.runs import info

    models = info.info(*args, **options)
    print(json.dumps({"models": models}, indent=2) if as_json else info_table(models))


@contextlib.contextmanager
def _reported(out: Path | None, lang: str, after: type[BaseException] | tuple[()] = ()) -> Iterator[None]:
    """Write the report of `out` in English and in `lang` after the work in the `with` block, or after an error of type
    `after`. A refused command writes no report.
    """
    try:
        yield
    except (UsageError, OSError):
        raise
    except after:
        _write(out, lang)
        raise
    _write(out, lang)


def _write(out: Path | None, lang: str) -> None:
    if out is None or not processes.is_main() or not all((out / f"{name}.json").exists() for name in _RECORDS):
        return
    from context_pythia.report.report import write_report

    written = write_report(out, *dict.fromkeys(("en", lang)))
    print("\n" + "\n".join(f"wrote {path}" for path in written))


_RECORDS = ("metrics", "provenance")
