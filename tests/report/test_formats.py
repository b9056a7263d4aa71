"""How a report writes a record's figures."""

import math

import pytest

from context_pythia.report import formats


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formats.percent(0.7504), "75.0 %"),
        (formats.percent(-0.0001), "0.0 %"),
        (formats.percent(0.00123, 2), "0.12 %"),
        (formats.change(-0.0004), "−0.0 %"),
        (formats.change(0.0), "+0.0 %"),
        (formats.change(-0.0304), "−3.0 %"),
        (formats.change(0.0304, 2), "+3.04 %"),
        (formats.perplexity(99.994), "99.99"),
        (formats.perplexity(1234.56), "1,234.6"),
        (formats.perplexity(1234.5, 2), "1,234.50"),
        (formats.kilobytes(3_145_728), "3,072.0 KB"),
        (formats.integer(70_426_624), "70,426,624"),
        (formats.pair(3, None), "3 / –"),
    ],
)
def test_figures_are_rounded_once_and_signed(written, expected):
    assert written == expected


def test_what_is_missing_is_a_dash():
    one = (formats.integer, formats.percent, formats.change, formats.perplexity, formats.kilobytes)
    assert {write(None) for write in one} | {formats.number(None, 2), formats.pair(None, None)} == {"–"}


def test_a_diverged_figure_is_none():
    assert formats.change(math.nan) == "–"
    assert [formats.finite(value) for value in (None, math.nan, math.inf, 0.0)] == [False, False, False, True]
