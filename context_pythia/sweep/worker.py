"""`context-pythia sweep`: a worker that trains a sweep's settings until all have ended. Any number may run at once.

A training is the comparison of a recipe with one model, in its own run folder below `trials/`. The run folder is its
only record. A worker holds the folder's lock while it trains, and the system releases the lock if the worker dies. A
worker reads a finished training, and resumes an unfinished one from its checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from context_pythia.config.recipe import Recipe
from context_pythia.config.recipe_files import load_recipe, recipe_from_dict, recipe_to_dict, save_recipe
from context_pythia.errors import Failure, UsageError
from context_pythia.files import read_record, write_json
from context_pythia.runs.build import best_device, embedding_rows
from context_pythia.runs.provenance import provenance, write_call
from context_pythia.runs.record import Run, merged, model_entry, read_metrics
from context_pythia.runs.train import check_training, compare, training_data
from context_pythia.sweep.options import Setting, SweepPlan, differences
from context_pythia.sweep.search import Search, require_optuna

Trial = tuple[Setting, dict[str, Any] | None]  # with the entry of its model; None until it has ended
TRIALS, PROVENANCE, METRICS, RECIPE = "trials", "provenance.json", "metrics.json", "recipe.yaml"
# The fields that a trial copies from the model's entry in the run folder's metrics.
COPIED = (
    "parameters", "best_epoch", "val_accuracy", "val_ppl_by_position", "stop_reason", "seconds_per_epoch", "error",
)  # fmt: skip


def sweep(plan: SweepPlan, out: Path, storage: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Train the settings that no other worker trains, wait for the other workers, and return the metrics of all.

    Args:
        out: the sweep's folder, which all workers share.
        storage: an Optuna storage URL for the sampler `tpe` (default: an SQLite file in `out`).

    Raises:
        UsageError: a setting cannot be trained (checked before any training), or `out` has another sweep.
        Failure: every trial failed, or the storage failed.
        OSError: a folder cannot be written. The next worker resumes the interrupted trial.
    """
    if plan.sampler == "tpe":
        require_optuna()
    (out / TRIALS).mkdir(parents=True, exist_ok=True)
    worker = Worker(plan, out, progress, FileLock(out / ".lock"))
    with worker.lock:  # the first worker packs the text, the others open its file
        recipe = _recipe(plan, out)
        for setting in plan.settings:
            worker.check(setting)
        models = [] if plan.sampler == "grid" else plan.recipe.models
        searches = [Search(plan, model.name, out, worker.lock, storage) for model in models]
        save_recipe(recipe, out / RECIPE)
    for search in searches:
        search.run(worker.train)
    if plan.sampler == "grid":
        worker.train_all()
    metrics = worker.record()
    trials = metrics["trials"]
    if not worker.trained:
        print(f"all {len(trials)} trials have ended, nothing is left to train")
    if trials and all(trial["state"] == "failed" for trial in trials):
        raise Failure(f"all {len(trials)} trials failed: {trials[0]['error']}")
    return metrics


def _recipe(plan: SweepPlan, out: Path) -> Recipe:
    """The recipe of the folder's trainings with the plan's models; raises `UsageError` if it does not fit the plan."""
    kind = read_record(out / METRICS).get("kind") if (out / METRICS).exists() else "sweep"
    if kind != "sweep" or (out / METRICS).exists() > (out / RECIPE).exists():
        raise UsageError(f"{out} holds a run, or a sweep of an older version: choose another folder with --out")
    if not (out / RECIPE).exists():
        return plan.recipe
    recorded = load_recipe(str(out / RECIPE))
    return merged(recorded, dataclasses.replace(plan.recipe, seed=recorded.seed), out, healed=True)


