"""The results of a sweep so far as plain values: trials, settings over seeds, and the importance of options.

metrics.json consists of these values, and the report reads nothing else.
"""

from __future__ import annotations

import statistics
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


def settings_over_seeds(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model and setting: how many seeds have a result, mean, range and standard deviation of perplexity.

    - `std` is the sample standard deviation; it needs two seeds.
    - `reduction` and `change` compare with the baseline's setting of the best mean perplexity.
    - `unbeaten`: no other setting is at least as good in mean perplexity and in cache bytes, and better in one of them.
    - `positions` are the bands of `perplexity_by_position`, each the mean over seeds; empty if a trial of an older
      version has no bands.

    `reduction`, `change` and `unbeaten` compare only settings of the same data, because perplexity and bytes depend on
    the text and the length of its samples.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        groups.setdefault(repr((trial["model"], trial["setting"])), []).append(trial)
    rows = [_over_seeds(group) for group in groups.values()]
    by_data: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        data = {path: value for path, value in row["setting"].items() if path.startswith("data.")}
        by_data.setdefault(repr(data), []).append(row)
    for comparable in by_data.values():
        _compare(comparable)
    return rows


def _over_seeds(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    done = [trial for trial in trials if trial["state"] == "complete"]
    perplexities = [trial["val_ppl"] for trial in done]
    bands = [trial.get("val_ppl_by_position") or [] for trial in done]
    return {
        **{key: trials[0][key] for key in ("model", "baseline", "setting")},
        "trials": len(trials),
        "n": len(done),
        "seeds": sorted(trial["seed"] for trial in done),
        "failed": sum(trial["state"] == "failed" for trial in trials),
        "mean": statistics.fmean(perplexities) if done else None,
        "min": min(perplexities, default=None),
        "max": max(perplexities, default=None),
        "std": statistics.stdev(perplexities) if len(done) > 1 else None,
        "cache_bytes": max((trial["cache_bytes"] for trial in done), default=None),
        "positions": [
            {**seeds[0], "perplexity": statistics.fmean(band["perplexity"] for band in seeds)}
            for seeds in (zip(*bands, strict=True) if all(bands) else ())
        ],
    }


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    finished = [row for row in rows if row["n"]]
    baseline = min((row for row in finished if row["baseline"]), key=lambda row: row["mean"], default=None)
    for row in rows:
        row |= {"change": None, "reduction": None}
        if baseline is not None and row["n"] and row is not baseline:
            row["change"] = row["mean"] / baseline["mean"] - 1
            row["reduction"] = None if row["baseline"] else 1 - row["cache_bytes"] / baseline["cache_bytes"]
        row["unbeaten"] = bool(row["n"]) and not any(_beats(other, row) for other in finished)


def _beats(other: dict[str, Any], row: dict[str, Any]) -> bool:
    one, two = (other["mean"], other["cache_bytes"]), (row["mean"], row["cache_bytes"])
    return one != two and one[0] <= two[0] and one[1] <= two[1]


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
