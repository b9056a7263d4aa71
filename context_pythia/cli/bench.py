"""`bench`: speed and memory of prefill, decoding, training steps or serving beside GPT-NeoX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from context_pythia.bench.options import SIZES, BenchOptions, ServeOptions, parse_sources
from context_pythia.cli.command import Command, Report, reported
from context_pythia.config.options import option
from context_pythia.config.recipe import OF_A_RECIPE
from context_pythia.config.recipe_files import load_recipe, packaged_recipes
from context_pythia.errors import UsageError


@dataclass(kw_only=True)
class Bench(Report, Command):
    summary = "speed and memory of prefill, decoding, training or serving beside GPT-NeoX"
    examples = (
        "bench --size pythia-70m --sources shared:256,layer:256,layer:512:exact --out bench",
        "bench runs/quick/models/pythia runs/quick/models/shared --batch-sizes 1,8 --lengths 64,120",
        "bench --train --recipe report --rounds 3 --out bench-train",
        "bench --serve pythia-70m pythia-70m-quarter --set serve.conversations=64 --out bench-serve",
    )
    arguments = ("models",)
    sections = OF_A_RECIPE | {"bench": BenchOptions, "serve": ServeOptions}
    flagged = ("bench",)

    models: list[str] = option((), "models' folders or Hub names", metavar="MODEL")
    recipe: str | None = option(None, f"{', '.join(packaged_recipes())}, or a YAML file")
    only: tuple[str, ...] | None = option(None, "only these models of the recipe", metavar="A,B")
    size: str | None = option(None, "GPT-NeoX of this size and Context-Pythias, with random weights", SIZES)
    sources: str | None = option(
        None,
        "with --size: input:DIM, shared:DIM, layer:DIM, layer:DIM:heads, layer:DIM:exact "
        "(default: shared and layer of half the width, and layer:WIDTH:exact)",
        metavar="A:N,B:N",
    )
    train: bool = option(False, "time training steps of a recipe (default: report)")
    serve: bool = option(False, "time conversations on vLLM's engine instead (--set serve.cache_mb=192)")
    out: Path | None = option(None, "folder for figures, report and pictures (default: none)", metavar="DIR")

    def run(self) -> None:
        name = "report" if self.train and self.recipe is None else self.recipe
        other = "bench" if self.serve else "serve"
        if foreign := self.values_of(other):
            with_serve = "does not go with" if self.serve else "needs"
            raise UsageError(f"bench: {other}.{next(iter(foreign))} {with_serve} --serve")
        if sum([bool(self.models), name is not None, self.size is not None]) != 1 or (self.serve and name is not None):
            one = "a recipe alone" if self.train else "either MODELs, --recipe RECIPE or --size SIZE"
            raise UsageError("bench --serve: give either MODELs or --size SIZE" if self.serve else f"bench: give {one}")
        if self.sources is not None and self.size is None:
            raise UsageError("bench: --sources needs --size")
        of_recipe = {path: value for path, value in self.values.items() if not path.startswith(("bench.", "serve."))}
        if name is None and (of_recipe or self.only):
            raise UsageError("bench: options of a recipe need --recipe")
        recipe = None if name is None else load_recipe(name, of_recipe, self.only)
        sources = None if self.sources is None else parse_sources(self.sources)
        of_bench, of_serve = BenchOptions(**self.values_of("bench")), ServeOptions(**self.values_of("serve"))
        from context_pythia.bench import run, serve
        from context_pythia.report.report import show

        common: dict[str, Any] = {"out": self.out, "progress": not self.quiet, "show": show}
        with reported(self.out, self.lang):
            if self.serve:
                serve.serve(self.models, self.size, sources, of_serve, **common)
            else:
                run.bench(self.models, recipe, self.size, sources, of_bench, train=self.train, **common)
