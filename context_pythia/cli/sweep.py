"""`sweep`: train settings of a recipe over seeds, by any number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from context_pythia.cli.command import RecipeCommand, Report, reported, required
from context_pythia.config.options import option
from context_pythia.sweep.options import SAMPLERS, SweepPlan, parse_over


@dataclass(kw_only=True)
class Sweep(Report, RecipeCommand):
    summary = "train settings of a recipe over seeds, by any number of processes"
    examples = (
        "sweep quick --models Pythia,shared --over context_dim=32,64 --over learning_rate=5e-4,1e-3 --out runs/dim",
        "sweep report --over learning_rate=1e-4..1e-3 --sampler tpe --trials 50 --out runs/rates",
    )
    resumable = True

    over: list[str] = option((), "values to try; may be given several times", metavar="KEY=A,B")
    models: tuple[str, ...] | None = option(None, "only these models of the recipe (default: all)", metavar="A,B")
    seeds: tuple[int, ...] | None = option(
        None, "train each setting with these seeds (default: the recipe's)", bounds=">= 0", metavar="N,N"
    )
    sampler: str = option("grid", "grid: every combination; tpe: Optuna proposes settings", SAMPLERS)
    trials: int | None = option(None, "with tpe: number of trainings over all models and seeds", bounds=">= 1")
    storage: str | None = option(None, "with tpe: Optuna storage to share (default: a file in DIR)", metavar="URL")
    out: Path = required("folder of the sweep, which all its processes share", metavar="DIR")

    def run(self) -> None:
        recipe = self.load_recipe(self.models)
        seeds = [recipe.seed] if self.seeds is None else self.seeds
        plan = SweepPlan(recipe, [parse_over(text) for text in self.over], seeds, self.sampler, self.trials)
        from context_pythia.sweep.worker import sweep

        with reported(self.out, self.lang):
            sweep(plan, self.out, storage=self.storage, progress=not self.quiet)
