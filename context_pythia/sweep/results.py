"""The results of a sweep so far as plain values of metrics.json: its trials, and the importance of options.

The report computes means over seeds from the trials.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from context_pythia.sweep.options import KEYS, Setting, by_logarithm

TRIALS_AT_LEAST = 4  # importances need so many trials with a result
BEST_AT_LEAST, BEST_SHARE, BEST_AT_MOST = 5, 0.1, 0.5  # the best trials: a number, and shares of all trials
# The fields that a trial copies from the model's entry in the run folder's metrics.
KEPT = ("parameters", "best_epoch", "val_accuracy", "val_ppl_by_position", "stop_reason", "seconds_per_epoch", "error")


def trial_row(setting: Setting, entry: dict[str, Any] | None, searched: Iterable[str]) -> dict[str, Any]:
    """A trial's row in metrics.json.

    Args:
        entry: the model's entry in the run folder; None if the trial has not ended.
        searched: paths of the searched options.
    """
    done = entry if entry and not entry["error"] else None
    return {
        "state": "unfinished" if entry is None else "failed" if done is None else "complete",
        "folder": setting.name,
        "model": setting.model.name,
        "baseline": setting.model.is_baseline,
        "setting": {path: setting.value(path) for path in searched},
        "seed": setting.recipe.seed,
        **{key: entry and entry.get(key) for key in KEPT},
        "val_ppl": done and done["best_val_ppl"],
        "cache_bytes": done and done["cache"]["bytes_measured"],
        "phase1": done and done["phase1"] and {key: x for key, x in done["phase1"].items() if key != "history"},
    }


def importances(trials: Sequence[dict[str, Any]], searched: Sequence[str]) -> dict[str, Any]:
    """The importance of each searched option for being among the best trials: shares with the sum 1, or a reason.

    The method is PED-ANOVA (arXiv 2304.10255; arXiv 2601.20800 for options that only some models have). Unlike Optuna's
    fANOVA it needs no scikit-learn. The best are a tenth of the trials, but at least five trials, and at most half of
    all; `quantile` is their share.

    Returns:
        `evaluator`, `quantile`, `trials` (their number) and `shares` (by option); only `reason` if there are no shares.
    """
    done = [trial for trial in trials if trial["state"] == "complete"]
    given = [{"model": trial["model"]} | {path: trial["setting"][path] for path in searched} for trial in done]
    values = {name: {params[name] for params in given} - {None} for name in ("model", *searched)}
    ranges = {name: _distribution(name, sorted(found, key=str)) for name, found in values.items() if len(found) > 1}
    if len(done) < TRIALS_AT_LEAST or not ranges or len({trial["val_ppl"] for trial in done}) == 1:
        return {"reason": f"it needs at least {TRIALS_AT_LEAST} trials with different settings and perplexities"}
    import optuna

    study = optuna.create_study(direction="minimize")
    for trial, params in zip(done, given, strict=True):
        known = {name: params[name] for name in ranges if params[name] is not None}
        of_trial = {name: ranges[name] for name in known}
        study.add_trial(optuna.trial.create_trial(value=trial["val_ppl"], params=known, distributions=of_trial))
    quantile = min(BEST_AT_MOST, max(BEST_SHARE, BEST_AT_LEAST / len(done)))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about options with few trials: the report shows the number of trials
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {"evaluator": "PED-ANOVA", "quantile": quantile, "trials": len(done), "shares": shares}


def _distribution(name: str, values: Sequence[Any]) -> Any:
    """Optuna's distribution of an option: the range of its numbers, or its values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    option = KEYS.get(name)
    if option and all(type(value) in (int, float) for value in values):
        kind = IntDistribution if option.kind is int else FloatDistribution
        return kind(min(values), max(values), log=by_logarithm(option))
    return CategoricalDistribution(list(values))
