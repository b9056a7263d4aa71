"""`context-pythia sweep`: one worker, of any number, that trains a sweep's settings until all of them have ended.

A training is the comparison of a recipe with one model, in a run folder of its own below `trials/`. Who trains it has
the folder's lock; who finds it finished reads it, and who finds it half done goes on from its checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from context_pythia.config.recipe_files import load_recipe, save_recipe
from context_pythia.data.packing import load_data
from context_pythia.errors import Failure, UsageError, first_line
from context_pythia.files import read_record, write_json
from context_pythia.runs.build import best_device, embedding_rows
from context_pythia.runs.record import Run, merged, provenance, read_metrics, write_call
from context_pythia.runs.train import check_training, compare
from context_pythia.sweep.options import MODEL, Setting, SweepPlan
from context_pythia.sweep.results import sweep_metrics
from context_pythia.sweep.study import (
    OBJECTIVES,
    RESULTS,
    SEEDS,
    add_missing,
    of_sweep,
    open_studies,
    require_optuna,
    suggest,
    take_all,
)

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

    from context_pythia.config.recipe import Recipe

TRIALS, PROVENANCE, METRICS, RECIPE = "trials", "provenance.json", "metrics.json", "recipe.yaml"
# What the study keeps of a model's entry in its run folder's metrics: the report needs no run folder.
KEPT = ("parameters", "best_epoch", "val_accuracy", "val_ppl_by_position", "stop_reason", "seconds_per_epoch", "error")
# States of trials of one training, what says most of it first.
STATES = {"COMPLETE": "complete", "RUNNING": "running", "WAITING": "waiting"}


def sweep(plan: SweepPlan, out: Path, storage: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Train what of the plan nobody else trains, wait for the others, and return the figures of all.

    Args:
        out: the sweep's folder; its name is the study's name in `storage`.
        storage: an Optuna storage URL (default: an SQLite file in `out`).

    Raises:
        UsageError: something that cannot be trained as asked, found before any training; or a folder of another sweep.
        Failure: every trial failed, or the storage failed on the way.
        OSError: a folder that cannot be written. The trial that it met is left to the next worker.
    """
    require_optuna()
    from optuna.exceptions import StorageInternalError

    try:
        (out / TRIALS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {out} ({error.strerror}): choose another with --out") from error
    lock = FileLock(out / ".lock")
    try:
        with lock:  # the first worker packs the text, the others open what it packed
            recipe = _same_recipe(plan, out)
            for setting in plan.settings:
                _check(setting, out, progress)
            save_recipe(recipe, out / RECIPE)
            worker = Worker(plan, out, open_studies(plan, out, storage), lock, progress)
            worker.add()
        take_all(worker.studies, worker.objective, worker.add)
        metrics = worker.record()
    except StorageInternalError as error:
        raise Failure(f"the storage failed ({first_line(error.__cause__ or error)}): run again to go on") from error
    trials = metrics["trials"]
    if not worker.trained:
        print(f"all {len(trials)} trials have ended, nothing is left to train")
    if trials and all(trial["state"] == "failed" for trial in trials):
        raise Failure(f"all {len(trials)} trials failed: {trials[0]['error']}")
    return metrics


def _same_recipe(plan: SweepPlan, out: Path) -> Recipe:
    """The recipe of the folder's trainings; `UsageError` where it or the sampler is another: they would not compare."""
    if (out / METRICS).exists():
        if not (out / RECIPE).exists():
            raise UsageError(f"{out} holds a sweep of an older version: `report` reads it; choose another with --out")
        if (sampler := read_record(out / METRICS)["sampler"]) != plan.sampler:
            raise UsageError(f"{out} holds a sweep with sampler {sampler}: choose another folder with --out")
    if not (out / RECIPE).exists():
        return plan.recipe
    held = load_recipe(str(out / RECIPE))
    return merged(held, dataclasses.replace(plan.recipe, seed=held.seed), out, healed=True)


def _check(setting: Setting, out: Path, progress: bool) -> None:
    """Raise `UsageError` for what cannot be trained, or has been trained on other text."""
    recipe, folder = setting.recipe, out / TRIALS / setting.name
    check_training(recipe)
    data = load_data(recipe.data, progress)
    embedding_rows(recipe, data.summary["vocab_size"])
    if (folder / METRICS).exists():
        Run(folder, recipe).use_data(data.summary)


@dataclass
class Worker:
    """What this process does of a sweep.

    Attributes:
        lock: of the sweep's folder.
        trained: whether it has trained anything yet.
    """

    plan: SweepPlan
    out: Path
    studies: list[Study]
    lock: FileLock
    progress: bool
    trained: bool = False

    def add(self) -> bool:
        with self.lock:
            return add_missing(self.plan, self.studies)

    def objective(self, trial: Trial) -> list[float]:
        """Train the trial's setting with its seeds: the means of perplexity and cache bytes, NaN if all have failed."""
        import optuna

        if MODEL not in trial.user_attrs:
            raise optuna.TrialPruned  # it was made since another worker took the last one that waited
        try:
            entries = dict(self._entries(trial))
        except optuna.TrialPruned:
            raise
        except BaseException:
            # Interrupted, or the machine is to blame: left to the next worker.
            held = trial.study.get_trials(deepcopy=False)[trial.number]
            optuna.storages.RetryHeartbeatStaleTrialCallback()(trial.study, held)
            raise
        trial.set_user_attr(RESULTS, entries)
        self.record()
        done = [(entry["val_ppl"], entry["cache_bytes"]) for entry in entries.values() if entry["error"] is None]
        return [statistics.fmean(column) for column in zip(*done, strict=True)] or [math.nan] * len(OBJECTIVES)

    def _entries(self, trial: Trial) -> Iterator[tuple[str, dict[str, Any]]]:
        """What the study keeps of each of the trial's trainings, by name."""
        import optuna

        searched = (
            {} if self.plan.sampler == "grid" else {one.path: suggest(trial, one) for one in self.plan.dimensions}
        )
        for seed in trial.user_attrs[SEEDS]:
            try:
                setting = self.plan.setting({MODEL: trial.user_attrs[MODEL]} | trial.params | searched, seed)
            except UsageError as error:  # values that are valid one by one, but not together
                print(f"trial {trial.number} is left out: {first_line(error)}", flush=True)
                raise optuna.TrialPruned from None
            try:
                if self.plan.sampler != "grid":
                    _check(setting, self.out, self.progress)
                entry = self.train(setting)
            except UsageError as error:
                entry = {"error": first_line(error)}
            kept = {key: entry.get(key) for key in KEPT} | {"val_ppl": None, "cache_bytes": None, "phase1": None}
            if entry["error"] is None:
                kept |= {"val_ppl": entry["best_val_ppl"], "cache_bytes": entry["cache"]["bytes_measured"]}
                kept["phase1"] = entry["phase1"] and {k: v for k, v in entry["phase1"].items() if k != "history"}
            yield setting.name, kept

    def train(self, setting: Setting) -> dict[str, Any]:
        """The model's entry in its run folder's metrics, a failure included: trained now, or recorded there before.

        Raises:
            UsageError: the folder holds something else, or the model is made of a baseline whose training failed.
        """
        origin = None
        if baseline := self.plan.origin(setting):
            if (error := self.train(baseline)["error"]) is not None:
                raise UsageError(f"its baseline {baseline.model.name} failed: {error}")
            origin = Run(self.out / TRIALS / baseline.name, baseline.recipe)
        folder = self.out / TRIALS / setting.name
        folder.mkdir(exist_ok=True)
        with FileLock(folder / ".training.lock"):
            if (entry := _recorded(folder)) is not None:
                return entry
            if not self.trained:
                self.trained = True
                with self.lock:
                    write_call(self.out / PROVENANCE, provenance(best_device()))
            print(f"\n{setting.name}", flush=True)
            try:
                compare(setting.recipe, folder, progress=self.progress, origin=origin)
            except Failure:
                if _recorded(folder) is None:
                    raise
            entry = _recorded(folder)
        assert entry is not None
        end = f"perplexity {entry['best_val_ppl']:,.2f}" if entry["error"] is None else f"failed: {entry['error']}"
        print(f"{setting.name}: {end}", flush=True)
        return entry

    def record(self) -> dict[str, Any]:
        """Write the sweep's metrics, as the studies have them now."""
        with self.lock:
            metrics = sweep_metrics(self.plan, self.out.resolve().name, self._trials())
            write_json(self.out / METRICS, metrics)
            if not (self.out / PROVENANCE).exists():
                write_call(self.out / PROVENANCE, provenance(best_device()))
        return metrics

    def _trials(self) -> list[tuple[Setting, str, dict[str, Any]]]:
        """Each training once: its setting, its state, and what the study keeps of it."""
        found: dict[str, tuple[Setting, str, dict[str, Any]]] = {}
        order = ["complete", "failed", "running", "waiting"]
        for trial in (trial for study in self.studies for trial in study.trials if of_sweep(trial)):
            if trial.state.name == "PRUNED" or (
                self.plan.sampler != "grid" and len(trial.params) < len(self.plan.dimensions)
            ):
                continue  # nothing was trained of it, or it has no values yet
            for seed in trial.user_attrs[SEEDS]:
                setting = self.plan.setting({MODEL: trial.user_attrs[MODEL]} | trial.params, seed)
                kept = trial.user_attrs.get(RESULTS, {}).get(setting.name)
                state = STATES.get(trial.state.name, "waiting")
                if kept:
                    state = "complete" if kept["error"] is None else "failed"
                if setting.name not in found or order.index(state) < order.index(found[setting.name][1]):
                    found[setting.name] = (setting, state, kept or {})
        return list(found.values())


def _recorded(folder: Path) -> dict[str, Any] | None:
    path = folder / METRICS
    return next(iter(read_metrics(path)["models"]), None) if path.exists() else None
