"""`bench` end to end on tiny models: what it writes, says and refuses."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.bench import decode as module
from context_pythia.bench import run
from context_pythia.bench.models import is_peer, share_parameters, sized_models
from context_pythia.bench.options import SIZES, BenchOptions, Source, parse_sources
from context_pythia.cli import command_line as cli
from context_pythia.cli.command import reported
from context_pythia.config.recipe import ArchitectureOptions, ModelOptions
from context_pythia.report.bench import DecodeReport, TrainReport, paired_ratio
from context_pythia.report.report import show, write_report
from context_pythia.report.texts import LANGUAGES, Texts
from tests.conftest import tiny_recipe

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SOURCES = (Source("shared", 12), Source("layer", 32, "exact"))


@pytest.fixture
def tiny_size(monkeypatch):
    size = ArchitectureOptions(**TINY, model_vocab_size=50)
    monkeypatch.setitem(SIZES, "pythia-14m", size)
    monkeypatch.setattr(module, "CONVERSATION", 64)


def options(**changes) -> BenchOptions:
    given = {"batch_sizes": (1, 2), "lengths": (8, 16), "caches": ("dynamic", "static"), "new_tokens": 2, "rounds": 2}
    return BenchOptions(**given | changes)


def saved(folder, model) -> str:
    model.save_pretrained(folder)
    return str(folder)


def bench(*args, out=None, **asked):
    with reported(out):
        return run.bench(*args, out=out, show=show, **asked)


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


def test_a_sweep_is_recorded_and_reported(tiny_size, tmp_path, capsys):
    out = tmp_path / "bench"
    given = options(lengths=(16,), threads=1, memory_gb=0.5)
    bench([], None, "pythia-14m", SOURCES, given, out=out, progress=False)
    metrics = metrics_of(out)
    names = ["pythia-14m, DynamicCache", "pythia-14m, StaticCache", "shared 12", "layer 32 exact"]
    assert [entry["name"] for entry in metrics["models"]] == names
    assert [(cell["batch_size"], cell["length"]) for cell in metrics["cells"]] == [(1, 16), (2, 16)]
    numbers = {"pythia-14m, DynamicCache": 128, "pythia-14m, StaticCache": 128, "shared 12": 16, "layer 32 exact": 64}
    for cell in metrics["cells"]:
        for row in cell["rows"]:
            assert row["error"] is None
            assert [len(row[kind]) for kind in ("prefill", "generate")] == [2, 2]
            assert min(row["prefill"] + row["generate"]) > 0
            assert row["cache"]["filled"] == 4 * numbers[row["name"]] * cell["batch_size"] * cell["length"]
    settings = metrics["settings"]
    assert (settings["threads"], settings["dtype"], settings["rounds"]) == (1, "float32", 2)
    for entry in metrics["models"]:
        one = entry["conversation"]
        assert (one["length"], one["bytes"]) == (64, 64 * 4 * numbers[entry["name"]])
        assert one["fit"] == (2**29 - entry["weight_bytes"]) // one["bytes"]
        assert one["fit_with_slack"] == (2**29 - entry["weight_bytes"]) // (one["bytes"] + one["slack"])
    files = {path.name for path in out.iterdir()}
    assert files == {
        "metrics.json", "provenance.json", "report.md", "report.html", "decode.png",
    }  # fmt: skip
    report = (out / "report.md").read_text()
    assert "## Batch 2, 16 tokens" in report and "| layer 32 exact |" in report and "50.0 %" in report
    assert "Batch 2, 16 tokens" in capsys.readouterr().out
    assert json.loads((out / "provenance.json").read_text())["threads"] == 1


def test_an_interrupted_sweep_keeps_its_finished_cells(tiny_size, tmp_path, monkeypatch):
    measured, whole = [], module.measure_cell

    def measure_cell(*args, **kwargs):
        if measured:
            raise KeyboardInterrupt
        measured.append(1)
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, "measure_cell", measure_cell)
    with pytest.raises(KeyboardInterrupt):
        bench([], None, "pythia-14m", SOURCES[:1], options(prefill=False), out=tmp_path, progress=False)
    assert len(metrics_of(tmp_path)["cells"]) == 1
    report = (tmp_path / "report.md").read_text()
    assert "## Batch 1, 8 tokens" in report and "## Batch 2, 8 tokens" not in report


def test_models_without_a_gpt_neox_are_refused(tmp_path):
    config = ContextPythiaConfig(**TINY, vocab_size=50, context_source="layer", context_dim=12)
    one = saved(tmp_path / "one", ContextPythiaForCausalLM(config))
    with pytest.raises(ValueError, match="add a GPT-NeoX model, the reference of the ratios"):
        bench([one], None, None, None, options(), progress=False)


def test_a_length_beyond_the_positions_is_refused_in_one_line(tmp_path):
    body = TINY | {"vocab_size": 50, "max_position_embeddings": 32}
    one = saved(tmp_path / "one", GPTNeoXForCausalLM(GPTNeoXConfig(**body)))
    with pytest.raises(ValueError, match="length 40: must be at most 32, the positions of one"):
        bench([one], None, None, None, options(lengths=(16, 40)), out=tmp_path / "out", progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_results_are_not_overwritten(tiny_size, tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="holds results already"):
        bench([], None, "pythia-14m", SOURCES, options(), out=tmp_path, progress=False)
    assert (tmp_path / "metrics.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either MODELs, --recipe RECIPE or --size SIZE"),
        (["there", "--size", "pythia-14m"], "give either"),
        (["there", "--train"], "give a recipe alone"),
        (["there", "--sources", "layer:8"], "--sources needs --size"),
        (["there", "--only", "Pythia"], "options of a recipe need --recipe"),
        (["--recipe", "quick", "--only", "Pythi"], "did you mean Pythia?"),
        (["there", "--set", "train.epochs=3"], "options of a recipe need --recipe"),
        (["--size", "pythia-14m", "--sources", "later:8"], "source 'later:8': give input:DIM"),
        (["--size", "pythia-14m", "--sources", "layer:8:heds"], "layer:DIM:heads or layer:DIM:exact"),
        (["--size", "pythia-14m", "--sources", "layer:64:exact"], "form exact needs context_dim 128, the width"),
        (["--size", "pythia-14m", "--sources", "layer:700"], "source 'layer 700': context_dim 700: must be"),
        (["--size", "pythia-14m", "--lengths", "16"], "length 16: must be more than new_tokens = 16"),
        (["--size", "pythia-14m", "--caches", "static"], "add dynamic, the reference of the ratios"),
        (["--size", "pythia-14m", "--rounds", "0"], "rounds 0: must be >= 1"),
        (["--size", "pythia-3b"], "--size 'pythia-3b': must be one of pythia-14m, "),
        (["--size", "pythia-14m", "--lengths", "16,x"], "bench.lengths 'x': must be a whole number"),
        (["--size", "pythia-14m", "--batch-sizes", "2,2"], "bench.batch_sizes 2,2: has the same value twice"),
        (["nowhere/at/all"], "no such model: 'nowhere/at/all'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["bench", *argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


@torch.no_grad()
def test_sized_models_share_what_they_have_in_common_and_nothing_else(tiny_size):
    baseline, shared, exact = sized_models("pythia-14m", SOURCES, 32, torch.float32).values()
    assert is_peer(baseline) and not is_peer(exact)
    assert shared.gpt_neox.embed_in.weight is baseline.gpt_neox.embed_in.weight
    layers = [model.gpt_neox.layers[1] for model in (baseline, exact)]
    assert layers[0].mlp.dense_h_to_4h.weight is layers[1].mlp.dense_h_to_4h.weight
    own = {name for name, p in exact.named_parameters() if all(p is not other for other in baseline.parameters())}
    assert {name.split(".")[-2] for name in own} >= {"query", "context", "key_up", "value_up"}
    assert exact.config.reuse_rotary_keys and exact.config.num_rotary_keys == 2
    # Sharing must not change what a model computes.
    ids = torch.arange(6).unsqueeze(0)
    other = ContextPythiaForCausalLM(exact.config)
    before = other.eval()(ids).logits
    share_parameters(other, baseline)
    assert not torch.equal(other(ids).logits, before)
    share_parameters(other, exact)
    assert torch.equal(other(ids).logits, exact.eval()(ids).logits)


def test_sizes_are_those_of_pythia():
    published = {
        "pythia-14m": 14_067_712, "pythia-70m": 70_426_624, "pythia-160m": 162_322_944, "pythia-410m": 405_334_016,
        "pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960,
    }  # fmt: skip
    assert set(published) == set(SIZES)
    for name, parameters in published.items():
        size = SIZES[name]
        body = {key: getattr(size, key) for key in TINY}
        with torch.device("meta"):
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**body, vocab_size=size.model_vocab_size))
        assert model.num_parameters() == parameters, name


def test_sources_are_read_from_words():
    assert parse_sources("shared:256, layer:512:exact") == (Source("shared", 256), Source("layer", 512, "exact"))


def test_ratios_pair_the_rounds():
    # The machine became four times slower meanwhile; the ratio of medians would say 1.
    assert paired_ratio([2.0, 2.0, 8.0], [1.0, 1.0, 4.0]) == 2
    assert paired_ratio([2.0], [1.0, 9.0]) == 2
    assert paired_ratio([], [1.0]) is None


def row(name, generate, error=None):
    cache = {"length": 2048, "filled": 2**20 * (4 if "Dynamic" in name else 1), "slack": 0}
    return {
        "name": name, "prefill": [2 * t for t in generate], "generate": generate,
        "cache": None if error else cache, "peak_bytes": None, "error": error,
    }  # fmt: skip


def records(rows):
    entry = {"parameters": 7, "weight_bytes": 2**20, "conversation": None, "attention": "sdpa", "error": None}
    models = [
        entry | {"name": "P, DynamicCache", "cache": "dynamic", "peer": True},
        entry | {"name": "P, StaticCache", "cache": "static", "peer": True},
        entry | {"name": "ours", "cache": "dynamic", "peer": False},
    ]
    cell = {"batch_size": 16, "length": 2048, "rows": rows}
    return {
        "kind": "decode", "models": models, "cells": [cell], "notes": [],
        "settings": {"memory_gb": 4.0, "rounds": 2, "threads": 2, "new_tokens": 8, "dtype": "float32"},
    }  # fmt: skip


def test_a_cells_table_has_ratios_to_both_peers(tmp_path):
    metrics = records([row("P, DynamicCache", [0.5, 0.5]), row("P, StaticCache", [0.2, 0.2]), row("ours", [0.1, 0.1])])
    report = DecodeReport(metrics, {}, Texts("en", "bench"))
    assert report.cell(metrics["cells"][0]).rows[-1] == [
        "ours", "100.0 (100.0–100.0)", "5.00", "2.00", "160.0",
        "0.200 (0.200–0.200)", "0.20", "1.0", "75.0 %", "–",  # a fifth of the time of DynamicCache's prefill
    ]  # fmt: skip


def test_a_report_with_failures_can_be_written(tmp_path):
    failed = row("ours", [], error="out of <memory>")
    metrics = records([row("P, DynamicCache", [0.5]), row("P, StaticCache", [], error="no"), failed])
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "provenance.json").write_text(json.dumps({"device": "CPU", "versions": {"torch": "2"}}))
    for lang in LANGUAGES:
        write_report(tmp_path, lang)  # as the command `report` does, which knows a bench by its record
    assert "out of \\<memory\\>" in (tmp_path / "report.md").read_text()
    assert "out of &lt;memory&gt;" in (tmp_path / "report.ja.html").read_text()
    assert "バッチ 16、2,048 トークン" in (tmp_path / "report.ja.md").read_text()


def test_training_is_timed_in_turns(tmp_path):
    recipe = tiny_recipe(tmp_path, architecture={"model_vocab_size": 280})
    shared = ModelOptions(name="shared", context_source="shared", context_dim=12)
    recipe = replace(recipe, models=[shared])
    out = tmp_path / "out"
    metrics = bench([], recipe, None, None, options(steps=1), train=True, out=out, progress=False)
    assert [one["name"] for one in metrics["rows"]] == ["plain fp32 GPT-NeoX", "shared"]
    for one in metrics["rows"]:
        assert one["error"] is None
        assert [len(turn) for turn in one["rounds"]] == [1, 1]
        assert one["peak_bytes"] is None or one["peak_bytes"] > 4 * one["parameters"]
        assert all(step["step"] > 0 for turn in one["rounds"] for step in turn)
    assert len(metrics["rates"]["float32"]) == 2 and metrics["tokens_per_step"] == 9 * 16
    speeds = [line[4] for line in TrainReport(metrics, {}, Texts("en", "bench")).steps().rows]
    assert speeds[0] == "1.00" and all(float(speed) > 0 for speed in speeds)
    assert {"report.md", "report.html", "metrics.json"} <= {path.name for path in out.iterdir()}


def test_a_model_made_of_the_trained_baseline_is_refused(tmp_path):
    made = {"name": "converted", "context_source": "layer", "context_dim": 12, "from_baseline": True}
    recipe = tiny_recipe(tmp_path, models=[{"name": "Pythia"}, made], heal={"steps": 1})
    with pytest.raises(ValueError, match="converted is converted from the trained baseline: leave it out"):
        bench([], recipe, None, None, options(), progress=False)


def test_training_options_that_cannot_be_are_refused_before_anything_starts(tmp_path):
    recipe = tiny_recipe(tmp_path, train={"warmup_ratio": 0.5})
    with pytest.raises(ValueError, match="warmup_ratio 0.5: schedule constant has no warm-up"):
        bench([], recipe, None, None, options(), train=True, progress=False)
