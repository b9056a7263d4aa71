"""What `context-pythia bench --serve` says: conversations on one engine, beside GPT-NeoX with the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from context_pythia.report.bench import BenchReport, Row
from context_pythia.report.document import Block, Paragraph, Table, to_console
from context_pythia.report.figures import Panel, draw_panels, png
from context_pythia.report.formats import DASH, integer
from context_pythia.report.sections import failures, picture

FIRST = "first-tokens.png"


class ServeReport(BenchReport):
    """Capacity, speed and waiting time, one row per model; figures are medians over the rounds."""

    how = "serve_how"

    def console(self) -> str:
        errors = [f"{row['name']}: {row['error']}" for row in self.metrics["rows"] if row["error"]]
        return "\n".join([to_console(self._room()), "", to_console(self._speed()), *errors])

    def pictures(self) -> dict[str, bytes]:
        served = {row["name"]: row for row in self.metrics["rows"] if row["rounds"]}
        if not served:
            return {}
        curves = {
            name: [(i + 1, seconds) for i, seconds in enumerate(_median(row, "first_token_seconds"))]
            for name, row in served.items()
        }
        panel = Panel(
            "How long conversations wait", "conversations with a first token", curves, "seconds since all asked"
        )
        return {FIRST: png(draw_panels, [panel], {name: row["peer"] for name, row in served.items()})}

    def figures(self, pictures: Mapping[str, bytes]) -> Iterator[Block]:
        settings = self.metrics["settings"]
        yield self._room()
        yield self._speed()
        yield from failures({row["name"]: row["error"] for row in self.metrics["rows"]}, self.text)
        yield Paragraph(self.text("serve_note", **settings | {"length": settings["prompt_tokens"]}))
        yield from picture(pictures, FIRST, self.text("serve_caption"))

    def _room(self) -> Table:
        rows = []
        for row in self._served():
            line = [row["name"], integer(row["tokens_fit"]), self._times(row, lambda one: one["tokens_fit"])]
            line += [f"{row['conversations_fit']:.1f}"]
            for key in ("mean_running", "most_running", "preemptions", "prompt_tokens_cached", "steps"):
                value = _median(row, key)
                line.append(f"{value:.1f}" if key == "mean_running" else integer(value))
            rows.append(line)
        keys = ("model", "serve_fit", "serve_times", "serve_conversations", "serve_mean", "serve_most")
        return Table(self.text.row(*keys, "serve_preemptions", "serve_hits", "serve_steps"), rows)

    def _speed(self) -> Table:
        settings, rows = self.metrics["settings"], []
        for row in self._served():
            seconds, first = _median(row, "seconds"), sorted(_median(row, "first_token_seconds"))
            line = [row["name"], f"{seconds:.1f}", f"{_median(row, 'processor_seconds'):.1f}"]
            line += [f"{settings['conversations'] / seconds:.3f}"]
            line += [self._times(row, lambda one: 1 / _median(one, "seconds"))]
            line += [self._times(row, lambda one: 1 / _median(one, "processor_seconds"))]
            line += [f"{settings['conversations'] * settings['answer_tokens'] / seconds:.1f}"]
            line += [f"{median(first):.1f}", f"{first[min(len(first) - 1, int(0.99 * len(first)))]:.1f}"]
            rows.append(line)
        keys = ("model", "serve_seconds", "serve_processor", "serve_requests", "serve_times", "serve_by_processor")
        return Table(self.text.row(*keys, "serve_tokens", "serve_first", "serve_last"), rows)

    def _served(self) -> list[Row]:
        return [row for row in self.metrics["rows"] if row["rounds"]]

    def _times(self, row: Row, figure: Any) -> str:
        """The figure relative to GPT-NeoX's."""
        peer = next((one for one in self._served() if one["peer"]), None)
        return DASH if peer is None else f"{figure(row) / figure(peer):.2f}"


def _median(row: Row, key: str) -> Any:
    """The median over the rounds, of a number or of each element of a list."""
    values = [one[key] for one in row["rounds"]]
    return [median(column) for column in zip(*values, strict=True)] if isinstance(values[0], list) else median(values)