@dataclass
class Worker:
    """This process's part of a sweep.

    Attributes:
        lock: the lock of the sweep's folder.
        trained: whether this worker has trained anything yet.
    """

    plan: SweepPlan
    out: Path
    progress: bool
    lock: FileLock
    trained: bool = False

    def check(self, setting: Setting) -> None:
        """Raise `UsageError` if the setting cannot be trained, or was trained on other text."""
        check_training(setting.recipe)
        data = training_data(setting.recipe, self.progress)
        embedding_rows(setting.recipe, data.summary["vocab_size"])
        if (self._folder(setting) / METRICS).exists():
            Run(self._folder(setting), setting.recipe).use_data(data.summary)

    def train_all(self) -> None:
        """Train the plan's settings: first those that no other worker trains, then the unfinished ones of others."""
        for wait in (False, True):
            for setting in self.plan.settings:
                try:
                    self.train(setting, wait)
                except Timeout:
                    print(f"{setting.name}: another worker trains it", flush=True)

    def train(self, setting: Setting, wait: bool = True) -> dict[str, Any]:
        """Train the setting unless its run folder is finished. Returns the model's entry, which may be a failure.

        Raises:
            Timeout: another worker trains it, and `wait` is false.
        """
        folder, origin = self._folder(setting), self.plan.origin(setting)
        baseline = origin and self.train(origin, wait)
        folder.mkdir(exist_ok=True)
        with FileLock(folder / ".training.lock", timeout=-1 if wait else 0):
            if entry := _entry(folder):
                return entry
            if not self.trained:
                self.trained = True
                with self.lock:
                    write_call(self.out / PROVENANCE, provenance(best_device()))
            print(f"\n{setting.name}", flush=True)
            if baseline and baseline["error"]:
                error = f"its baseline {baseline['name']} failed: {baseline['error']}"
                Run(folder, setting.recipe).write(model_entry(setting.model, error=error))
            else:
                run = origin and Run(self._folder(origin), origin.recipe)
                try:
                    compare(setting.recipe, folder, progress=self.progress, origin=run)
                except Failure:
                    if _entry(folder) is None:
                        raise
            entry = _entry(folder)
        assert entry is not None
        end = f"failed: {entry['error']}" if entry["error"] else f"perplexity {entry['best_val_ppl']:,.2f}"
        print(f"{setting.name}: {end}", flush=True)
        self.record()
        return entry

    def record(self) -> dict[str, Any]:
        """Write the sweep's metrics: the results in the run folders, and the settings that have not begun."""
        with self.lock:
            recipe = load_recipe(str(self.out / RECIPE))
            planned = self.plan.settings if self.plan.sampler == "grid" else []
            found: dict[str, Trial] = {setting.name: (setting, None) for setting in planned}
            found |= {path.parent.name: _read(path) for path in sorted(self.out.glob(f"{TRIALS}/*/{METRICS}"))}
            # Another call in the same folder may have searched other options.
            differing = {path for setting, _ in found.values() for path in differences(setting.recipe, recipe)}
            searched = list(dict.fromkeys([*(one.path for one in self.plan.dimensions), *sorted(differing)]))
            metrics = {
                "kind": "sweep",
                "study": self.out.resolve().name,
                "sampler": self.plan.sampler,
                "seeds": sorted({setting.recipe.seed for setting, _ in found.values()}),
                "searched": searched,
                "recipe": recipe_to_dict(recipe),
                "trials": [_trial_row(setting, entry, searched) for setting, entry in found.values()],
            }
            write_json(self.out / METRICS, metrics)
        return metrics

    def _folder(self, setting: Setting) -> Path:
        return self.out / TRIALS / setting.name


def _trial_row(setting: Setting, entry: dict[str, Any] | None, searched: Iterable[str]) -> dict[str, Any]:
    """A trial in metrics.json, with the values of the `searched` options; the report computes means over seeds."""
    done = entry if entry and not entry["error"] else None
    return {
        "state": "unfinished" if entry is None else "failed" if done is None else "complete",
        "folder": setting.name,
        "model": setting.model.name,
        "baseline": setting.model.is_baseline,
        "setting": {path: setting.value(path) for path in searched},
        "seed": setting.recipe.seed,
        **{key: entry and entry.get(key) for key in COPIED},
        "val_ppl": done and done["best_val_ppl"],
        "cache_bytes": done and done["cache"]["bytes_measured"],
        "phase1": done and done["phase1"] and {key: x for key, x in done["phase1"].items() if key != "history"},
    }


def _read(path: Path) -> Trial:
    """The training of a run folder's metrics, with the entry of its model if it has ended."""
    metrics = read_metrics(path)
    return Setting(path.parent.name, recipe_from_dict(metrics["recipe"])), next(iter(metrics["models"]), None)


def _entry(folder: Path) -> dict[str, Any] | None:
    return _read(folder / METRICS)[1] if (folder / METRICS).exists() else None
