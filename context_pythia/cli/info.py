"""`info`: parameters and cache bytes, by formula and measured."""

from __future__ import annotations

from dataclasses import dataclass

from context_pythia.cli.command import Command
from context_pythia.config.options import option
from context_pythia.config.recipe import OF_A_RECIPE, PRECISIONS
from context_pythia.config.recipe_files import load_recipe, packaged_recipes
from context_pythia.errors import UsageError


@dataclass(kw_only=True)
class Info(Command):
    summary = "parameters and cache bytes, by formula and measured"
    examples = ("info --recipe report", "info runs/quick/models/shared --length 2048 --dtype bfloat16 --json")
    arguments = ("model",)
    sections = OF_A_RECIPE

    model: str | None = option(None, "a model's folder or Hub name")
    recipe: str | None = option(None, f"{', '.join(packaged_recipes())}, or a YAML file")
    json: bool = option(False, "print JSON instead of a table")
    length: int = option(128, "tokens in the cache", bounds=">= 1")
    dtype: str = option("float32", "dtype of model and cache", PRECISIONS)

    def run(self) -> None:
        if (self.model is None) == (self.recipe is None):
            raise UsageError("info: give either --recipe RECIPE or a MODEL")
        if self.recipe is None and self.values:
            raise UsageError("info: options of a recipe need --recipe; a saved MODEL has its own")
        recipe = None if self.recipe is None else load_recipe(self.recipe, self.values)
        from context_pythia.cli.reported import info

        info(recipe=recipe, model=self.model, length=self.length, dtype=self.dtype, as_json=self.json)
