"""The command: how flags become recipes, errors become exit codes, and help stays quick."""

import importlib
import inspect
import io
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import transformers

import context_pythia
from context_pythia.cli import command_line as cli
from context_pythia.cli import parser
from context_pythia.config.convert import ConvertOptions
from context_pythia.config.options import options_of
from context_pythia.config.recipe import DataOptions, HealOptions
from context_pythia.config.recipe_files import load_recipe
from context_pythia.errors import Failure, UsageError

WORK = {
    "compare": "context_pythia.runs.train.compare",
    "train": "context_pythia.runs.train.compare",
    "phase1": "context_pythia.runs.train.run_phase1",
    "sweep": "context_pythia.sweep.worker.sweep",
    "generate": "context_pythia.runs.generate.generate",
    "info": "context_pythia.runs.info.info",
    "report": "context_pythia.report.report.write_report",
    "convert": "context_pythia.runs.convert.Conversion",
    "eval": "context_pythia.runs.evaluate.evaluate",
    "bench": "context_pythia.bench.run.bench",
}
REQUIRED = {
    "phase1": ["--model=m"],
    "train": ["--model=m"],
    "sweep": ["--out=o"],
    "generate": ["m", "--prompt=p"],
    "report": ["r"],
    "convert": ["m", "--out=o"],
    "eval": ["m"],
}
calls: list[dict] = []


@pytest.fixture
def run(monkeypatch):
    """Run the command line with the work of all commands replaced; return what was asked of it."""
    calls.clear()
    for path in ("report.report.show", "cli.info.info_table", "report.card.write_card"):
        monkeypatch.setattr(f"context_pythia.{path}", lambda work: None)
    for path in dict.fromkeys(WORK.values()):
        module, _, name = path.rpartition(".")
        signature = inspect.signature(getattr(importlib.import_module(module), name))

        def record(*arguments, _signature=signature, **keywords):
            asked = _signature.bind(*arguments, **keywords).arguments
            others = [p.name for p in _signature.parameters.values() if p.kind is p.VAR_KEYWORD]
            calls.append(asked | asked.pop(others[0], {}) if others else asked)
            return MagicMock()

        monkeypatch.setattr(path, record)

    def run(*argv):
        assert cli.main(argv) == 0
        return calls[-1]

    return run


@pytest.fixture
def run_failing(monkeypatch):
    """Run a command whose work raises the given error; return the exit code."""

    def run(error, *argv, name="report"):
        def fail(*arguments, **keywords):
            raise error

        monkeypatch.setattr(WORK[name], fail)
        return cli.main([name, *argv])

    return run


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


