"""A command: one dataclass of options, with the function that does the work as its method `run`.

The options make the command's flags and its help (`parser.py`), so a field here is all that an option needs. Files of
commands import torch inside `run`, since `--help` must answer without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from context_pythia.config.options import Options, option, options_of
from context_pythia.config.recipe import SECTIONS, ModelOptions, Recipe
from context_pythia.config.recipe_files import load_recipe, packaged_recipes

LANGUAGES = ("en", "ja")
# The sections of a recipe, by the paths of their values.
OF_A_RECIPE: dict[str, type[Options]] = {"": Recipe} | SECTIONS | {"model": ModelOptions}


@dataclass(kw_only=True)
class Command(Options):
    """Base of the commands.

    Attributes:
        summary: one line for the help.
        examples: command lines for the help.
        arguments: names of the fields that are given without a flag.
        sections: option dataclasses whose values `--set section.name=value` sets, by section.
        flagged: those of the sections whose options declared with `flag` have flags, too.
        unflagged: paths of such options without one.
        defaults: what the help says of defaults that differ from the declared ones, by path.
        values: what flags of sections and `--set` gave, by path.
        resumable: whether the same command, run again, goes on where it stopped.
        joint: whether several processes, started by `torchrun`, can share the work.
    """

    summary: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]
    arguments: ClassVar[tuple[str, ...]] = ()
    sections: ClassVar[Mapping[str, type[Options]]] = {}
    flagged: ClassVar[tuple[str, ...]] = ()
    unflagged: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[dict[str, str]] = {}
    resumable: ClassVar[bool] = False
    joint: ClassVar[bool] = False

    values: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Do the work."""
        raise NotImplementedError

    def label(self, name: str) -> str:
        """As the command line calls it."""
        return name.upper() if name in self.arguments else f"--{name}".replace("_", "-")

    def own(self) -> dict[str, Any]:
        """The values of the command's own options, by name."""
        return {declared.name: getattr(self, declared.name) for declared in options_of(type(self))}

    def values_of(self, section: str) -> dict[str, Any]:
        """The values given for one section, by name."""
        return {
            path.removeprefix(f"{section}."): value
            for path, value in self.values.items()
            if path.startswith(f"{section}.")
        }


@dataclass(kw_only=True)
class RecipeCommand(Command):
    """Base of the commands that take a recipe."""

    arguments = ("recipe",)
    sections = OF_A_RECIPE
    flagged = ("", "data", "architecture", "phase1", "train", "model")

    recipe: str = option("quick", f"{', '.join(packaged_recipes())}, or a YAML file")

    def load_recipe(self, models: Sequence[str] | None = None) -> Recipe:
        """The recipe with the values given over its own, and these models alone."""
        return load_recipe(self.recipe, self.values, models)


@dataclass(kw_only=True)
class Report(Options):
    """What commands that write a report can be asked for."""

    lang: str = option("en", "language of a second report, beside the English one", LANGUAGES)
    quiet: bool = option(False, "show no progress bars")


def required(help: str, **declared: Any) -> Any:
    """An option that must be given."""
    return option(MISSING, help, **declared)


def folder_of(recipe: Recipe, out: Path | None) -> Path:
    """Where a run goes: `out`, or the folder of the recipe's name."""
    return out or Path("runs") / recipe.name
