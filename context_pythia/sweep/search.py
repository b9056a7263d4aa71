"""Which trials a sweep adds to its study: every combination of the grid, or what TPE proposes for each model in turn.

TPE (Bergstra et al. 2011; here Optuna's, which takes both objectives) sees the trials of one model alone, and each
model gets as many settings: so the baseline is tuned with the budget of the others, and its results mislead nobody
else's search.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from context_pythia.errors import UsageError
from context_pythia.sweep.options import MODEL, Dimension, Setting, SweepPlan
from context_pythia.sweep.study import IDENTITY, OBJECTIVES, SEED, Queue

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

RANDOM_AT_MOST = 10  # settings a model that are drawn at random before TPE has seen enough, half of the budget at most
TRIES = 50


def distribution(dimension: Dimension, sampler: str) -> BaseDistribution:
    """The range or the choices of a searched option, as the storage, the dashboard and the importances know them.

    A grid's numbers are a range, which another call may widen; choices are all that the option has.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    option, values = dimension.option, dimension.values
    if option.kind in (int, float) and (dimension.ranged or sampler == "grid") and None not in values:
        kind = IntDistribution if option.kind is int else FloatDistribution
        return kind(min(values), max(values), log=dimension.log)
    if option.choices:
        return CategoricalDistribution([None, *option.choices] if option.optional else list(option.choices))
    return CategoricalDistribution([False, True] if option.kind is bool else list(values))


def distributions(plan: SweepPlan) -> dict[str, BaseDistribution]:
    """Those of all that the plan searches, the model included."""
    from optuna.distributions import CategoricalDistribution

    models: BaseDistribution = CategoricalDistribution([model.name for model in plan.recipe.models])
    return {MODEL: models} | {one.path: distribution(one, plan.sampler) for one in plan.dimensions}


class Search:
    """Adds the plan's trials to a queue, those that are there already left out."""

    def __init__(self, plan: SweepPlan, queue: Queue):
        self.plan, self.queue = plan, queue
        self.distributions = distributions(plan)
        self._grid = plan.combinations() if plan.sampler == "grid" else []

    def fill(self) -> bool:
        """Add what can be added now; whether that was any."""
        with self.queue.exclusive:
            trials = self.queue.trials()
            wanted = self._grid if self.plan.sampler == "grid" else self._proposals(trials)
            held = {trial.user_attrs[IDENTITY] for trial in trials}
            new = [setting for setting in wanted if setting.identity not in held]
            for setting in new:
                chosen = {path: self.distributions[path] for path in setting.params}
                self.queue.add(setting.identity, setting.recipe.seed, setting.params, chosen)
        return bool(new)

    def _proposals(self, trials: Sequence[FrozenTrial]) -> list[Setting]:
        """What settings lack of seeds, because a worker died while it added them; else one setting with every seed."""
        groups: dict[str, list[FrozenTrial]] = {}
        for trial in trials:
            groups.setdefault(repr(sorted(trial.params.items())), []).append(trial)
        for group in groups.values():
            missing = set(self.plan.seeds) - {trial.user_attrs[SEED] for trial in group}
            if missing and any(not trial.state.is_finished() for trial in group):
                return [self.plan.setting(group[0].params, seed) for seed in sorted(missing)]
        if len(trials) >= (self.plan.trials or 0):
            return []
        tried = {name: [g for g in groups.values() if g[0].params[MODEL] == name] for name in self.plan.models}
        model = min(self.plan.models, key=lambda name: len(tried[name]))
        return self._propose(model, tried[model], {trial.user_attrs[IDENTITY] for trial in trials})

    def _propose(self, model: str, tried: list[list[FrozenTrial]], held: set[str]) -> list[Setting]:
        """A new setting of the model, with every seed; nothing where all settings have been tried."""
        import optuna

        share = (self.plan.trials or 0) // len(self.plan.models) // len(self.plan.seeds)
        startup = max(1, min(RANDOM_AT_MOST, share // 2))
        seed = len(tried)
        searched = {path: one for path, one in self.distributions.items() if path != MODEL}
        samplers = (
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup),
            optuna.samplers.RandomSampler(seed=seed),
        )
        for sampler in samplers:
            study = optuna.create_study(directions=["minimize"] * len(OBJECTIVES), sampler=sampler)
            for group in tried:
                study.add_trial(_mean_trial(group))
            for _ in range(TRIES):
                params: dict[str, Any] = study.ask(searched).params
                try:
                    settings = [self.plan.setting({MODEL: model} | params, seed) for seed in self.plan.seeds]
                except UsageError:
                    continue  # values that are valid one by one, but not together
                if settings[0].identity not in held:
                    return settings
        return []


def _mean_trial(group: list[FrozenTrial]) -> FrozenTrial:
    """One setting as the sampler sees it: the mean of its seeds so far, or that it is still being trained."""
    from optuna.trial import TrialState, create_trial

    params = {path: value for path, value in group[0].params.items() if path != MODEL}
    known: dict[str, Any] = {
        "params": params,
        "distributions": {path: group[0].distributions[path] for path in params},
    }
    done = [trial.values for trial in group if trial.state == TrialState.COMPLETE]
    if done:
        return create_trial(values=[statistics.fmean(column) for column in zip(*done, strict=True)], **known)
    failed = all(trial.state.is_finished() for trial in group)
    return create_trial(state=TrialState.FAIL if failed else TrialState.RUNNING, **known)
