"""Draws the pictures of reports: curves over an axis, perplexity against the cache, and the settings of a sweep.

Labels are English in every language, because matplotlib has no Japanese font. The module uses matplotlib's object
interface, which needs no window system and no global figure. It imports matplotlib only when it draws a picture.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 7.2  # inches: fonts of 12 points stay legible when a phone shows the picture at its own width
_GREYS = ("#3c4350", "#7d8696", "#b5bcc8")  # of baselines
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a3db8", "#8c564b")
_LINE = "#b5bcc8"
_MARKERS = {True: "D", False: "o"}  # of baselines and others
_CURVE_MARKERS = "os^Dv<>Pp"  # hollow, so that equal curves show all of theirs
_LOG_FROM = 4.0  # an axis is logarithmic if largest / smallest value is above this
_MARKERS_AT_MOST = 30  # on a curve
_ROWS_AT_MOST = 30  # in a picture with one line per setting
# Where a point's label may stand: points to the right and up, the nearest first.
_PLACES = [(x, y) for d in range(9, 90, 7) for x in (0, d, -d) for y in (0, d, -d) if (x or y) and (y or d < 20)]

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Curves over one axis.

    Attributes:
        curves: (x, y) points by the model's name.
        stars: a point with a star, by the model's name.
        scaled: the axes ("x", "y", "xy") that become logarithmic if their values span much; x in powers of 2.
        shares: y is a share in percent; its axis is from 0 to 100.
    """

    title: str
    x: str
    curves: Mapping[str, Points]
    y: str = ""
    stars: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    scaled: str = ""
    shares: bool = False


@dataclass(frozen=True)
class Series:
    """The figures of a model, or of one of its settings in a sweep.

    Attributes:
        name: the model's, with the setting.
        perplexity, cache_bytes: 0 if there is no figure.
        positions: the bands of `perplexity_by_position`.
        model, setting: in a sweep, the name and the setting for pictures.
        seeds: the perplexities whose mean `perplexity` is.
        group: only figures of the same group are compared.
    """

    name: str
    baseline: bool
    perplexity: float
    cache_bytes: float
    positions: Sequence[Mapping[str, float]] = ()
    model: str = ""
    setting: str = ""
    seeds: Sequence[float] = ()
    group: str = ""


