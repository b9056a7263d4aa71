"""The pictures of `bench`: decoding time against length, and bars of memory and of a training step's parts.

Labels are English in every language, as in the other pictures (`figures.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from context_pythia.report.figures import COLOURS, drawing_style, new_figure, png, scale, short

_PEER_COLOURS = ("#3c4350", "#7d8696", "#b5bcc8")
_PART_COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#009e73", "#b8860b", "#b5bcc8")

Points = Sequence[tuple[float, float]]


def decode_times(
    curves: Mapping[int, Mapping[str, Points]], peers: set[str], crossings: Mapping[tuple[str, int], float]
) -> bytes:
    """PNG of seconds a token against the tokens in the cache, a panel a batch size.

    Args:
        curves: batch size -> name -> (length, seconds a token).
        peers: names that are drawn in grey.
        crossings: (name, batch size) -> the length from which this model is faster than every peer.
    """
    names = [name for name in next(iter(curves.values())) if any(by_name[name] for by_name in curves.values())]
    colours = _colours(names, peers)
    columns = max(1, min(3, 66 // (7 + max(len(short(name)) for name in names))))
    with drawing_style():
        figure = new_figure(height=0.25 * math.ceil(len(names) / columns) + 3.2 * len(curves))
        axes = figure.subplots(len(curves), 1, squeeze=False)[:, 0]
        for ax, (batch, by_name) in zip(axes, curves.items(), strict=True):
            for name in names:
                points = [(length, 1000 * seconds) for length, seconds in sorted(by_name[name])]
                if not points:
                    continue
                style = "--" if name in peers else "-"
                ax.plot(*zip(*points, strict=True), style, color=colours[name], marker="o", markersize=5, linewidth=1.8)
                if (length := crossings.get((name, batch))) is not None:
                    y = _between(points, length)
                    ax.plot(length, y, "*", markersize=15, color=colours[name], markeredgecolor="white", zorder=4)
                    ax.annotate(
                        f"{length:,.0f}", (length, y), (7, -4), textcoords="offset points", va="top",
                        color=colours[name], fontsize=10,
                    )  # fmt: skip
            drawn = [point for points in by_name.values() for point in points]
            scale(ax, "x", [length for length, _ in drawn], base=2)
            scale(ax, "y", [1000 * seconds for _, seconds in drawn])
            ax.set_title(f"Batch {batch} (star: faster than every GPT-NeoX from here)")
            ax.set_xlabel("tokens in the cache")
            ax.set_ylabel("generate(), ms/token")
        handles = [_handle(colours[name], name in peers) for name in names]
        figure.legend(handles, list(map(short, names)), loc="outside upper left", ncols=columns, frameon=False)
        return png(figure)


def memory_bars(models: Mapping[str, Mapping[str, float]]) -> bytes:
    """PNG of a bar a model: its bytes of each kind, one after another."""
    return _bars({name: {k: v / 2**20 for k, v in kinds.items()} for name, kinds in models.items()}, "MB", "Memory")


def part_bars(models: Mapping[str, Mapping[str, float]]) -> bytes:
    """PNG of a bar a model: the seconds of each part of a training step, one after another."""
    return _bars(models, "seconds", "A training step by part")


def _bars(models: Mapping[str, Mapping[str, float]], unit: str, title: str) -> bytes:
    with drawing_style():
        figure = new_figure(height=1.5 + 0.45 * len(models))
        ax = figure.subplots()
        names = [short(name) for name in models]
        starts = [0.0] * len(models)
        for kind, colour in zip(next(iter(models.values())), _PART_COLOURS, strict=False):
            widths = [kinds[kind] for kinds in models.values()]
            ax.barh(names, widths, left=starts, color=colour, label=kind.replace("_", " "))
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        ax.invert_yaxis()
        ax.set_axisbelow(True)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(unit)
        ax.set_title(title)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        return png(figure)


def _between(points: Points, x: float) -> float:
    """The value at x on the line that is straight between the points' logarithms."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= x <= x1:
            return y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0))
    return points[0][1]


def _colours(names: Sequence[str], peers: set[str]) -> dict[str, str]:
    greys, others = [name for name in names if name in peers], [name for name in names if name not in peers]
    colours = {name: _PEER_COLOURS[i % len(_PEER_COLOURS)] for i, name in enumerate(greys)}
    return colours | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}


def _handle(colour: str, peer: bool):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker="o", markersize=5, linewidth=1.8, linestyle="--" if peer else "-")
