"""Writes the report of a bench's folder: Markdown, HTML and pictures, in English or Japanese.

It reads metrics.json and provenance.json of the folder and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from context_pythia.files import read_record
from context_pythia.report.bench_figures import decode_times, memory_bars, part_bars
from context_pythia.report.bench_tables import (
    cell_figures,
    crossings,
    crossover_figures,
    decode_curves,
    first_peer,
    mean_parts,
    megabytes,
    memory_figures,
    memory_title,
    part_figures,
    rates,
    step_figures,
)
from context_pythia.report.bench_translations import BENCH_TRANSLATIONS
from context_pythia.report.document import Block, Heading, Paragraph, Picture, Table, write_document

DECODE_PICTURE, MEMORY_PICTURE, PARTS_PICTURE = "decode.png", "memory.png", "parts.png"


def write_bench(folder: Path, lang: str = "en") -> list[Path]:
    """Write report.md, report.html (report.ja.md, ... in other languages than English) and the pictures into `folder`.

    Raises:
        FileNotFoundError, ValueError: metrics.json or provenance.json is missing or damaged.
    """
    metrics, provenance = read_record(folder / "metrics.json"), read_record(folder / "provenance.json")
    pictures = _pictures(metrics)
    return write_document(folder, _blocks(metrics, provenance, BENCH_TRANSLATIONS[lang], pictures), lang, pictures)


def _blocks(
    metrics: dict[str, Any], provenance: dict[str, Any], text: dict[str, str], pictures: dict[str, bytes]
) -> Iterator[Block]:
    kind, settings = metrics["kind"], metrics["settings"]
    yield Heading(text["title"].format(what=text[kind]), level=1)
    yield Paragraph(text["how"].format(**settings | {"device": provenance["device"]}))
    for note in metrics["notes"]:
        yield Paragraph(note, "note")
    yield from (_train_blocks if kind == "train" else _decode_blocks)(metrics, text, pictures)
    yield Heading(text["provenance"])
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    rows = [[key, versions if key == "versions" else str(value)] for key, value in provenance.items()]
    yield Table([text["item"], text["value"]], rows, text_columns=2)


def _decode_blocks(metrics: dict[str, Any], text: dict[str, str], pictures: dict[str, bytes]) -> Iterator[Block]:
    if DECODE_PICTURE in pictures:
        yield Picture(DECODE_PICTURE, text["decode_caption"])
    for cell in metrics["cells"]:
        yield Heading(text["cell"].format(batch=cell["batch_size"], length=f"{cell['length']:,}"))
        yield cell_figures(metrics, cell, text)
        yield from (Paragraph(text["failure"].format(**row), "alert") for row in cell["rows"] if row["error"])
    if metrics["cells"]:
        settings, attention = metrics["settings"], ", ".join(sorted({one["attention"] for one in metrics["models"]}))
        facts = {"peer": first_peer(metrics)["name"].rpartition(", ")[0], "attention": attention}
        yield Paragraph(text["cell_note"].format(**settings | facts))
        yield Heading(text["crossover"])
        yield crossover_figures(metrics, text)
        yield Paragraph(text["crossover_note"])
    yield Heading(memory_title(metrics, text))
    yield memory_figures(metrics, text)
    yield Paragraph(text["memory_note"].format(gb=f"{metrics['settings']['memory_gb']:g}"))
    if MEMORY_PICTURE in pictures:
        cell = _largest(metrics)
        yield Picture(
            MEMORY_PICTURE, text["memory_caption"].format(batch=cell["batch_size"], length=f"{cell['length']:,}")
        )


def _train_blocks(metrics: dict[str, Any], text: dict[str, str], pictures: dict[str, bytes]) -> Iterator[Block]:
    yield step_figures(metrics, text)
    yield from (Paragraph(text["failure"].format(**row), "alert") for row in metrics["rows"] if row["error"])
    plain = next(row for row in metrics["rows"] if row["plain"])
    facts = {"recipe": metrics["recipe"]["name"], "tokens": f"{metrics['tokens_per_step']:,}", "plain": plain["name"]}
    empty = megabytes(plain.get("process_bytes"))
    yield Paragraph(text["train_note"].format(rates=rates(metrics), empty=empty, **facts))
    yield Heading(text["parts"])
    yield part_figures(metrics, text)
    yield Paragraph(text["parts_note"])
    if PARTS_PICTURE in pictures:
        yield Picture(PARTS_PICTURE, text["parts_caption"])


def _pictures(metrics: dict[str, Any]) -> dict[str, bytes]:
    if metrics["kind"] == "train":
        parts = {row["name"]: mean_parts(row) for row in metrics["rows"] if row["rounds"]}
        return {PARTS_PICTURE: part_bars(parts)} if parts else {}
    peers = {entry["name"] for entry in metrics["models"] if entry["peer"]}
    batches = sorted({cell["batch_size"] for cell in metrics["cells"]})
    curves = {batch: decode_curves(metrics, batch) for batch in batches}
    if not any(points for by_name in curves.values() for points in by_name.values()):
        return {}
    stars = {(name, batch): length for name, batch, length in crossings(metrics) if length is not None}
    pictures = {DECODE_PICTURE: decode_times(curves, peers, stars)}
    bars = {}
    for row in _largest(metrics)["rows"]:
        if row["cache"] and row["peak_bytes"] is not None:
            entry = next(entry for entry in metrics["models"] if entry["name"] == row["name"])
            cache = row["cache"]["filled"]
            rest = max(0, row["peak_bytes"] - cache)
            bars[row["name"]] = {"weights": entry["weight_bytes"], "cache": cache, "rest of the peak": rest}
    return pictures | ({MEMORY_PICTURE: memory_bars(bars)} if bars else {})


def _largest(metrics: dict[str, Any]) -> dict[str, Any]:
    return max(metrics["cells"], key=lambda cell: cell["batch_size"] * cell["length"])
