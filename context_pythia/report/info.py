"""The table of `context-pythia info`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from context_pythia.report.document import Table, to_console
from context_pythia.report.formats import DASH, integer, kilobytes


def info_table(models: Sequence[dict[str, Any]]) -> str:
    """Parameters and cache bytes of models, for the console."""
    cache = models[0]["cache"]
    head = ["model", "parameters", "trainable", "numbers/token", "by formula", "measured", "slack"]
    rows = [
        [
            model["name"],
            *(integer(model[key]) for key in ("parameters", "trainable_parameters", "cached_numbers_per_token")),
            *(kilobytes(model["cache"][key]) for key in ("bytes_formula", "bytes_measured", "bytes_slack")),
        ]
        for model in models
    ]
    title = f"cache of one sequence of {cache['length']} tokens in {cache['dtype']} (1 KB = 1,024 bytes)"
    open_ones = any(model["parameters"] is None for model in models)
    note = ["", f"{DASH}: the conversion of the trained baseline decides it"] if open_ones else []
    return "\n".join([title, "", to_console([Table(head, rows)]), *note])
