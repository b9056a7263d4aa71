"""What `context-pythia eval` says: a table for the console, and the report of an evaluation's folder.

The report reads metrics.json and provenance.json of the folder and nothing else.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from context_pythia.files import read_record
from context_pythia.report.document import (
    Block,
    Heading,
    Paragraph,
    Picture,
    Table,
    to_console,
    write_document,
)
from context_pythia.report.figures import Series, frontier, position_curves
from context_pythia.report.formats import DASH, change, integer, kilobytes, percent, plain
from context_pythia.report.positions import POSITIONS, position_blocks, position_table
from context_pythia.report.translations import TRANSLATIONS

PICTURE = "frontier.png"
_COLUMNS = (
    "model",
    "ppl",
    "change",
    "accuracy",
    "cached_ppl",
    "cached_change",
    "cache",
    "reduction",
    "kl",
    "agreement",
    "difference",
)


def label(row: dict[str, Any]) -> str:
    """The name of a row: the model's, with the quantised cache if it has one."""
    return f"{row['name']} + {row['quantised']}" if row["quantised"] else row["name"]


def console_table(metrics: dict[str, Any]) -> str:
    """The figures as an aligned table, and below it what they rest on."""
    text, rows = TRANSLATIONS["en"], metrics["models"]
    lines = to_console(_table(rows, text)).split("\n")
    notes = (text["eval_note"].format(**_setup(metrics)), _agreement(metrics, text))
    lines += ["", *(textwrap.fill(note, max(80, len(lines[0]))) for note in notes)]
    lines += [f"{label(row)}: {row['error']}" for row in rows if row["error"]]
    series = _series(rows)
    if any(one.positions for one in series):
        lines += ["", text["positions_console"], "", to_console(position_table(series, text))]
    if found := _tasks(metrics):
        lines += ["", to_console(found)]
    return "\n".join(lines)


def write_evaluation(folder: Path, lang: str = "en") -> list[Path]:
    """Write report.md, report.html (report.ja.md, ... in other languages than English) and the pictures into `folder`.

    Raises:
        FileNotFoundError, ValueError: metrics.json or provenance.json is missing or damaged.
    """
    metrics, provenance = read_record(folder / "metrics.json"), read_record(folder / "provenance.json")
    series = _series(metrics["models"])
    pictures = {PICTURE: frontier(series)}
    if any(one.positions for one in series):
        pictures[POSITIONS] = position_curves(series)
    return write_document(folder, _blocks(metrics, provenance, TRANSLATIONS[lang], pictures), lang, pictures)


def _blocks(
    metrics: dict[str, Any], provenance: dict[str, Any], text: dict[str, str], pictures: dict[str, bytes]
) -> Iterator[Block]:
    rows, setup = metrics["models"], _setup(metrics)
    yield Heading(text["eval_title"], level=1)
    yield Paragraph(_headline(rows, text), "lead")
    yield _table(rows, text)
    yield Paragraph(text["eval_note"].format(**setup))
    disagreeing = any(row["cached"] and row["cached"]["agrees"] is False for row in rows)
    yield Paragraph(_agreement(metrics, text), "alert" if disagreeing else "plain")
    residual = next((row["cache"]["residual_length"] for row in rows if row["quantised"] and row["cache"]), None)
    if residual is not None:
        yield Paragraph(text["eval_quantised"].format(residual=residual))
    for row in rows:
        if row["error"]:
            yield Paragraph(text["failure"].format(name=label(row), error=row["error"]), "alert")
    for note in metrics["notes"]:
        yield Paragraph(note, "note")
    yield Picture(PICTURE, text["eval_caption"].format(**setup))
    yield from position_blocks(_series(rows), text, pictures)
    if found := _tasks(metrics):
        yield Heading(text["eval_tasks"])
        yield found
    yield Heading(text["cache"])
    yield Table([text[key] for key in ("model", "bytes_measured", "bytes_formula", "slack")], _cache_rows(rows))
    yield Heading(text["settings"])
    data = metrics["data"]
    facts = {
        "data_source": str(data["source"]),
        "samples": f"{data['samples_train']:,} / {data['samples_validation']:,}",
        "tokenizer": str(data["tokenizer"]),
        "vocabulary": f"{data['vocab_size']:,}",
        "precision": metrics["settings"]["dtype"],
        "batch": str(metrics["settings"]["batch_size"]),
        "fingerprint": str(data["fingerprint"]),
        "device": str(provenance.get("device")),
        "platform": str(provenance.get("platform")),
        "threads": str(provenance.get("threads")),
        "versions": ", ".join(f"{name} {number}" for name, number in provenance.get("versions", {}).items()),
        "commit": plain(provenance.get("commit")),
        "created": str(provenance.get("created")),
        "command": str(provenance.get("command")),
    }
    yield Table([text["setting"], text["value"]], [[text[key], value] for key, value in facts.items()], text_columns=2)


