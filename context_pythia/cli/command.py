"""A command: a dataclass of options whose method `run` does the work.

`parser.py` makes flags and help from the options, so a field is all that an option needs. Command files import torch
inside `run`, because `--help` must answer without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from context_pythia import processes
from context_pythia.config.options import Options, option
from context_pythia.config.recipe import OF_A_RECIPE, Recipe
from context_pythia.config.recipe_files import load_recipe, packaged_recipes
from context_pythia.errors import UsageError
from context_pythia.report.texts import LANGUAGES


@dataclass(kw_only=True)
class Command(Options):
    """Base of the commands.

    Attributes:
        summary: one line for the help.
        examples: command lines for the help.
        arguments: names of the positional arguments.
        sections: the option dataclasses that `--set section.name=value` sets, by section.
        flagged: sections whose options with `flag=True` also get a flag.
        values: values from section flags and `--set`, by path.
        resumable: whether the same command, run again, resumes.
        joint: whether several processes (`torchrun`) can share the work.
    """

    summary: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]
    arguments: ClassVar[tuple[str, ...]] = ()
    sections: ClassVar[Mapping[str, type[Options]]] = {}
    flagged: ClassVar[tuple[str, ...]] = ()
    resumable: ClassVar[bool] = False
    joint: ClassVar[bool] = False

    values: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Do the work."""
        raise NotImplementedError

    def label(self, name: str) -> str:
        """The option's name on the command line."""
        return name.upper() if name in self.arguments else f"--{name}".replace("_", "-")

    def values_of(self, section: str) -> dict[str, Any]:
        """The values given for one section, by name."""
        start = f"{section}."
        return {path.removeprefix(start): value for path, value in self.values.items() if path.startswith(start)}


@dataclass(kw_only=True)
class RecipeCommand(Command):
    """Base of the commands that take a recipe."""

    arguments = ("recipe",)
    sections = OF_A_RECIPE
    flagged = ("", "data", "architecture", "phase1", "train", "model")

    recipe: str = option("quick", f"{', '.join(packaged_recipes())}, or a YAML file")

    def load_recipe(self, models: Sequence[str] | None = None) -> Recipe:
        """The recipe after the user's overrides, with only these models."""
        return load_recipe(self.recipe, self.values, models)


@dataclass(kw_only=True)
class Report(Options):
    """Options of the commands that write a report."""

    lang: str = option("en", "language of a second report, beside the English one", LANGUAGES)
    quiet: bool = option(False, "show no progress bars")


@contextlib.contextmanager
def reported(out: Path | None, lang: str = "en") -> Iterator[None]:
    """Write the report of the folder `out`, in English and in `lang`, after the work in the `with` block.

    After a failure or an interruption too, because the folder has the figures so far; but not if the command was
    refused. The work knows nothing of reports, and reports read only its JSON files.
    """
    try:
        yield
    except (UsageError, OSError):
        raise
    except BaseException:
        with contextlib.suppress(Exception):  # the error of the work says more than that of its report
            _write_report(out, lang)
        raise
    _write_report(out, lang)


def _write_report(out: Path | None, lang: str) -> None:
    records = ("metrics.json", "provenance.json")
    if out is not None and processes.is_main() and all((out / record).exists() for record in records):
        from context_pythia.report.report import write_report

        print("\n" + "\n".join(f"wrote {path}" for path in write_report(out, *dict.fromkeys(("en", lang)))))


def required(help: str, **declared: Any) -> Any:
    """An option that must be given."""
    return option(MISSING, help, **declared)


def folder_of(recipe: Recipe, out: Path | None) -> Path:
    """The run folder: `out`, or one named after the recipe."""
    return out or Path("runs") / recipe.name
