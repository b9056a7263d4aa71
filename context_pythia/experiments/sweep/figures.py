"""The picture of a sweep: each setting over seeds, its perplexity against its cache, and the unbeaten ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from context_pythia.experiments.figures import COLOURS, drawing_style, label_points, new_figure, png, scale, short

_BASELINE_COLOUR, _LINE_COLOUR = "#3c4350", "#b5bcc8"


def pareto(rows: Sequence[dict[str, Any]], labels: Sequence[str], meaning: str) -> bytes:
    """PNG of mean perplexity (whiskers: smallest and largest over seeds) against measured cache bytes.

    Args:
        rows: settings with a result, as `settings_over_seeds` makes them.
        labels: a name for each; only the settings that no other beats are labelled.
        meaning: what the labels are, for the title.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    order = list(dict.fromkeys(row["model"] for row in rows if not row["baseline"]))
    colours = dict.fromkeys(models, _BASELINE_COLOUR)
    colours |= {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(order)}
    with drawing_style():
        figure = new_figure(height=5.2)
        ax = figure.subplots()
        best = sorted((row["cache_bytes"] / 1024, row["mean"]) for row in rows if row["unbeaten"])
        ax.plot(*zip(*best, strict=True), color=_LINE_COLOUR, linestyle="--", linewidth=1.2, zorder=1)
        for name in models:
            own = [row for row in rows if row["model"] == name]
            ax.errorbar(
                [row["cache_bytes"] / 1024 for row in own],
                [row["mean"] for row in own],
                yerr=[[row["mean"] - row["min"] for row in own], [row["max"] - row["mean"] for row in own]],
                fmt="D" if name not in order else "o",
                color=colours[name],
                markersize=7,
                capsize=3,
                linewidth=1.2,
                label=short(name),
            )
        scale(ax, "x", [row["cache_bytes"] / 1024 for row in rows], base=2)
        scale(ax, "y", [row[key] for row in rows for key in ("min", "max")])
        ax.margins(0.18)
        ax.set_xlabel("measured KV cache (KB)")
        ax.set_ylabel("best validation perplexity")
        ax.set_title(f"Lower left is better ({short(meaning)})" if meaning else "Lower left is better")
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
        figure.draw_without_rendering()  # settles the axes, on which the labels' room depends
        names = [label if row["unbeaten"] else "" for row, label in zip(rows, labels, strict=True)]
        label_points(
            ax,
            [
                (short(name), colours[row["model"]], row["cache_bytes"] / 1024, row["mean"])
                for row, name in zip(rows, names, strict=True)
            ],
        )
        return png(figure)
