"""What `context-pythia bench` says, on the console and in the report of a bench's folder.

This module computes medians and ratios from the single times in metrics.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from statistics import median
from typing import Any

from context_pythia.report.document import Block, Heading, Paragraph, Picture, Table
from context_pythia.report.figures import Panel, draw_panels
from context_pythia.report.formats import DASH, change, integer, megabytes, number, percent
from context_pythia.report.sections import failures, provenance, table
from context_pythia.report.texts import Texts

Row = dict[str, Any]


class BenchReport:
    """The document of a bench: the method, the figures and the machine."""

    def __init__(self, metrics: Mapping[str, Any], record: Mapping[str, Any], text: Texts):
        self.metrics, self.provenance, self.text = metrics, record, text

    def blocks(self) -> Iterator[Block]:
        text, metrics = self.text, self.metrics
        yield Heading(text("title", what=text(metrics["kind"])), level=1)
        how = "serve_how" if metrics["kind"] == "serve" else "how"
        yield Paragraph(text(how, **metrics["settings"] | {"device": self.provenance["device"]}))
        for note in metrics["notes"]:
            yield Paragraph(note, "note")
        yield from self.figures()
        yield from provenance(self.provenance, text)

    def figures(self) -> Iterator[Block]:
        """All tables and pictures."""
        raise NotImplementedError

    def newest(self) -> Iterator[Block]:
        """What the console shows when there are new figures."""
        return self.figures()


class DecodeReport(BenchReport):
    """Prefill, decoding and memory."""

    def __init__(self, metrics: Mapping[str, Any], record: Mapping[str, Any], text: Texts):
        super().__init__(metrics, record, text)
        # The first GPT-NeoX with each kind of cache.
        self.peers: dict[str, Row] = {one["cache"]: one for one in reversed(metrics["models"]) if one["peer"]}

    def figures(self) -> Iterator[Block]:
        text, metrics, settings = self.text, self.metrics, self.metrics["settings"]
        curves: dict[int, dict[str, list[tuple[float, float]]]] = {}
        for cell in sorted(metrics["cells"], key=itemgetter("batch_size", "length")):
            of_batch = curves.setdefault(cell["batch_size"], {})
            for row in cell["rows"]:
                if row["generate"]:
                    of_batch.setdefault(row["name"], []).append((cell["length"], 1000 * median(row["generate"])))
        if any(curves.values()):
            x, y = "tokens in the cache", "generate(), ms/token"
            panels = [Panel(f"Batch {batch}", x, of_batch, y, scaled="xy") for batch, of_batch in curves.items()]
            peers = {entry["name"]: entry["peer"] for entry in metrics["models"]}
            yield Picture("decode.png", text("decode_caption"), partial(draw_panels, panels, peers))
        for cell in metrics["cells"]:
            yield from self._cell(cell)
        if metrics["cells"]:
            attention = ", ".join(sorted({one["attention"] for one in metrics["models"]}))
            peer = self.peers["dynamic"]["name"].rpartition(", ")[0]
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
        by_name = {row["name"]: row for row in cell["rows"]}
        dynamic, static = (by_name.get(self.peers.get(kind, {}).get("name")) for kind in ("dynamic", "static"))
        base = dynamic and dynamic["cache"] and dynamic["cache"]["filled"]
        weights = {entry["name"]: entry["weight_bytes"] for entry in self.metrics["models"]}
        rows = []
        for row in cell["rows"]:
            seconds, filled, peak = row["generate"], row["cache"] and row["cache"]["filled"], row["peak_bytes"]
            rows.append(
                {
                    "model": row["name"],
                    "generate": _spread(seconds, 1000),
                    "dynamic": _times(dynamic, row, "generate"),
                    "static": _times(static, row, "generate"),
                    "rate": f"{cell['batch_size'] / median(seconds):,.1f}" if seconds else DASH,
                    "prefill": _spread(row["prefill"]),
                    "prefill_ratio": _times(row, dynamic, "prefill"),
                    "cache": megabytes(filled),
                    "reduction": percent(1 - filled / base if filled and base else None),
                    "peak": megabytes(None if peak is None else peak + weights[row["name"]]),
                }
            )
        return table(rows, self.text)

    def _memory(self) -> Iterator[Block]:
        models = self.metrics["models"]
        base = (self.peers["dynamic"]["conversation"] or {}).get("fit")
        rows = []
        for entry in models:
            one = entry["conversation"] or {}
            rows.append(
                {
                    "model": entry["name"],
                    "parameters": integer(entry["parameters"]),
                    "weights": megabytes(entry["weight_bytes"]),
                    "conversation": megabytes(one.get("bytes")),
                    "slack": megabytes(one.get("slack")),
                    "fit": integer(one.get("fit")),
                    "fit_ratio": _ratio(one.get("fit"), base),
                    "fit_with_slack": integer(one.get("fit_with_slack")),
                }
            )
        length = max((one["conversation"]["length"] for one in models if one["conversation"]), default=0)
        gb = f"{self.metrics['settings']['memory_gb']:g}"
        yield Heading(self.text("memory", gb=gb, length=integer(length)))
        yield table(rows, self.text)


class TrainReport(BenchReport):
    """Training steps."""

    def figures(self) -> Iterator[Block]:
        text, metrics, plain = self.text, self.metrics, self._plain()
        yield self.steps()
        yield from failures({row["name"]: row["error"] for row in metrics["rows"]}, text)
        shown = {"recipe": metrics["recipe"]["name"], "tokens": integer(metrics["tokens_per_step"])}
        rates = [f"{dtype} {median(found) / 1e9:,.1f} GFLOP/s" for dtype, found in metrics["rates"].items() if found]
        yield Paragraph(text("train_note", plain=plain["name"], rates=", ".join(rates), **shown))

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
                    "peak": megabytes(row["peak_bytes"]),
                    "parameters": integer(row.get("parameters")),
                }
            )
        return table(rows, self.text, text_columns=2)

    def _plain(self) -> Row:
        return next(row for row in self.metrics["rows"] if row["plain"])


class ServeReport(BenchReport):
    """Conversations on one engine beside GPT-NeoX with the same memory, one row per model: medians over the rounds."""

    def __init__(self, metrics: Mapping[str, Any], record: Mapping[str, Any], text: Texts):
        super().__init__(metrics, record, text)
        served = [row for row in metrics["rows"] if row["rounds"]]
        self.rows: list[Row] = [row | {key: _median(row["rounds"], key) for key in row["rounds"][0]} for row in served]
        self.peer: Row = next((row for row in self.rows if row["peer"]), {})

    def figures(self) -> Iterator[Block]:
        settings = self.metrics["settings"]
        yield self._room()
        yield self._speed()
        yield from failures({row["name"]: row["error"] for row in self.metrics["rows"]}, self.text)
        yield Paragraph(self.text("serve_note", **settings | {"length": settings["prompt_tokens"]}))
        if self.rows:
            curves = {row["name"]: list(enumerate(row["first_token_seconds"], 1)) for row in self.rows}
            title, x, y = "How long conversations wait", "conversations with a first token", "seconds since all asked"
            peers = {row["name"]: row["peer"] for row in self.rows}
            draw = partial(draw_panels, [Panel(title, x, curves, y)], peers)
            yield Picture("first-tokens.png", self.text("serve_caption"), draw)

    def _room(self) -> Table:
        rows = [
            {
                "model": row["name"],
                "serve_fit": integer(row["tokens_fit"]),
                "serve_times": _ratio(row["tokens_fit"], self.peer.get("tokens_fit")),
                "serve_conversations": number(row["conversations_fit"], 1),
                "serve_mean": number(row["mean_running"], 1),
                "serve_preemptions": integer(row["preemptions"]),
                "serve_hits": integer(row["prompt_tokens_cached"]),
                "serve_steps": integer(row["steps"]),
            }
            for row in self.rows
        ]
        return table(rows, self.text)

    def _speed(self) -> Table:
        conversations, answer = (self.metrics["settings"][key] for key in ("conversations", "answer_tokens"))
        rows = []
        for row in self.rows:
            seconds, first = row["seconds"], sorted(row["first_token_seconds"])
            rows.append(
                {
                    "model": row["name"],
                    "serve_seconds": number(seconds, 1),
                    "serve_processor": number(row["processor_seconds"], 1),
                    "serve_requests": number(conversations / seconds, 3),
                    "serve_times": _ratio(self.peer.get("seconds"), seconds),
                    "serve_by_processor": _ratio(self.peer.get("processor_seconds"), row["processor_seconds"]),
                    "serve_tokens": number(conversations * answer / seconds, 1),
                    "serve_first": number(median(first), 1),
                    "serve_last": number(first[min(len(first) - 1, int(0.99 * len(first)))], 1),
                }
            )
        return table(rows, self.text)


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


def _median(rounds: Sequence[Row], key: str) -> Any:
    """The median over the rounds, of a number or of each element of a list."""
    values = [one[key] for one in rounds]
    return [median(column) for column in zip(*values, strict=True)] if isinstance(values[0], list) else median(values)


def _ratio(first: float | None, second: float | None) -> str:
    return number(None if first is None or not second else first / second, 2)
