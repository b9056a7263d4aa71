"""What the character tables in the built-in corpus do to a comparison: perplexity on them and on all other text.

    python results/sweep/character_tables.py SWEEP OUT

SWEEP is a sweep over the built-in corpus, with one seed and no other setting than `samples`, whose trials are still
there, models included, made with this version of Python. The standard library's `encodings` hold some seventy character
tables, most of them generated and near copies of one another, so a model that has seen one knows the next. Writes OUT,
JSON: for each amount of text the tables' share of the validation tokens, and each model's perplexity on the tables (if
there are any), on all other text and on both, over the sample and by position.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import context_pythia  # noqa: F401  registers the model
from context_pythia.data.packing import PackedData, load_data
from context_pythia.data.positions import perplexity_by_position
from context_pythia.files import write_json
from context_pythia.recipe import Recipe
from context_pythia.recipe_files import load_recipe

HEADING, BEGINNING = "Character Mapping Codec", 80  # words in the first line of a table, tokens to look for them in
BATCH = 32


def of_tables(data: PackedData) -> np.ndarray:
    """Whether each label of the validation samples `[N, S]` belongs to a character table."""
    rows = np.asarray(data.validation.tokens)
    flat = rows.reshape(-1)
    ends = np.flatnonzero(flat == data.tokenizer.eos_token_id).tolist()
    tables = np.zeros(len(flat), dtype=bool)
    for start, end in zip([0, *(end + 1 for end in ends)], [*ends, len(flat)], strict=True):
        tables[start:end] = HEADING in data.tokenizer.decode(flat[start : start + BEGINNING])
    return tables.reshape(rows.shape)[:, 1:]


@torch.inference_mode()
def losses(folder: Path, data: PackedData) -> np.ndarray:
    """The loss of each label of the validation samples, `[N, S]`, in nats."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = torch.from_numpy(np.asarray(data.validation.tokens).astype(np.int64))
    found: list[Tensor] = []
    for batch in tqdm(rows.split(BATCH), desc=folder.name):
        logits = model(batch[:, :-1], use_cache=False).logits.float()
        found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none"))
    return torch.cat(found).numpy()


def trials(sweep: Path) -> Iterator[tuple[Recipe, Path]]:
    for trial in json.loads((sweep / "metrics.json").read_text())["trials"]:
        folder = sweep / "trials" / trial["folder"]
        recipe = load_recipe(str(folder / "recipe.yaml"), {})
        yield recipe, folder / "models" / recipe.models[0].folder


def figures(loss: np.ndarray, which: np.ndarray) -> dict:
    """Of the labels `which`, `[N, S]`: the perplexity, over all and by position."""
    sums, counts = (torch.from_numpy(part.sum(0)) for part in (np.where(which, loss, 0.0), which))
    return {
        "perplexity": float(np.exp(loss[which].mean(dtype=np.float64))),
        "val_ppl_by_position": perplexity_by_position(sums, counts),
    }


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sweep, out = map(Path, sys.argv[1:])
    found: dict[int, dict] = {}
    for recipe, folder in trials(sweep):
        data, model = load_data(recipe.data), recipe.models[0]
        tables, loss = of_tables(data), losses(folder, data)
        kinds = {"tables": tables, "other text": ~tables, "all": np.ones_like(tables)}
        entry = found.setdefault(recipe.data.samples, {"share of tables": float(tables.mean()), "models": {}})
        if model.name in entry["models"]:
            sys.exit(f"{sweep} has several trainings of {model.name} with {recipe.data.samples} samples")
        entry["models"][model.name] = {name: figures(loss, which) for name, which in kinds.items() if which.any()}
    write_json(out, found)


if __name__ == "__main__":
    main()
