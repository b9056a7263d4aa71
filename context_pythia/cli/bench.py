"""`bench`: speed and memory of prefill, decoding, training steps or serving beside GPT-NeoX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from context_pythia.bench.options import SIZES, BenchOptions, ServeOptions, parse_sources
from context_pythia.cli.command import Command, Report
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
        if self.serve:
            self._serve()
            return
        if served := self.values_of("serve"):
            raise UsageError(f"bench: serve.{next(iter(served))} needs --serve")
        name = "report" if self.train and self.recipe is None else self.recipe
        if sum([bool(self.models), name is not None, self.size is not None]) != 1:
            one = "a recipe alone" if self.train else "either MODELs, --recipe RECIPE or --size SIZE"
            raise UsageError(f"bench: give {one}")
        if self.sources is not None and self.size is None:
            raise UsageError("bench: --sources needs --size")
        of_recipe = {path: value for path, value in self.values.items() if not path.startswith("bench.")}
        if name is None and (of_recipe or self.only):
            raise UsageError("bench: options of a recipe need --recipe")
        recipe = None if name is None else load_recipe(name, of_recipe, self.only)
        sources = None if self.sources is None else parse_sources(self.sources)
        options = BenchOptions(**self.values_of("bench"))
        from context_pythia.cli.reported import bench

        bench(
            models=self.models,
            recipe=recipe,
            size=self.size,
            sources=sources,
            options=options,
            train=self.train,
            out=self.out,
            lang=self.lang,
            progress=not self.quiet,
        )

    def _serve(self) -> None:
        others = [path for path in self.values if not path.startswith("serve.")]
        if others or self.recipe or self.only or self.train:
            what = others[0] if others else next(n for n in ("recipe", "only", "train") if getattr(self, n))
            raise UsageError(f"bench --serve: takes MODELs or --size and --set serve.NAME=VALUE, not {what}")
        if bool(self.models) == bool(self.size):
            raise UsageError("bench --serve: give either MODELs or --size SIZE")
        sources = None if self.sources is None else parse_sources(self.sources)
        options = ServeOptions(**self.values_of("serve"))
        from context_pythia.cli.reported import serve

        serve(self.models, self.size, sources, options, out=self.out, lang=self.lang, progress=not self.quiet)
