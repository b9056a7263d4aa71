"""A record's figures as reports write them, in any language; what is missing is a dash."""

from __future__ import annotations

import math
from typing import Any

DASH = "–"


def finite(value: float | None) -> bool:
    """Whether there is a figure at all, as there is none of a model that failed or diverged."""
    return value is not None and math.isfinite(value)


def plain(value: Any) -> str:
    return DASH if value is None else str(value)


def integer(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def pair(first: int | None, second: int | None) -> str:
    return DASH if first is None and second is None else f"{integer(first)} / {integer(second)}"


def number(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    # Rounded first and added to zero, so that a loss of nothing is not "-0.0 %".
    return DASH if value is None else f"{round(100 * value, digits) + 0.0:.{digits}f} %"


def sign(value: float) -> str:
    """That of a change. What is rounded to nothing has it too: that of the change in percent is that in units."""
    return "−" if value < 0 else "+"


def change(value: float | None, digits: int = 1) -> str:
    """A share by which something is more or less, signed."""
    return DASH if value is None or not math.isfinite(value) else sign(value) + percent(abs(value), digits)


def perplexity_digits(value: float) -> int:
    return 2 if value < 100 else 1


def perplexity(value: float | None, digits: int | None = None) -> str:
    return DASH if value is None else f"{value:,.{perplexity_digits(value) if digits is None else digits}f}"


def kilobytes(value: int | None) -> str:
    """Of bytes; 1 KB is 1,024 of them."""
    return DASH if value is None else f"{value / 1024:,.1f} KB"
