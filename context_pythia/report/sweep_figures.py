"""The pictures of a sweep: each setting's perplexities, and their mean against the cache with the unbeaten settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from context_pythia.report.figures import (
    BASELINE_COLOUR,
    drawing_style,
    label_points,
    model_colours,
    new_figure,
    png,
    scale,
    short,
)

_LINE_COLOUR = "#b5bcc8"
_ROWS_AT_MOST = 30


def perplexities(
    rows: Sequence[dict[str, Any]], seeds: Sequence[Sequence[float]], labels: Sequence[str], meaning: str
) -> bytes:
    """PNG of the best settings, one a line: the mean perplexity, and a small dot for each seed.

    Args:
        rows: settings with a result, as `settings_over_seeds` makes them, the best first.
        seeds: the perplexities of each one's seeds.
        labels: a name for each.
        meaning: what the labels are beside the model, for the title.
    """
    shown = rows[:_ROWS_AT_MOST]
    colours = _colours(rows)
    baseline = next((row for row in rows if row["baseline"]), None)
    title = "Best validation perplexity" + (f" by {short(meaning)}" if meaning else "")
    with drawing_style():
        figure = new_figure(height=1.2 + 0.3 * len(shown))
        ax = figure.subplots()
        if baseline:
            ax.axvline(baseline["mean"], color=BASELINE_COLOUR, linestyle=":", linewidth=1.2, zorder=1)
        for y, row in enumerate(shown):
            colour = colours[row["model"]]
            ax.plot(seeds[y], [y] * len(seeds[y]), "o", color=colour, markersize=4, alpha=0.5, zorder=2)
            ax.plot(row["mean"], y, "D" if row["baseline"] else "o", color=colour, markersize=8, zorder=3)
        ax.set_yticks(range(len(shown)), [short(label) for label in labels[: len(shown)]])
        ax.set_ylim(len(shown) - 0.5, -0.5)
        scale(ax, "x", [row[key] for row in shown for key in ("min", "max")])
        ax.set_title(title if len(shown) == len(rows) else f"{title} (best {len(shown)} of {len(rows)})")
        ax.set_xlabel("mean, and each seed (small)" + ("; dotted: the baseline's best" if baseline else ""))
        return png(figure)


def _colours(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A colour a model, whichever of them is the best so far."""
    return model_colours({row["model"]: row["baseline"] for row in sorted(rows, key=lambda row: row["model"])})


def pareto(rows: Sequence[dict[str, Any]], labels: Sequence[str], meaning: str) -> bytes:
    """PNG of mean perplexity (whiskers: smallest and largest over seeds) against measured cache bytes.

    Args:
        rows: settings with a result, as `settings_over_seeds` makes them.
        labels: a name for each; only the settings that no other beats are labelled.
        meaning: what the labels are, for the title.
    """
    colours = _colours(rows)
    with drawing_style():
        figure = new_figure(height=5.2)
        ax = figure.subplots()
        for group in by_data(rows):
            best = sorted((row["cache_bytes"] / 1024, row["mean"]) for row in group if row["unbeaten"])
            ax.plot(*zip(*best, strict=True), color=_LINE_COLOUR, linestyle="--", linewidth=1.2, zorder=1)
        for name, colour in colours.items():
            own = [row for row in rows if row["model"] == name]
            ax.errorbar(
                [row["cache_bytes"] / 1024 for row in own],
                [row["mean"] for row in own],
                yerr=[[row["mean"] - row["min"] for row in own], [row["max"] - row["mean"] for row in own]],
                fmt="D" if own[0]["baseline"] else "o",
                color=colour,
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


def by_data(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The settings, in groups of the same data by what was searched of it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        data = {path: value for path, value in row["setting"].items() if path.startswith("data.")}
        groups.setdefault(repr(data), []).append(row)
    return list(groups.values())
