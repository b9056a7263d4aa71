"""What the character tables in the built-in corpus do to a comparison: perplexity on them and on all other text.

    python results/sweep/character_tables.py SWEEP OUT

SWEEP is a sweep over the built-in corpus, with one seed and no other setting than `samples`, whose trials are still
there, models included, made with this version of Python. The standard library's `encodings` hold some seventy character
tables, most of them generated and near copies of one another, so a model that has seen one knows the next. Writes OUT,
JSON: for each amount of text the tables' share of the validation tokens, and each model's perplexity on the tables (if
there are any), on all other text and on both, over the sample and by position.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import context_pythia  # noqa: F401  registers the model
from context_pythia.config.recipe import Recipe
from context_pythia.config.recipe_files import load_recipe
from context_pythia.data.packing import PackedData, load_data
from context_pythia.evaluation.perplexity import perplexity_by_position
from context_pythia.files import write_json
from context_pythia.training.loss import token_scores

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
    found: list[Tensor] = []
    for batch in tqdm(DataLoader(data.validation, BATCH), desc=folder.name):
        ids, labels = batch["input_ids"], batch["labels"]
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        loss, _ = token_scores(hidden.flatten(0, 1), model.lm_head.weight, labels.flatten())
        found.append(loss.view_as(labels))
    return torch.cat(found).numpy()


def trials(sweep: Path) -> Iterator[tuple[Recipe, Path]]:
    """Each trial's recipe, and the folder of its model."""
    for trial in json.loads((sweep / "metrics.json").read_text())["trials"]:
        folder = sweep / "trials" / trial["folder"]
        recipe = load_recipe(str(folder / "recipe.yaml"), {})
        yield recipe, folder / "models" / recipe.models[0].folder


def amount(trial: tuple[Recipe, Path]) -> int:
    return trial[0].data.samples


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
    for samples, group in itertools.groupby(sorted(trials(sweep), key=amount), amount):
        trained = list(group)
        data = load_data(trained[0][0].data)
        tables, models = of_tables(data), {}
        kinds = {"tables": tables, "other text": ~tables, "all": np.ones_like(tables)}
        for recipe, folder in trained:
            name = recipe.models[0].name
            if name in models:
                sys.exit(f"{sweep} has several trainings of {name} with {samples} samples")
            loss = losses(folder, data)
            models[name] = {kind: figures(loss, which) for kind, which in kinds.items() if which.any()}
        found[samples] = {"share of tables": float(tables.mean()), "models": models}
    write_json(out, found)


if __name__ == "__main__":
    main()
