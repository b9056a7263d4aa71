"""`bench --serve`, without an engine: its conversations, its report, and what it refuses. tests/serving runs it."""

import json

import pytest

import context_pythia.bench.serve as serving
from context_pythia.bench.options import ServeOptions
from context_pythia.cli import main
from context_pythia.errors import UsageError
from context_pythia.files import write_json
from context_pythia.report.report import write_report


def test_prompts_begin_alike_and_go_on_apart():
    made = serving.prompts(ServeOptions(conversations=3, prompt_tokens=40, common=0.25), vocab_size=1000)
    assert [len(prompt) for prompt in made] == [40] * 3
    assert len({tuple(prompt[:10]) for prompt in made}) == 1
    assert len({tuple(prompt[10:20]) for prompt in made}) == 3


def test_without_vllm_it_says_where_to_get_it(monkeypatch):
    monkeypatch.setattr(serving, "vllm_version", lambda: None)
    with pytest.raises(UsageError, match="needs vLLM 0.32 or newer, install it as docs/serving.md says"):
        serving.serve([], "pythia-14m", None, ServeOptions())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--serve"], "give either MODELs or --size"),
        (["--serve", "--size", "pythia-14m", "--rounds", "2"], "bench.rounds does not go with --serve"),
        (["--size", "pythia-14m", "--set", "serve.rounds=2"], "serve.rounds needs --serve"),
    ],
)
def test_options_of_another_kind_of_bench(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def record(name, peer, seconds, tokens_fit):
    one = {
        "seconds": seconds, "processor_seconds": seconds / 2, "steps": 30, "first_token_seconds": [1.0, 2.0, 4.0, 9.0],
        "most_running": 4, "mean_running": 3.5, "preemptions": 1, "prompt_tokens_cached": 128,
    }  # fmt: skip
    row = {"name": name, "peer": peer, "error": None, "tokens_fit": tokens_fit}
    return row | {"conversations_fit": tokens_fit / 100, "rounds": [one | {"seconds": seconds * 3}, one, one]}


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_the_report_has_medians_and_ratios_to_gpt_neox(lang, tmp_path):
    options = ServeOptions(conversations=4, answer_tokens=20)
    settings = vars(options) | {"threads": 2, "device": "cpu"}
    failed = {"name": "broken", "peer": False, "rounds": [], "error": "out of memory"}
    rows = [record("pythia", True, 8.0, 1000), record("quarter", False, 2.0, 4000), failed]
    metrics = {"kind": "serve", "settings": settings, "notes": [], "vllm": "0.32.0", "rows": rows}
    write_json(tmp_path / "metrics.json", json.loads(json.dumps(metrics)))
    write_json(tmp_path / "provenance.json", {"device": "cpu", "versions": {}})
    markdown = next(path for path in write_report(tmp_path, lang) if path.suffix == ".md").read_text()
    quarter = next(line for line in markdown.splitlines() if "quarter" in line)
    assert [cell.strip() for cell in quarter.split("|")[2:6]] == ["4,000", "4.00", "40.0", "3.5"]
    assert [line.split("|")[3:6] for line in markdown.splitlines() if "| 2.000 |" in line] == [
        [" 1.0 ", " 2.000 ", " 4.00 "]
    ]
    assert "out of memory" in markdown
    assert (tmp_path / "first-tokens.png").exists()
