"""What each model loses where in a sample: the table of perplexities by position, for runs and evaluations alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from context_pythia.report.document import Block, Heading, Paragraph, Picture, Table
from context_pythia.report.figures import Series
from context_pythia.report.formats import change, perplexity

POSITIONS = "positions.png"


def position_blocks(series: Sequence[Series], text: dict[str, str], pictures: dict[str, bytes]) -> Iterator[Block]:
    """The section, with the picture `POSITIONS` if it is among the `pictures`; none where no model has the figures."""
    measured = [one for one in series if one.positions]
    if measured:
        yield Heading(text["positions"])
        yield position_table(series, text)
        yield Paragraph(text["positions_note"])
        if len(measured) > 1 and (base := _baseline(measured)):
            yield Paragraph(text["positions_change"].format(baseline=base.name))
        if POSITIONS in pictures:
            yield Picture(POSITIONS, text["positions_caption"])


def position_table(series: Sequence[Series], text: dict[str, str]) -> Table:
    """Models by bands: the perplexity, and its change against the first baseline that has the figures."""
    measured = [one for one in series if one.positions]
    base = _baseline(measured)
    bands = [(band["from"], band["to"], band["tokens"]) for band in measured[0].positions]
    rows = []
    for one in measured:
        cells = []
        for i, band in enumerate(one.positions):
            value = band["perplexity"]
            cell = perplexity(value)
            if base is not None and one is not base:
                cell += f" ({change(value / base.positions[i]['perplexity'] - 1)})"
            cells.append(cell)
        rows.append([one.name, *cells])
    rows.append([text["positions_tokens"], *(f"{tokens:,}" for *_, tokens in bands)])
    return Table([text["model"], *(f"{start:,}–{stop:,}" for start, stop, _ in bands)], rows)


def _baseline(measured: Sequence[Series]) -> Series | None:
    return next((one for one in measured if one.baseline), None)
