"""The Optuna studies behind a sweep: trials are added once, and workers anywhere take them until all have ended.

A trial waits in the study until a worker's `study.optimize` takes it. Optuna's heartbeats tell a dead worker, whose
trial Optuna adds once more. So a training may have several trials, one after another: what counts is its run folder.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from context_pythia.errors import UsageError, first_line
from context_pythia.runs.record import without_password
from context_pythia.sweep.options import KEYS, MODEL, Dimension, SweepPlan, by_logarithm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

HEARTBEAT, GRACE = 20, 60  # seconds between two heartbeats, and without one until a worker counts as dead
POLL = 1.0  # seconds between two looks at trials of other workers
OBJECTIVES = ("best validation perplexity", "measured cache bytes")
SEEDS, RESULTS, SEARCHED = "seeds", "results", "searched"  # attributes of trials, beside MODEL, and of a study
RANDOM_AT_MOST = 10  # settings a model that are drawn at random before TPE has seen enough, half of the budget at most


def require_optuna() -> None:
    """Raise `UsageError` where the extra is not installed; else let Optuna print errors alone."""
    if find_spec("optuna") is None:
        raise UsageError("sweep needs Optuna: pip install 'context-pythia[sweep]'")
    import optuna

    optuna.logging.set_verbosity(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def open_studies(plan: SweepPlan, folder: Path, url: str | None) -> list[Study]:
    """The studies of the sweep in `folder`: one of a grid; of TPE one a model.

    TPE (Bergstra et al. 2011) sees the trials of one model alone, and each model gets as many: so the baseline is tuned
    with the budget of the others, and its results mislead nobody else's search.

    Args:
        url: an Optuna storage (default: an SQLite file in `folder`). Who opens a new one has the folder's lock.

    Raises:
        UsageError: the storage cannot be opened.
    """
    import optuna
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy import URL

    # Rendered, since a path may hold characters that mean something in a URL.
    url = url or URL.create("sqlite", database=str(folder.resolve() / "study.db")).render_as_string()
    # SQLite's file may be locked by another worker; a server may have closed a connection while a training ran.
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    name = folder.resolve().name
    try:
        storage = RDBStorage(
            url,
            engine_kwargs=options,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )
        studies = []
        for one in [name] if plan.sampler == "grid" else [f"{name} {model}" for model in plan.models]:
            startup = max(1, min(RANDOM_AT_MOST, _budget(plan) // 2))
            sampler = optuna.samplers.TPESampler(n_startup_trials=startup, constant_liar=True)
            known: dict[str, Any] = {"storage": storage, "study_name": one, "load_if_exists": True}
            study = optuna.create_study(**known, sampler=sampler, directions=["minimize"] * len(OBJECTIVES))
            study.set_metric_names(list(OBJECTIVES))
            studies.append(study)
    except Exception as error:  # whatever the database's driver raises
        reason = first_line(error).replace(url, without_password(url))
        raise UsageError(f"--storage {without_password(url)}: cannot be opened ({reason})") from None
    return studies


def _budget(plan: SweepPlan) -> int:
    """TPE's settings a model; each is trained with every seed."""
    return (plan.trials or 0) // len(plan.models) // len(plan.seeds)


def distribution(path: str, values: Sequence[Any]) -> BaseDistribution:
    """What the storage, the dashboard and the importances know of an option's values.

    Numbers are a range, which another call may widen; choices are all that the option has.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    option = KEYS[path][1] if path != MODEL else None
    if option is not None and all(type(value) in (int, float) for value in values):
        kind = IntDistribution if option.kind is int else FloatDistribution
        return kind(min(values), max(values), log=by_logarithm(option))
    if option is not None and option.choices:
        return CategoricalDistribution([None, *option.choices] if option.optional else list(option.choices))
    return CategoricalDistribution([False, True] if option is not None and option.kind is bool else list(values))


def suggest(trial: Trial, dimension: Dimension) -> Any:
    """The value that the study's sampler gives the trial."""
    if not dimension.ranged:
        return trial.suggest_categorical(dimension.path, dimension.values)
    ask = trial.suggest_int if dimension.option.kind is int else trial.suggest_float
    return ask(dimension.path, *dimension.values, log=dimension.log)


