"""What `context-pythia bench` says, on the console and in the report of a bench's folder.

This module computes medians and ratios from the single times in metrics.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any

from context_pythia.report.document import Block, Heading, Paragraph, Picture, Table
from context_pythia.report.figures import Panel, Points, draw_panels
from context_pythia.report.formats import DASH, change, integer, number, percent
from context_pythia.report.sections import failures, provenance, table
from context_pythia.report.texts import Texts

_MEGABYTE = 2**20
Row = dict[str, Any]


class BenchReport:
    """The document of a bench: the method, the figures and the machine.

    Attributes:
        how: key of the text on the method.
    """

    how = "how"

    def __init__(self, metrics: Mapping[str, Any], record: Mapping[str, Any], text: Texts):
        self.metrics, self.provenance, self.text = metrics, record, text

    def blocks(self) -> Iterator[Block]:
        text, metrics = self.text, self.metrics
        yield Heading(text("title", what=text(metrics["kind"])), level=1)
        yield Paragraph(text(self.how, **metrics["settings"] | {"device": self.provenance["device"]}))
        for note in metrics["notes"]:
            yield Paragraph(note, "note")
        yield from self.figures()
        yield from provenance(self.provenance, text)

    def figures(self) -> Iterator[Block]:
        """All tables and pictures."""
        raise NotImplementedError

    def newest(self) -> Iterator[Block]:
        """The tables that the console shows when there are new figures."""
        raise NotImplementedError


class DecodeReport(BenchReport):
    """Prefill, decoding and memory."""

    def figures(self) -> Iterator[Block]:
        text, metrics, settings = self.text, self.metrics, self.metrics["settings"]
        curves = {batch: self._curves(batch) for batch in sorted({cell["batch_size"] for cell in metrics["cells"]})}
        if any(points for by_name in curves.values() for points in by_name.values()):
            y = "generate(), ms/token"
            panels = [Panel(f"Batch {n}", "tokens in the cache", by, y, scaled="xy") for n, by in curves.items()]
            peers = {entry["name"]: entry["peer"] for entry in metrics["models"]}
            yield Picture("decode.png", text("decode_caption"), partial(draw_panels, panels, peers))
        for cell in metrics["cells"]:
            yield from self._cell(cell)
        if metrics["cells"]:
            attention = ", ".join(sorted({one["attention"] for one in metrics["models"]}))
            peer = self._first_peer("dynamic")["name"].rpartition(", ")[0]
            yield Paragraph(text("cell_note", **settings | {"peer": peer, "attention": attention}))
        yield from self._memory()
        yield Paragraph(text("memory_note", gb=f"{settings['memory_gb']:g}"))

    def newest(self) -> Iterator[Block]:
        """The newest cell; the memory if there is no cell yet."""
        yield from self._cell(self.metrics["cells"][-1]) if self.metrics["cells"] else self._memory()

    def _cell(self, cell: Row) -> Iterator[Block]:
        yield Heading(self.text("cell", batch=cell["batch_size"], length=integer(cell["length"])))
        yield self.cell(cell)
        yield from failures({row["name"]: row["error"] for row in cell["rows"]}, self.text)

    def cell(self, cell: Row) -> Table:
        """Decoding, prefill and memory at one batch size and length, and the ratios to the peers."""
        dynamic, static = self._peers(cell)
        base = dynamic and dynamic["cache"] and dynamic["cache"]["filled"]
        weights = {entry["name"]: entry["weight_bytes"] for entry in self.metrics["models"]}
        rows = []
        for row in cell["rows"]:
            filled, peak = row["cache"] and row["cache"]["filled"], row["peak_bytes"]
            rate = f"{cell['batch_size'] / median(row['generate']):,.1f}" if row["generate"] else DASH
            rows.append(
                {
                    "model": row["name"],
                    "generate": _spread(row["generate"], 1000),
                    "dynamic": _times(dynamic, row, "generate"),
                    "static": _times(static, row, "generate"),
                    "rate": rate,
                    "prefill": _spread(row["prefill"]),
                    "prefill_ratio": _times(row, dynamic, "prefill"),
                    "cache": _megabytes(filled),
                    "reduction": percent(1 - filled / base if filled and base else None),
                    "peak": _megabytes(None if peak is None else peak + weights[row["name"]]),
                }
            )
        return table(rows, self.text)

    def _peers(self, cell: Row) -> list[Row | None]:
        """The rows of GPT-NeoX with a dynamic and with a static cache; None for a missing one."""
        rows = {row["name"]: row for row in cell["rows"]}
        return [rows.get((self._first_peer(kind) or {}).get("name")) for kind in ("dynamic", "static")]

    def _curves(self, batch: int) -> dict[str, Points]:
        """Each row's (length, median ms a token through `generate()`) at a batch size."""
        curves: dict[str, Any] = {entry["name"]: [] for entry in self.metrics["models"]}
        for cell in sorted(self.metrics["cells"], key=lambda cell: cell["length"]):
            for row in cell["rows"]:
                if cell["batch_size"] == batch and row["generate"]:
                    curves[row["name"]].append((cell["length"], 1000 * median(row["generate"])))
        return curves

    def _memory(self) -> Iterator[Block]:
        lengths = [model["conversation"]["length"] for model in self.metrics["models"] if model["conversation"]]
        base = (self._first_peer("dynamic")["conversation"] or {}).get("fit")
        rows = []
        for entry in self.metrics["models"]:
            one = entry["conversation"] or {}
            rows.append(
                {
                    "model": entry["name"],
                    "parameters": integer(entry["parameters"]),
                    "weights": _megabytes(entry["weight_bytes"]),
                    "conversation": _megabytes(one.get("bytes")),
                    "slack": _megabytes(one.get("slack")),
                    "fit": integer(one.get("fit")),
                    "fit_ratio": f"{one['fit'] / base:.2f}" if one and base else DASH,
                    "fit_with_slack": integer(one.get("fit_with_slack")),
                }
            )
        gb = f"{self.metrics['settings']['memory_gb']:g}"
        yield Heading(self.text("memory", gb=gb, length=integer(max(lengths, default=0))))
        yield table(rows, self.text)

    def _first_peer(self, cache: str) -> Any:
        """The entry of the first GPT-NeoX with this kind of cache; None if there is none."""
        return next((entry for entry in self.metrics["models"] if entry["peer"] and entry["cache"] == cache), None)


