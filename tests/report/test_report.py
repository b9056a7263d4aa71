"""The report says what the run's records say, in both languages, whatever the state of the run."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from string import Formatter

import pytest

from context_pythia.report.document import Code, Paragraph, Picture, Table, to_markdown
from context_pythia.report.report import write_report
from context_pythia.report.run import RunReport
from context_pythia.report.texts import LANGUAGES, Texts

NASTY = "<b>bad|name</b> $x"


def entry(name, source, dim, ppl, numbers, seconds, *, sharing=None, phase1=None, error=None):
    """An entry of metrics.json whose perplexity falls to `ppl` at epoch 2 and rises again; all null with an error."""
    measured = 128 * 4 * numbers
    history = [
        {"epoch": i, "train_loss": 7.0 - i, "val_ppl": p, "val_accuracy": 0.2 + i / 100, "seconds": 56.2, "best": b}
        for i, p, b in ((1, 2 * ppl, True), (2, ppl, True), (3, 1.1 * ppl, False))
    ]
    done = {
        "parameters": 70_756_608, "trainable_parameters": 70_559_232, "best_val_ppl": ppl, "best_epoch": 2,
        "val_accuracy": 0.2201, "history": history, "stop_reason": "early stop",
        "seconds_per_epoch": seconds, "phase1": phase1,
        "cache": {
            "length": 128, "dtype": "float32", "numbers_per_token": numbers, "bytes_formula": measured,
            "bytes_measured": measured, "bytes_slack": 0,
        },
    }  # fmt: skip
    figures = {key: None for key in done} if error else done
    return {"name": name, "context_source": source, "context_dim": dim, "context_sharing": sharing, "error": error} | (
        figures
    )


def oacd(rate):
    history = [{"iteration": i, "loss": -1.0, "convergence_rate": rate * i / 12, "seconds": 0.5} for i in range(1, 13)]
    return {"iterations": 12, "convergence_rate": rate, "effective_rank": 171.25, "history": history, "seconds": 6.0}


@pytest.fixture
def records():
    """Metrics and provenance of a run with a failed model and one that has not run."""
    models = [
        entry("Pythia", None, None, 400.0, 6144, 50.0),
        entry("input 256", "input", 256, 470.4, 6144, 62.0, phase1=oacd(0.962)),
        entry("shared 256", "shared", 256, 440.0, 272, 60.0, phase1=oacd(0.913)),
        entry("layer 256", "layer", 256, 390.0, 1536, 55.0, sharing=1),
        entry(NASTY, "layer", 64, 1.0, 384, 50.0, error="loss became NaN in epoch 1 | see <log>"),
    ]
    planned = [{key: model[key] for key in ("name", "context_source", "context_dim")} for model in models]
    planned.append({"name": "layer late", "context_source": "layer", "context_dim": 256, "context_sharing": 3})
    metrics = {
        "models": models,
        "data": {
            "source": "peps.jsonl.gz", "documents_train": 650, "documents_validation": 72, "samples_train": 9000,
            "samples_validation": 1000, "sequence_length": 128, "tokens_train": 1_152_000, "tokenizer": "neox.json",
            "vocab_size": 50277, "fingerprint": "abc123",
        },
        "recipe": {
            "name": "report", "seed": 7, "models": planned,
            "architecture": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
                             "intermediate_size": 2048},
            "train": {"epochs": 10, "batch_size": 32, "gradient_accumulation": 2, "learning_rate": 1e-4,
                      "schedule": "cosine", "warmup_ratio": 0.05, "weight_decay": 0.01, "precision": "bfloat16",
                      "patience": 1},
            "phase1": {"max_iterations": 100, "convergence_rate": 0.95, "threshold": 0.03, "learning_rate": 0.003,
                       "batch_tokens": 5000, "noise": 0.05, "state_dtype": "float32"},
        },
    }  # fmt: skip
    provenance = {
        "versions": {"python": "3.12.1", "torch": "2.13.0"}, "device": "cpu", "platform": "Linux", "threads": 2,
        "commit": "deadbeef", "created": "2026-01-02T03:04:05Z", "seed": 7, "data_fingerprint": "abc123",
        "command": "context-pythia compare --recipe report",
    }  # fmt: skip
    return metrics, provenance


@pytest.fixture
def run(tmp_path, records):
    return store(tmp_path, *records)


def store(folder: Path, metrics, provenance) -> Path:
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (folder / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
    return folder


def markdown(records, lang: str = "en") -> str:
    """The Markdown of a report whose pictures are not drawn."""
    return to_markdown(list(RunReport(*records, Texts(lang)).blocks()))


def results(text: str) -> dict[str, dict[str, str]]:
    """The first table of a Markdown report: model -> column -> cell."""
    lines = [line for line in text.split("\n\n") if line.startswith("|")][0].splitlines()
    head, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


class Page(HTMLParser):
    """Collects what a browser would load, and checks that every opened element is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.links, self.open = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_reports_share_their_pictures_need_no_torch_load_nothing_and_escape_names(run):
    code = f"""
import sys
from pathlib import Path
sys.argv[0] = "/usr/bin/context-pythia"
from context_pythia.cli import command_line
from context_pythia.report.report import write_report
print(*write_report(Path({str(run)!r}), "en", "ja"), sep="\\n")
heavy = {{"torch", "transformers", "accelerate", "datasets", "optuna", "pandas", "pyarrow", "scipy"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
ours = {{name.split(".")[1] for name in sys.modules if name.startswith("context_pythia.")}}
assert not ours & {{"model", "data", "training", "evaluation", "conversion", "runs"}}, ours
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = [Path(line) for line in done.stdout.splitlines()]
    names = {"report.md", "report.html", "report.ja.md", "report.ja.html", "curves.png", "frontier.png"}
    assert {path.name for path in written} == names and len(written) == len(names)
    assert {path.name for path in run.iterdir()} == names | {"metrics.json", "provenance.json"}
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in written if path.suffix == ".png")
    for lang, name in (("en", "report.html"), ("ja", "report.ja.html")):
        html = (run / name).read_text(encoding="utf-8")
        page = Page(html)
        assert page.open == []
        assert len(page.links) == 2
        assert all(link.startswith("data:image/png;base64,") for link in page.links)
        assert not page.tags & {"script", "link", "b", "log", "iframe"}
        assert "url(" not in html and "@import" not in html
        assert "&lt;b&gt;bad|name&lt;/b&gt; $x" in html
        assert f'<html lang="{lang}">' in html and 'name="viewport"' in html and "prefers-color-scheme: dark" in html


def test_differences_and_reductions_are_those_to_the_baseline(records):
    table = results(markdown(records))
    worse, better, base = table["input 256"], table["layer 256"], table["Pythia"]
    assert (worse["Best PPL"], worse["Against baseline"]) == ("470.4", "+17.6 %")
    assert (better["Against baseline"], better["Reduction"]) == ("−2.5 %", "75.0 %")
    assert (table["shared 256"]["KV cache"], table["shared 256"]["Reduction"]) == ("136.0 KB", "95.6 %")
    assert (worse["KV cache"], worse["Reduction"], worse["s/epoch"]) == ("3,072.0 KB", "0.0 %", "62.0")
    assert (base["Against baseline"], base["Reduction"], base["s/epoch"]) == ("–", "–", "50.0")
    assert better["Parameters, trained / all"] == "70,559,232 / 70,756,608"
    assert better["Accuracy"] == "22.0 %"
    japanese = results(markdown(records, "ja"))
    assert [list(row.values())[2:8] for row in japanese.values()][:4] == [
        list(row.values())[2:8] for row in table.values()
    ][:4]


def test_the_headline_names_the_best_smaller_model_and_the_smallest_cache(records):
    lead = markdown(records).split("\n\n")[1]
    assert "layer 256 has the best perplexity: 390.0 against 400.0 (−2.5 %)." in lead
    assert "768.0 KB in place of 3,072.0 KB, a reduction of 75.0 %" in lead
    assert "shared 256 has the smallest cache: 136.0 KB (95.6 % less), at a perplexity of 440.0 (+10.0 %)." in lead


def test_of_caches_of_one_size_the_headline_names_the_best(records):
    models = records[0]["models"]
    models.insert(3, entry("shared 255", "shared", 255, 430.0, 272, 60.0))
    lead = markdown(records).split("\n\n")[1]
    assert "shared 255 has the smallest cache: 136.0 KB (95.6 % less), at a perplexity of 430.0 (+7.5 %)." in lead


def test_widths_of_the_mlp_are_a_column_where_one_is_not_the_recipes(records):
    baseline, other, *_ = records[0]["models"]
    baseline["intermediate_size"] = other["intermediate_size"] = 2048
    assert "Width of the MLP" not in results(markdown(records))["Pythia"]
    other["intermediate_size"] = None  # healed, or of an older version
    assert "Width of the MLP" not in results(markdown(records))["Pythia"]
    other["intermediate_size"] = 2100
    for lang, label in (("en", "Width of the MLP"), ("ja", "MLP 次元")):
        text = markdown(records, lang)
        table = results(text)
        assert (table["Pythia"][label], table["input 256"][label]) == ("2,048", "2,100")
        assert table["layer late"][label] == "–" and f"| {label} | 2048 |" not in text


def bands(*perplexities):
    edges = (0, 16, 32, 64)
    return [
        {"from": edges[i], "to": edges[i + 1], "tokens": 1000 * (edges[i + 1] - edges[i]), "perplexity": perplexity}
        for i, perplexity in enumerate(perplexities)
    ]


@pytest.fixture
def banded(records):
    """The records with perplexities by position of all but one finished model."""
    for model, held in zip(records[0]["models"], [(800, 450, 80), (840, 450, 76), (880, 429.975, 80.4)], strict=False):
        model["val_ppl_by_position"] = bands(*held)
    return records


def test_perplexities_by_position_are_shown_with_their_differences_to_the_baseline(banded):
    text = markdown(banded)
    for line in (
        "| Model | 0–16 | 16–32 | 32–64 |",
        "| Pythia | 800.0 | 450.0 | 80.00 |",
        "| input 256 | 840.0 (+5.0 %) | 450.0 (+0.0 %) | 76.00 (−5.0 %) |",
        "| shared 256 | 880.0 (+10.0 %) | 430.0 (−4.4 %) | 80.40 (+0.5 %) |",
        "| tokens | 16,000 | 16,000 | 32,000 |",
    ):
        assert line in text
    section = "".join(text.split("## Quality by position")[1].split("\n\n")[1:4])
    assert "layer 256" not in section and "against Pythia" in section
    japanese = markdown(banded, "ja").split("## 位置ごとの品質")[1]
    assert re.findall(r"\d+\.\d+ \([+−].*? %\)", japanese) == re.findall(r"\d+\.\d+ \([+−].*? %\)", section)


def test_a_picture_by_position_shows_every_band_and_the_difference_in_percent(banded):
    pictures = {block.file: block for block in RunReport(*banded, Texts()).blocks() if isinstance(block, Picture)}
    above, below = pictures["positions.png"].draw().axes
    assert [list(line.get_ydata()) for line in above.lines] == [[800, 450, 80], [840, 450, 76], [880, 429.975, 80.4]]
    expected = [[0, 0, 0], [5, 0, -5], [10, -4.45, 0.5]]
    assert [list(line.get_ydata()) for line in below.lines] == [pytest.approx(line) for line in expected]
    assert list(below.lines[0].get_xdata()) == [16, 32, 64]


def curves(records):
    return {panel.title: panel.curves for panel in RunReport(*records, Texts()).panels()}


def test_learning_curves_show_the_difference_to_the_baseline_at_each_epoch(records):
    baseline, _, _, layer, *_ = records[0]["models"]
    perplexity, *others = curves(records)
    assert others == ["Difference to Pythia at the same time (%)", "Training loss", "Phase 1: converged tokens (%)"]
    layer["history"][2]["epoch"] = 9
    difference = curves(records)[others[0]]
    assert difference["Pythia"] == [(1, 0), (2, 0), (3, 0)]
    assert difference["layer 256"] == [(1, pytest.approx(-2.5)), (2, pytest.approx(-2.5))]  # there is no ninth epoch
    records[0]["models"] = [baseline]
    assert list(curves(records)) == [perplexity, "Training loss"]


def test_one_pass_is_drawn_over_tokens(records):
    for model in records[0]["models"]:
        for row in model["history"] or []:
            row["tokens"] = 2_000_000 * row["epoch"]
    records[0]["recipe"]["train"]["tokens"] = 6_000_000
    perplexity = next(iter(curves(records).values()))
    assert perplexity["layer 256"] == [(2.0, 780.0), (4.0, 390.0), (6.0, pytest.approx(429.0))]
    text = markdown(records)
    assert "\nmillion tokens 4: train_loss=5.0000, val_ppl=400.00" in text
    assert "\nepoch " not in text
    assert "| Tokens, read once | 6000000 |" in text
    assert "Epochs at most" not in text and "Patience" not in text


def test_learning_curves_are_logged_line_by_line_with_the_reason_to_stop(records):
    text = markdown(records)
    assert "epoch 2: train_loss=5.0000, val_ppl=400.00, val_acc=0.2200, 56.2 s *\n" in text
    assert "epoch 3: train_loss=4.0000, val_ppl=440.00, val_acc=0.2300, 56.2 s\nstopped: early stop\n" in text


def test_phase_1_shows_what_was_reached_against_what_was_wanted(records):
    text = markdown(records)
    assert "| input 256 | yes | 96.2 % | 95.0 % | 12 | 171.2 of 256 | 6.0 |" in text
    assert "| shared 256 | no | 91.3 % | 95.0 % | 12 | 171.2 of 256 | 6.0 |" in text
    converged = RunReport(*records, Texts()).panels()[-1].curves["input 256"]
    assert converged[-2:] == [(11, pytest.approx(88.18, abs=0.01)), (12, pytest.approx(96.2))]


def test_settings_and_provenance_are_listed(records):
    text = markdown(records)
    for line in (
        "| Samples, training / validation | 9,000 / 1,000 |",
        "| Sequence length | 128 tokens (129 with the target) |",
        "| Batches a step | 2 |",
        "| Warm-up, share of the steps | 0.05 |",
        "| Learning rate (AdamW) | 0.0001 |",
        "| Epochs at most | 10 |",
        "| Patience: evaluations without a better perplexity before training stops | 1 |",
        "| Width of the MLP | 2048 |",
        "| Phase 1: iterations at most | 100 |",
        "| Versions | python 3.12.1, torch 2.13.0 |",
        "| Commit | deadbeef |",
        "| Data fingerprint | abc123 |",
        "| CPU threads | 2 |",
    ):
        assert line in text
    assert "by position" not in text and "Earlier calls" not in text
    records[1]["earlier"] = [{"command": "context-pythia train"}]
    assert "Earlier calls with figures in this folder: 1." in markdown(records)


def test_failed_and_pending_models_are_shown_as_such(records):
    text = markdown(records)
    table = results(text)
    failed = next(row for name, row in table.items() if "bad" in name)
    assert (failed["Best PPL"], failed["KV cache"], failed["Against baseline"]) == ("failed", "–", "–")
    assert table["layer late"]["Best PPL"] == "not run yet"
    assert table["layer late"]["Context"] == "layer 256, shared by 3 layers"
    assert "4 of 6 models have a result (failed: 1, not run yet: 1)" in text
    assert r"loss became NaN in epoch 1 \| see \<log\>" in text
    by_layers = {"context_sharing": 1, "context_layers": [0, 1, 1], "layer_context_dims": [16, 40, 0]}
    records[0]["recipe"]["models"][-1] |= by_layers
    assert results(markdown(records))["layer late"]["Context"] == "layer 16 + 40"


def test_a_run_without_a_finished_baseline_has_no_differences(records):
    del records[0]["models"][0]
    text = markdown(records)
    assert "No baseline with a larger cache has a result here." in text
    assert {row["Against baseline"] for row in results(text).values()} == {"–"}


def test_a_run_that_has_only_begun_is_reported_without_pictures(tmp_path, records):
    metrics, provenance = records
    metrics["models"] = []
    written = write_report(store(tmp_path, metrics, provenance))
    assert {path.name for path in written} == {"report.md", "report.html"}
    assert "No model has a result yet." in written[0].read_text(encoding="utf-8")


def test_the_caveat_on_the_input_source_appears_only_where_it_was_run(records):
    assert "has the baseline's cache" in markdown(records)
    del records[0]["models"][1]
    assert "has the baseline's cache" not in markdown(records)


def test_every_language_has_the_same_texts_with_the_same_placeholders():
    def placeholders(texts):
        return {key: {field for _, field, _, _ in Formatter().parse(text) if field} for key, text in texts.items()}

    english, *others = (placeholders(Texts(lang).texts) for lang in LANGUAGES)
    assert others and all(other == english for other in others)


@pytest.mark.parametrize("file", ["metrics.json", "provenance.json"])
def test_a_missing_record_is_named(run, file):
    (run / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing: name a folder that a command"):
        write_report(run)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"models": [', "Expecting value"),
        ("[]", "no object"),
        ('{"models": [], "data": {}}', "no command of context-pythia has written it"),
        ('{"kind": "other"}', "no command of context-pythia has written it"),
    ],
)
def test_damaged_metrics_are_one_clear_line(run, content, reason):
    (run / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=rf"metrics.json is damaged \(.*{reason}.*\): restore it") as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert not (run / "report.md").exists()


def test_markdown_keeps_odd_texts_in_their_place():
    text = to_markdown([Table(["a|b"], [["x\n*y* _z_ snake_case"]]), Code("a|b"), Paragraph("<i> [l](u)")])
    assert "| a\\|b |\n| :-- |\n| x \\*y\\* \\_z\\_ snake_case |" in text
    assert "```text\na|b\n```" in text
    assert r"\<i\> \[l\](u)" in text
