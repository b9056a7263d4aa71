"""What `context-pythia bench` says: tables for the console, and the report of a bench's folder.

This module computes medians, ratios and crossover points from the single times in metrics.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from context_pythia.report.document import Block, Heading, Paragraph, Picture, Table, to_console
from context_pythia.report.figures import Panel, Points, draw_bars, draw_panels, png
from context_pythia.report.formats import DASH, change, integer, number, percent
from context_pythia.report.sections import failures, picture, provenance
from context_pythia.report.texts import Texts

DECODE, MEMORY, PARTS = "decode.png", "memory.png", "parts.png"
_MEGABYTE = 2**20
Row = dict[str, Any]


def show(metrics: Mapping[str, Any]) -> None:
    """Print the newest figures: for training at its end; for decoding first the memory, then each cell."""
    text = Texts("en", "bench")
    report = (TrainReport if metrics["kind"] == "train" else DecodeReport)(metrics, {}, text)
    print("\n" + report.console(), flush=True)


class BenchReport:
    """The document of a bench: the method, the figures and the machine.

    Attributes:
        how: key of the text on the method.
    """

    how = "how"

    def __init__(self, metrics: Mapping[str, Any], record: Mapping[str, Any], text: Texts):
        self.metrics, self.provenance, self.text = metrics, record, text

    def blocks(self, pictures: Mapping[str, bytes]) -> Iterator[Block]:
        text, metrics = self.text, self.metrics
        yield Heading(text("title", what=text(metrics["kind"])), level=1)
        yield Paragraph(text(self.how, **metrics["settings"] | {"device": self.provenance["device"]}))
        for note in metrics["notes"]:
            yield Paragraph(note, "note")
        yield from self.figures(pictures)
        yield from provenance(self.provenance, text)

    def figures(self, pictures: Mapping[str, bytes]) -> Iterator[Block]:
        raise NotImplementedError


class DecodeReport(BenchReport):
    """Prefill, decoding and memory."""

    def console(self) -> str:
        """The newest cell; the memory if there is no cell yet."""
        if not self.metrics["cells"]:
            return "\n".join([self._memory_title(), "", to_console(self._memory())])
        cell = self.metrics["cells"][-1]
        errors = [f"{row['name']}: {row['error']}" for row in cell["rows"] if row["error"]]
        return "\n".join(
            [self._title(cell), "", to_console(self.decoding(cell)), "", to_console(self.prefill(cell)), *errors]
        )

    def pictures(self) -> dict[str, bytes]:
        curves = {batch: self._curves(batch) for batch in self._batches()}
        if not any(points for by_name in curves.values() for points in by_name.values()):
            return {}
        peers = {entry["name"]: entry["peer"] for entry in self.metrics["models"]}
        panels = []
        for batch, by_name in curves.items():
            crossings = {name: at for name, b, at in self.crossings() if b == batch and at is not None}
            stars = {name: (at, 1000 * _between(by_name[name], at)) for name, at in crossings.items()}
            shown = {name: [(length, 1000 * s) for length, s in points] for name, points in by_name.items()}
            title = f"Batch {batch} (star: faster than every GPT-NeoX from here)"
            y = "generate(), ms/token"
            panels.append(Panel(title, "tokens in the cache", shown, y, stars, scaled="xy"))
        bars = {}
        for row in self._largest()["rows"]:
            if row["cache"] and row["peak_bytes"] is not None:
                cache = row["cache"]["filled"]
                parts = {"weights": self._entry(row["name"])["weight_bytes"], "cache": cache}
                parts |= {"rest of the peak": max(0, row["peak_bytes"] - cache)}
                bars[row["name"]] = {kind: value / _MEGABYTE for kind, value in parts.items()}
        pictures = {DECODE: png(draw_panels, panels, peers)}
        return pictures | ({MEMORY: png(draw_bars, bars, "MB", "Memory")} if bars else {})

    def figures(self, pictures: Mapping[str, bytes]) -> Iterator[Block]:
        text, metrics, settings = self.text, self.metrics, self.metrics["settings"]
        yield from picture(pictures, DECODE, text("decode_caption"))
        for cell in metrics["cells"]:
            yield Heading(self._title(cell))
            yield self.decoding(cell)
            yield self.prefill(cell)
            yield from failures({row["name"]: row["error"] for row in cell["rows"]}, text)
        if metrics["cells"]:
            attention = ", ".join(sorted({one["attention"] for one in metrics["models"]}))
            peer = self._first_peer("dynamic")["name"].rpartition(", ")[0]
            yield Paragraph(text("cell_note", **settings | {"peer": peer, "attention": attention}))
            yield Heading(text("crossover"))
            yield self._crossover_table()
            yield Paragraph(text("crossover_note"))
        yield Heading(self._memory_title())
        yield self._memory()
        yield Paragraph(text("memory_note", gb=f"{settings['memory_gb']:g}"))
        if MEMORY in pictures:
            cell = self._largest()
            yield Picture(MEMORY, text("memory_caption", batch=cell["batch_size"], length=integer(cell["length"])))

    def prefill(self, cell: Row) -> Table:
        """Seconds of prefill, and memory, at one batch size and length."""
        dynamic, _ = self._peers(cell)
        table: list[list[str]] = []
        for row in cell["rows"]:
            cache, most = row["cache"], row["peak_bytes"]
            base = dynamic["cache"] if dynamic else None
            line = [row["name"], _spread(row["prefill"]), _times(row, dynamic, "prefill")]
            line += [_megabytes(cache["filled"] if cache else None)]
            line += [percent(1 - cache["filled"] / base["filled"] if cache and base else None)]
            line += [_megabytes(None if most is None else most + self._entry(row["name"])["weight_bytes"])]
            table.append(line)
        return Table(self.text.row("model", "prefill", "prefill_ratio", "cache", "reduction", "peak"), table)

    def decoding(self, cell: Row) -> Table:
        """Milliseconds a token at one batch size and length, and the speed relative to the peers."""
        table: list[list[str]] = []
        for row in cell["rows"]:
            line = [row["name"]]
            for kind in ("generate", "decode"):
                line += [_spread(row[kind], 1000), *(_times(peer, row, kind) for peer in self._peers(cell))]
            rate = f"{cell['batch_size'] / median(row['generate']):,.1f}" if row["generate"] else DASH
            table.append([*line, rate])
        keys = ("model", "generate", "dynamic", "static", "forward", "dynamic", "static", "rate")
        return Table(self.text.row(*keys), table)

    def _peers(self, cell: Row) -> list[Row | None]:
        """The rows of GPT-NeoX with a dynamic and with a static cache; None for a missing one."""
        rows = {row["name"]: row for row in cell["rows"]}
        return [rows.get((self._first_peer(kind) or {}).get("name")) for kind in ("dynamic", "static")]

    def crossings(self) -> Iterator[tuple[str, int, float | None]]:
        """Each smaller cache's name, batch size, and the length from which it decodes faster than every GPT-NeoX."""
        peers = {entry["name"] for entry in self.metrics["models"] if entry["peer"]}
        for batch in self._batches():
            curves = self._curves(batch)
            fastest: dict[float, float] = {}
            for length, seconds in (point for name in curves if name in peers for point in curves[name]):
                fastest[length] = min(seconds, fastest.get(length, math.inf))
            for name, points in curves.items():
                if name not in peers and points and fastest:
                    yield name, batch, crossover(points, list(fastest.items()))

    def _batches(self) -> list[int]:
        return sorted({cell["batch_size"] for cell in self.metrics["cells"]})

    def _curves(self, batch: int) -> dict[str, Points]:
        """Each row's (length, median seconds a token through `generate()`) at a batch size."""
        curves: dict[str, Any] = {entry["name"]: [] for entry in self.metrics["models"]}
        for cell in sorted(self.metrics["cells"], key=lambda cell: cell["length"]):
            for row in cell["rows"]:
                if cell["batch_size"] == batch and row["generate"]:
                    curves[row["name"]].append((cell["length"], median(row["generate"])))
        return curves

    def _crossover_table(self) -> Table:
        lengths = sorted({cell["length"] for cell in self.metrics["cells"]})
        rows = []
        for name, batch, length in self.crossings():
            if length is None:
                found = self.text("never", length=integer(lengths[-1]))
            elif length == lengths[0]:
                found = self.text("always", length=integer(lengths[0]))
            else:
                found = self.text("about", length=integer(float(f"{length:.2g}")))
            rows.append([name, str(batch), found])
        return Table(self.text.row("model", "batch", "crossover_length"), rows)

    def _memory_title(self) -> str:
        lengths = [model["conversation"]["length"] for model in self.metrics["models"] if model["conversation"]]
        gb = f"{self.metrics['settings']['memory_gb']:g}"
        return self.text("memory", gb=gb, length=integer(max(lengths, default=0)))

    def _memory(self) -> Table:
        keys = ("model", "parameters", "weights", "conversation", "slack", "fit", "dynamic", "fit_with_slack")
        base = (self._first_peer("dynamic")["conversation"] or {}).get("fit")
        rows = []
        for entry in self.metrics["models"]:
            line = [entry["name"], integer(entry["parameters"]), _megabytes(entry["weight_bytes"])]
            if one := entry["conversation"]:
                line += [_megabytes(one["bytes"]), _megabytes(one["slack"]), integer(one["fit"])]
                line += [f"{one['fit'] / base:.2f}" if base else DASH]
                line += [integer(one["fit_with_slack"]), integer(one["tokens_fit"])]
            rows.append(line + [DASH] * (len(keys) + 1 - len(line)))
        return Table(self.text.row(*keys, "fit_tokens"), rows)

    def _title(self, cell: Row) -> str:
        return self.text("cell", batch=cell["batch_size"], length=integer(cell["length"]))

    def _entry(self, name: str) -> Row:
        return next(entry for entry in self.metrics["models"] if entry["name"] == name)

    def _first_peer(self, cache: str) -> Any:
        """The entry of the first GPT-NeoX with this kind of cache; None if there is none."""
        return next((entry for entry in self.metrics["models"] if entry["peer"] and entry["cache"] == cache), None)

    def _largest(self) -> Row:
        return max(self.metrics["cells"], key=lambda cell: cell["batch_size"] * cell["length"])


