"""What a user is shown of an error: one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank, or the name of its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
