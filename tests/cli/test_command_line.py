"""The command: how flags become recipes, errors become exit codes, and help stays quick."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from context_pythia.cli import command_line as cli
from context_pythia.cli.flags import OVERRIDE
from context_pythia.config.recipe import DataOptions
from context_pythia.config.recipe_files import load_recipe, recipe_to_dict
from context_pythia.errors import Failure, UsageError

calls: list[dict] = []


def record(**keywords):
    calls.append(keywords)


def fail(**keywords):
    raise keywords["error"]


@pytest.fixture
def run(monkeypatch):
    """Run the command line with the work of all commands replaced by `record`; return what was asked of it."""
    calls.clear()
    for name, command in cli.COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, replace(command, function=f"{__name__}:record"))

    def run(*argv):
        assert cli.main(argv) == 0
        return calls[-1]

    return run


@pytest.fixture
def run_failing(monkeypatch):
    """Run a command whose work raises the given error; return the exit code."""

    def run(error, *argv, name="report"):
        row = replace(cli.COMMANDS[name], function=f"{__name__}:fail", keywords=lambda args: {"error": error})
        monkeypatch.setitem(cli.COMMANDS, name, row)
        return cli.main([name, *argv])

    return run


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_has_examples_and_answers_without_torch(argv):
    code = f"""
import sys
sys.argv[0] = "/usr/bin/context-pythia"
from context_pythia.cli.command_line import main
try:
    main({argv!r})
except SystemExit as stop:
    assert stop.code == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "examples:\n  context-pythia " in done.stdout


@pytest.mark.parametrize(
    ("command", "shown", "absent"),
    [
        (
            "convert",
            ("(default: 32768)", "(default: float32)", "(default: no)", "(default: the model's)"),
            "(default: the model's) (default:",
        ),
        ("eval", ("(default: builtin)", "(default: the first model's)"), "(default: None)"),
        ("train", ("(default: quick)",), "(default: 0.0001)"),
    ],
)
def test_help_names_the_defaults_that_hold(command, shown, absent, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(default in text for default in shown)
    assert absent not in text


@pytest.mark.parametrize("argv", [["--help"], ["compare", "--help"]], ids=" ".join)
def test_help_answers_in_half_a_second(argv):
    seconds = []
    # The quickest of three, so that a busy machine does not fail the test; torch alone takes longer to import.
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "context_pythia", *argv], capture_output=True, check=True, timeout=60)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_import_registers_the_models():
    done = python("import context_pythia, transformers; print(transformers.AutoConfig.for_model('context_pythia'))")
    assert done.stdout.startswith("ContextPythiaConfig"), done.stderr


