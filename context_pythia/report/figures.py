"""The pictures of a report: learning curves, perplexity by position, and perplexity against the bytes of the cache.

Labels are English in every language, because matplotlib brings no Japanese font. Figures are made by matplotlib's
object interface, so that no window system and no global figure is touched; matplotlib loads when a picture is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from context_pythia.report.formats import finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 7.2  # inches: fonts of 12 points stay legible when a phone shows the picture at its own width
BASELINE_COLOUR = "#3c4350"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a3db8", "#8c564b")
_CJK_FONTS = ("Noto Sans CJK JP", "Noto Sans JP", "Hiragino Sans", "Yu Gothic", "IPAexGothic", "IPAGothic")
_FAR = 4.0  # an arrow stands for a model that is so many times as far above the best as the worst that none beats
_LOG_FROM = 4.0  # ratio of largest to smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Series:
    """What the pictures show of one model: (x, y) points a curve, its perplexity by position and against its cache."""

    name: str
    baseline: bool
    perplexity: Sequence[tuple[float, float]]
    train_loss: Sequence[tuple[float, float]]
    convergence: Sequence[tuple[float, float]] = ()
    best: tuple[float, float] | None = None  # (epoch, perplexity)
    cache_bytes: float | None = None
    positions: Sequence[Mapping[str, float]] = ()  # as `perplexity_by_position` gives them


def is_baseline(entry: Mapping[str, Any]) -> bool:
    """Whether a model's entry is that of a GPT-NeoX trained from its first weights; older runs do not record it."""
    return entry.get("baseline", entry["context_source"] is None and not entry.get("from_baseline"))


