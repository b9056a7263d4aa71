"""The figures of `bench` as tables, for the console and for its report.

Medians, ratios and crossover points are made here, from the single times that metrics.json records.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, median
from typing import Any

from context_pythia.report.bench_translations import BENCH_TRANSLATIONS
from context_pythia.report.document import Table, to_console
from context_pythia.report.formats import DASH, change, integer, number, percent

_MEGABYTE = 2**20
PARTS = ("body", "head_and_loss", "context_block", "backward", "optimizer", "rest")  # of a training step


def show(metrics: dict[str, Any]) -> None:
    """Print the newest of the figures."""
    if metrics["kind"] == "train":
        print(train_table(metrics), flush=True)
    elif metrics["cells"]:
        print(f"\n{cell_table(metrics, metrics['cells'][-1])}", flush=True)
    else:
        print(memory_table(metrics), flush=True)


def cell_table(metrics: dict[str, Any], cell: dict[str, Any]) -> str:
    """A cell's figures for the console."""
    text = BENCH_TRANSLATIONS["en"]
    title = text["cell"].format(batch=cell["batch_size"], length=cell["length"])
    failures = [f"{row['name']}: {row['error']}" for row in cell["rows"] if row["error"]]
    return "\n".join([title, "", to_console(cell_figures(metrics, cell, text)), *failures])


def memory_table(metrics: dict[str, Any]) -> str:
    """The conversations that fit, for the console."""
    return "\n".join(
        [
            memory_title(metrics, BENCH_TRANSLATIONS["en"]),
            "",
            to_console(memory_figures(metrics, BENCH_TRANSLATIONS["en"])),
        ]
    )


def train_table(metrics: dict[str, Any]) -> str:
    """Training steps, whole and by part, for the console."""
    text = BENCH_TRANSLATIONS["en"]
    lines = [
        f"matrix products alone: {rates(metrics)}",
        "",
        to_console(step_figures(metrics, text)),
        "",
        text["parts"],
        "",
    ]
    failures = [f"{row['name']}: {row['error']}" for row in metrics["rows"] if row["error"]]
    return "\n".join([*lines, to_console(part_figures(metrics, text)), *failures])


def cell_figures(metrics: dict[str, Any], cell: dict[str, Any], text: dict[str, str]) -> Table:
    entries = {entry["name"]: entry for entry in metrics["models"]}
    rows = {row["name"]: row for row in cell["rows"]}
    dynamic, static = (
        rows.get((first_peer(metrics, kind) or {"name": None})["name"]) for kind in ("dynamic", "static")
    )
    keys = ["model", "prefill", "prefill_ratio", "forward", "dynamic", "static", "generate", "dynamic", "static"]
    table = Table([text[key] for key in [*keys, "rate", "cache", "reduction", "peak"]], cells := [])
    for name, row in rows.items():
        cache, most = row["cache"], row["peak_bytes"]
        base = dynamic["cache"] if dynamic else None
        line = [name, _spread(row["prefill"]), _times(row, dynamic, "prefill")]
        for kind in ("decode", "generate"):
            line += [_spread(row[kind], 1000), *(_times(peer, row, kind) for peer in (dynamic, static))]
        line += [
            f"{cell['batch_size'] / median(row['generate']):,.1f}" if row["generate"] else DASH,
            megabytes(cache["filled"] if cache else None),
            percent(1 - cache["filled"] / base["filled"] if cache and base else None),
            megabytes(None if most is None else most + entries[name]["weight_bytes"]),
        ]
        cells.append(line)
    return table


def memory_title(metrics: dict[str, Any], text: dict[str, str]) -> str:
    lengths = [model["conversation"]["length"] for model in metrics["models"] if model["conversation"]]
    gb = f"{metrics['settings']['memory_gb']:g}"
    return text["memory"].format(gb=gb, length=f"{max(lengths, default=0):,}")


def memory_figures(metrics: dict[str, Any], text: dict[str, str]) -> Table:
    keys = ["model", "parameters", "weights", "conversation", "slack", "fit", "dynamic", "fit_with_slack", "fit_tokens"]
    base = (first_peer(metrics)["conversation"] or {}).get("fit")
    rows = []
    for entry in metrics["models"]:
        line = [entry["name"], f"{entry['parameters']:,}", megabytes(entry["weight_bytes"])]
        if one := entry["conversation"]:
            line += [megabytes(one["bytes"]), megabytes(one["slack"]), f"{one['fit']:,}"]
            line += [f"{one['fit'] / base:.2f}" if base else DASH]
            line += [f"{one['fit_with_slack']:,}", f"{one['tokens_fit']:,}"]
        rows.append(line + [DASH] * (len(keys) - len(line)))
    return Table([text[key] for key in keys], rows)


def crossover_figures(metrics: dict[str, Any], text: dict[str, str]) -> Table:
    """For each smaller cache and batch size, the length from which it is faster than every GPT-NeoX."""
    rows = []
    lengths = sorted({cell["length"] for cell in metrics["cells"]})
    for name, batch, length in crossings(metrics):
        if length is None:
            found = text["never"].format(length=f"{lengths[-1]:,}")
        elif length == lengths[0]:
            found = text["always"].format(length=f"{lengths[0]:,}")
        else:
            found = text["about"].format(length=f"{float(f'{length:.2g}'):,.0f}")
        rows.append([name, str(batch), found])
    return Table([text["model"], text["batch"], text["crossover_length"]], rows)


