"""What a sweep has found, from plain values."""

import random

import pytest

from context_pythia.sweep.results import importances, settings_over_seeds


def trial(model, ppl, cache_bytes, seed=0, state="complete", **setting):
    figures = {"val_ppl": ppl, "cache_bytes": cache_bytes, "seed": seed, "state": state}
    return {"model": model, "baseline": model == "Pythia", "setting": setting} | figures


def test_settings_are_means_and_spreads_over_seeds_against_the_best_baseline():
    rows = settings_over_seeds(
        [
            trial("Pythia", 20.0, 1000, lr=1),
            trial("Pythia", 10.0, 1000, lr=2),
            trial("layer", 10.0, 250, lr=1),
            trial("layer", 14.0, 250, seed=1, lr=1),
            trial("layer", None, None, seed=2, state="failed", lr=1),
            trial("layer", 13.0, 250, lr=2),
            trial("shared", 11.5, 500, lr=2),
        ]
    )
    first, best, ours, worse, between = rows
    assert best["change"] is None and first["change"] == 1.0
    assert (ours["n"], ours["trials"], ours["failed"], ours["seeds"]) == (2, 3, 1, [0, 1])
    assert (ours["mean"], ours["min"], ours["max"]) == (12.0, 10.0, 14.0)
    assert ours["std"] == pytest.approx(8**0.5)
    assert ours["change"] == pytest.approx(0.2) and ours["reduction"] == 0.75
    assert [row["unbeaten"] for row in rows] == [False, True, True, False, True]


def test_settings_are_compared_where_their_data_is_the_same():
    rows = settings_over_seeds(
        [
            trial(model, ppl, bytes_, **{"data.sequence_length": length, "train.epochs": 2})
            for model, ppl, bytes_, length in (
                ("Pythia", 20.0, 1000, 128), ("layer", 21.0, 250, 128),
                ("Pythia", 10.0, 4000, 512), ("layer", 11.0, 1000, 512),
            )
        ]
    )  # fmt: skip
    assert [row["reduction"] for row in rows] == [None, 0.75, None, 0.75]
    assert [row["change"] for row in rows] == [None, pytest.approx(0.05), None, pytest.approx(0.1)]
    assert all(row["unbeaten"] for row in rows)


def test_a_setting_s_perplexity_by_position_is_the_mean_over_seeds():
    bands = {"from": 0, "to": 16, "tokens": 32}
    seeds = [
        trial("layer", 10.0, 250, seed=i) | {"val_ppl_by_position": [bands | {"perplexity": value}]}
        for i, value in enumerate((8.0, 12.0))
    ]
    (row,) = settings_over_seeds(seeds)
    assert row["positions"] == [bands | {"perplexity": 10.0}]
    (row,) = settings_over_seeds([*seeds, trial("layer", 10.0, 250, seed=2)])  # of an older version
    assert row["positions"] == []


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
