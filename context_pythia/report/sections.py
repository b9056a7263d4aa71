"""What all reports share: models as series, quality by position, settings and provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

from context_pythia.report.document import Block, Heading, Paragraph, Picture, Table
from context_pythia.report.figures import Panel, Points, Series, draw_frontier, draw_panels, short
from context_pythia.report.formats import change, integer, kilobytes, pair, percent, perplexity
from context_pythia.report.texts import Texts


def table(rows: Sequence[Mapping[str, str]], text: Texts, text_columns: int = 1) -> Table:
    """Rows of cells by column; the text of a column's key is its head."""
    keys = next(iter(rows), {})
    return Table([text(key) for key in keys], [[row[key] for key in keys] for row in rows], text_columns)


def compared(one: Series, base: Series | None, digits: int | None = None) -> dict[str, str]:
    """Perplexity and cache of a model, and their differences to those of `base`, if that is another model."""
    apart = reduction = None
    if base is not None and base is not one:
        apart = one.perplexity / base.perplexity - 1 if one.perplexity else None
        reduction = 1 - one.cache_bytes / base.cache_bytes if one.cache_bytes and not one.baseline else None
    return {
        "name": one.name,
        "ppl": perplexity(one.perplexity or None, digits),
        "change": change(apart, digits or 1),
        "kb": kilobytes(one.cache_bytes or None),
        "reduction": percent(reduction),
    }


def headline(series: Sequence[Series], text: Texts) -> Paragraph:
    """The best perplexity with a smaller cache than the first baseline's, and the smallest cache."""
    done = [one for one in series if one.perplexity and one.cache_bytes]
    if not done:
        return Paragraph(text("nothing"), "lead")
    base = next((one for one in done if one.baseline), None)
    smaller = [one for one in done if base and one.cache_bytes < base.cache_bytes]
    best = min(smaller or done, key=attrgetter("perplexity"))
    if base is None or not smaller:
        return Paragraph(text("none_smaller", **compared(best, None)), "lead")
    of_base = {f"base_{key}": value for key, value in compared(base, None).items()}
    sentences = [text("best", **of_base, **compared(best, base))]
    smallest = min(smaller, key=attrgetter("cache_bytes", "perplexity"))
    if smallest is not best:
        sentences.append(text("smallest", **compared(smallest, base)))
    return Paragraph(text("between_sentences").join(sentences), "lead")


def frontier(series: Sequence[Series], caption: str) -> Iterator[Picture]:
    """The picture of perplexity against the cache, if a model has both."""
    if any(one.perplexity and one.cache_bytes for one in series):
        title = "Perplexity against cache (lower left is better)"
        yield Picture("frontier.png", caption, partial(draw_frontier, series, title))


def baselines(series: Sequence[Series]) -> dict[str, bool]:
    """Whether each model, by name, is a baseline."""
    return {one.name: one.baseline for one in series}


def difference(panel: Panel, series: Sequence[Series], of: str = "") -> Iterator[Panel]:
    """The panel of the curves' differences to the first baseline, if there is a baseline and another model."""
    base = next((one.name for one in series if one.baseline and panel.curves.get(one.name)), None)
    if base is not None and sum(map(bool, panel.curves.values())) > 1:
        values = dict(panel.curves[base])
        apart = {
            name: [(x, 100 * (y / values[x] - 1)) for x, y in points if x in values]
            for name, points in panel.curves.items()
        }
        yield Panel(f"Difference to {short(base)}{of} (%)", panel.x, apart, scaled=panel.scaled.replace("y", ""))


def positions(series: Sequence[Series], text: Texts) -> Iterator[Block]:
    """The section on quality by position, of the models with the bands of the first one; empty if no model has bands.

    In the picture a point stands at the end of its band.
    """
    ends = {one.name: [band["to"] for band in one.positions] for one in series if one.positions}
    measured = [one for one in series if ends.get(one.name) == next(iter(ends.values()), ())]
    if not measured:
        return
    bands = measured[0].positions
    base = next((one for one in measured if one.baseline), None)
    rows: list[list[str]] = []
    curves: dict[str, Points] = {}
    for one in measured:
        values = [band["perplexity"] for band in one.positions]
        curves[one.name] = list(zip(ends[one.name], values, strict=True))
        cells = list(map(perplexity, values))
        if base and one is not base:
            pairs = zip(values, base.positions, strict=True)
            cells = [f"{perplexity(value)} ({change(value / band['perplexity'] - 1)})" for value, band in pairs]
        rows.append([one.name, *cells])
    rows.append([text("positions_tokens"), *(integer(band["tokens"]) for band in bands)])
    yield Heading(text("positions"))
    yield Table([text("model"), *(f"{band['from']:,}–{band['to']:,}" for band in bands)], rows)
    yield Paragraph(text("positions_note"))
    if base and len(measured) > 1:
        yield Paragraph(text("positions_change", baseline=base.name))
    x = "end of the band of positions (tokens)"
    panel = Panel("Perplexity by position in the sample", x, curves, scaled="xy")
    draw = partial(draw_panels, [panel, *difference(panel, series)], baselines(series))
    yield Picture("positions.png", text("positions_caption"), draw)


def cache_table(caches: Mapping[str, Mapping[str, Any]], text: Texts) -> Table:
    """The contents of the caches by model; `bytes_slack` is the growth reserve. Evaluations record no numbers."""
    known = ("numbers_per_token", "bytes_measured", "bytes_formula", "bytes_slack")
    keys = [key for key in known if any(key in cache for cache in caches.values())]
    rows = [{"model": name} | {key: integer(cache.get(key)) for key in keys} for name, cache in caches.items()]
    return table(rows, text)


def data_facts(data: Mapping[str, Any], text: Texts) -> dict[str, str]:
    """Facts about the data, by the keys of the texts."""
    length = data["sequence_length"]
    return {
        "data_source": data["source"],
        "documents": pair(data["documents_train"], data["documents_validation"]),
        "samples": pair(data["samples_train"], data["samples_validation"]),
        "sequence_length": text("tokens", length=length, with_target=length + 1),
        "tokenizer": data["tokenizer"],
        "vocabulary": integer(data["vocab_size"]),
    }


def failures(named: Mapping[str, str | None], text: Texts) -> Iterator[Block]:
    """An alert for each error, by the name of the model or trial."""
    for name, error in named.items():
        if error is not None:
            yield Paragraph(text("failure", name=name, error=error), "alert")


def facts(values: Mapping[str, str], text: Texts) -> Table:
    """Settings or provenance, one per line; the text of the key is the label."""
    rows = [{"setting": text(key), "value": value} for key, value in values.items()]
    return table(rows, text, text_columns=2)


def provenance(record: Mapping[str, Any], text: Texts) -> Iterator[Block]:
    """The machine, date and versions of the figures."""
    known = {key: record.get(key) for key in ("device", "platform", "threads", "commit", "created", "command")}
    known["versions"] = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    known["fingerprint"] = record.get("data_fingerprint")
    yield Heading(text("provenance"))
    yield facts({key: str(value) for key, value in known.items() if value is not None}, text)
    if earlier := record.get("earlier"):
        yield Paragraph(text("earlier", calls=len(earlier)))