def crossings(metrics: dict[str, Any]) -> Iterator[tuple[str, int, float | None]]:
    """Each smaller cache's name, batch size, and the length from which it decodes faster than every GPT-NeoX."""
    peers = {entry["name"] for entry in metrics["models"] if entry["peer"]}
    for batch in sorted({cell["batch_size"] for cell in metrics["cells"]}):
        curves = decode_curves(metrics, batch)
        fastest: dict[float, float] = {}
        for length, seconds in (point for name in curves if name in peers for point in curves[name]):
            fastest[length] = min(seconds, fastest.get(length, math.inf))
        for name, points in curves.items():
            if name not in peers and points and fastest:
                yield name, batch, crossover(points, list(fastest.items()))


def decode_curves(metrics: dict[str, Any], batch: int) -> dict[str, list[tuple[float, float]]]:
    """Each row's (length, median seconds a token through `generate()`) at a batch size."""
    curves: dict[str, list[tuple[float, float]]] = {entry["name"]: [] for entry in metrics["models"]}
    for cell in metrics["cells"]:
        if cell["batch_size"] == batch:
            for row in cell["rows"]:
                if row["generate"]:
                    curves[row["name"]].append((cell["length"], median(row["generate"])))
    return curves


def crossover(own: Sequence[tuple[float, float]], peer: Sequence[tuple[float, float]]) -> float | None:
    """The length from which `own` is no slower than `peer`, both (length, seconds); None if it still is at the longest.

    Between two lengths both times are taken to be powers of the length. Faster from the shortest length on gives that
    length.
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
    """Median over the rounds of own seconds to the peer's in the same round; None without a common round."""
    ratios = [a / b for a, b in zip(own, peer, strict=False)]
    return median(ratios) if ratios else None


def first_peer(metrics: dict[str, Any], cache: str = "dynamic") -> Any:
    """The entry of the first GPT-NeoX with this kind of cache; None if there is none."""
    return next((entry for entry in metrics["models"] if entry["peer"] and entry["cache"] == cache), None)


def step_figures(metrics: dict[str, Any], text: dict[str, str]) -> Table:
    keys = ["model", "precision", "step", "rate", "speed", "overhead", "share", "peak", "parameters"]
    plain = next(row for row in metrics["rows"] if row["plain"])
    peer = next((row for row in metrics["rows"] if row["peer"]), None)
    rows = []
    for row in metrics["rows"]:
        seconds = _by_round(row)
        speed, overhead = paired_ratio(_by_round(plain), seconds), paired_ratio(seconds, _by_round(peer))
        achieved = [row["flops_per_step"] / one for one in seconds]
        share = paired_ratio(achieved, metrics["rates"][row["precision"]]) if seconds else None
        rows.append(
            [
                row["name"],
                row["precision"],
                _spread([step["step"] for turn in row["rounds"] for step in turn]),
                f"{metrics['tokens_per_step'] / median(seconds):,.0f}" if seconds else DASH,
                number(speed, 2),
                DASH if overhead is None or row is peer or row["plain"] else change(overhead - 1),
                percent(share),
                megabytes(row["peak_bytes"]),
                integer(row.get("parameters")),
            ]
        )
    return Table([text[key] for key in keys], rows, text_columns=2)


def part_figures(metrics: dict[str, Any], text: dict[str, str]) -> Table:
    rows = []
    for row in metrics["rows"]:
        parts = mean_parts(row)
        rows.append([row["name"], *(f"{parts[part]:.3f}" if parts else DASH for part in PARTS)])
    return Table([text["model"], *(text[part] for part in PARTS)], rows)


def mean_parts(row: dict[str, Any]) -> dict[str, float]:
    """A step's mean seconds by part; empty if there is no step."""
    steps = [step for turn in row["rounds"] for step in turn]
    return {part: fmean(step[part] for step in steps) for part in PARTS} if steps else {}


def _by_round(row: dict[str, Any] | None) -> list[float]:
    """Median seconds a step in each of the row's turns."""
    return [median(step["step"] for step in turn) for turn in row["rounds"]] if row else []


def rates(metrics: dict[str, Any]) -> str:
    return ", ".join(
        f"{dtype} {median(rates) / 1e9:,.1f} GFLOP/s" for dtype, rates in metrics["rates"].items() if rates
    )


def _times(first: dict[str, Any] | None, second: dict[str, Any] | None, kind: str) -> str:
    """How many times as long as the second row the first one takes."""
    ratio = paired_ratio(first[kind], second[kind]) if first and second else None
    return number(ratio, 2)


def _spread(seconds: Sequence[float], unit: float = 1.0) -> str:
    """Median, and in brackets the smallest and largest."""
    if not seconds:
        return DASH
    digits = 1 if median(seconds) * unit >= 100 else 2 if median(seconds) * unit >= 10 else 3
    middle, least, most = (f"{unit * f(seconds):.{digits}f}" for f in (median, min, max))
    return f"{middle} ({least}–{most})"


def megabytes(value: int | None) -> str:
    return DASH if value is None else f"{value / _MEGABYTE:,.1f}"