def test_help_has_examples_and_answers_without_torch():
    done = python("""
import contextlib, sys
sys.argv[0] = "/usr/bin/context-pythia"
from context_pythia.cli.command_line import COMMANDS, main
for argv in [["--help"], *([name, "--help"] for name in COMMANDS)]:
    with contextlib.suppress(SystemExit):
        main(argv)
assert "torch" not in sys.modules and "transformers" not in sys.modules
import context_pythia
assert set(context_pythia.__all__) <= set(dir(context_pythia))
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("examples:\n  context-pythia ") == 1 + len(cli.COMMANDS)


def test_import_registers_the_models_but_in_the_command(tmp_path):
    (tmp_path / "mine").mkdir()
    # What registers them takes seconds: here its name is enough.
    (tmp_path / "mine" / "__init__.py").write_text(
        "import importlib\nimportlib.import_module = print\nimport context_pythia"
    )
    (tmp_path / "mine" / "run.py").touch()
    command = [sys.executable, "-m", "mine.run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.stdout == "context_pythia.model\n", done.stderr
    assert transformers.AutoConfig.for_model("context_pythia").model_type == "context_pythia"


def help_of(command, capsys) -> str:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("command", "shown", "absent"),
    [
        (
            "convert",
            ("(default: 32768)", "(default: float32)", "(default: train; for saved models, theirs)"),
            "(default: None)",
        ),
        ("eval", ("(default: builtin)",), "(default: None)"),
        ("phase1", ("(default: quick)",), "(default: 0.0001)"),
        ("generate", ("greedy (default: 0.0)", "seed of the sampling (default: 0)"), "(default: False)"),
    ],
)
def test_help_names_the_defaults_that_hold(command, shown, absent, capsys):
    text = help_of(command, capsys)
    assert all(default in text for default in shown)
    assert absent not in text


def test_help_shows_at_most_thirty_flags():
    for name in cli.COMMANDS:
        parsed = parser.build_parser(cli.COMMANDS).parse_args([name, *REQUIRED.get(name, [])])
        assert len([action for action in parsed.parser._actions if action.option_strings]) <= 30


def test_set_help_lists_all_keys(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", "--set", "help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert "heal.steps                       optimizer steps (0: no distillation) (default: 0)" in lines
    assert len([line for line in lines if line.startswith("data.")]) == len(options_of(DataOptions))


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        (
            ["compare"],
            {"recipe": load_recipe("quick"), "out": Path("runs/quick"), "progress": True},
        ),
        (
            ["compare", "report", "--out=a", "--lang=ja", "--models", "Pythia-70M, Context-Pythia shared"],
            {"recipe": load_recipe("report", models=["Pythia-70M", "Context-Pythia shared"])},
        ),
        (
            ["phase1", "quick", "--model=shared", "--quiet"],
            {"recipe": load_recipe("quick", models=["shared"]), "out": Path("runs/quick"), "progress": False},
        ),
        (
            ["generate", "m", "--prompt", "", "--top-k=5", "--temperature=0.7", "--stats"],
            {"model": "m", "prompt": "", "top_k": 5, "temperature": 0.7, "stats": True, "max_new_tokens": 64},
        ),
        (
            ["info", "folder", "--length=7", "--dtype=bfloat16"],
            {"recipe": None, "model": "folder", "length": 7, "dtype": "bfloat16"},
        ),
        (
            ["info", "--recipe=report", "--set", "model.context_dim=300"],
            {"model": None, "recipe": load_recipe("report", {"model.context_dim": 300})},
        ),
        (
            ["eval", "a", "b"],
            {"models": ["a", "b"], "data": DataOptions(tokenizer="a"), "caches": [], "out": None, "progress": True},
        ),
        (
            ["eval", "a", "--samples=40", "--tokenizer=t.json", "--cache=int4", "--cache=int4", "--tasks", "x, y"],
            {"data": DataOptions(tokenizer="t.json", samples=40), "caches": ["int4"], "tasks": ("x", "y")},
        ),
        (
            [
                "convert",
                "m",
                "--out=o",
                "--context-dim=32",
                "--heal-steps=5",
                "--set",
                "heal.ce_weight=1",
            ],
            {
                "options": ConvertOptions(context_dim=32),
                "data": DataOptions(tokenizer="m"),
                "healing": HealOptions(steps=5, ce_weight=1),
            },
        ),
        (
            ["convert", "m", "--out=o", "--control", "--heal-steps=5"],
            {"options": ConvertOptions(), "control": True},
        ),
        (["report", "runs/quick", "--lang", "ja"], {"folder": Path("runs/quick"), "langs": ("ja",)}),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_flags_reach_the_work(run, argv, asked):
    found = run(*argv)
    assert {name: found[name] for name in asked} == asked


def test_flags_and_set_override_every_section(run):
    flags = ["--seed=3", "--samples=40", "--learning-rate=1e-3", "--schedule=cosine", "--context-dim=32"]
    others = ["architecture.hidden_size=64", "phase1.noise=0.1", "tensorboard=yes", "cache-dir=none"]
    settings = [word for text in others for word in ("--set", text)]
    recipe = run("compare", "quick", *flags, "--no-freeze-context-block", *settings)["recipe"]
    assert recipe == load_recipe(
        "quick",
        {
            "seed": 3,
            "data.samples": 40,
            "data.cache_dir": None,
            "architecture.hidden_size": 64,
            "phase1.noise": 0.1,
            "train.learning_rate": 1e-3,
            "train.tensorboard": True,
            "train.schedule": "cosine",
            "model.context_dim": 32,
            "model.freeze_context_block": False,
        },
    )
    assert recipe.models[1].context_dim == 32 and not recipe.models[1].freeze_context_block


def test_sweep_takes_a_recipe_with_overrides_and_what_to_search(run):
    argv = ["--over", "context_dim=32,64", "--models", "layer, Pythia", "--seeds", "0,2", "--epochs", "2", "--quiet"]
    plan = run("sweep", "quick", *argv, "--out", "here")["plan"]
    assert plan.recipe == load_recipe("quick", {"train.epochs": 2}, ["Pythia", "layer"])
    assert (plan.seeds, plan.sampler, plan.trials) == ((0, 2), "grid", None)
    assert [(one.path, one.values) for one in plan.dimensions] == [("model.context_dim", (32, 64))]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["compare", "nope"],
            "recipe 'nope' is unknown; valid: quick, recall, report, small, text-l, text-m, text-s, tuned, "
            "or a YAML file",
        ),
        (["compare", "--context-dim", "0"], "model input: context_dim 0: must be between 1 and 2 * hidden_size = 256"),
        (["compare", "--models", "a"], "recipe quick: model 'a' is unknown; valid: Pythia, input, shared, layer"),
        (["info", "m", "--recipe", "quick"], "info: give either --recipe RECIPE or a MODEL"),
        (["info", "m", "--set", "train.epochs=2"], "info: options of a recipe need --recipe"),
        (["compare", "--epochs", "x"], "train.epochs 'x': must be a whole number"),
        (
            ["compare", "--tokens", "9999", "--epochs", "3"],
            "train.epochs 3: has no effect beside train.tokens 9999, which are read once; drop it",
        ),
        (
            ["compare", "--set", "train.epohcs=3"],
            "--set 'train.epohcs' is unknown (did you mean train.epochs or ",
        ),
        (["comapre"], "command 'comapre' is unknown (did you mean compare?); valid: compare, phase1, "),
        (["compare", "--set", "bogus=1"], "--set 'bogus' is unknown; `context-pythia compare --set help` lists all"),
        (["sweep", "--out=o", "--over", "bogus=1"], "--over 'bogus' is unknown; `context-pythia sweep --set help` li"),
        (["bench", "--set", "rounds=3"], "--set 'rounds' is unknown (did you mean serve.rounds or bench.rounds"),
        (["compare", "--set", "train.epochs"], "--set 'train.epochs': give section.key=value, such as train.max"),
        (
            ["compare", "--set", "model.name=a"],
            "--set 'model.name' is unknown (did you mean model.phase1?); `context-pythia compare --set help` lists all",
        ),
        (["generate", "m", "--prompt", "a", "--temperature", "-1"], "--temperature -1.0: must be >= 0"),
        (["eval", "m", "--cache", "int2"], "--cache 'int2': must be one of int8, int4 (did you mean int8?)"),
        (["bench", "--size", "pythia-14m", "--lengths", "8,8"], "bench.lengths 8,8: has the same value twice"),
    ],
)
def test_wrong_values_are_one_line_and_exit_2(run, capsys, argv, message):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"context-pythia: error: {message}") and err.count("\n") == 1 and not out
    assert not calls


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compare", "--epohcs", "3"], "unknown argument --epohcs (did you mean --epochs?)"),
        (
            ["compare", "--no-tensorboard"],
            "unknown argument --no-tensorboard (did you mean --set train.",
        ),
        (["compare", "--phase1-noise=1"], "unknown argument --phase1-noise=1 (did you mean --set phase1.noise=...?)"),
        (["phase1"], "the following arguments are required: --model"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(run, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert err.startswith(f"context-pythia: error: {message}") and err.count("\n") == 1 and not out
    assert not calls


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("corpus empty.txt holds no text"), 2, "corpus empty.txt holds no text"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "a.txt: No such file or directory"),
        (NotADirectoryError(20, "Not a directory", "a.txt/b"), 2, "a.txt/b: Not a directory"),
        (PermissionError(13, "Permission denied", "/runs"), 1, "/runs: Permission denied"),
        (Failure("loss is NaN at step 3\n  lower the learning rate"), 1, "loss is NaN at step 3"),
        (ConnectionError("cannot reach the Hub"), 1, "cannot reach the Hub"),
        (MemoryError(), 1, "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "CUDA out of memory. Tried"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(run_failing, capsys, error, code, line):
    assert run_failing(error, "runs/x") == code
    assert capsys.readouterr().err == f"context-pythia: error: {line}\n"


def test_our_own_mistakes_keep_their_traceback_and_ask_to_be_reported(run_failing):
    with pytest.raises(TypeError, match="ours") as error:
        run_failing(TypeError("ours"), "runs/x")
    assert error.value.__notes__[0].startswith("context-pythia: a mistake of context-pythia ")


def test_a_console_without_unicode_shows_another_character(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(cli.COMMANDS["report"], "run", lambda self: print("256 \u00d7 3 \u2212 1"))
    assert cli.main(["report", "runs/x"]) == 0
    assert written.getvalue() == b"256 ? 3 ? 1\n"


def test_an_interrupt_says_how_to_go_on(run_failing, capsys):
    assert run_failing(KeyboardInterrupt(), name="compare") == 130
    line = "context-pythia: interrupted; run the same command again to resume"
    assert capsys.readouterr().err.split("\n") == ["", line, ""]
    assert run_failing(KeyboardInterrupt(), "runs/x") == 130
    assert "again" not in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error():
    code = """
import sys
sys.argv[0] = "context-pythia"
from context_pythia.cli import command_line as cli
def write(self):
    for _ in range(100000):
        print("line")
cli.COMMANDS["report"].run = write
sys.exit(cli.main(["report", "runs/x"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=600) == 1


def test_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"context-pythia {context_pythia.__version__}\n"
