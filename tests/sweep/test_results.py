"""Which options decide, from plain values."""

import random

import pytest

from context_pythia.sweep.results import importances


def trial(model, ppl, cache_bytes, seed=0, state="complete", **setting):
    figures = {"val_ppl": ppl, "cache_bytes": cache_bytes, "seed": seed, "state": state}
    return {"model": model, "baseline": model == "Pythia", "setting": setting} | figures


def test_importance_finds_what_decides():
    dice = random.Random(1)
    trials = [
        trial("layer" if i % 2 else "Pythia", 10 + 5 * rate + dice.random() / 100, 1, **{
            "train.learning_rate": rate, "model.context_dim": 16 * (1 + i // 2 % 2) if i % 2 else None,
        })
        for i in range(12) for rate in (0.1, 0.2, 0.4)
    ]  # fmt: skip
    found = importances(trials, ["train.learning_rate", "model.context_dim"])
    assert found["shares"]["train.learning_rate"] > 0.8
    assert sum(found["shares"].values()) == pytest.approx(1) and found["trials"] == 36
    reason = {"reason": "it needs at least 4 trials with different settings and perplexities"}
    equal = [{**one, "val_ppl": 1.0} for one in trials]
    assert importances(equal, ["train.learning_rate"]) == importances(trials[:3], ["train.learning_rate"]) == reason
    assert importances([trial("layer", float(i), 1) for i in range(4)], []) == reason
