"""The card of a converted model, and a picture of what each layer keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from context_pythia.files import read_record, write_bytes
from context_pythia.report.figures import draw_spectra, png

RECORD, SPECTRUM = "conversion.json", "spectrum.png"


def write_card(folder: Path) -> list[Path]:
    """Write README.md for Hugging Face, and the picture, from the conversion.json of a converted model's folder.

    Returns:
        the paths of the new files.

    Raises:
        FileNotFoundError: conversion.json is missing.
        UsageError: conversion.json is damaged.
    """
    record = read_record(folder / RECORD)
    written = [write_bytes(folder / "README.md", "\n".join(_card(record)).encode())]
    if any(value > 0 for layer in record.get("layers") or () for value in layer["spectrum"]):
        written.append(write_bytes(folder / SPECTRUM, png(draw_spectra, record["layers"])))
    return written


def _card(record: dict[str, Any]) -> list[str]:
    cache, settings = record["cache"], record["settings"]
    control = record["context_dim"] is None
    name = f"{Path(record['original']).name}, " + ("healed" if control else f"{reduction(record):.1%} less cache")
    shipped = settings["ship_code"] and not control  # a control is a plain GPT-NeoX, which transformers can load
    load = "" if control else "import context_pythia  # registers the model\n"
    if shipped:
        load = "# with context-pythia installed: import context_pythia; without it: trust_remote_code=True below\n"
    option = ", trust_remote_code=True" if shipped else ""
    return [
        "---",
        "library_name: transformers",
        *([f"base_model: {record['original'].partition('@')[0]}"] if not Path(record["original"]).exists() else []),
        "tags: [context-pythia, kv-cache]",
        "---",
        "",
        f"# {name}",
        "",
        *_what(record),
        "",
        "```python",
        f"{load}from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{option})',
        f'tokenizer = AutoTokenizer.from_pretrained("."{option})',
        "```",
        "",
        f"| | numbers a token | bytes of {cache['length']} tokens, {cache['dtype']} |",
        "| --- | ---: | ---: |",
        f"| by formula | {cache['numbers_per_token']:,} | {cache['bytes_formula']:,} |",
        f"| measured on the cache that `generate()` filled | | {cache['bytes_measured']:,} |",
        f"| original, by formula | {record['numbers_per_token_original']:,} | |",
        "",
        *_layers(record),
        "The settings, and what each layer keeps, are in `conversion.json`.",
        "",
    ]


def _what(record: dict[str, Any]) -> list[str]:
    options, data = record["settings"]["convert"], record["settings"]["data"]
    reduced = ["", f"A layer caches one context a token in place of keys and values: {reduction(record):.1%} less."]
    if record["context_dim"] is None:
        text = f"The model of {record['original']}, not converted: the control of a healing."
        reduced = []
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
    return [text, *reduced]


def _layers(record: dict[str, Any]) -> list[str]:
    if not record.get("layers"):
        return []
    rows = [
        f"| {i} | {layer['width']} | {2 * sum(layer['rotary_pairs'])} | {' '.join(map(str, layer['rotary_pairs']))} | "
        f"{layer['latent']} |"
        for i, layer in enumerate(record["layers"])
    ]
    head = ["| layer | width | rotary | pairs by frequency | latent |", "| --- | ---: | ---: | --- | ---: |"]
    return [*head, *rows, ""]


def reduction(record: dict[str, Any]) -> float:
    """Reduction of the cache against the original model, by formula, as a share."""
    return 1 - record["cache"]["numbers_per_token"] / record["numbers_per_token_original"]