def draw_panels(panels: Sequence[Panel], baselines: Mapping[str, bool]) -> Figure:
    """Panels in one column, with a legend of the models that have a curve. Long curves have no markers.

    Args:
        baselines: whether each model, by name, is a baseline. Baselines are grey and dashed.
    """
    from matplotlib.lines import Line2D

    colors = model_colors(baselines)
    styles: dict[str, dict[str, Any]] = {
        name: {
            "color": colors[name],
            "marker": marker,
            "markersize": 7,
            "markerfacecolor": "none",
            "linestyle": "--" if grey else "-",
        }
        for (name, grey), marker in zip(baselines.items(), itertools.cycle(_CURVE_MARKERS), strict=False)
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
            ax.locator_params(axis="x", integer=True, min_n_ticks=1)
        for axis in panel.scaled:
            _scale(ax, axis, [point["xy".index(axis)] for _, points in drawn for point in points])
        if panel.shares:
            ax.set_ylim(-5, 105)
    return figure


def draw_frontier(series: Sequence[Series], title: str) -> Figure:
    """Perplexity against measured cache, with a line through the points that no other of their group beats in both.

    In a sweep only the points on the line have their setting.
    """
    models = _models(series)
    colors, figure = model_colors(models), _figure(4.9)
    ax = figure.subplots()
    points = [one for one in series if one.perplexity and one.cache_bytes]
    lines = frontiers(series)
    for line in lines:
        xy = [(one.cache_bytes / 1024, one.perplexity) for one in line]
        ax.plot(*zip(*xy, strict=True), color=_LINE, linestyle="--", linewidth=1.2, zorder=1)
    labels = []
    for one in points:
        x, y, color = one.cache_bytes / 1024, one.perplexity, colors[one.model or one.name]
        label = short(one.name if not one.model else one.setting if any(one in line for line in lines) else "")
        if one.seeds:
            ax.vlines(x, min(one.seeds), max(one.seeds), color=color, linewidth=1.2)
        ax.plot(x, y, marker=_MARKERS[one.baseline], markersize=8, color=color, zorder=3)
        labels.append((label, color, x, y))
    _scale(ax, "x", [x for *_, x, _ in labels])
    _scale(ax, "y", [y for *_, y in labels])
    ax.margins(0.18)
    ax.set(title=title, xlabel="measured KV cache (KB)", ylabel="best validation perplexity")
    if any(one.model for one in series):
        for name, baseline in models.items():
            ax.plot([], [], _MARKERS[baseline], color=colors[name], label=short(name))
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
    figure.draw_without_rendering()  # fixes the axes, on which the space for labels depends
    _label_points(ax, labels)
    return figure


def frontiers(series: Sequence[Series]) -> list[list[Series]]:
    """Of each group the points that no other beats in both perplexity and cache, the smallest cache first."""
    lines: dict[str, list[Series]] = {}
    for one in sorted(series, key=lambda one: (one.cache_bytes, one.perplexity)):
        if one.perplexity and one.cache_bytes:
            line = lines.setdefault(one.group, [])
            if not line or one.perplexity < line[-1].perplexity:
                line.append(one)
    return list(lines.values())


def draw_settings(series: Sequence[Series], title: str) -> Figure:
    """The best settings of a sweep, one per line: the mean perplexity, and a small dot for each seed."""
    shown, colors = series[:_ROWS_AT_MOST], model_colors(_models(series))
    baseline = next((one for one in series if one.baseline), None)
    figure = _figure(1.2 + 0.3 * len(shown))
    ax = figure.subplots()
    if baseline:
        ax.axvline(baseline.perplexity, color=_GREYS[0], linestyle=":", linewidth=1.2, zorder=1)
    for y, one in enumerate(shown):
        color = colors[one.model]
        ax.plot(one.seeds, [y] * len(one.seeds), "o", color=color, markersize=4, alpha=0.5, zorder=2)
        ax.plot(one.perplexity, y, _MARKERS[one.baseline], color=color, markersize=8, zorder=3)
    ax.set_yticks(range(len(shown)), [short(": ".join(filter(None, (one.model, one.setting)))) for one in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    _scale(ax, "x", [value for one in shown for value in one.seeds])
    ax.set_title(title if len(shown) == len(series) else f"{title} (best {len(shown)} of {len(series)})")
    ax.set_xlabel("mean, and each seed (small)" + ("; dotted: the baseline's best" if baseline else ""))
    return figure


def _models(series: Sequence[Series]) -> dict[str, bool]:
    """Whether each model is a baseline: in their order, in a sweep by the alphabet."""
    return {one.model or one.name: one.baseline for one in sorted(series, key=attrgetter("model"))}


def png(draw: Callable[[], Figure]) -> bytes:
    """The figure that `draw` returns, as a PNG file with few colors, a third as large as one with all colors."""
    import matplotlib.style
    import numpy
    from PIL import Image  # a dependency of matplotlib

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # not every font of the style is installed
    with matplotlib.style.context(Path(__file__).parent / "pages" / "pictures.mplstyle"):
        canvas: Any = draw().canvas
        canvas.draw()
    content = io.BytesIO()
    picture = Image.fromarray(numpy.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(96, Image.Quantize.FASTOCTREE).save(content, "png", optimize=True)
    return content.getvalue()


def _figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # measures texts
    return figure


def model_colors(baselines: Mapping[str, bool]) -> dict[str, str]:
    """A color for each model, in their order; baselines are grey."""
    colors: dict[str, str] = {}
    for kind, palette in ((True, _GREYS), (False, _COLORS)):
        names = [name for name, baseline in baselines.items() if baseline == kind]
        colors |= dict(zip(names, itertools.cycle(palette), strict=False))
    return colors


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
        for right, up in _PLACES:
            label.set(
                position=(right, up),
                horizontalalignment="center" if not right else "left" if right > 0 else "right",
                verticalalignment="center" if not up else "bottom" if up > 0 else "top",
            )
            box = label.get_window_extent()
            if room.containsx(box.x0) and room.containsx(box.x1) and not box.count_overlaps(taken):
                break
        taken.append(label.get_window_extent())
