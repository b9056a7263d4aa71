"""Draws the pictures of reports: curves over an axis, perplexity against the cache, and the settings of a sweep.

Labels are English in every language, because matplotlib has no Japanese font. The module uses matplotlib's object
interface, which needs no window system and no global figure. It imports matplotlib only when it draws a picture.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 7.2  # inches: fonts of 12 points stay legible when a phone shows the picture at its own width
_GREYS = ("#3c4350", "#7d8696", "#b5bcc8")  # of baselines
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a3db8", "#8c564b")
_LINE = "#b5bcc8"
_CJK_FONTS = ("Noto Sans CJK JP", "Noto Sans JP", "Hiragino Sans", "Yu Gothic", "IPAexGothic", "IPAGothic")
_FAR = 4.0  # beyond so many times the range of the unbeaten models, an arrow replaces a model's point
_LOG_FROM = 4.0  # an axis is logarithmic if largest / smallest value is above this
_MARKERS_AT_MOST = 30  # on a curve
_ROWS_AT_MOST = 30  # in a picture with one line per setting

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Curves over one axis.

    Attributes:
        curves: (x, y) points by the model's name.
        stars: a point with a star, by the model's name.
        scaled: the axes ("x", "y", "xy") that become logarithmic if their values span much; x in powers of 2.
    """

    title: str
    x: str
    curves: Mapping[str, Points]
    y: str = ""
    stars: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    scaled: str = ""


@dataclass(frozen=True)
class Point:
    """A model, or a setting of it, with a cache of `size` bytes; `low` and `high` are the ends of its whiskers."""

    name: str
    model: str
    size: float
    perplexity: float
    label: str
    low: float | None = None
    high: float | None = None
    group: str = ""  # only points of the same group are compared


def draw_panels(panels: Sequence[Panel], baselines: Mapping[str, bool]) -> Figure:
    """Panels in one column, with a legend of the models that have a curve. Long curves have no markers.

    Args:
        baselines: whether each model, by name, is a baseline. Baselines are grey and dashed.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    colors = model_colors(baselines)
    styles: dict[str, dict[str, Any]] = {
        name: {"color": color, "marker": "o", "markersize": 5, "linewidth": 1.8, "linestyle": "--" if grey else "-"}
        for (name, color), grey in zip(colors.items(), baselines.values(), strict=True)
    }
    names = [name for name in baselines if any(panel.curves.get(name) for panel in panels)]
    columns = max(1, min(3, 66 // (7 + max(len(short(name)) for name in names))))
    figure = _figure(0.25 * math.ceil(len(names) / columns) + 2.9 * len(panels))
    handles = [Line2D([], [], **styles[name]) for name in names]
    figure.legend(handles, list(map(short, names)), loc="outside upper left", ncols=columns, frameon=False)
    for ax, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        drawn = [(name, points) for name, points in panel.curves.items() if points]
        for name, points in drawn:
            marker = {"marker": ""} if len(points) > _MARKERS_AT_MOST else {}
            ax.plot(*zip(*points, strict=True), **styles[name] | marker)
        for name, point in panel.stars.items():
            ax.plot(*point, marker="*", markersize=15, color=colors[name], markeredgecolor="white", zorder=4)
        ax.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        if "x" not in panel.scaled:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for axis in panel.scaled:
            _scale(ax, axis, [point["xy".index(axis)] for _, points in drawn for point in points])
    return figure


def draw_frontier(points: Sequence[Point], baselines: Mapping[str, bool], title: str) -> Figure:
    """Perplexity against measured cache, with a line through the points that no other of their group beats in both.

    In a picture without whiskers, an arrow at the upper edge with the perplexity replaces a point far above the line.
    Otherwise it would squeeze the other points together.
    """
    colors, figure = model_colors(baselines), _figure(4.9)
    ax = figure.subplots()
    lines = [unbeaten([point for point in points if point.group == group]) for group in {p.group: 0 for p in points}]
    ceiling = math.inf
    if len(lines) == 1 and len(lines[0]) > 1 and all(point.low is None for point in points):
        worst, best = lines[0][0].perplexity, lines[0][-1].perplexity
        ceiling = best + _FAR * (worst - best)
    for line in lines:
        xy = [(point.size / 1024, point.perplexity) for point in line]
        ax.plot(*zip(*xy, strict=True), color=_LINE, linestyle="--", linewidth=1.2, zorder=1)
    labels = []
    for point in points:
        x, y, label = point.size / 1024, min(point.perplexity, ceiling), short(point.label)
        marker = "D" if baselines[point.model] else "o"
        if point.perplexity > ceiling:
            label, marker = f"{label}: {point.perplexity:,.4g}", "^"
        if point.low is not None and point.high is not None:
            ax.vlines(x, point.low, point.high, color=colors[point.model], linewidth=1.2)
        ax.plot(x, y, marker=marker, markersize=8, color=colors[point.model], zorder=3)
        labels.append((label, colors[point.model], x, y))
    _scale(ax, "x", [x for *_, x, _ in labels])
    _scale(ax, "y", [y for *_, y in labels])
    ax.margins(0.18)
    ax.set(title=title, xlabel="measured KV cache (KB)", ylabel="best validation perplexity")
    if any(point.label != point.model for point in points):
        for name, color in colors.items():
            ax.plot([], [], "D" if baselines[name] else "o", color=color, label=short(name))
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
    figure.draw_without_rendering()  # fixes the axes, on which the space for labels depends
    _label_points(ax, labels)
    return figure


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both perplexity and size, the smallest cache first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.size, point.perplexity)):
        if not best or point.perplexity < best[-1].perplexity:
            best.append(point)
    return best


def draw_settings(
    points: Sequence[Point], seeds: Sequence[Sequence[float]], baselines: Mapping[str, bool], title: str
) -> Figure:
    """The best settings of a sweep, one per line: the mean perplexity, and a small dot for each seed."""
    shown, colors = points[:_ROWS_AT_MOST], model_colors(baselines)
    baseline = next((point for point in points if baselines[point.model]), None)
    figure = _figure(1.2 + 0.3 * len(shown))
    ax = figure.subplots()
    if baseline:
        ax.axvline(baseline.perplexity, color=_GREYS[0], linestyle=":", linewidth=1.2, zorder=1)
    for y, point in enumerate(shown):
        color = colors[point.model]
        ax.plot(seeds[y], [y] * len(seeds[y]), "o", color=color, markersize=4, alpha=0.5, zorder=2)
        ax.plot(point.perplexity, y, "D" if baselines[point.model] else "o", color=color, markersize=8, zorder=3)
    ax.set_yticks(range(len(shown)), [short(point.name) for point in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    _scale(ax, "x", [value for values in seeds[: len(shown)] for value in values])
    ax.set_title(title if len(shown) == len(points) else f"{title} (best {len(shown)} of {len(points)})")
    ax.set_xlabel("mean, and each seed (small)" + ("; dotted: the baseline's best" if baseline else ""))
    return figure


def png(draw: Callable[[], Figure]) -> bytes:
    """The figure that `draw` returns, as a PNG file with few colors, a third as large as one with all colors."""
    from PIL import Image  # a dependency of matplotlib

    drawn, reduced = io.BytesIO(), io.BytesIO()
    with _drawing_style():
        draw().savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(96).save(reduced, format="png", optimize=True)
    return reduced.getvalue()


@contextmanager
def _drawing_style() -> Iterator[None]:
    import matplotlib
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    settings: dict[Any, Any] = {
        "font.family": ["DejaVu Sans", *(font for font in _CJK_FONTS if font in installed)],
        "font.size": 12,
        "axes.titlesize": 13,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#8a93a3",
        "axes.grid": True,
        "grid.color": "#e6e9ee",
        "text.parse_math": False,  # a model's name may contain a dollar sign
    }
    with matplotlib.rc_context(settings):
        yield


def _figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def model_colors(baselines: Mapping[str, bool]) -> dict[str, str]:
    """A color for each model's name, the same in all pictures; baselines are grey."""
    colors: dict[str, str] = {}
    for kind, palette in ((True, _GREYS), (False, _COLORS)):
        names = [name for name, baseline in baselines.items() if baseline == kind]
        colors |= {name: palette[i % len(palette)] for i, name in enumerate(names)}
    return {name: colors[name] for name in baselines}


