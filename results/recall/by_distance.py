"""Recall by distance: `python by_distance.py OUT.json RUN...` for run folders of the recipe `recall`.

The samples are new, have the most pairs, and are as long as the trained ones or twice as long. An answer counts where
its key is asked for the first time, because its value then stands only in the list of pairs; the distance is from there
to the answer. Samples of the trained length are also read token by token through each model's cache.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import DynamicCache

from context_pythia.data.associations import associations
from context_pythia.evaluation.pretrained import load_pretrained

SAMPLES, SEED = 2000, 2
BANDS = ((2, 16), (16, 32), (32, 64), (64, 128), (2, 128))


def questions(length: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples `[N, S+1]`, and the distance of each answer to its only copy, 0 for other tokens."""
    tokens, answers = associations(SAMPLES, length, vocab_size, SEED, mixed=False)
    distances = torch.zeros(tokens.shape, dtype=torch.long)
    for n, (row, answer) in enumerate(zip(tokens, answers, strict=True)):
        told: dict[int, int] = {}
        for t in range(1, length + 1, 2):
            key = int(row[t - 1])
            if not answer[t]:
                told[key] = t
            elif key in told:
                distances[n, t] = t - told.pop(key)
    return torch.from_numpy(tokens.astype("int64")), distances


@torch.no_grad()
def predictions(model, tokens: torch.Tensor, through_cache: bool) -> torch.Tensor:
    """The likeliest next token at each position `[N, S]`."""
    cache = DynamicCache(config=model.config) if through_cache else None
    parts = tokens.split(1, 1) if through_cache else tokens.split(250)
    found = [model(input_ids=part, past_key_values=cache, use_cache=through_cache).logits.argmax(-1) for part in parts]
    return torch.cat(found, dim=1 if through_cache else 0)


out, *runs = map(Path, sys.argv[1:])
lines = []
for run in runs:
    recipe = json.loads((run / "metrics.json").read_text())["recipe"]
    trained, vocab_size = recipe["data"]["sequence_length"], recipe["data"]["vocab_size"]
    for name in (options["name"] for options in recipe["models"]):
        model = load_pretrained(str(run / "models" / "-".join(name.casefold().split())), torch.float32).eval()
        for length, through_cache in ((trained, False), (trained, True), (2 * trained, False)):
            tokens, distances = questions(length, vocab_size)
            right, asked = predictions(model, tokens[:, :-1], through_cache) == tokens[:, 1:], distances[:, 1:]
            line = {"run": run.name, "model": name, "length": length, "through_cache": through_cache}
            for start, stop in BANDS:
                inside = (asked >= start) & (asked < stop)
                if inside.any():
                    line[f"{start}-{stop}"] = round(right[inside].double().mean().item(), 4)
            line["answers"] = int(inside.sum())
            lines.append(line)
            print(*line.values())
out.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