class TrainReport(BenchReport):
    """Training steps, whole and by part."""

    def console(self) -> str:
        lines = [f"matrix products alone: {self._rates()}", "", to_console(self.steps()), ""]
        lines += [self.text("parts"), "", to_console(self._parts())]
        return "\n".join([*lines, *(f"{row['name']}: {row['error']}" for row in self.metrics["rows"] if row["error"])])

    def pictures(self) -> dict[str, bytes]:
        parts = {row["name"]: mean_parts(row) for row in self.metrics["rows"] if row["rounds"]}
        return {PARTS: png(draw_bars, parts, "seconds", "A training step by part")} if parts else {}

    def figures(self, pictures: Mapping[str, bytes]) -> Iterator[Block]:
        text, metrics = self.text, self.metrics
        yield self.steps()
        yield from failures({row["name"]: row["error"] for row in metrics["rows"]}, text)
        plain = self._plain()
        shown = {"recipe": metrics["recipe"]["name"], "tokens": integer(metrics["tokens_per_step"])}
        # In older records each model has its own process.
        key = "train_peak_of_process" if "process_bytes" in plain else "train_peak"
        peak = text(key, empty=_megabytes(plain.get("process_bytes")))
        shown |= {"plain": plain["name"], "rates": self._rates(), "peak": peak}
        yield Paragraph(text("train_note", **shown))
        yield Heading(text("parts"))
        yield self._parts()
        yield Paragraph(text("parts_note"))
        yield from picture(pictures, PARTS, text("parts_caption"))

    def steps(self) -> Table:
        keys = ("model", "precision", "step", "rate", "speed", "overhead", "share", "peak", "parameters")
        plain, peer = self._plain(), next((row for row in self.metrics["rows"] if row["peer"]), None)
        rows = []
        for row in self.metrics["rows"]:
            seconds = _by_round(row)
            speed, overhead = paired_ratio(_by_round(plain), seconds), paired_ratio(seconds, _by_round(peer))
            achieved = [row["flops_per_step"] / one for one in seconds]
            share = paired_ratio(achieved, self.metrics["rates"][row["precision"]]) if seconds else None
            rows.append(
                [row["name"], row["precision"], _spread([step["step"] for turn in row["rounds"] for step in turn])]
                + [integer(self.metrics["tokens_per_step"] / median(seconds)) if seconds else DASH, number(speed, 2)]
                + [DASH if overhead is None or row is peer or row["plain"] else change(overhead - 1), percent(share)]
                + [_megabytes(row["peak_bytes"]), integer(row.get("parameters"))]
            )
        return Table(self.text.row(*keys), rows, text_columns=2)

    def _parts(self) -> Table:
        means = {row["name"]: mean_parts(row) for row in self.metrics["rows"]}
        keys = next((list(parts) for parts in means.values() if parts), [])
        rows = [[name, *(number(parts.get(key), 3) for key in keys)] for name, parts in means.items()]
        return Table(self.text.row("model", *keys), rows)

    def _plain(self) -> Row:
        return next(row for row in self.metrics["rows"] if row["plain"])

    def _rates(self) -> str:
        rates = self.metrics["rates"].items()
        return ", ".join(f"{dtype} {median(found) / 1e9:,.1f} GFLOP/s" for dtype, found in rates if found)


