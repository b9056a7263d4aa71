"""The report of a sweep, from plain trials."""

import pytest

from context_pythia.report.document import Table
from context_pythia.report.sweep import SweepReport
from context_pythia.report.texts import Texts

DATA = "data.sequence_length"


def trial(model, ppl, cache_bytes, seed=0, state="complete", **setting):
    figures = {"val_ppl": ppl, "cache_bytes": cache_bytes, "seed": seed, "state": state}
    named = {"folder": f"{model} {seed}", "error": "no memory" if state == "failed" else None}
    return {"model": model, "baseline": model == "Pythia", "setting": setting} | figures | named


def report(*trials) -> SweepReport:
    metrics = {
        "trials": trials, "searched": list(trials[0]["setting"]), "recipe": {"name": "r", "models": []},
        "sampler": "grid", "seeds": [0], "study": "s",
    }  # fmt: skip
    return SweepReport(metrics, {}, Texts("en", "sweep"))


def table(*trials) -> list[dict[str, str]]:
    """All settings, the best first."""
    *_, found = [b for b in report(*trials).blocks() if isinstance(b, Table) and "Mean PPL" in b.head]
    return [dict(zip(found.head, row, strict=True)) for row in found.rows]


def test_settings_are_means_and_spreads_over_seeds_against_the_best_baseline():
    rows = table(
        trial("Pythia", 20.0, 2048, lr=1),
        trial("Pythia", 10.0, 2048, lr=2),
        trial("layer", 10.0, 512, lr=1),
        trial("layer", 14.0, 512, seed=1, lr=1),
        trial("layer", None, None, seed=2, state="failed", lr=1),
        trial("shared", 13.0, 512, lr=2),
        trial("shared", 11.5, 1024, lr=2.5),
        trial("shared", None, None, lr=3, state="failed"),
    )
    best, between, ours, worse, last, failed = rows
    assert [row["Mean PPL"] for row in rows] == ["10.00", "11.50", "12.00", "13.00", "20.00", "failed"]
    assert (best["Against baseline"], best["Reduction"], last["Against baseline"]) == ("–", "–", "+100.00 %")
    assert (ours["Model"], ours["lr"], ours["n"], failed["n"]) == ("layer", "1", "2 / 3", "0 / 1")
    assert (ours["Smallest–largest"], ours["Std"], best["Std"]) == ("10.00–14.00", "2.83", "–")
    assert (ours["Against baseline"], ours["KV cache"], ours["Reduction"]) == ("+20.00 %", "0.5 KB", "75.0 %")
    assert (failed["KV cache"], failed["Against baseline"], failed["Reduction"]) == ("–", "–", "–")
    assert [row["Unbeaten"] for row in rows] == ["yes", "yes", "yes", "", "", ""]


def test_settings_are_compared_where_their_data_is_the_same():
    rows = table(
        *(
            trial(model, ppl, size, **{DATA: length})
            for model, ppl, size, length in (
                ("Pythia", 20.0, 1000, 128), ("layer", 21.0, 250, 128),
                ("Pythia", 10.0, 4000, 512), ("layer", 11.0, 1000, 512),
            )
        )
    )  # fmt: skip
    assert [row["Reduction"] for row in rows] == ["–", "75.0 %", "–", "75.0 %"]
    assert [row["Against baseline"] for row in rows] == ["–", "+10.00 %", "–", "+5.00 %"]
    assert all(row["Unbeaten"] for row in rows)


def test_a_setting_s_perplexity_by_position_is_the_mean_over_seeds():
    band = {"from": 0, "to": 16, "tokens": 32}
    seeds = [
        trial("layer", 10.0, 250, seed=i) | {"val_ppl_by_position": [band | {"perplexity": value}]}
        for i, value in enumerate((8.0, 12.0))
    ]
    assert report(*seeds).rows[0].series.positions == [band | {"perplexity": pytest.approx(10.0)}]
    older = trial("layer", 10.0, 250, seed=2)
    assert report(*seeds, older).rows[0].series.positions == []
