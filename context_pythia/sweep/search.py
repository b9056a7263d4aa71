"""Optuna's part of a sweep: TPE proposes settings, and a study records their results.

Only the run folders record the trainings themselves and their progress.
"""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from context_pythia.errors import Failure, UsageError, first_line
from context_pythia.runs.provenance import without_password
from context_pythia.sweep.options import KEYS, Dimension, Setting, SweepPlan

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial


def require_optuna() -> None:
    """Raise `UsageError` if Optuna is not installed. Otherwise make Optuna print only errors."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise UsageError("--sampler tpe needs Optuna: pip install 'context-pythia[sweep]'") from None
    optuna.logging.set_verbosity(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class Search:
    """TPE (Bergstra et al. 2011) over the settings of one model, for any number of workers.

    Each model has its own study and the same number of settings. So the baseline gets the same budget as the others,
    and the results of one model do not mislead the search of another. A different search in the same folder has its own
    study, too.

    Args:
        folder: the sweep's folder.
        lock: the folder's lock. The caller must hold it while it constructs the search.
        url: an Optuna storage (default: an SQLite file in `folder`).

    Raises:
        UsageError: the storage cannot be opened.
    """

    def __init__(self, plan: SweepPlan, model: str, folder: Path, lock: FileLock, url: str | None):
        import optuna
        from sqlalchemy import URL

        self.plan, self.model, self.lock = plan, model, lock
        self.budget = (plan.trials or 0) // len(plan.recipe.models) // len(plan.seeds)
        over = [f"{one.path}={'log:' if one.log else ''}{one.values}" for one in plan.dimensions]
        # SQLAlchemy escapes the characters of a path that have a meaning in a URL.
        url = url or URL.create("sqlite", database=str(folder.resolve() / "study.db")).render_as_string()
        try:
            self.study: Study = optuna.create_study(
                # A server may close a connection while a model trains.
                storage=optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True}),
                study_name=" ".join([folder.resolve().name, model, *over, f"seeds={[*plan.seeds]}"]),
                load_if_exists=True,
                sampler=optuna.samplers.TPESampler(
                    n_startup_trials=max(1, min(10, self.budget // 2)), constant_liar=True
                ),
                directions=["minimize", "minimize"],  # perplexity and cache bytes
            )
        except Exception as error:  # each database driver raises its own errors
            reason = first_line(error).replace(url, without_password(url))
            raise UsageError(f"--storage {without_password(url)}: cannot be opened ({reason})") from None

    def run(self, train: Callable[[Setting], dict[str, Any]]) -> None:
        """Train proposals until the budget is spent, then the unfinished proposals of other workers.

        Args:
            train: trains a setting and returns its entry. It waits if another worker trains the setting.

        Raises:
            Failure: the storage failed.
        """
        import optuna

        try:
            while True:
                with self.lock:
                    if len(self.study.get_trials(deepcopy=False)) >= self.budget:
                        break
                    trial = self.study.ask()
                    values = {one.path: _suggest(trial, one) for one in self.plan.dimensions}
                self._train(trial.number, values, train)
            for begun in self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
                self._train(begun.number, begun.params, train)
        except optuna.exceptions.StorageInternalError as error:
            raise Failure(f"the storage failed ({first_line(error.__cause__ or error)}): run again to go on") from error

    def _train(self, number: int, values: Mapping[str, Any], train: Callable[[Setting], dict[str, Any]]) -> None:
        """Train a proposal with every seed, and report the means to the study."""
        from optuna.trial import TrialState

        try:
            entries = [train(self.plan.setting(self.model, values, seed)) for seed in self.plan.seeds]
        except UsageError as error:  # each value is valid, but their combination is not
            print(f"{self.model}, trial {number}: skipped, {first_line(error)}", flush=True)
            entries = []
        done = [(entry["best_val_ppl"], entry["cache"]["bytes_measured"]) for entry in entries if not entry["error"]]
        means = [statistics.fmean(column) for column in zip(*done, strict=True)]
        with self.lock:  # several workers may report the same proposal
            state = TrialState.COMPLETE if means else TrialState.FAIL
            self.study.tell(number, means or None, state=state, skip_if_finished=True)


def _suggest(trial: Trial, dimension: Dimension) -> Any:
    if not dimension.ranged:
        return trial.suggest_categorical(dimension.path, dimension.values)
    ask = trial.suggest_int if KEYS[dimension.path].kind is int else trial.suggest_float
    return ask(dimension.path, *dimension.values, log=dimension.log)
