"""Phase 2's way to train beside the plain one: the loss of each step, from the same weights, on the same batches.

    python results/training/loss_curve.py --data CORPUS --tokenizer TOKENIZER --batch-size 8 --steps 200 --out curve

The recipe `report`'s baseline, once by phase 2's own Trainer (bfloat16 autocast, head and loss in chunks, fused AdamW)
and once by a textbook's loop (fp32, all logits). Writes losses.json and loss_curve.png into the folder.

It runs with the package of commit 3930306: later ones train by a loop of their own, not by the Trainer.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from context_pythia.training.trainer import LanguageModelTrainer
from torch import nn
from tqdm import tqdm

from context_pythia.config.recipe_files import load_recipe
from context_pythia.data.packing import load_data
from context_pythia.runs.build import build_model, embedding_rows
from context_pythia.training.phase2 import run_trainer


class RecordingTrainer(LanguageModelTrainer):
    """Phase 2's Trainer, without validation, that notes each batch and its loss."""

    def __init__(self, *positional, losses, batches, args, **arguments):
        args.eval_strategy = args.save_strategy = "no"
        args.eval_on_start = False
        super().__init__(*positional, args=args, **arguments)
        self.losses, self.batches = losses, batches

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append((inputs["input_ids"].clone(), inputs["shift_labels"].clone()))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss.item())
        return loss


def plain_losses(model, batches, options) -> list[float]:
    optimizer = torch.optim.AdamW(parameter_groups(model, options), lr=options.learning_rate)
    losses = []
    model.train()
    for ids, labels in tqdm(batches, desc="plain"):
        logits = model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def parameter_groups(model, options) -> list[dict]:
    """Weight decay on matrices alone, as transformers has it (embeddings included, biases and norms left out)."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--data", "--tokenizer", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    own = {"data.data": asked.data, "data.tokenizer": asked.tokenizer, "train.batch_size": asked.batch_size}
    recipe = load_recipe("report", own, models=["Pythia-70M"])
    data, options = load_data(recipe.data), recipe.train
    build = partial(build_model, recipe.models[0], recipe, embedding_rows(recipe, len(data.tokenizer)), data.tokenizer)
    losses: dict[str, list[float]] = {"phase 2": [], "plain": []}
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    make = partial(RecordingTrainer, losses=losses["phase 2"], batches=batches)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run_trainer(
            build(),
            data,
            options,
            recipe.seed,
            Path(folder),
            "phase 2",
            None,
            True,
            steps=asked.steps,
            make_trainer=make,
        )
    seconds = {"phase 2": time.monotonic() - began}
    began = time.monotonic()
    losses["plain"] = plain_losses(build(), batches, options)
    seconds["plain"] = time.monotonic() - began
    gaps = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
    figures = {
        "steps": asked.steps,
        "tokens_per_step": batches[0][0].numel(),
        "largest_difference": max(gaps),
        "mean_difference": statistics.fmean(gaps),
        "last_20": {way: statistics.fmean(values[-20:]) for way, values in losses.items()},
        "seconds": seconds,
        "losses": losses,
    }
    out = Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "losses.json").write_text(json.dumps(figures, indent=1))
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 5), height_ratios=(3, 1), layout="constrained")
    for (way, values), style in zip(losses.items(), ("-", ":"), strict=True):
        above.plot(range(1, len(values) + 1), values, style, label=way)
    above.set_ylabel("training loss, nats")
    above.legend()
    below.plot(range(1, len(gaps) + 1), gaps, color="0.4")
    below.set_ylabel("|difference|")
    below.set_xlabel("step")
    figure.savefig(out / "loss_curve.png", dpi=120)
    print(json.dumps({key: value for key, value in figures.items() if key != "losses"}, indent=1))


if __name__ == "__main__":
    main()
