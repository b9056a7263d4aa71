"""Formats the figures of a record for reports in any language. A missing figure is a dash."""

from __future__ import annotations

import math

DASH = "–"


def finite(value: float | None) -> bool:
    """Whether there is a figure; a model that failed or diverged has none."""
    return value is not None and math.isfinite(value)


def integer(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def pair(first: int | None, second: int | None) -> str:
    return DASH if first is None and second is None else f"{integer(first)} / {integer(second)}"


def number(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    # Adding 0.0 to the rounded value turns "-0.0 %" into "0.0 %".
    return DASH if value is None else f"{round(100 * value, digits) + 0.0:.{digits}f} %"


def change(value: float | None, digits: int = 1) -> str:
    """A relative change in percent, with its sign even if it rounds to 0."""
    return DASH if value is None or not finite(value) else ("−" if value < 0 else "+") + percent(abs(value), digits)


def perplexity(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return DASH
    return f"{value:,.{(2 if value < 100 else 1) if digits is None else digits}f}"


def kilobytes(value: float | None) -> str:
    """Bytes in KB; 1 KB is 1,024 bytes."""
    return DASH if value is None else f"{value / 1024:,.1f} KB"


def megabytes(value: float | None) -> str:
    """Bytes in MB, without the unit; 1 MB is 1,024 KB."""
    return DASH if value is None else f"{value / 2**20:,.1f}"
