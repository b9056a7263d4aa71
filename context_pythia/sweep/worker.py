"""`context-pythia sweep`: one worker, of any number, that trains a study's trials until the whole study has ended.

A trial is the comparison of a recipe with one model, in a run folder of its own below `trials/`; what it holds is never
trained again, and a trial that another worker left half done goes on from its checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from context_pythia.data.packing import load_data
from context_pythia.errors import Failure, UsageError, first_line
from context_pythia.files import write_json
from context_pythia.runs.build import best_device, embedding_rows
from context_pythia.runs.record import Run, provenance, read_metrics, write_call
from context_pythia.runs.train import check_training, compare
from context_pythia.sweep.options import Setting, SweepPlan, trial_values
from context_pythia.sweep.results import sweep_metrics
from context_pythia.sweep.search import Search
from context_pythia.sweep.study import (
    ERROR,
    RESULT,
    SEED,
    Claim,
    Queue,
    open_storage,
    require_optuna,
)

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, TrialState

    from context_pythia.config.recipe import Recipe

POLL = 1.0  # seconds between two looks at trials that other workers hold
TRIALS, PROVENANCE = "trials", "provenance.json"
RECIPE = "recipe"  # the study's attribute that says what all its trials share
TEXT = "text "  # the study's attributes that say which text the options of the data stand for
# Of a trial's entry in its run folder's metrics, what the study keeps: its report needs no run folder.
KEPT = ("parameters", "best_epoch", "val_accuracy", "val_ppl_by_position", "stop_reason", "seconds_per_epoch")


def sweep(plan: SweepPlan, out: Path, storage: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Train what of the plan's trials nobody else trains, wait for the others, and return the figures of all.

    Args:
        out: the sweep's folder; its name is the study's name in `storage`.
        storage: an Optuna storage URL (default: a journal in `out`).

    Raises:
        ValueError: something that cannot be trained as asked, found before any training; or a study of another sweep.
        RuntimeError: every trial failed, or the storage failed on the way.
        OSError: a folder that cannot be written. The trial that it met waits for the next worker.
    """
    require_optuna()
    from optuna.exceptions import StorageInternalError

    try:
        (out / TRIALS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {out} ({error.strerror}): choose another with --out") from error
    try:
        queue = Queue(open_storage(storage, out), out.resolve().name, out, plan.trials)
        _check_same_sweep(plan, queue, out)
        with queue.exclusive:  # the first worker packs the text, the others open what it packed
            for setting in plan.probes():
                _check_same_text(queue, setting.recipe, check_setting(setting.recipe, progress), out)
        metrics = _work(plan, queue, out, progress)
    except StorageInternalError as error:
        reason = first_line(error.__cause__ or error)
        raise Failure(f"the storage failed ({reason}): run again to go on") from error
    failed = [trial for trial in metrics["trials"] if trial["state"] == "failed"]
    if failed and len(failed) == len(metrics["trials"]):
        raise Failure(f"all {len(failed)} trials failed: {failed[0]['error']}")
    return metrics


def _check_same_sweep(plan: SweepPlan, queue: Queue, out: Path) -> None:
    """Raise `ValueError` where the study holds trials of another recipe or sampler: they would not compare."""
    wanted = trial_values(plan.recipe) | {"sampler": plan.sampler}
    del wanted["seed"]
    with queue.exclusive:
        held = queue.study.user_attrs.get(RECIPE)
        if held is None:
            queue.study.set_user_attr(RECIPE, wanted)
            return
    for key in wanted:
        if held.get(key) != wanted[key]:
            raise UsageError(f"{out} holds a sweep with another {_difference(key, held.get(key), wanted[key])}: "
                             "choose another folder with --out")  # fmt: skip


def _difference(key: str, held: Any, wanted: Any) -> str:
    if isinstance(held, dict) and isinstance(wanted, dict):
        inner = next((name for name in wanted if held.get(name) != wanted[name]), None)
        return f"{key}.{inner} ({held.get(inner)}, not {wanted.get(inner)})"
    return key if isinstance(wanted, list) else f"{key} ({held}, not {wanted})"


def _check_same_text(queue: Queue, recipe: Recipe, fingerprint: str, out: Path) -> None:
    """Raise `ValueError` where the study's trials of the same data options are of another text than theirs now.

    A file may have been replaced since, and the built-in corpus is another with another Python.
    """
    options = json.dumps(trial_values(recipe)["data"], sort_keys=True)
    key = TEXT + hashlib.sha256(options.encode()).hexdigest()[:10]
    with queue.exclusive:
        held = queue.study.user_attrs.get(key)
        if held is None:
            queue.study.set_user_attr(key, fingerprint)
    if held not in (None, fingerprint):
        raise _other_text(out, held, fingerprint)


def _check_recorded_text(folder: Path, fingerprint: str) -> None:
    """The same of a trial's run folder, which another study may have left."""
    path = folder / "metrics.json"
    held = read_metrics(path)["data"].get("fingerprint") if path.exists() else None
    if held not in (None, fingerprint):
        raise _other_text(folder, held, fingerprint)


def _other_text(folder: Path, held: str, fingerprint: str) -> UsageError:
    return UsageError(
        f"{folder} holds results of data {held}, and the same names here give {fingerprint}: the text has changed, or "
        "is another on this machine; give what it was, or choose another folder with --out"
    )


def check_setting(recipe: Recipe, progress: bool) -> str:
    """The fingerprint of the recipe's text; `ValueError` for what cannot be told to be wrong before it is read."""
    check_training(recipe)
    data = load_data(recipe.data, progress)
    embedding_rows(recipe, data.summary["vocab_size"])
    fingerprint: str = data.summary["fingerprint"]
    return fingerprint


def _work(plan: SweepPlan, queue: Queue, out: Path, progress: bool) -> dict[str, Any]:
    search = Search(plan, queue)
    waiting, called = 0, False
    while True:
        claim = queue.take(lambda trial, states: _origin_ended(plan, trial, states))
        if claim is None:
            if search.fill():
                continue
            if not (unfinished := queue.unfinished()):
                if not called:
                    print(f"all {len(queue.trials())} trials ended before, nothing is left to train")
                return _record(plan, queue, out)
            if unfinished != waiting:
                print(f"waiting for {unfinished} of {len(queue.trials())} trials in other workers", flush=True)
            waiting = unfinished
            time.sleep(POLL)
            continue
        waiting = 0
        with claim:
            if not called:
                called = True
                with queue.exclusive:
                    write_call(out / PROVENANCE, provenance(best_device()))
            _run(plan, claim, out, progress)
        _record(plan, queue, out)


def _run(plan: SweepPlan, claim: Claim, out: Path, progress: bool) -> None:
    """Train the trial and record its end; a failure on the way is its end too, unless the machine is to blame."""
    from optuna.trial import TrialState

    trial, count = claim.trial, plan.trials or len(claim.queue.trials())
    try:
        setting = plan.setting(trial.params, trial.user_attrs[SEED])
        fingerprint = check_setting(setting.recipe, progress)
        origin = _trained_origin(plan, setting, out)
    except UsageError as error:
        claim.end(None, {ERROR: first_line(error)}, TrialState.FAIL)
        return
    folder = run_folder(setting, out)
    _check_same_text(claim.queue, setting.recipe, fingerprint, out)
    _check_recorded_text(folder, fingerprint)
    print(f"\ntrial {trial.number + 1} of {count}: {setting.describe()}", flush=True)
    entry = train_trial(setting, folder, progress, origin)
    if entry["error"] is not None:
        claim.end(None, {ERROR: entry["error"]}, TrialState.FAIL)
        return
    values = [entry["best_val_ppl"], entry["cache"]["bytes_measured"]]
    claim.end(values, {RESULT: {key: entry[key] for key in KEPT} | {"phase1": _without_history(entry["phase1"])}})


def _without_history(phase1: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if phase1 is None else {key: value for key, value in phase1.items() if key != "history"}


def _origin_ended(plan: SweepPlan, trial: FrozenTrial, states: Mapping[str, TrialState]) -> bool:
    """Whether the trial need not wait for that of the baseline which its model is made of."""
    try:
        origin = plan.origin(plan.setting(trial.params, trial.user_attrs[SEED]))
    except UsageError:  # which the trial's end will tell
        return True
    return origin is None or origin.identity not in states or states[origin.identity].is_finished()


def _trained_origin(plan: SweepPlan, setting: Setting, out: Path) -> Run | None:
    """The run with the trained baseline that the model of `setting` is made of, if it is made of one.

    Raises:
        ValueError: the baseline's training failed.
        FileNotFoundError: its run folder is not here, so the trial is another worker's.
    """
    origin = plan.origin(setting)
    if origin is None:
        return None
    name, folder = origin.recipe.models[0].name, run_folder(origin, out)
    entry = _entry(folder)
    if entry is None:
        raise FileNotFoundError(
            f"no trained {name} in {folder}: workers that heal must share --out, not only the storage"
        )
    if entry["error"] is not None:
        raise UsageError(f"its baseline {name} failed: {entry['error']}")
    return Run(folder, origin.recipe)


def run_folder(setting: Setting, out: Path) -> Path:
    """The trial's run folder: one of the same identity that is there already, whatever else was searched then."""
    return next((out / TRIALS).glob(f"*_{setting.identity}"), out / TRIALS / setting.folder)


def train_trial(setting: Setting, folder: Path, progress: bool, origin: Run | None = None) -> dict[str, Any]:
    """The trial's entry in its run folder's metrics, a failure included: trained now, or recorded there before.

    Args:
        origin: see `compare`.
    """
    if (entry := _entry(folder)) is None:
        try:
            compare(setting.recipe, folder, progress=progress, origin=origin)
        except Failure:
            if _entry(folder) is None:
                raise
        entry = _entry(folder)
    assert entry is not None
    return entry


def _entry(folder: Path) -> dict[str, Any] | None:
    path = folder / "metrics.json"
    return next(iter(read_metrics(path)["models"]), None) if path.exists() else None


def _record(plan: SweepPlan, queue: Queue, out: Path) -> dict[str, Any]:
    """Write the sweep's metrics and provenance, as the study has them now."""
    with queue.exclusive:
        metrics = sweep_metrics(plan, queue, lambda setting: run_folder(setting, out).name)
        write_json(out / "metrics.json", metrics)
        if not (out / PROVENANCE).exists():
            write_call(out / PROVENANCE, provenance(best_device()))
    return metrics