def _headline(rows: list[dict[str, Any]], text: dict[str, str]) -> str:
    """The smaller cache that costs least perplexity, of those that were filled by all tokens: with the few that fill a
    quantised one, chance decides."""
    first = rows[0]
    smaller = [row for row in rows if row["perplexity"] and row["cache"]["reduction_measured"] > 0]
    if not smaller:
        return text["eval_none_smaller"].format(first=label(first), ppl=_number(first["perplexity"]))
    best = min(smaller, key=lambda row: row["perplexity"])
    return text["eval_best"].format(
        first=label(first),
        name=label(best),
        reduction=percent(best["cache"]["reduction_measured"], 2),
        kb=kilobytes(best["cache"]["bytes_measured"]),
        first_kb=kilobytes(first["cache"]["bytes_measured"]),
        ppl=_number(best["perplexity"]),
        first_ppl=_number(first["perplexity"]),
        change=change(best["change"], 2),
    )


def _whole(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the same model whose perplexity is that of all tokens; the first if a quantised one stands alone."""
    return next((one for one in rows if one["name"] == row["name"] and one["perplexity"] is not None), rows[0])


def _perplexity(row: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """Of all tokens. A quantised cache was filled by fewer: its model's without, times the change found on these."""
    whole = _whole(row, rows)
    if row is whole:
        return row["perplexity"]
    return whole["perplexity"] * row["cached"]["perplexity"] / whole["cached"]["perplexity"]


def _positions(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """As `_perplexity`, band by band; empty in the records of an older version."""
    whole = _whole(row, rows)
    bands = whole.get("perplexity_by_position") or []
    if row is whole or not bands:
        return bands
    parts = zip(bands, row["cached"]["perplexity_by_position"], whole["cached"]["perplexity_by_position"], strict=True)
    return [band | {"perplexity": band["perplexity"] * a["perplexity"] / b["perplexity"]} for band, a, b in parts]


def _table(rows: list[dict[str, Any]], text: dict[str, str]) -> Table:
    return Table([text[f"eval_{column}"] for column in _COLUMNS], [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    cached, cache = row["cached"] or {}, row["cache"]
    return [
        label(row),
        _number(row["perplexity"]),
        change(row["change"], 2),
        percent(row["accuracy"], 2),
        _number(cached.get("perplexity")),
        change(cached.get("change"), 2),
        kilobytes(cache and cache["bytes_measured"]),
        percent(cache and cache["reduction_measured"], 2),
        DASH if row["kl"] is None else f"{abs(row['kl']):.3g}",
        percent(row["agreement"], 2),
        DASH if row["logit_difference"] is None else f"{row['logit_difference']:.2g}",
    ]


def _cache_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    held = [(label(row), row["cache"]) for row in rows if row["cache"]]
    keys = ("bytes_measured", "bytes_formula", "bytes_slack")
    return [[name, *(integer(cache[key]) for key in keys)] for name, cache in held]


def _setup(metrics: dict[str, Any]) -> dict[str, str]:
    first = metrics["models"][0]
    return {
        "first": label(first),
        "tokens": f"{first['tokens']:,}",
        "cached_tokens": f"{first['cached']['tokens']:,}",
        "length": f"{first['cache']['length']:,}",
        "dtype": first["cache"]["dtype"],
    }


def _agreement(metrics: dict[str, Any], text: dict[str, str]) -> str:
    """Whether the two passes found the same perplexity of the same tokens, and where not, by how much they differ."""
    setup = _setup(metrics)
    wrong = [row for row in metrics["models"] if row["cached"] and row["cached"]["agrees"] is False]
    if not wrong:
        return text["eval_agree"].format(**setup)
    pairs = [(row["cached"]["parallel_perplexity"], row["cached"]["perplexity"]) for row in wrong]
    found = [f"{label(row)} {a:.6g} / {b:.6g}" for row, (a, b) in zip(wrong, pairs, strict=True)]
    return text["eval_disagree"].format(**setup, found=", ".join(found))


def _tasks(metrics: dict[str, Any]) -> Table | None:
    """The tasks' table, a line a model, task and figure; None if none was run."""
    lines = [
        [label(row), task, name, f"{value:.4f}"]
        for row in metrics["models"]
        for task, figures in (row["tasks"] or {}).items()
        for name, value in figures.items()
        if not name.endswith("_stderr")
    ]
    return Table(["model", "task", "metric", "value"], lines) if lines else None


def _series(rows: list[dict[str, Any]]) -> list[Series]:
    return [
        Series(
            name=label(row),
            baseline=row is rows[0],
            perplexity=(),
            train_loss=(),
            best=(0, _perplexity(row, rows)),
            cache_bytes=row["cache"]["bytes_measured"],
            positions=_positions(row, rows),
        )
        for row in rows
        if row["cached"]
    ]


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:,.2f}" if value >= 1000 else f"{value:.5g}"
