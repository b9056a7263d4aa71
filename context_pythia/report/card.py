"""The card of a converted model for Hugging Face, with a picture of what each layer keeps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from context_pythia.files import read_record, write_bytes
from context_pythia.report.document import Block, Code, Heading, Paragraph, Picture, Table, to_markdown
from context_pythia.report.figures import Panel, draw_panels, png
from context_pythia.report.formats import integer

RECORD = "conversion.json"
_FRONT = """---
library_name: transformers
{base}tags: [context-pythia, kv-cache]
---

"""
_LOAD = """{first}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{option})
tokenizer = AutoTokenizer.from_pretrained("."{option})"""


def write_card(folder: Path) -> list[Path]:
    """Write README.md, and the picture if text has decided what is kept, from a converted model's conversion.json.

    Returns:
        the paths of the new files.

    Raises:
        FileNotFoundError: conversion.json is missing.
        UsageError: conversion.json is damaged.
    """
    record = read_record(folder / RECORD)
    blocks, original = list(_blocks(record)), record["original"]
    front = _FRONT.format(base="" if Path(original).exists() else f"base_model: {original.partition('@')[0]}\n")
    files = {"README.md": (front + to_markdown(blocks)).encode()}
    files |= {block.file: png(block.draw) for block in blocks if isinstance(block, Picture)}
    return [write_bytes(folder / name, content) for name, content in files.items()]


def _blocks(record: dict[str, Any]) -> Iterator[Block]:
    cache, original = record["cache"], record["numbers_per_token_original"]
    control = record["context_dim"] is None
    reduction = f"{1 - cache['numbers_per_token'] / original:.1%}"
    yield Heading(f"{Path(record['original']).name}, " + ("healed" if control else f"{reduction} less cache"), level=1)
    yield Paragraph(_origin(record))
    if not control:
        yield Paragraph(f"A layer caches one context a token in place of keys and values: {reduction} less.")
    # A control is a plain GPT-NeoX, which transformers loads by itself.
    first = "import context_pythia  # registers the model" if not control else ""
    shipped = record["settings"]["ship_code"] and not control
    if shipped:
        first = "# with context-pythia installed: import context_pythia; without it: trust_remote_code=True below"
    option = ", trust_remote_code=True" if shipped else ""
    yield Code(_LOAD.format(first=first, option=option).strip(), "python")
    rows = [
        ["by formula", integer(cache["numbers_per_token"]), integer(cache["bytes_formula"])],
        ["measured on the cache that generate() filled", "", integer(cache["bytes_measured"])],
        ["original, by formula", integer(original), ""],
    ]
    yield Table(["", "numbers a token", f"bytes of {cache['length']} tokens, {cache['dtype']}"], rows)
    spectra = {f"layer {i}": layer["spectrum"] for i, layer in enumerate(record.get("layers") or ())}
    largest = max((value for spectrum in spectra.values() for value in spectrum), default=0)
    if largest > 0:
        curves = {
            name: [(i, value) for i, value in enumerate(spectrum, 1) if value > 1e-9 * largest]
            for name, spectrum in spectra.items()
        }
        kept = {
            name: (layer["latent"], spectra[name][layer["latent"] - 1])
            for name, layer in zip(spectra, record["layers"], strict=True)
            if 0 < layer["latent"] <= len(spectra[name])
        }
        title, x = "Error without each direction (star: last kept)", "direction of the input, rotary keys aside"
        panel = Panel(title, x, curves, stars=kept, scaled="y")
        draw = partial(draw_panels, [panel], dict.fromkeys(curves, False))
        yield Picture("spectrum.png", "Error without each direction of the layers' inputs, and the last one kept", draw)
    yield Paragraph("conversion.json has the settings and what each layer keeps.")


def _origin(record: dict[str, Any]) -> str:
    options, data = record["settings"]["convert"], record["settings"]["data"]
    if record["context_dim"] is None:
        text = f"The model of {record['original']}, not converted: the control of a healing."
    elif record["exact"]:
        condition = max(layer["condition"] for layer in record["layers"])
        text = (
            "Converted exactly: its predictions are the original's, up to rounding, which the way back from a context "
            f"enlarges by at most {condition:,.3g} (the condition number). No text was used."
        )
    else:
        text = (
            f"Converted without training; calibrated on {options['calibration_tokens']:,} tokens of {data['data']} "
            f"(weighting: {options['weighting']})."
        )
    if healing := record.get("healing"):
        text += (
            f" Then healed for {healing['steps']} steps (parameters: {record['settings']['heal']['parameters']}): "
            f"validation perplexity {healing['val_ppl_before']:.2f} before, {healing['val_ppl']:.2f} after "
            f"(weights of step {healing['kept_step']} kept)."
        )
    return text
