"""The papers of a converted model: its card, and a picture of what each layer keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from context_pythia.files import read_record
from context_pythia.report.figures import COLOURS, drawing_style, new_figure, png

SPECTRUM = "spectrum.png"


def write_card(folder: Path) -> None:
    """README.md of a converted model's folder, as Hugging Face shows it, and the picture, from its conversion.json."""
    record = read_record(folder / "conversion.json")
    if record.get("layers"):
        write_spectrum(folder, record)
    cache, settings = record["cache"], record["settings"]
    control = record["context_dim"] is None
    name = f"{Path(record['original']).name}, " + ("healed" if control else f"{reduction(record):.1%} less cache")
    shipped = settings["ship_code"] and not control  # a control is a plain GPT-NeoX, which every transformers knows
    load = "" if control else "import context_pythia  # registers the model\n"
    if shipped:
        load = "# with context-pythia installed: import context_pythia; without it: trust_remote_code=True below\n"
    option = ", trust_remote_code=True" if shipped else ""
    lines = [
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
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


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


def write_spectrum(folder: Path, record: dict[str, Any]) -> None:
    """The picture: what each direction of a layer's input is worth, and how many the latent keeps."""
    positive = [value for layer in record["layers"] for value in layer["spectrum"] if value > 0]
    if not positive:
        return
    from matplotlib.ticker import FuncFormatter

    with drawing_style():
        figure = new_figure(height=4.9)
        axes = figure.subplots()
        for number, layer in enumerate(record["layers"]):
            spectrum, colour = layer["spectrum"], COLOURS[number % len(COLOURS)]
            axes.plot(range(1, len(spectrum) + 1), spectrum, color=colour, linewidth=1.2, label=f"layer {number}")
            if 0 < layer["latent"] <= len(spectrum):
                axes.plot(layer["latent"], spectrum[layer["latent"] - 1], "o", color=colour)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
        axes.set_ylim(bottom=max(positive) * 1e-9)
        axes.set_xlabel("direction of the input, rotary keys aside (dot: last kept)")
        axes.set_ylabel("error where it is left out")
        axes.legend(fontsize=8, ncols=2)
        (folder / SPECTRUM).write_bytes(png(figure))


def reduction(record: dict[str, Any]) -> float:
    """Share of the original's cache that the model does without, by formula."""
    return 1 - record["cache"]["numbers_per_token"] / record["numbers_per_token_original"]
