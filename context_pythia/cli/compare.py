"""`compare`, `train` and `phase1`: train the models of a recipe into one run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from context_pythia.cli.command import RecipeCommand, Report, folder_of, reported, required
from context_pythia.config.options import option


@dataclass(kw_only=True)
class Compare(Report, RecipeCommand):
    summary = "train the models of a recipe on the same text and write the report"
    examples = (
        "compare",
        "compare report --data corpus.jsonl.gz --tokenizer tokenizer.json --out runs/corpus",
        "compare quick --models Pythia,shared --epochs 2 --set train.max_grad_norm=0.5 --lang ja",
    )
    resumable = joint = True

    models: tuple[str, ...] | None = option(None, "only these models of the recipe", metavar="A,B")
    out: Path | None = option(None, "run folder (default: runs/NAME-OF-THE-RECIPE)", metavar="DIR")

    def run(self) -> None:
        recipe = self.load_recipe(self.models)
        out = folder_of(recipe, self.out)
        from context_pythia.runs.train import compare

        with reported(out, self.lang):
            compare(recipe, out, progress=not self.quiet)


@dataclass(kw_only=True)
class Train(RecipeCommand):
    summary = "train one model of a recipe, both phases"
    examples = ("train quick --model layer --learning-rate 3e-4 --epochs 6",)
    resumable = joint = True

    model: str = required("the model of the recipe", metavar="NAME")
    out: Path | None = option(None, "run folder (default: runs/NAME-OF-THE-RECIPE)", metavar="DIR")
    quiet: bool = option(False, "show no progress bars")

    def run(self) -> None:
        from context_pythia.runs.train import compare

        recipe = self.load_recipe([self.model])
        compare(recipe, folder_of(recipe, self.out), progress=not self.quiet)


@dataclass(kw_only=True)
class Phase1(Train):
    summary = "train the ContextBlock of one model (OACD) and stop"
    examples = ("phase1 quick --model shared --phase1-convergence-rate 0.99",)

    def run(self) -> None:
        from context_pythia.runs.train import run_phase1

        recipe = self.load_recipe([self.model])
        run_phase1(recipe, folder_of(recipe, self.out), progress=not self.quiet)