def series_of(model: Mapping[str, Any]) -> Series:
    """The finite figures of one entry of metrics.json's models."""

    def points(entries: Sequence[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
        return [(entry[x], entry[y]) for entry in entries if finite(entry[y])]

    history, phase1, cache = model["history"] or [], model["phase1"] or {}, model["cache"] or {}
    # What is made of the trained baseline goes on where that ended.
    origin = model.get("from_baseline")
    start = origin["best_epoch"] if origin else 0
    epoch, best = model["best_epoch"], model["best_val_ppl"]
    return Series(
        name=model["name"],
        baseline=is_baseline(model),
        perplexity=[(start + x, y) for x, y in points(history, "epoch", "val_ppl")],
        # The loss of healing is another one.
        train_loss=[] if origin else points(history, "epoch", "train_loss"),
        convergence=points(phase1.get("history") or [], "iteration", "convergence_rate"),
        best=(start + epoch, best) if finite(epoch) and finite(best) else None,
        cache_bytes=cache.get("bytes_measured"),
        positions=model.get("val_ppl_by_position") or (),
    )


def learning_curves(series: Sequence[Series], wanted_convergence: float | None = None) -> bytes:
    """PNG of validation perplexity and training loss by epoch, of the difference to the baseline where there is one and
    another model, and of phase 1's convergence where a model had it."""
    with drawing_style():
        return png(draw_learning_curves(series, wanted_convergence))


def draw_learning_curves(series: Sequence[Series], wanted_convergence: float | None = None) -> Figure:
    """The figure of `learning_curves`."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    shown = [
        (one, colour)
        for one, colour in zip(series, _colours(series), strict=True)
        if one.perplexity or one.train_loss or one.convergence
    ]
    base = next((one for one, _ in shown if one.baseline and one.perplexity), None) if len(shown) > 1 else None
    perplexity, loss, phase1 = "Validation perplexity (star: best epoch)", "Training loss", "Phase 1: converged tokens"
    difference = "" if base is None else f"Difference to {short(base.name)} at the same epoch (%)"
    titles = [title for title in (perplexity, difference, loss) if title]
    if any(one.convergence for one, _ in shown):
        titles.append(phase1)
    figure, panels = _panels(shown, len(titles))
    axes = dict(zip(titles, panels, strict=True))
    for title, ax in axes.items():
        ax.set_title(title)
        ax.set_xlabel("iteration" if title == phase1 else "epoch")
    for one, colour in shown:
        _curve(axes[perplexity], one.perplexity, colour)
        if one.best:
            axes[perplexity].plot(*one.best, marker="*", markersize=15, color=colour, markeredgecolor="white", zorder=4)
        _curve(axes[loss], one.train_loss, colour)
        if base is not None:
            held = dict(base.perplexity)
            _curve(axes[difference], [(x, 100 * (y / held[x] - 1)) for x, y in one.perplexity if x in held], colour)
        if one.convergence:
            axes[phase1].plot(*zip(*one.convergence, strict=True), color=colour)
    scale(axes[perplexity], "y", [y for one, _ in shown for _, y in one.perplexity])
    if difference:
        axes[difference].set_xlim(axes[perplexity].get_xlim())
    if phase1 in axes:
        axes[phase1].set_ylim(0, 1.03)
        axes[phase1].yaxis.set_major_formatter(PercentFormatter(1.0))
        if wanted_convergence is not None:
            axes[phase1].axhline(wanted_convergence, color=BASELINE_COLOUR, linestyle=":", linewidth=1.2)
    for ax in axes.values():
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def position_curves(series: Sequence[Series]) -> bytes:
    """PNG of perplexity by position and, where there is a baseline and another model, the difference to it."""
    with drawing_style():
        return png(draw_positions(series))


def draw_positions(series: Sequence[Series]) -> Figure:
    """The figure of `position_curves`: a point a band, between the band's edges, all bands equally wide."""
    from matplotlib.ticker import FixedFormatter, FixedLocator

    shown = [(one, colour) for one, colour in zip(series, _colours(series), strict=True) if one.positions]
    base = next((one for one, _ in shown if one.baseline), None)
    rows = 2 if base is not None and len(shown) > 1 else 1
    figure, axes = _panels(shown, rows)
    for one, colour in shown:
        _curve(axes[0], list(enumerate(band["perplexity"] for band in one.positions)), colour)
        if rows == 2 and base is not None:
            pairs = zip(one.positions, base.positions, strict=True)
            changes = [100 * (band["perplexity"] / other["perplexity"] - 1) for band, other in pairs]
            _curve(axes[1], list(enumerate(changes)), colour)
    scale(axes[0], "y", [band["perplexity"] for one, _ in shown for band in one.positions])
    axes[0].set_title("Perplexity by position in the sample")
    if rows == 2 and base is not None:
        axes[1].set_title(f"Difference to {short(base.name)} (%)")
    bands = shown[0][0].positions
    edges = [bands[0]["from"], *(band["to"] for band in bands)]
    for ax in axes:
        ax.xaxis.set_major_locator(FixedLocator([i - 0.5 for i in range(len(edges))]))
        ax.xaxis.set_major_formatter(FixedFormatter([str(edge) for edge in edges]))
        ax.set_xlim(-0.5, len(bands) - 0.5)
        ax.set_xlabel("position (tokens)")
    return figure


def frontier(series: Sequence[Series]) -> bytes:
    """PNG of best perplexity against measured cache bytes; models without both are left out."""
    with drawing_style():
        return png(draw_frontier(series))


def draw_frontier(series: Sequence[Series]) -> Figure:
    """The figure of `frontier`: a labelled point a model, and the line of those that no other model beats.

    A model far above that line is an arrow at the upper edge, with its perplexity, so that the others stay apart.
    """
    figure = new_figure(height=4.9)
    ax = figure.subplots()
    points = [
        (one, colour, one.cache_bytes / 1024, one.best[1])
        for one, colour in zip(series, _colours(series), strict=True)
        if one.cache_bytes and one.best
    ]
    unbeaten: list[tuple[float, float]] = []
    for _, _, size, perplexity in sorted(points, key=lambda point: point[2:]):
        if not unbeaten or perplexity < unbeaten[-1][1]:
            unbeaten.append((size, perplexity))
    ax.plot(*zip(*unbeaten, strict=True), color="#b5bcc8", linestyle="--", linewidth=1.2, zorder=1)
    ceiling = math.inf
    if len(unbeaten) > 1:
        worst, best = unbeaten[0][1], unbeaten[-1][1]
        ceiling = best + _FAR * (worst - best)
    labels = []
    for one, colour, size, perplexity in points:
        shown, name, marker = min(perplexity, ceiling), short(one.name), "D" if one.baseline else "o"
        if perplexity > ceiling:
            name, marker = f"{name}: {perplexity:,.4g}", "^"
        ax.plot(size, shown, marker=marker, markersize=9, color=colour, zorder=3)
        labels.append((name, colour, size, shown))
    scale(ax, "x", [size for _, _, size, _ in labels], base=2)
    scale(ax, "y", [shown for _, _, _, shown in labels])
    ax.margins(0.18)
    ax.set_xlabel("measured KV cache (KB)")
    ax.set_ylabel("best validation perplexity")
    ax.set_title("Perplexity against cache (lower left is better)")
    figure.draw_without_rendering()  # settles the axes, on which the labels' room depends
    label_points(ax, labels)
    return figure


@contextmanager
def drawing_style() -> Iterator[None]:
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
        "text.parse_math": False,  # a model's name may hold a dollar sign
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _colours(series: Sequence[Series]) -> list[str]:
    colours = model_colours({one.name: one.baseline for one in series})
    return [colours[one.name] for one in series]


def model_colours(baselines: Mapping[str, bool]) -> dict[str, str]:
    """A colour for each model's name, the same in all pictures; the names tell which models are baselines."""
    contexts = [name for name, baseline in baselines.items() if not baseline]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(contexts)}
    return {name: colours.get(name, BASELINE_COLOUR) for name in baselines}


def short(name: str) -> str:
    return name if len(name) <= 32 else name[:31] + "…"


def _curve(ax: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    if points:
        ax.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=5, linewidth=1.8)


def _panels(shown: Sequence[tuple[Series, str]], rows: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many axes one below the other, with a legend of the models and their colours above."""
    from matplotlib.lines import Line2D

    names = [short(one.name) for one, _ in shown]
    columns = max(1, min(3, 66 // (7 + max(map(len, names)))))
    figure = new_figure(height=0.25 * math.ceil(len(shown) / columns) + 2.9 * rows)
    handles = [Line2D([], [], color=colour, marker="o", markersize=5, linewidth=1.8) for _, colour in shown]
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False)
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def scale(ax: Axes, which: Literal["x", "y"], values: Sequence[float], base: int = 10) -> None:
    """Makes an axis logarithmic where its values span more than `_LOG_FROM`; its numbers are plain either way."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = ax.xaxis if which == "x" else ax.yaxis
    if values and min(values) > 0 and max(values) / min(values) > _LOG_FROM:
        ax.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(base=base, subs=(1, 2, 5) if base == 10 else (1,)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def label_points(ax: Axes, points: Sequence[tuple[str, str, float, float]]) -> None:
    """Writes each point's name at the nearest place that is free of points and of other names."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    pixels = ax.transData.transform([(x, y) for _, _, x, y in points])
    taken = [Bbox.from_bounds(px - 12, py - 12, 24, 24) for px, py in pixels]
    room = ax.get_window_extent()
    for name, colour, x, y in points:
        label = ax.annotate(name, (x, y), (0, 0), textcoords="offset points", color=colour, fontsize=11)
        label.set_path_effects([withStroke(linewidth=3, foreground="white")])  # legible where it crosses the line
        for dx, dy, horizontal, vertical in _PLACES:
            label.set(position=(dx, dy), horizontalalignment=horizontal, verticalalignment=vertical)
            box = label.get_window_extent()
            if room.containsx(box.x0) and room.containsx(box.x1) and not box.count_overlaps(taken):
                break
        taken.append(label.get_window_extent())


def _places() -> Iterator[tuple[float, float, str, str]]:
    for distance in range(9, 90, 7):
        yield from ((distance, 0, "left", "center"), (-distance, 0, "right", "center")) if distance < 20 else ()
        yield from ((0, distance, "center", "bottom"), (0, -distance, "center", "top"))
        yield from ((distance, distance, "left", "bottom"), (-distance, distance, "right", "bottom"))
        yield from ((distance, -distance, "left", "top"), (-distance, -distance, "right", "top"))


_PLACES = tuple(_places())  # offsets in points and the label's alignment there, nearest first