def crossover(own: Points, peer: Points) -> float | None:
    """The length from which `own` is no slower than `peer`; None if it is still slower at the longest length.

    Both are (length, seconds). Between two lengths both times are interpolated as powers of the length. If `own` is no
    slower from the shortest length on, the result is that length.
    """
    others = dict(peer)
    gaps = [(length, math.log(seconds / others[length])) for length, seconds in sorted(own) if length in others]
    slower = [i for i, (_, gap) in enumerate(gaps) if gap > 0]
    if not gaps or (slower and slower[-1] == len(gaps) - 1):
        return None
    if not slower:
        return gaps[0][0]
    (short, above), (long, below) = gaps[slower[-1] : slower[-1] + 2]
    return short * (long / short) ** (above / (above - below))


def paired_ratio(own: Sequence[float], peer: Sequence[float]) -> float | None:
    """Median over the common rounds of own seconds divided by the peer's; None without a common round."""
    ratios = [a / b for a, b in zip(own, peer, strict=False)]
    return median(ratios) if ratios else None


def mean_parts(row: Row) -> dict[str, float]:
    """The mean seconds of each recorded part of a step; empty if there is no step."""
    steps = [step for turn in row["rounds"] for step in turn]
    return {part: fmean(step[part] for step in steps) for part in steps[0] if part != "step"} if steps else {}


def _between(points: Points, x: float) -> float:
    """The value at x, interpolated linearly between the logarithms of the points."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= x <= x1:
            return y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0))
    return points[0][1]


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
