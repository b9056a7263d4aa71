"""The card of a converted model for Hugging Face, with a picture of what each layer keeps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from context_pythia.files import read_record, write_bytes
from context_pythia.report.document import rendered
from context_pythia.report.figures import Panel, draw_panels, png

RECORD = "conversion.json"


def write_card(folder: Path) -> list[Path]:
    """Write README.md, and the picture if text has decided what is kept, from a converted model's conversion.json.

    Returns:
        the paths of the new files.

    Raises:
        FileNotFoundError: conversion.json is missing.
        UsageError: conversion.json is damaged.
    """
    record = read_record(folder / RECORD)
    original, control = record["original"], record["context_dim"] is None
    layers = record.get("layers") or []
    shipped = record["settings"]["ship_code"] and not control  # transformers itself loads a control, a GPT-NeoX
    spectrum = _spectrum(layers)
    values = record | {
        "name": Path(original).name,
        "base_model": "" if Path(original).exists() else original.partition("@")[0],
        "control": control,
        "reduction": f"{1 - record['cache']['numbers_per_token'] / record['numbers_per_token_original']:.1%}",
        "shipped": shipped,
        "option": ", trust_remote_code=True" if shipped else "",
        "spectrum": spectrum is not None,
    }
    files = {"README.md": rendered("card.md", **values).encode()}
    if spectrum:
        files["spectrum.png"] = png(partial(draw_panels, [spectrum], dict.fromkeys(spectrum.curves, False)))
    return [write_bytes(folder / name, content) for name, content in files.items()]


def _spectrum(layers: list[Mapping[str, Any]]) -> Panel | None:
    """The error without each direction of the layers' inputs; None if the conversion has read no text."""
    spectra = {f"layer {i}": layer["spectrum"] for i, layer in enumerate(layers)}
    largest = max((value for spectrum in spectra.values() for value in spectrum), default=0)
    if largest <= 0:
        return None
    curves = {
        name: [(i, value) for i, value in enumerate(spectrum, 1) if value > 1e-9 * largest]
        for name, spectrum in spectra.items()
    }
    kept = {
        name: (layer["latent"], spectra[name][layer["latent"] - 1])
        for name, layer in zip(spectra, layers, strict=True)
        if 0 < layer["latent"] <= len(spectra[name])
    }
    title, x = "Error without each direction (star: last kept)", "direction of the input, rotary keys aside"
    return Panel(title, x, curves, stars=kept, scaled="y")
