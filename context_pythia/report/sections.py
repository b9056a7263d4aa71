"""What all reports share: models as series, quality by position, settings and provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from context_pythia.report.document import Block, Code, Heading, Paragraph, Picture, Table
from context_pythia.report.figures import Panel, Point, Points, draw_frontier, draw_panels, png, short
from context_pythia.report.formats import DASH, change, integer, pair, percent, perplexity, plain
from context_pythia.report.texts import Texts

FRONTIER, POSITIONS = "frontier.png", "positions.png"
Bands = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Series:
    """A model's figures for tables and pictures; `positions` are the bands of `perplexity_by_position`."""

    name: str
    baseline: bool
    perplexity: float | None = None
    cache_bytes: float | None = None
    positions: Bands = ()


def frontier(series: Sequence[Series]) -> dict[str, bytes]:
    """The picture of perplexity against the cache; empty if no model has both."""
    points = [
        Point(one.name, one.name, one.cache_bytes, one.perplexity, one.name)
        for one in series
        if one.perplexity and one.cache_bytes
    ]
    title = "Perplexity against cache (lower left is better)"
    return {FRONTIER: png(draw_frontier, points, _baselines(series), title)} if points else {}


def difference(
    curves: Mapping[str, Points], series: Sequence[Series], of: str, where: str, **axis: Any
) -> Iterator[Panel]:
    """The panel of the curves' differences to the first baseline, if there is a baseline and another model."""
    base = next((one.name for one in series if one.baseline and curves.get(one.name)), None)
    if base is None or sum(map(bool, curves.values())) < 2:
        return
    values = dict(curves[base])
    apart = {
        name: [(x, 100 * (y / values[x] - 1)) for x, y in points if x in values] for name, points in curves.items()
    }
    yield Panel(f"Difference to {short(base)}{of} (%)", where, apart, **axis)


def position_panels(series: Sequence[Series]) -> list[Panel]:
    """Perplexity by position, one point per band, and the difference to the baseline."""
    curves = {one.name: list(enumerate(band["perplexity"] for band in one.positions)) for one in series}
    bands = next(one.positions for one in series if one.positions)
    axis: dict[str, Any] = {"edges": [bands[0]["from"], *(band["to"] for band in bands)]}
    where = "position (tokens)"
    first = Panel("Perplexity by position in the sample", where, curves, scaled="y", **axis)
    return [first, *difference(curves, series, "", where, **axis)]


def position_picture(series: Sequence[Series]) -> dict[str, bytes]:
    if not any(one.positions for one in series):
        return {}
    return {POSITIONS: png(draw_panels, position_panels(series), _baselines(series))}


def position_table(series: Sequence[Series], text: Texts) -> Table:
    """Models by bands: the perplexity, and its change against the first baseline that has the figures."""
    measured = [one for one in series if one.positions]
    base = next((one for one in measured if one.baseline), None)
    rows = []
    for one in measured:
        cells = []
        for i, band in enumerate(one.positions):
            apart = (
                "" if base in (None, one) else f" ({change(band['perplexity'] / base.positions[i]['perplexity'] - 1)})"
            )
            cells.append(perplexity(band["perplexity"]) + apart)
        rows.append([one.name, *cells])
    bands = measured[0].positions
    rows.append([text("positions_tokens"), *(f"{band['tokens']:,}" for band in bands)])
    return Table([text("model"), *(f"{band['from']:,}–{band['to']:,}" for band in bands)], rows)


def positions(series: Sequence[Series], text: Texts, pictures: Mapping[str, bytes]) -> Iterator[Block]:
    """The section on quality by position; empty if no model has the figures."""
    measured = [one for one in series if one.positions]
    if not measured:
        return
    yield Heading(text("positions"))
    yield position_table(series, text)
    yield Paragraph(text("positions_note"))
    base = next((one for one in measured if one.baseline), None)
    if base and len(measured) > 1:
        yield Paragraph(text("positions_change", baseline=base.name))
    yield from picture(pictures, POSITIONS, text("positions_caption"))


def picture(pictures: Mapping[str, bytes], file: str, caption: str) -> Iterator[Block]:
    """The picture, if there is one."""
    if file in pictures:
        yield Picture(file, caption)


def cache_table(caches: Mapping[str, Mapping[str, Any]], text: Texts, *keys: str) -> Table:
    """The contents of the caches by model; `bytes_slack` is the growth reserve."""
    keys = (*keys, "bytes_measured", "bytes_formula", "bytes_slack")
    rows = [[name, *(integer(cache.get(key)) for key in keys)] for name, cache in caches.items() if cache]
    return Table(text.row("model", *keys), rows)


def data_facts(data: Mapping[str, Any], text: Texts) -> dict[str, str]:
    """Facts about the data, by the keys of the texts."""
    length = data.get("sequence_length")
    return {
        "data_source": plain(data.get("source")),
        "documents": pair(data.get("documents_train"), data.get("documents_validation")),
        "samples": pair(data.get("samples_train"), data.get("samples_validation")),
        "sequence_length": text("tokens", length=length, with_target=length + 1) if length else DASH,
        "tokenizer": plain(data.get("tokenizer")),
        "vocabulary": integer(data.get("vocab_size")),
    }


def failures(named: Mapping[str, str | None], text: Texts) -> Iterator[Block]:
    """An alert for each error, by the name of the model or trial."""
    for name, error in named.items():
        if error is not None:
            yield Paragraph(text("failure", name=name, error=error), "alert")


def facts(values: Mapping[str, str], text: Texts) -> Table:
    """Settings or provenance, one per line; the text of the key is the label."""
    return Table(text.row("setting", "value"), [[text(key), value] for key, value in values.items()], text_columns=2)


def recipe_facts(recipe: Mapping[str, Any], text: Texts) -> dict[str, str]:
    """The values of a recipe, by path, that have a text and are not None."""
    found = {}
    for section, values in recipe.items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            key = f"{section}.{name}" if name else section
            if key in text.texts and value is not None:
                share = name.endswith(("_ratio", "_rate")) and name != "learning_rate"
                found[key] = percent(value) if share else plain(value)
    return found


def provenance(
    record: Mapping[str, Any], text: Texts, earlier: Sequence[Mapping[str, Any]] | None = None
) -> Iterator[Block]:
    """The machine, date and versions of the figures, and the earlier calls in the same folder."""
    keys = ("device", "platform", "threads", "commit", "created", "command")
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    values = {key: plain(record.get(key)) for key in keys} | {"versions": versions or DASH}
    values |= {"fingerprint": record["data_fingerprint"]} if record.get("data_fingerprint") else {}
    yield Heading(text("provenance"))
    yield facts(values, text)
    if earlier := record.get("earlier", []) if earlier is None else earlier:
        yield Paragraph(text("earlier"))
        yield Code("\n".join(f"{plain(call.get('updated'))}  {plain(call.get('command'))}" for call in earlier))


def _baselines(series: Sequence[Series]) -> dict[str, bool]:
    return {one.name: one.baseline for one in series}
