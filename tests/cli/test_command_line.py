"""The command: how flags become recipes, errors become exit codes, and help stays quick."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import context_pythia
from context_pythia.cli import command_line as cli
from context_pythia.cli import parser
from context_pythia.config.convert import ConvertOptions
from context_pythia.config.recipe import DataOptions, HealOptions
from context_pythia.config.recipe_files import load_recipe, recipe_to_dict
from context_pythia.errors import Failure, UsageError

WORK = {
    "compare": "context_pythia.cli.reported.compare",
    "train": "context_pythia.runs.train.train",
    "phase1": "context_pythia.runs.train.run_phase1",
    "sweep": "context_pythia.cli.reported.sweep",
    "generate": "context_pythia.runs.generate.generate",
    "info": "context_pythia.cli.reported.info",
    "report": "context_pythia.report.report.report",
    "convert": "context_pythia.cli.reported.convert",
    "eval": "context_pythia.cli.reported.evaluate",
    "bench": "context_pythia.cli.reported.bench",
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
    for path in WORK.values():
        module, _, name = path.rpartition(".")
        signature = inspect.signature(getattr(importlib.import_module(module), name))

        def record(*arguments, _signature=signature, **keywords):
            asked = _signature.bind(*arguments, **keywords).arguments
            others = [p.name for p in _signature.parameters.values() if p.kind is p.VAR_KEYWORD]
            calls.append(asked | asked.pop(others[0], {}) if others else asked)

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


def help_of(command, capsys) -> str:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("command", "shown", "absent"),
    [
        ("convert", ("(default: 32768)", "(default: float32)", "(default: the model's)"), "(default: train)"),
        ("eval", ("(default: builtin)", "(default: the first model's)"), "(default: None)"),
        ("train", ("(default: quick)",), "(default: 0.0001)"),
    ],
)
def test_help_names_the_defaults_that_hold(command, shown, absent, capsys):
    text = help_of(command, capsys)
    assert all(default in text for default in shown)
    assert absent not in text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_at_most_thirty_flags(command, capsys):
    help_of(command, capsys)
    actions = parser.build_parser(cli.COMMANDS).parse_args([command, *REQUIRED.get(command, [])]).parser._actions
    assert len([action for action in actions if action.option_strings]) <= 30


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
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


def test_flags_and_set_override_every_section(run):
    flags = ["--seed=3", "--samples=40", "--learning-rate=1e-3", "--schedule=cosine", "--context-dim=32"]
    others = ["architecture.hidden_size=64", "phase1.noise=0.1", "train.tensorboard=yes", "data.cache_dir=none"]
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


def test_every_value_of_a_recipe_can_be_set(run):
    for section, values in recipe_to_dict(load_recipe("quick")).items():
        if section in ("data", "architecture", "phase1", "train", "heal"):
            for name, value in values.items():
                asked = run("compare", "quick", "--set", f"{section}.{name}={value}")
                assert getattr(getattr(asked["recipe"], section), name) == value


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
    asked = run("info", "--recipe", "report", "--set", "model.context_dim=300")
    assert asked["model"] is None and asked["recipe"] == load_recipe("report", {"model.context_dim": 300})


def test_a_revision_is_that_of_all_hub_models_named(run, tmp_path, capsys):
    assert run("generate", "a/b", "--prompt", "x", "--revision", "step1")["model"] == "a/b@step1"
    asked = run("eval", "a/b", str(tmp_path), "c@main", "--revision", "step1")
    assert asked["models"] == ["a/b@step1", str(tmp_path), "c@main"] and asked["data"].tokenizer == "a/b@step1"
    for argv in (["info", str(tmp_path)], ["info", "--recipe", "quick"], ["bench", str(tmp_path)]):
        assert cli.main([*argv, "--revision", "step1"]) == 2
        assert "--revision step1: is for models of the Hub" in capsys.readouterr().err


def test_eval_takes_models_data_and_the_first_models_tokenizer(run):
    asked = run("eval", "a", "b")
    assert (asked["models"], asked["data"]) == (["a", "b"], DataOptions(tokenizer="a"))
    assert (asked["caches"], asked["out"], asked["progress"]) == ([], None, True)
    flags = ["--samples=40", "--tokenizer=t.json", "--cache=int8", "--cache=none", "--cache=int4", "--cache=int8"]
    asked = run("eval", "a", *flags, "--tasks", "x, y", "--tasks-path", "mine", "--limit=5", "--quiet")
    assert asked["data"] == DataOptions(tokenizer="t.json", samples=40)
    assert asked["caches"] == ["int8", "int4"] and asked["tasks"] == ("x", "y")
    assert (asked["tasks_path"], asked["limit"], asked["progress"]) == (Path("mine"), 5, False)


def test_convert_takes_its_sections_and_the_models_tokenizer(run):
    flags = ["--context-dim=32", "--samples=40", "--heal-steps=5", "--set", "heal.weight_decay=0.1"]
    asked = run("convert", "m", "--out", "o", *flags)
    assert asked["options"] == ConvertOptions(context_dim=32)
    assert asked["data"] == DataOptions(tokenizer="m", samples=40)
    assert asked["healing"] == HealOptions(steps=5, weight_decay=0.1)
    assert run("convert", "m", "--out", "o", "--control", "--heal-steps=5")["options"].kv_reduction == 0.5


def test_sweep_takes_a_recipe_with_overrides_and_what_to_search(run):
    argv = ["--over", "context_dim=32,64", "--models", "layer, Pythia", "--seeds", "0,2", "--epochs", "2", "--quiet"]
    asked = run("sweep", "quick", *argv, "--out", "here", "--storage", "sqlite:///s.db", "--lang", "ja")
    plan = asked.pop("plan")
    assert asked == {"out": Path("here"), "storage": "sqlite:///s.db", "lang": "ja", "progress": False}
    assert plan.recipe == load_recipe("quick", {"train.epochs": 2}, ["Pythia", "layer"])
    assert (plan.seeds, plan.sampler, plan.trials) == ((0, 2), "grid", None)
    assert [(one.path, one.values) for one in plan.dimensions] == [("model.context_dim", (32, 64))]


def test_report_hands_its_folder_over(run):
    assert run("report", "runs/quick", "--lang", "ja") == {"run": Path("runs/quick"), "lang": "ja"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["compare", "nope"],
            "recipe 'nope' is unknown; valid: quick, report, small, text-m, text-s, tuned, or a YAML file",
        ),
        (["compare", "--context-dim", "0"], "context_dim 0: must be between 1 and 2 * hidden_size = 256"),
        (["compare", "--models", "a"], "recipe quick: model 'a' is unknown; valid: Pythia, input, shared, layer"),
        (["train", "--model", "a"], "recipe quick: model 'a' is unknown; valid: Pythia, input, shared, layer"),
        (["info"], "info: give either --recipe RECIPE or a MODEL"),
        (["eval", "m", "--samples", "1"], "data.samples 1: must be >= 2"),
        (["info", "m", "--recipe", "quick"], "info: give either --recipe RECIPE or a MODEL"),
        (["info", "m", "--set", "train.epochs=2"], "info: options of a recipe were given without --recipe"),
        (["compare", "--epochs", "x"], "train.epochs 'x': must be a whole number"),
        (["compare", "--schedule", "cosin"], "train.schedule 'cosin': must be one of constant, constant_with_warmup, "),
        (
            ["compare", "--set", "train.epohcs=3"],
            "--set 'train.epohcs' is unknown (did you mean train.epochs?)",
        ),
        (["compare", "--set", "train.epochs"], "--set 'train.epochs': give section.key=value"),
        (["compare", "--set", "model.name=a"], "--set 'model.name' is unknown"),
        (["generate", "m", "--prompt", "a", "--temperature", "-1"], "--temperature -1.0: must be >= 0"),
        (["generate", "m", "--prompt", "a", "--top-k", "0"], "--top-k 0: must be >= 1"),
        (["generate", "m", "--prompt", "a", "--num-beams", "x"], "--num-beams 'x': must be a whole number"),
        (["eval", "m", "--cache", "int2"], "--cache 'int2': must be one of none, int8, int4 (did you mean int8?)"),
        (["bench", "--size", "pythia-14m", "--lengths", "8,8"], "bench.lengths 8,8: names a value twice"),
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
        (["compare", "--epoch", "3"], "unknown argument --epoch"),
        (
            ["train", "--no-tensorboard", "--model=m"],
            "unknown argument --no-tensorboard (did you mean --set train.",
        ),
        (["compare", "--phase1-noise=1"], "unknown argument --phase1-noise=1 (did you mean --set phase1.noise=...?)"),
        (["phase1"], "the following arguments are required: --model"),
        (["eval"], "the following arguments are required: MODEL"),
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
from context_pythia.cli import command_line as cli
def fail(self):
    import torch
    torch.ones(2, 3) @ torch.ones(2, 3)
cli.COMMANDS["report"].run = fail
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
from context_pythia.cli import command_line as cli
def write(self):
    print("256 \u00d7 3 \u2212 1")
cli.COMMANDS["report"].run = write
sys.exit(cli.main(["report", "runs/x"]))
"""
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
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
