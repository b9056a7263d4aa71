"""`context-pythia eval` on the models of a tiny comparison: figures, files, and what it refuses."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from context_pythia.cli import command_line as cli
from context_pythia.cli.command import reported
from context_pythia.config.recipe import DataOptions
from context_pythia.config.recipe_files import load_recipe
from context_pythia.data.tokenizers import vocabulary_rows
from context_pythia.errors import UsageError
from context_pythia.evaluation import perplexity
from context_pythia.evaluation.pretrained import load_pretrained
from context_pythia.evaluation.recall import recall
from context_pythia.report.evaluation import EvaluationReport
from context_pythia.report.formats import change, percent
from context_pythia.report.report import show, write_report
from context_pythia.report.texts import Texts
from context_pythia.runs import evaluate as module
from context_pythia.runs.evaluate import evaluate_model
from tests.evaluation.conftest import build, tokenizer_of_words

NAMES = ("pythia", "input", "shared", "layer-12-x2")


@pytest.fixture(scope="module")
def paths(finished_run):
    return [str(finished_run / "models" / name) for name in NAMES]


@pytest.fixture(scope="module")
def data(finished_run, paths):
    """The data of the comparison, with the tokenizer that its models carry: the default of `eval`."""
    return replace(load_recipe(str(finished_run / "recipe.yaml")).data, tokenizer=paths[0])


def evaluate(*args, out=None, lang="en", **asked):
    with reported(out, lang):
        metrics = module.evaluate(*args, out=out, **asked)
        show(metrics)
    return metrics


@pytest.fixture(scope="module")
def evaluated(paths, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    evaluate(paths, data, batch_size=4, cached_tokens=70, out=out, lang="ja", progress=False)
    return out


@pytest.fixture(scope="module")
def rows(evaluated):
    return json.loads((evaluated / "metrics.json").read_text())["models"]


def test_the_figures_are_those_of_training(rows, finished_run):
    trained = json.loads((finished_run / "metrics.json").read_text())["models"]
    assert [row["name"] for row in rows] == list(NAMES)
    for row, held in zip(rows, trained, strict=True):
        assert row["perplexity"] == pytest.approx(held["best_val_ppl"], rel=1e-5)
        assert row["accuracy"] == pytest.approx(held["val_accuracy"])
        assert row["cache"]["bytes_measured"] == row["cache"]["bytes_formula"] == held["cache"]["bytes_measured"]
        assert row["parameters"] == held["parameters"]


def test_both_passes_agree_and_rows_are_compared_with_the_first(rows):
    for row in rows:
        assert row["cached"]["agrees"] and row["cached"]["tokens"] == 80
        assert row["cached"]["perplexity"] == pytest.approx(row["cached"]["parallel_perplexity"], rel=1e-5)
    first, *others = rows
    assert (first["kl"], first["agreement"]) == (None, None)
    for row in others:
        assert row["kl"] > 0 and 0 < row["agreement"] <= 1


def test_the_report_shows_the_figures_in_both_languages(evaluated, rows):
    english, japanese = (evaluated / "report.md").read_text(), (evaluated / "report.ja.md").read_text()
    for row in rows:
        line = next(line for line in english.splitlines() if line.startswith(f"| {row['name']} |"))
        assert f"{row['perplexity']:.5g}" in line and f"{row['cache']['bytes_measured'] / 1024:.1f} KB" in line
        apart = row["perplexity"] / rows[0]["perplexity"] - 1
        assert f"| {change(apart if apart else None, 2)} |" in line
        assert f"| {percent(1 - row['cache']['bytes_measured'] / (64 * 128), 2)} |" in line
    assert "give every model the same perplexity on the same 80 tokens, to 4 digits" in english
    assert sorted(re.findall(r"\d+\.\d+ KB", english)) == sorted(re.findall(r"\d+\.\d+ KB", japanese))
    assert "モデルの比較評価" in japanese and "accuracy" not in japanese
    assert (evaluated / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (evaluated / "report.html").read_text()


def test_perplexities_by_position_are_those_of_training_and_shown(evaluated, rows, finished_run, capsys):
    trained = json.loads((finished_run / "metrics.json").read_text())["models"]
    for row, held in zip(rows, trained, strict=True):
        (found,), (expected,) = row["perplexity_by_position"], held["val_ppl_by_position"]
        assert found == pytest.approx(expected, rel=1e-5) and found["tokens"] == row["tokens"]
        assert row["cached"]["perplexity_by_position"][0]["tokens"] == 80
    shown = [f"{row['perplexity']:.2f}" for row in rows]
    text = (evaluated / "report.md").read_text()
    table = text.split("## Quality by position")[1].split("\n\n")[1]
    assert table.startswith("| Model | 0–16 |") and f"| {NAMES[0]} | {shown[0]} |" in table
    assert re.search(rf"\| {NAMES[3]} \| {shown[3]} \([+−]\d+\.\d %\) \|", table)
    assert "](positions.png)" in text and (evaluated / "positions.png").read_bytes().startswith(b"\x89PNG")
    assert "位置ごとの品質" in (evaluated / "report.ja.md").read_text()
    show(json.loads((evaluated / "metrics.json").read_text()))
    console = " ".join(capsys.readouterr().out.split())
    assert "Quality by position Model 0–16 ----" in console and shown[3] in console


def test_the_report_of_quantized_caches_recall_tasks_and_passes_that_differ(evaluated, rows, tmp_path, capsys):
    shutil.copytree(evaluated, tmp_path / "eval")
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    models = metrics["models"]
    quantized = json.loads(json.dumps(models[1])) | {"quantised": "int4", "perplexity_by_position": None}
    quantized |= {"perplexity": None, "accuracy": None, "kl": 0.1}
    quantized["cached"]["perplexity"] *= 1.25
    models.append(quantized)
    models[0]["recall"] = [{"task": "key", "distance": 32, "accuracy": 0.75, "chance": 0.125, "samples": 4}]
    models[0]["tasks"] = {"own_words": {"acc": 0.4375, "acc_stderr": 0.1}}
    models[3]["cached"] |= {"agrees": False, "perplexity": 78.5, "parallel_perplexity": 77.0}
    (tmp_path / "eval" / "metrics.json").write_text(json.dumps(metrics))
    write_report(tmp_path / "eval")
    capsys.readouterr()
    show(metrics)
    report, table = (tmp_path / "eval" / "report.md").read_text(), " ".join(capsys.readouterr().out.split())
    # Beside a quantized cache all models are compared by the pass that filled it.
    cached = [row["cached"]["perplexity"] for row in models]
    assert f"| input + int4 | – | – | – | {cached[-1]:.5g} |" in report
    assert "![Perplexity on the first 80 tokens, token by token, against the measured cache" in report
    series = EvaluationReport(metrics, {}, Texts("en", "eval")).series
    assert [one.perplexity for one in series] == cached
    assert [bool(one.positions) for one in series] == [True] * 4 + [False]
    assert "| pythia | own_words | acc | 0.4375 |" in report and "pythia own_words acc 0.4375" in table
    assert "| key, 32 | 75.0 % | 12.5 % |" in report and "](recall.png)" in report
    line = "token by token give different perplexities on the same 80 tokens: layer-12-x2 77 / 78.5."
    assert line in report and line in table
    # An older version recorded no perplexities by position.
    for row in models:
        del row["perplexity_by_position"], row["cached"]["perplexity_by_position"]
    show(metrics)
    assert "by position" in table and "by position" not in capsys.readouterr().out


def test_recall_by_distance_is_recorded(tmp_path):
    tokenizer, length = tokenizer_of_words(), 48
    model = build("layer", vocab_size=vocabulary_rows(tokenizer))
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    texts = [" ".join(["the day is long", "abc", "bad"] * 40) + f" {i}" for i in range(4)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = DataOptions(
        data=str(tmp_path / "text.jsonl"),
        tokenizer=str(tmp_path / "model"),
        samples=3,
        sequence_length=length,
        cache_dir=str(tmp_path / "packed"),
    )
    metrics = module.evaluate([str(tmp_path / "model")], data, recall_samples=3, progress=False)
    assert metrics["models"][0]["recall"] == recall(model, tokenizer, length, samples=3)
    assert [row["distance"] for row in metrics["models"][0]["recall"]] == [32, 44, 32, 46]
    with pytest.raises(UsageError, match="recall in texts of 20 tokens"):
        module.evaluate([str(tmp_path / "model")], replace(data, sequence_length=20), recall_samples=3, progress=False)


def test_where_it_ran_is_recorded(evaluated, data):
    found = json.loads((evaluated / "provenance.json").read_text())
    assert found["versions"]["torch"] == torch.__version__ and found["data_fingerprint"] and found["device"]


def test_a_wrong_decoding_step_shows_as_a_difference(paths, data, monkeypatch):
    monkeypatch.setattr(perplexity, "DynamicCache", Amnesiac)
    metrics = evaluate(paths[:1], data, cached_tokens=70, progress=False)
    assert metrics["models"][0]["cached"]["agrees"] is False


class Amnesiac(perplexity.DynamicCache):
    def update(self, keys, values, layer_idx, *args, **kwargs):
        held, own = super().update(keys, values, layer_idx, *args, **kwargs)
        return held, torch.zeros_like(own)


def test_quantized_caches_make_rows_of_their_own(paths, data, capsys):
    pytest.importorskip("hqq")
    metrics = evaluate([paths[0], paths[3]], data, cached_tokens=70, caches=["int8", "int4"], progress=False)
    found = {(row["name"], row["quantised"]): row for row in metrics["models"]}
    assert len(found) == 6
    for name in ("pythia", "layer-12-x2"):
        sizes = [found[name, kind]["cache"]["bytes_measured"] for kind in (None, "int8", "int4")]
        assert sizes == sorted(sizes, reverse=True)
        assert found[name, "int8"]["perplexity"] is None and found[name, "int8"]["cached"]["perplexity"] > 1
    assert found["pythia", "int8"]["kl"] < found["pythia", "int4"]["kl"] < found["layer-12-x2", None]["kl"]
    assert "layer-12-x2 + int4" in capsys.readouterr().out


def test_a_quantized_cache_that_fails_is_a_row_with_its_error(paths, data, capsys, monkeypatch):
    pytest.importorskip("hqq")

    def fail(*_):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(module, "quantized_cache", fail)
    metrics = evaluate([paths[0]], data, cached_tokens=70, caches=["int8"], progress=False)
    assert metrics["models"][1]["error"] == "out of memory" and metrics["models"][1]["cached"] is None
    assert "pythia + int8 failed: out of memory" in capsys.readouterr().out


def test_a_model_in_hand_gives_the_same_rows(paths, data, rows):
    packed = module.load_data(data, progress=False)
    first, other = (load_pretrained(paths[i], torch.float32) for i in (0, 3))
    found = evaluate_model(first, "pythia", packed.validation, 4, 70, progress=False)
    found += evaluate_model(other, "layer-12-x2", packed.validation, 4, 70, reference=first, progress=False)
    assert found[0] | {"name": ""} == rows[0] | {"name": ""} and found[1]["kl"] == pytest.approx(rows[3]["kl"])
    assert found[1]["cache"] == rows[3]["cache"]


def test_other_vocabularies_are_said_or_refused(paths, data, tmp_path, capsys):
    build("layer", vocab_size=400).save_pretrained(tmp_path / "wider")
    models = [paths[0], str(tmp_path / "wider")]
    metrics = evaluate(models, replace(data, tokenizer="train", vocab_size=270), cached_tokens=1, progress=False)
    assert metrics["notes"][0].startswith("pythia was trained with another tokenizer")
    assert "note: wider has a vocabulary of 400 rows, pythia 384: KL is left out" in capsys.readouterr().out
    assert metrics["models"][1]["kl"] is None and metrics["models"][1]["agreement"] is not None
    build("pythia", vocab_size=61).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"tokenizer pythia has \d+ tokens, model narrow has 61: give the model's own"):
        evaluate([str(tmp_path / "narrow")], data, progress=False)


def test_a_damaged_or_absent_model_is_one_line_before_anything_is_scored(paths, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "score", lambda *arguments: pytest.fail("scored"))
    shutil.copytree(paths[3], tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("gpt_neox.final_layer_norm.bias")
    save_file(tensors, file, {"format": "pt"})
    flags = ["--data", data.data, "--samples", "60", "--sequence-length", "16"]
    for model, code, message in [
        (str(tmp_path / "broken"), 1, "is damaged"),
        (str(tmp_path / "absent"), 2, "no such model"),
        (paths[0], 2, "is named twice"),
    ]:
        assert cli.main(["eval", paths[0], model, *flags]) == code
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_model_with_too_few_positions_is_named_before_anything_is_scored(paths, data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "score", lambda *arguments: pytest.fail("scored"))
    build("layer", vocab_size=384, max_position_embeddings=15).save_pretrained(tmp_path / "short")
    with pytest.raises(UsageError, match="sequence_length 16: must be at most 15, short's positions"):
        module.evaluate([paths[0], str(tmp_path / "short")], data, progress=False)


def test_a_training_run_is_not_written_over(paths, data, finished_run):
    held = (finished_run / "metrics.json").read_bytes()
    with pytest.raises(ValueError, match="holds a training run"):
        module.evaluate(paths[:1], data, out=finished_run, progress=False)
    assert (finished_run / "metrics.json").read_bytes() == held


def test_neither_models_nor_files_nor_other_evaluations_are_written_over(paths, data, tmp_path):
    def again(models, out, **options):
        return module.evaluate(models, data, cached_tokens=1, out=out, progress=False, **options)

    again(paths[:1], tmp_path / "eval")
    for models, options in [(paths[2:3], {}), (paths[:1], {"batch_size": 3})]:
        with pytest.raises(ValueError, match="eval: holds an evaluation with .*, not .*: choose another folder"):
            again(models, tmp_path / "eval", **options)
    again(paths[:2], tmp_path / "eval")  # one more of the same is an evaluation that goes on
    with pytest.raises(ValueError, match="holds a model; choose another folder"):
        again(paths[:1], Path(paths[1]))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is a file; choose another folder"):
        again(paths[:1], tmp_path / "file")


def test_a_model_whose_loss_is_not_a_number_is_named(paths, data, tmp_path):
    shutil.copytree(paths[0], tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["gpt_neox.final_layer_norm.weight"][0] = torch.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="broken: the validation loss is nan"):
        evaluate([paths[0], str(tmp_path / "broken")], data, cached_tokens=1, progress=False)


def test_an_interrupt_is_one_line_and_keeps_what_was_found(paths, data, tmp_path, capsys, monkeypatch):
    scored = module.score

    def score(model, dataset, batch_size, reference, progress):
        if reference is not None:
            raise KeyboardInterrupt
        return scored(model, dataset, batch_size, reference, progress)

    monkeypatch.setattr(module, "score", score)
    flags = ["--data", data.data, "--samples", "60", "--sequence-length", "16", "--cached-tokens", "1", "--quiet"]
    assert cli.main(["eval", *paths[:2], *flags, "--out", str(tmp_path / "eval")]) == 130
    assert capsys.readouterr().err == "\ncontext-pythia: interrupted\n"
    kept = json.loads((tmp_path / "eval" / "metrics.json").read_text())["models"]
    assert [row["name"] for row in kept] == ["pythia"]