def of_sweep(trial: FrozenTrial) -> bool:
    """Whether the trial was added by a worker, and not to be done again by another one."""
    from optuna.trial import TrialState

    return MODEL in trial.user_attrs and (trial.state != TrialState.FAIL or RESULTS in trial.user_attrs)


def add_missing(plan: SweepPlan, studies: Sequence[Study]) -> bool:
    """Add the plan's trials that the studies do not hold; under the folder's lock. Whether there were any.

    Raises:
        UsageError: the study was searched in a way that does not fit.
    """
    import optuna

    before = sum(len(study.trials) for study in studies)
    if plan.sampler == "tpe":
        searched = [f"{one.path}={'log:' if one.log else ''}{one.values}" for one in plan.dimensions]
        for model, study in zip(plan.models, studies, strict=True):
            if study.user_attrs.get(SEARCHED, searched) != searched:
                raise UsageError(
                    f"--over: the sweep searches {', '.join(study.user_attrs[SEARCHED])}: choose another --out"
                )
            study.set_user_attr(SEARCHED, searched)
            for _ in range(sum(map(of_sweep, study.trials)), _budget(plan)):
                study.enqueue_trial({}, user_attrs={MODEL: model, SEEDS: list(plan.seeds)})
        return sum(len(study.trials) for study in studies) > before
    (study,) = studies
    held = [(trial.params, trial.user_attrs[SEEDS]) for trial in study.trials if of_sweep(trial)]
    values: dict[str, list[Any]] = {MODEL: [model.name for model in plan.recipe.models]}
    values |= {one.path: list(one.values) for one in plan.dimensions}
    for setting in plan.settings:
        params, seeds = dict(setting.params), [setting.recipe.seed]
        if (params, seeds) not in held:
            ranges = {path: distribution(path, values[path]) for path in params}
            attributes = {MODEL: setting.model.name, SEEDS: seeds}
            waiting = optuna.trial.TrialState.WAITING
            trial = optuna.trial.create_trial(state=waiting, params=params, distributions=ranges, user_attrs=attributes)
            try:
                study.add_trial(trial)
            except ValueError as error:
                reason = f"--over: the sweep has other choices ({first_line(error)}): choose another --out"
                raise UsageError(reason) from None
    return len(study.trials) > before


def take_all(studies: Sequence[Study], objective: Callable[[Trial], Sequence[float]], add: Callable[[], bool]) -> None:
    """Take trials until all have ended, those of other workers too.

    Args:
        add: `add_missing`: a worker may be killed between ending a dead one's trial and adding it once more.
    """
    import optuna
    from optuna.trial import TrialState

    looks: Counter[tuple[str, int]] = Counter()
    waited = 0
    while True:
        if any(_take(study, objective) for study in studies):
            continue
        running = [(s, t) for s in studies for t in s.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]
        if not running:
            if not add():
                return
            continue
        if len(running) != waited:
            waited = len(running)
            print(f"waiting for {waited} trials of other workers", flush=True)
        time.sleep(POLL)
        for study, trial in running:
            looks[study.study_name, trial.number] += 1
            if looks[study.study_name, trial.number] == 2:
                # A worker that was killed before its first heartbeat: Optuna judges only who has had one.
                study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
        for study in studies:
            optuna.storages.fail_stale_trials(study)


def _take(study: Study, objective: Callable[[Trial], Sequence[float]]) -> bool:
    """Take one trial, if any waits; whether there was one."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        return False
    # A worker that was taken for dead finds its trial ended by another, which has read the run folder: so it stands.
    with contextlib.suppress(UpdateFinishedTrialError):
        try:
            study.optimize(objective, n_trials=1)
        except ValueError as error:
            if not str(error).startswith("Cannot tell a "):
                raise
    return True
