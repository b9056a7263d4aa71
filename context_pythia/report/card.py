"""The card of a converted model for Hugging Face."""

from __future__ import annotations

from pathlib import Path

from context_pythia.files import read_record, write_bytes
from context_pythia.report.document import rendered

RECORD = "conversion.json"


def write_card(folder: Path) -> Path:
    """Write README.md, which is returned, from the conversion.json of a converted model.

    Raises:
        FileNotFoundError: conversion.json is missing.
        UsageError: conversion.json is damaged.
    """
    record = read_record(folder / RECORD)
    original = record["original"]
    values = record | {
        "name": Path(original).name,
        "base_model": "" if Path(original).exists() else original.partition("@")[0],
        "control": record["context_dim"] is None,
        "reduction": f"{1 - record['cache']['numbers_per_token'] / record['numbers_per_token_original']:.1%}",
    }
    return write_bytes(folder / "README.md", rendered("card.md", **values).encode())
