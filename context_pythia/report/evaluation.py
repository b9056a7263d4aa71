"""What `context-pythia eval` says, on the console and in the report of an evaluation's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from context_pythia.report import sections
from context_pythia.report.document import Block, Heading, Paragraph, Picture, Table
from context_pythia.report.figures import Panel, Series, draw_panels
from context_pythia.report.formats import DASH, change, integer, kilobytes, percent
from context_pythia.report.texts import Texts

Row = dict[str, Any]


class EvaluationReport:
    """The document of an evaluation. A model with a quantized cache has a row, and a name, of its own."""

    def __init__(self, metrics: Mapping[str, Any], record: Mapping[str, Any], text: Texts):
        self.metrics, self.provenance, self.text = metrics, record, text
        self.rows: dict[str, Row] = {
            f"{row['name']} + {row['quantised']}" if row.get("quantised") else row["name"]: row
            for row in metrics["models"]
        }
        self.first, self.first_row = next(iter(self.rows.items()))
        self.quantized = [row for row in self.rows.values() if row.get("quantised")]
        # Quantized caches are filled token by token, with the first tokens alone. Beside them all models are compared
        # by the perplexity of that pass; otherwise by that of all tokens.
        self.series = [
            Series(
                name,
                name == self.first,
                (row["cached"] if self.quantized else row)["perplexity"],
                row["cache"]["bytes_measured"],
                row.get("perplexity_by_position") or (),  # quantized caches and older records have none
            )
            for name, row in self.rows.items()
            if row["cached"]
        ]

    def blocks(self) -> Iterator[Block]:
        text = self.text
        yield Heading(text("title"), level=1)
        yield sections.headline(self.series, text)
        for note in self.metrics["notes"]:
            yield Paragraph(note, "note")
        yield from self.newest()
        yield Heading(text("bytes"))
        yield sections.cache_table({name: row["cache"] for name, row in self.rows.items() if row["cache"]}, text)
        yield Heading(text("settings"))
        data, settings = self.metrics["data"], self.metrics["settings"]
        shown = {"train.precision": settings["dtype"], "train.batch_size": str(settings["batch_size"])}
        yield sections.facts(sections.data_facts(data, text) | shown, text)
        yield from sections.provenance({"data_fingerprint": data["fingerprint"], **self.provenance}, text)

    def newest(self) -> Iterator[Block]:
        """All figures, which the console shows too."""
        text, first, rows = self.text, self.first_row, self.rows
        setup = {
            "first": self.first,
            "tokens": integer(first["tokens"]),
            "cached_tokens": integer(first["cached"]["tokens"]),
            "length": integer(first["cache"]["length"]),
            "dtype": first["cache"]["dtype"],
        }
        yield self._results()
        yield Paragraph(text("note", **setup))
        found = ", ".join(
            f"{name} {cached['parallel_perplexity']:.6g} / {cached['perplexity']:.6g}"
            for name, row in rows.items()
            if (cached := row["cached"]) and cached["agrees"] is False
        )
        yield Paragraph(text("disagree", found=found, **setup), "alert") if found else Paragraph(text("agree", **setup))
        if caches := [row["cache"] for row in self.quantized if row["cache"]]:
            yield Paragraph(text("quantised", residual=caches[0]["residual_length"]))
        yield from sections.failures({name: row["error"] for name, row in rows.items()}, text)
        yield from sections.frontier(self.series, text("quantised_caption" if self.quantized else "caption", **setup))
        yield from sections.positions(self.series, text)
        yield from self._recall()
        yield from self._tasks()

    def _results(self) -> Table:
        rows = []
        for name, row in self.rows.items():
            cached, cache = row["cached"] or {}, row["cache"] or {}
            kl, difference, size = row["kl"], row["logit_difference"], cache.get("bytes_measured")
            rows.append(
                {
                    "model": name,
                    "ppl": _number(row["perplexity"]),
                    "change": self._change(row, self.first_row),
                    "accuracy": percent(row["accuracy"], 2),
                    "cached_ppl": _number(cached.get("perplexity")),
                    "cached_change": self._change(cached, self.first_row["cached"]),
                    "kb": kilobytes(size),
                    "reduction": percent(size and 1 - size / self.first_row["cache"]["bytes_measured"], 2),
                    "kl": DASH if kl is None else f"{abs(kl):.3g}",
                    "agreement": percent(row["agreement"], 2),
                    "difference": DASH if difference is None else f"{difference:.2g}",
                }
            )
        return sections.table(rows, self.text)

    def _change(self, figures: Row, first: Row) -> str:
        """The change of the perplexity to the first model's."""
        own = None if figures is first else figures.get("perplexity")
        return change(own and own / first["perplexity"] - 1, 2)

    def _recall(self) -> Iterator[Block]:
        """How often each model found a word so many tokens back."""
        found = {name: row["recall"] for name, row in self.rows.items() if row.get("recall")}
        if found:
            tests = zip(*found.values(), strict=True)
            lines = [
                [f"{first['task']}, {first['distance']}", *(percent(one["accuracy"]) for one in (first, *others))]
                + [percent(first["chance"])]
                for first, *others in tests
            ]
            yield Heading(self.text("recall"))
            yield Table([self.text("recall_distance"), *found, self.text("recall_chance")], lines)
            tasks: dict[str, dict[str, list[tuple[float, float]]]] = {}
            for name, rows in found.items():
                for row in rows:
                    curves = tasks.setdefault(row["task"], {})
                    curves.setdefault(name, []).append((row["distance"], 100 * row["accuracy"]))
            for row in rows:
                tasks[row["task"]].setdefault("chance", []).append((row["distance"], 100 * row["chance"]))
            panels = [
                Panel(f"{task}: found (%)", "tokens back", curves, scaled="x", shares=True)
                for task, curves in tasks.items()
            ]
            draw = partial(draw_panels, panels, sections.baselines(self.series) | {"chance": True})
            yield Picture("recall.png", self.text("recall_caption"), draw)

    def _tasks(self) -> Iterator[Block]:
        """One line per model, task and figure."""
        lines = [
            [name, task, metric, f"{value:.4f}"]
            for name, row in self.rows.items()
            for task, figures in (row.get("tasks") or {}).items()
            for metric, value in figures.items()
            if not metric.endswith("_stderr")
        ]
        if lines:
            yield Heading(self.text("tasks"))
            yield Table(["model", "task", "metric", "value"], lines)


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:,.2f}" if value >= 1000 else f"{value:.5g}"