class TrainReport(BenchReport):
    """Training steps, whole and by part."""

    def figures(self) -> Iterator[Block]:
        text, metrics = self.text, self.metrics
        yield from self.newest()
        plain = self._plain()
        shown = {"recipe": metrics["recipe"]["name"], "tokens": integer(metrics["tokens_per_step"])}
        # In older records each model has its own process.
        key = "train_peak_of_process" if "process_bytes" in plain else "train_peak"
        peak = text(key, empty=_megabytes(plain.get("process_bytes")))
        yield Paragraph(text("train_note", plain=plain["name"], rates=self._rates(), peak=peak, **shown))
        yield Paragraph(text("parts_note"))

    def newest(self) -> Iterator[Block]:
        yield self.steps()
        yield Heading(self.text("parts"))
        yield self._parts()
        yield from failures({row["name"]: row["error"] for row in self.metrics["rows"]}, self.text)

    def steps(self) -> Table:
        plain, peer = self._plain(), next((row for row in self.metrics["rows"] if row["peer"]), None)
        rows = []
        for row in self.metrics["rows"]:
            seconds = _by_round(row)
            overhead = paired_ratio(seconds, _by_round(peer))
            achieved = [row["flops_per_step"] / one for one in seconds]
            share = paired_ratio(achieved, self.metrics["rates"][row["precision"]]) if seconds else None
            rows.append(
                {
                    "model": row["name"],
                    "precision": row["precision"],
                    "step": _spread([step["step"] for turn in row["rounds"] for step in turn]),
                    "rate": integer(self.metrics["tokens_per_step"] / median(seconds)) if seconds else DASH,
                    "speed": number(paired_ratio(_by_round(plain), seconds), 2),
                    "overhead": DASH if overhead is None or row is peer or row["plain"] else change(overhead - 1),
                    "share": percent(share),
                    "peak": _megabytes(row["peak_bytes"]),
                    "parameters": integer(row.get("parameters")),
                }
            )
        return table(rows, self.text, text_columns=2)

    def _parts(self) -> Table:
        """The mean seconds of each recorded part of a step."""
        rows = []
        for row in self.metrics["rows"]:
            steps = [step for turn in row["rounds"] for step in turn]
            if steps:
                means = {part: fmean(step[part] for step in steps) for part in steps[0] if part != "step"}
                rows.append({"model": row["name"]} | {part: number(mean, 3) for part, mean in means.items()})
        return table(rows, self.text)

    def _plain(self) -> Row:
        return next(row for row in self.metrics["rows"] if row["plain"])

    def _rates(self) -> str:
        rates = self.metrics["rates"].items()
        return ", ".join(f"{dtype} {median(found) / 1e9:,.1f} GFLOP/s" for dtype, found in rates if found)


def paired_ratio(own: Sequence[float], peer: Sequence[float]) -> float | None:
    """Median over the common rounds of own seconds divided by the peer's; None without a common round."""
    ratios = [a / b for a, b in zip(own, peer, strict=False)]
    return median(ratios) if ratios else None


def _by_round(row: Row | None) -> list[float]:
    """Median seconds per step in each round of the row."""
    return [median(step["step"] for step in turn) for turn in row["rounds"]] if row else []


def _times(first: Row | None, second: Row | None, kind: str) -> str:
    """The first row's time divided by the second's."""
    return number(paired_ratio(first[kind], second[kind]) if first and second else None, 2)


def _spread(seconds: Sequence[float], unit: float = 1.0) -> str:
    """Median, and in brackets the smallest and largest."""
    if not seconds:
        return DASH
    digits = 1 if median(seconds) * unit >= 100 else 2 if median(seconds) * unit >= 10 else 3
    middle, least, most = (f"{unit * f(seconds):.{digits}f}" for f in (median, min, max))
    return f"{middle} ({least}–{most})"


def _megabytes(value: int | None) -> str:
    return DASH if value is None else f"{value / _MEGABYTE:,.1f}"
