"""What `context-pythia eval` says: a table for the console, and the report of an evaluation's folder."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from context_pythia.report.document import Block, Heading, Paragraph, Table, to_console
from context_pythia.report.formats import DASH, change, integer, kilobytes, percent
from context_pythia.report.sections import (
    FRONTIER,
    Bands,
    Series,
    cache_table,
    data_facts,
    facts,
    failures,
    frontier,
    picture,
    position_picture,
    position_table,
    positions,
    provenance,
)
from context_pythia.report.texts import Texts

Row = dict[str, Any]
_COLUMNS = ("model", "ppl", "change", "accuracy", "cached_ppl", "cached_change", "cache", "reduction", "kl")


class EvaluationReport:
    """The document and the pictures of an evaluation."""

    def __init__(self, metrics: Mapping[str, Any], record: Mapping[str, Any], text: Texts):
        self.metrics, self.provenance, self.text = metrics, record, text
        self.rows: list[Row] = metrics["models"]
        self.names = [
            f"{row['name']} + {row['quantised']}" if row.get("quantised") else row["name"] for row in self.rows
        ]
        self.series = [
            Series(
                name,
                row is self.rows[0],
                self._perplexity(row),
                row["cache"]["bytes_measured"],
                self._positions(row),
            )
            for name, row in zip(self.names, self.rows, strict=True)
            if row["cached"]
        ]

    def console(self) -> str:
        """The figures as an aligned table, and notes below it."""
        lines = to_console(self._table()).split("\n")
        notes = (self.text("note", **self._setup()), self._agreement())
        lines += ["", *(textwrap.fill(note, max(80, len(lines[0]))) for note in notes)]
        lines += [f"{name}: {row['error']}" for name, row in zip(self.names, self.rows, strict=True) if row["error"]]
        if any(one.positions for one in self.series):
            lines += ["", self.text("positions_console"), "", to_console(position_table(self.series, self.text))]
        if found := self._tasks():
            lines += ["", to_console(found)]
        return "\n".join(lines)

    def pictures(self) -> dict[str, bytes]:
        return frontier(self.series) | position_picture(self.series)

    def blocks(self, pictures: Mapping[str, bytes]) -> Iterator[Block]:
        text, rows, setup = self.text, self.rows, self._setup()
        yield Heading(text("title"), level=1)
        yield Paragraph(self._headline(), "lead")
        yield self._table()
        yield Paragraph(text("note", **setup))
        disagreeing = any(row["cached"] and row["cached"]["agrees"] is False for row in rows)
        yield Paragraph(self._agreement(), "alert" if disagreeing else "plain")
        residual = [row["cache"].get("residual_length") for row in rows if row["cache"] and row.get("quantised")]
        if residual and residual[0] is not None:
            yield Paragraph(text("quantised", residual=residual[0]))
        yield from failures(dict(zip(self.names, (row["error"] for row in rows), strict=True)), text)
        for note in self.metrics["notes"]:
            yield Paragraph(note, "note")
        yield from picture(pictures, FRONTIER, text("caption", **setup))
        yield from positions(self.series, text, pictures)
        if found := self._tasks():
            yield Heading(text("tasks"))
            yield found
        yield Heading(text("bytes"))
        yield cache_table(dict(zip(self.names, (row["cache"] for row in rows), strict=True)), text)
        yield Heading(text("settings"))
        data, settings = self.metrics["data"], self.metrics["settings"]
        shown = data_facts(data, text)
        shown |= {"train.precision": settings["dtype"], "train.batch_size": str(settings["batch_size"])}
        yield facts(shown, text)
        yield from provenance({"data_fingerprint": data["fingerprint"], **self.provenance}, text)

    def _headline(self) -> str:
        """The best perplexity with a smaller cache.

        It compares only caches that were filled by all tokens. A quantized cache was filled by few, so its perplexity
        depends on chance.
        """
        first, name = self.rows[0], self.names[0]
        smaller = [row for row in self.rows if row["perplexity"] and row["cache"]["reduction_measured"] > 0]
        if not smaller:
            return self.text("none_smaller", first=name, ppl=_number(first["perplexity"]))
        best = min(smaller, key=lambda row: row["perplexity"])
        return self.text(
            "best",
            first=name,
            name=best["name"],
            reduction=percent(best["cache"]["reduction_measured"], 2),
            kb=kilobytes(best["cache"]["bytes_measured"]),
            first_kb=kilobytes(first["cache"]["bytes_measured"]),
            ppl=_number(best["perplexity"]),
            first_ppl=_number(first["perplexity"]),
            change=change(best["change"], 2),
        )

    def _whole(self, row: Row) -> Row:
        """The same model's row with the perplexity of all tokens; the first row if it has only a quantized one."""
        same = (one for one in self.rows if one["name"] == row["name"] and one["perplexity"] is not None)
        return next(same, self.rows[0])

    def _perplexity(self, row: Row) -> float:
        """Perplexity on all tokens.

        A quantized cache was filled by fewer tokens. It gets the perplexity of its model without quantization, times
        the change on these tokens.
        """
        whole = self._whole(row)
        if row is whole:
            return row["perplexity"]
        return whole["perplexity"] * row["cached"]["perplexity"] / whole["cached"]["perplexity"]

    def _positions(self, row: Row) -> Bands:
        """`_perplexity` for each band; empty in records of an older version."""
        whole = self._whole(row)
        bands = whole.get("perplexity_by_position") or []
        if row is whole or not bands:
            return bands
        found = (one["cached"]["perplexity_by_position"] for one in (row, whole))
        return [
            band | {"perplexity": band["perplexity"] * a["perplexity"] / b["perplexity"]}
            for band, a, b in zip(bands, *found, strict=True)
        ]

    def _table(self) -> Table:
        rows = []
        for name, row in zip(self.names, self.rows, strict=True):
            cached, cache = row["cached"] or {}, row["cache"] or {}
            kl, difference = row["kl"], row["logit_difference"]
            rows.append(
                [name, _number(row["perplexity"]), change(row["change"], 2), percent(row["accuracy"], 2)]
                + [_number(cached.get("perplexity")), change(cached.get("change"), 2)]
                + [kilobytes(cache.get("bytes_measured")), percent(cache.get("reduction_measured"), 2)]
                + [DASH if kl is None else f"{abs(kl):.3g}", percent(row["agreement"], 2)]
                + [DASH if difference is None else f"{difference:.2g}"]
            )
        return Table(self.text.row(*_COLUMNS, "agreement", "difference"), rows)

    def _setup(self) -> dict[str, str]:
        first = self.rows[0]
        return {
            "first": self.names[0],
            "tokens": integer(first["tokens"]),
            "cached_tokens": integer(first["cached"]["tokens"]),
            "length": integer(first["cache"]["length"]),
            "dtype": first["cache"]["dtype"],
        }

    def _agreement(self) -> str:
        """Says whether the two passes give the same perplexity on the same tokens, and shows both if they differ."""
        wrong = [
            f"{name} {row['cached']['parallel_perplexity']:.6g} / {row['cached']['perplexity']:.6g}"
            for name, row in zip(self.names, self.rows, strict=True)
            if row["cached"] and row["cached"]["agrees"] is False
        ]
        key = "disagree" if wrong else "agree"
        return self.text(key, **self._setup(), found=", ".join(wrong))

    def _tasks(self) -> Table | None:
        """The table of tasks, one line per model, task and figure; None without tasks."""
        lines = [
            [name, task, metric, f"{value:.4f}"]
            for name, row in zip(self.names, self.rows, strict=True)
            for task, figures in (row.get("tasks") or {}).items()
            for metric, value in figures.items()
            if not metric.endswith("_stderr")
        ]
        return Table(["model", "task", "metric", "value"], lines) if lines else None


def console_table(metrics: Mapping[str, Any]) -> str:
    """The figures of an evaluation for the console."""
    return EvaluationReport(metrics, {}, Texts("en", "eval")).console()


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:,.2f}" if value >= 1000 else f"{value:.5g}"