def short(name: str) -> str:
    return name if len(name) <= 32 else name[:31] + "…"


def _scale(ax: Axes, which: str, values: Collection[float]) -> None:
    """Makes an axis logarithmic if its values span more than `_LOG_FROM`; tick labels are plain numbers in any case."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis, base = (ax.xaxis, 2) if which == "x" else (ax.yaxis, 10)
    span = max(values) / min(values) if values and min(values) > 0 else 1
    if span > _LOG_FROM:
        ax.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(base=base, subs=(1, 2, 5) if base == 10 and span < 1000 else (1,)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _label_points(ax: Axes, points: Sequence[tuple[str, str, float, float]]) -> None:
    """Writes each point's name at the nearest place without points and other names."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    pixels = ax.transData.transform([(x, y) for *_, x, y in points])
    taken = [Bbox.from_bounds(px - 12, py - 12, 24, 24) for px, py in pixels]
    room = ax.get_window_extent()
    for name, color, x, y in points:
        label = ax.annotate(name, (x, y), (0, 0), textcoords="offset points", color=color, fontsize=11)
        label.set_path_effects([withStroke(linewidth=3, foreground="white")])  # legible where it crosses the line
        for dx, dy, horizontal, vertical in _places():
            label.set(position=(dx, dy), horizontalalignment=horizontal, verticalalignment=vertical)
            box = label.get_window_extent()
            if room.containsx(box.x0) and room.containsx(box.x1) and not box.count_overlaps(taken):
                break
        taken.append(label.get_window_extent())


def _places() -> Iterator[tuple[float, float, str, str]]:
    """Offsets in points, and the label's alignment at each; the nearest first."""
    for distance in range(9, 90, 7):
        for x, horizontal in ((0, "center"), (distance, "left"), (-distance, "right")):
            for y, vertical in ((0, "center"), (distance, "bottom"), (-distance, "top")):
                if (x or y) and (y or distance < 20):
                    yield x, y, horizontal, vertical
