"""`info`: parameters and cache bytes, by formula and measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
        from context_pythia.runs.info import info

        models = info(recipe, self.model, self.length, self.dtype)
        print(json.dumps({"models": models}, indent=2) if self.json else info_table(models))


def info_table(models: Sequence[dict[str, Any]]) -> str:
    """Parameters and cache bytes for the console."""
    from context_pythia.report.document import Table, to_console
    from context_pythia.report.formats import DASH, integer, kilobytes

    head = ["model", "parameters", "trainable", "numbers/token", "by formula", "measured", "slack"]
    rows = [
        [
            model["name"],
            *(integer(model[key]) for key in ("parameters", "trainable_parameters", "cached_numbers_per_token")),
            *(kilobytes(model["cache"][key]) for key in ("bytes_formula", "bytes_measured", "bytes_slack")),
        ]
        for model in models
    ]
    cache = models[0]["cache"]
    lines = [f"cache of one sequence of {cache['length']} tokens in {cache['dtype']} (1 KB = 1,024 bytes)", ""]
    lines.append(to_console([Table(head, rows)]))
    if any(model["parameters"] is None for model in models):
        lines += ["", f"{DASH}: the conversion of the trained baseline decides it"]
    return "\n".join(lines)