def test_import_registers_the_models_in_another_packages_module(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import context_pythia")
    (tmp_path / "mine" / "run.py").write_text(
        "import transformers; print(transformers.AutoConfig.for_model('context_pythia').model_type)"
    )
    command = [sys.executable, "-m", "mine.run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout.strip() == "context_pythia", done.stderr


def test_the_command_has_the_public_names_and_loads_them_late():
    code = """
import sys
sys.argv[0] = "/usr/bin/context-pythia"
import context_pythia
assert "torch" not in sys.modules
from context_pythia import ContextPythiaConfig
from transformers import AutoConfig
assert isinstance(AutoConfig.for_model("context_pythia"), ContextPythiaConfig)
assert set(context_pythia.__all__) <= set(dir(context_pythia))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_every_command_names_a_function_that_exists():
    for command in cli.COMMANDS.values():
        module, function = command.function.split(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_compare_runs_quick_by_default(run):
    assert run("compare") == {
        "recipe": load_recipe("quick"),
        "out": Path("runs/quick"),
        "progress": True,
        "lang": "en",
    }


def test_compare_takes_a_recipe_an_output_a_language_and_models(run):
    asked = run("compare", "report", "--out", "here", "--lang", "ja", "--models", "Pythia-70M, Context-Pythia shared")
    assert (asked["out"], asked["lang"]) == (Path("here"), "ja")
    assert [model.name for model in asked["recipe"].models] == ["Pythia-70M", "Context-Pythia shared"]


@pytest.mark.parametrize("name", ["phase1", "train"])
def test_one_model_commands_narrow_the_recipe_to_it(run, name):
    asked = run(name, "quick", "--model", "shared", "--quiet")
    assert asked == {
        "recipe": load_recipe("quick", models=["shared"]),
        "out": Path("runs/quick"),
        "progress": False,
    }


def test_flags_override_every_section(run):
    numbers = ["--seed=3", "--samples=40", "--hidden-size=64", "--phase1-noise=0.1", "--learning-rate=1e-3"]
    others = ["--context-dim=32", "--no-freeze-context-block", "--tensorboard", "--schedule=cosine"]
    recipe = run("compare", "quick", *numbers, *others)["recipe"]
    assert recipe == load_recipe(
        "quick",
        {
            "seed": 3,
            "data.samples": 40,
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


def test_every_option_of_a_recipe_has_a_flag():
    names = {a.dest for a in cli.build_parser().parse_args(["compare"]).parser._actions}
    sections = {"data", "architecture", "phase1", "train", "heal"}
    expected = {"seed"}
    for section, values in recipe_to_dict(load_recipe("quick")).items():
        if section in sections:
            expected |= {f"{section}.{name}" for name in values}
        if section == "models":
            expected |= {f"model.{name}" for name in values[0] if name not in ("name", "from_baseline")}
    assert {name.removeprefix(OVERRIDE) for name in names if name.startswith(OVERRIDE)} == expected


def test_generate_hands_its_flags_over(run):
    assert run("generate", "m", "--prompt", "Once") == {
        "model": "m",
        "prompt": "Once",
        "max_new_tokens": 64,
        "temperature": 0.0,
        "top_k": None,
        "num_beams": 1,
        "seed": 0,
        "dtype": "float32",
        "stats": False,
        "compile": False,
    }
    asked = run("generate", "m", "--prompt", "", "--top-k", "5", "--temperature", "0.7", "--stats")
    assert (asked["prompt"], asked["top_k"], asked["temperature"], asked["stats"]) == ("", 5, 0.7, True)


def test_info_takes_a_model_or_a_recipe_with_overrides(run):
    assert run("info", "folder", "--length", "7", "--dtype", "bfloat16", "--json") == {
        "recipe": None,
        "model": "folder",
        "length": 7,
        "dtype": "bfloat16",
        "as_json": True,
    }
    asked = run("info", "--recipe", "report", "--context-dim", "300")
    assert asked["model"] is None and asked["recipe"] == load_recipe("report", {"model.context_dim": 300})


def test_eval_takes_models_data_and_the_first_models_tokenizer(run):
    assert run("eval", "a", "b") == {
        "models": ["a", "b"],
        "data": DataOptions(tokenizer="a"),
        "dtype": "float32",
        "batch_size": 16,
        "cached_tokens": 4096,
        "caches": [],
        "tasks": [],
        "tasks_path": None,
        "limit": None,
        "out": None,
        "lang": "en",
        "progress": True,
    }
    flags = ["--samples=40", "--tokenizer=t.json", "--cache=int8", "--cache=none", "--cache=int4", "--cache=int8"]
    asked = run("eval", "a", *flags, "--tasks", "x, y", "--tasks-path", "mine", "--limit=5", "--quiet")
    assert asked["data"] == DataOptions(tokenizer="t.json", samples=40)
    assert asked["caches"] == ["int8", "int4"] and asked["tasks"] == ["x", "y"]
    assert (asked["tasks_path"], asked["limit"], asked["progress"]) == (Path("mine"), 5, False)


def test_sweep_takes_a_recipe_with_overrides_and_what_to_search(run):
    argv = ["--over", "context_dim=32,64", "--models", "layer, Pythia", "--seeds", "0,2", "--epochs", "2", "--quiet"]
    asked = run("sweep", "quick", *argv, "--out", "here", "--storage", "sqlite:///s.db", "--lang", "ja")
    plan = asked.pop("plan")
    assert asked == {"out": Path("here"), "storage": "sqlite:///s.db", "lang": "ja", "progress": False}
    assert plan.recipe == load_recipe("quick", {"train.epochs": 2})
    assert (plan.models, plan.seeds, plan.sampler, plan.trials) == (["Pythia", "layer"], [0, 2], "grid", None)
    assert [(one.path, one.values) for one in plan.dimensions] == [("model.context_dim", (32, 64))]


def test_report_hands_its_folder_over(run):
    assert run("report", "runs/quick", "--lang", "ja") == {"run": Path("runs/quick"), "lang": "ja"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compare", "nope"], "recipe 'nope' is unknown; valid: quick, report, small, text-s, tuned, or a YAML file"),
        (["compare", "--context-dim", "0"], "context_dim 0: must be between 1 and 2 * hidden_size = 256"),
        (["compare", "--models", "a"], "recipe quick: model 'a' is unknown; valid: Pythia, input, shared, layer"),
        (["train", "--model", "a"], "recipe quick: model 'a' is unknown; valid: Pythia, input, shared, layer"),
        (["info"], "info: give either --recipe RECIPE or a MODEL"),
        (["eval", "m", "--samples", "1"], "data.samples 1: must be >= 2"),
        (["info", "m", "--recipe", "quick"], "info: give either --recipe RECIPE or a MODEL"),
        (["info", "m", "--epochs", "2"], "info: options of a recipe were given without --recipe"),
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
        (["compare", "--epochs", "x"], "argument --epochs: invalid int value: 'x'"),
        (["compare", "--schedule", "x"], "argument --schedule: invalid choice: 'x'"),
        (["compare", "--epoch", "3"], "unknown argument --epoch"),
        (["phase1"], "the following arguments are required: --model"),
        (["generate", "m", "--prompt", "a", "--temperature", "-1"], "argument --temperature: -1: must be 0 (greedy)"),
        (["generate", "m", "--prompt", "a", "--top-k", "0"], "argument --top-k: 0: must be at least 1"),
        (["generate", "m", "--prompt", "a", "--num-beams", "x"], "argument --num-beams: 'x' is not a whole number"),
        (["eval"], "the following arguments are required: MODEL"),
        (["eval", "m", "--cache", "int2"], "argument --cache: invalid choice: 'int2'"),
        (["compere"], "argument COMMAND: invalid choice: 'compere'"),
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
        (FileNotFoundError("no such model: m"), 2, "no such model: m"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "a.txt: No such file or directory"),
        (NotADirectoryError(20, "Not a directory", "a.txt/b"), 2, "a.txt/b: Not a directory"),
        (PermissionError(13, "Permission denied", "/runs"), 1, "/runs: Permission denied"),
        (Failure("loss is NaN at step 3\n  lower the learning rate"), 1, "loss is NaN at step 3"),
        (Failure("\n\n first words\n"), 1, "first words"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (ConnectionError("cannot reach the Hub"), 1, "cannot reach the Hub"),
        (MemoryError(), 1, "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "CUDA out of memory. Tried"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(run_failing, capsys, error, code, line):
    assert run_failing(error, "runs/x") == code
    assert capsys.readouterr().err == f"context-pythia: error: {line}\n"


def test_debug_shows_the_traceback(run_failing):
    with pytest.raises(UsageError, match="why"):
        run_failing(UsageError("why"), "runs/x", "--debug")
    with pytest.raises(ValueError, match="why"):
        cli.main(["--debug", "report", "runs/x"])


def test_our_own_mistakes_keep_their_traceback_and_ask_to_be_reported():
    code = """
import sys
from dataclasses import replace
from context_pythia.cli import command_line as cli
def fail(**keywords):
    import torch
    torch.ones(2, 3) @ torch.ones(2, 3)
sys.modules["ours"] = sys.modules["__main__"]
cli.COMMANDS["report"] = replace(cli.COMMANDS["report"], function="ours:fail")
sys.exit(cli.main(["report", "runs/x"]))
"""
    done = python(code)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and "Traceback (most recent call last):" in lines
    assert any("in fail" in line for line in lines) and "shapes cannot be multiplied" in lines[-2]
    assert lines[-1].startswith("context-pythia: a mistake of context-pythia ") and "please report it" in lines[-1]


def test_memory_that_the_cpu_lacks_is_one_line(run_failing, capsys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert run_failing(caught.value, "runs/x") == 1
    assert "can't allocate memory" in capsys.readouterr().err


def test_a_console_without_unicode_shows_another_character():
    code = """
import sys
from dataclasses import replace
from context_pythia.cli import command_line as cli
def write(**keywords):
    print("256 \u00d7 3 \u2212 1")
sys.modules["writer"] = sys.modules["__main__"]
cli.COMMANDS["report"] = replace(cli.COMMANDS["report"], function="writer:write")
sys.exit(cli.main(["report", "runs/x"]))
"""
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (0, "256 ? 3 ? 1\n"), done.stderr


def test_an_interrupt_says_how_to_go_on(run_failing, capsys):
    assert run_failing(KeyboardInterrupt(), name="compare") == 130
    line = "context-pythia: interrupted; run the same command again to go on where it stopped"
    assert capsys.readouterr().err.split("\n") == ["", line, ""]
    assert run_failing(KeyboardInterrupt(), "runs/x") == 130
    assert "again" not in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error():
    code = """
import sys
sys.argv[0] = "context-pythia"
from dataclasses import replace
from context_pythia.cli import command_line as cli
def write(**keywords):
    for _ in range(100000):
        print("line")
sys.modules["writer"] = sys.modules["__main__"]
cli.COMMANDS["report"] = replace(cli.COMMANDS["report"], function="writer:write")
sys.exit(cli.main(["report", "runs/x"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


def test_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"context-pythia {cli.context_pythia.__version__}\n"
