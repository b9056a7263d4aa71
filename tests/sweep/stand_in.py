"""Stands in for trainings: real run folders without torch's work. Each is ten steps, and goes on after a kill."""

import time
from types import SimpleNamespace

from context_pythia.config.recipe_files import load_recipe
from context_pythia.runs.record import Run, model_entry
from context_pythia.sweep import worker
from context_pythia.sweep.options import SweepPlan, parse_over

DATA = {"fingerprint": "the same text", "vocab_size": 300}
STEPS = 10


def plan_of(recipe="quick", over=(), models=("Pythia", "layer"), seeds=(0,), values=None, **asked) -> SweepPlan:
    return SweepPlan(load_recipe(recipe, values, models), [parse_over(text) for text in over], seeds, **asked)


def compare(recipe, folder, progress=False, origin=None, seconds=0.0):
    """`runs.train.compare` of one model, whose perplexity its settings decide."""
    if worker._entry(folder):
        (folder / "twice").touch()
    (options,) = recipe.models
    run = Run(folder, recipe, origin)
    run.use_data(DATA)
    run.write()
    log = folder / "steps"
    for step in range(len(log.read_text().splitlines()) if log.exists() else 0, STEPS):
        time.sleep(seconds)
        with log.open("a") as file:
            file.write(f"{step}\n")
    width = 512 if options.context_source is None else options.context_dim
    rate = recipe.train.learning_rate
    ppl = 100 + 10 * abs(rate - 0.002) / 0.002 + 1000 / width + recipe.seed
    cache = {"bytes_measured": 4096 * width}
    run.write(model_entry(options, best_val_ppl=ppl, cache=cache))


def stand_in(patch=setattr, seconds=0.0) -> None:
    patch(worker, "training_data", lambda recipe, progress: SimpleNamespace(summary=DATA))
    patch(worker, "compare", lambda *args, **named: compare(*args, **named, seconds=seconds))


def work(out, seconds: float, **plan) -> None:
    """A worker in a process of its own."""
    stand_in(seconds=seconds)
    worker.sweep(plan_of(**plan), out, progress=False)
