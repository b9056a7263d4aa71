"""What `context-pythia bench --serve` says: conversations on one engine, beside GPT-NeoX with the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

from context_pythia.report.bench import BenchReport, Row
from context_pythia.report.document import Block, Paragraph, Picture, Table
from context_pythia.report.figures import Panel, draw_panels
from context_pythia.report.formats import DASH, integer
from context_pythia.report.sections import failures, table


class ServeReport(BenchReport):
    """Capacity, speed and waiting time, one row per model; figures are medians over the rounds."""

    how = "serve_how"

    def figures(self) -> Iterator[Block]:
        settings, served = self.metrics["settings"], self._served()
        yield from self.newest()
        yield Paragraph(self.text("serve_note", **settings | {"length": settings["prompt_tokens"]}))
        if served:
            curves = {row["name"]: list(enumerate(_median(row, "first_token_seconds"), 1)) for row in served}
            title, x, y = "How long conversations wait", "conversations with a first token", "seconds since all asked"
            peers = {row["name"]: row["peer"] for row in served}
            draw = partial(draw_panels, [Panel(title, x, curves, y)], peers)
            yield Picture("first-tokens.png", self.text("serve_caption"), draw)

    def newest(self) -> Iterator[Block]:
        yield self._room()
        yield self._speed()
        yield from failures({row["name"]: row["error"] for row in self.metrics["rows"]}, self.text)

    def _room(self) -> Table:
        rows = [
            {
                "model": row["name"],
                "serve_fit": integer(row["tokens_fit"]),
                "serve_times": self._times(row, lambda one: one["tokens_fit"]),
                "serve_conversations": f"{row['conversations_fit']:.1f}",
                "serve_mean": f"{_median(row, 'mean_running'):.1f}",
                "serve_preemptions": integer(_median(row, "preemptions")),
                "serve_hits": integer(_median(row, "prompt_tokens_cached")),
                "serve_steps": integer(_median(row, "steps")),
            }
            for row in self._served()
        ]
        return table(rows, self.text)

    def _speed(self) -> Table:
        settings, rows = self.metrics["settings"], []
        for row in self._served():
            seconds, first = _median(row, "seconds"), sorted(_median(row, "first_token_seconds"))
            rows.append(
                {
                    "model": row["name"],
                    "serve_seconds": f"{seconds:.1f}",
                    "serve_processor": f"{_median(row, 'processor_seconds'):.1f}",
                    "serve_requests": f"{settings['conversations'] / seconds:.3f}",
                    "serve_times": self._times(row, lambda one: 1 / _median(one, "seconds")),
                    "serve_by_processor": self._times(row, lambda one: 1 / _median(one, "processor_seconds")),
                    "serve_tokens": f"{settings['conversations'] * settings['answer_tokens'] / seconds:.1f}",
                    "serve_first": f"{median(first):.1f}",
                    "serve_last": f"{first[min(len(first) - 1, int(0.99 * len(first)))]:.1f}",
                }
            )
        return table(rows, self.text)

    def _served(self) -> list[Row]:
        return [row for row in self.metrics["rows"] if row["rounds"]]

    def _times(self, row: Row, figure: Callable[[Row], float]) -> str:
        """The figure relative to GPT-NeoX's."""
        peer = next((one for one in self._served() if one["peer"]), None)
        return DASH if peer is None else f"{figure(row) / figure(peer):.2f}"


def _median(row: Row, key: str) -> Any:
    """The median over the rounds, of a number or of each element of a list."""
    values = [one[key] for one in row["rounds"]]
    return [median(column) for column in zip(*values, strict=True)] if isinstance(values[0], list) else median(values)
