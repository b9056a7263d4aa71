"""The shape of the package: imports point to a strictly lower rank, and files stay small."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "context_pythia"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
MOST_LINES = 370

RANKS = {
    "errors": 0,
    "files": 1,
    "processes": 1,
    "model": 1,
    "config": 2,
    "report": 2,
    "data": 3,
    "evaluation": 4,
    "serving": 4,
    "training": 5,
    "conversion": 6,
    "runs": 7,
    "bench": 8,
    "sweep": 8,
    "cli": 9,
    "__main__": 10,
}
MODEL_RANKS = {
    "configuration": 0,
    "flash_decoding": 0,
    "scan": 0,
    "shortcuts": 0,
    "layer_contexts": 0,
    "context": 1,
    "cache": 1,
    "positions": 1,
    "attention": 2,
    "quantized": 2,
    "grouped": 3,
    "modeling": 4,
    "__init__": 5,
}


def imports(source: str, module: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Modules of the package that `module` imports, as paths below `context_pythia`, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["context_pythia", *module[: len(module) - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            # `from package import module` names a module only by its alias.
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        found |= {tuple(name[1:]) for name in names if name[0] == "context_pythia"}
    return found


def parts(path: Path) -> tuple[str, ...]:
    return path.with_suffix("").parts


def rank_errors(source: str, module: tuple[str, ...]) -> list[str]:
    """The imports of `module` that do not point to a strictly lower rank."""
    errors = []
    for target in imports(source, module):
        if not target or target[0] not in RANKS:
            continue  # the package itself: its version and public names
        if target[0] != module[0]:
            # Reports read JSON, and the work writes it without a thought of reports.
            wrong = RANKS[target[0]] >= RANKS[module[0]] or (target[0] == "report" and module[0] != "cli")
        else:
            wrong = (
                module[0] == "model" and target[1] in MODEL_RANKS and MODEL_RANKS[target[1]] >= MODEL_RANKS[module[1]]
            )
        if wrong:
            errors.append(f"{'.'.join(module)} imports {'.'.join(target)}")
    return errors


def text(path: Path) -> str:
    return (PACKAGE / path).read_text("utf-8")


def test_imports_point_strictly_down():
    modules = [path for path in FILES if path != Path("__init__.py")]
    assert not [error for path in modules for error in rank_errors(text(path), parts(path))]


@pytest.mark.parametrize(
    ("source", "module", "wrong"),
    [
        ("from context_pythia.training import phase1", "data/packing.py", True),
        ("from context_pythia.training.loss import x", "evaluation/perplexity.py", True),
        ("def f():\n    import context_pythia.cli.command_line", "runs/info.py", True),
        ("from context_pythia import runs", "training/phase1.py", True),
        ("from context_pythia.report import report", "runs/train.py", True),
        ("from context_pythia.config.recipe import Recipe", "report/run.py", True),
        ("from context_pythia.report import report", "cli/command.py", False),
        ("from .modeling import x", "model/cache.py", True),
        ("from . import cache", "model/context.py", True),
        ("from ..data import packing", "model/modeling.py", True),
        ("from .configuration import x", "model/cache.py", False),
        ("from context_pythia.model import x\nimport torch", "training/phase1.py", False),
        ("from context_pythia.training.phase1 import x", "training/phase2.py", False),
    ],
)
def test_the_rule_tells_right_from_wrong(source, module, wrong):
    assert bool(rank_errors(source, parts(Path(module)))) == wrong


def test_the_model_imports_only_itself_and_third_parties():
    # save_pretrained ships the folder, so an absolute import of the package would fail where it is loaded.
    for path in FILES:
        if path.parts[0] != "model":
            continue
        tree = ast.parse(text(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path} line {node.lineno}"
                names = [] if node.level else [node.module or ""]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] == "context_pythia"], f"{path} {names}"


def test_no_file_grows_past_the_limit():
    assert not [str(path) for path in FILES if len(text(path).splitlines()) > MOST_LINES]


def test_errors_say_whose_they_are():
    # What is meant for users is a UsageError or a Failure, what cannot be an assert. Model and plug-in have hosts.
    ours = [path for path in FILES if path.parts[0] not in ("model", "serving")]
    raised = {str(path) for path in ours if re.search(r"raise (?:ValueError|RuntimeError)\b", text(path))}
    assert raised <= {"evaluation/pretrained.py"}  # which catches them itself


def test_every_module_has_a_rank():
    assert {path.with_suffix("").parts[0] for path in FILES} - {"__init__"} <= set(RANKS)
    assert {path.stem for path in FILES if path.parts[0] == "model"} <= set(MODEL_RANKS)


def test_nothing_is_called_utils():
    assert not [str(path) for path in FILES if {"utils", "util", "helpers", "common"} & set(parts(path))]


def test_files_open_by_saying_what_they_are_for():
    for path in FILES:
        docstring = ast.get_docstring(ast.parse(text(path)))
        assert path.name == "__init__.py" or docstring and len(docstring.splitlines()) < 15, path


def test_names_that_help_lists_without_torch_are_those_of_the_code():
    from context_pythia.cli.evaluate import CACHES
    from context_pythia.config import recipe
    from context_pythia.evaluation.quantized import BITS
    from context_pythia.model import configuration

    assert recipe.CONTEXT_SOURCES == configuration.CONTEXT_SOURCES and tuple(BITS) == CACHES


def tree() -> str:
    """The parts of the package from the highest rank down: lines, files, and the parts that each imports."""
    rows = []
    for part in sorted(RANKS, key=lambda part: -RANKS[part]):
        files = [path for path in FILES if parts(path)[0] == part]
        targets = {target[0] for path in files for target in imports(text(path), parts(path)) if target}
        below = sorted(targets & set(RANKS) - {part}, key=lambda name: -RANKS[name])
        lines = sum(len(text(path).splitlines()) for path in files)
        rows.append(f"{part:12} {lines:6,} lines {len(files):3} files  -> {', '.join(below)}")
        rows += [f"    {path.name:24} {len(text(path).splitlines()):4}" for path in files if len(path.parts) > 1]
    return "\n".join(rows)


if __name__ == "__main__":
    print(tree())
