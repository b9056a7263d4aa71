"""`eval`: perplexity, accuracy and measured cache of models side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from context_pythia.cli.command import Command, Report, reported, required
from context_pythia.config.options import option
from context_pythia.config.recipe import PRECISIONS, DataOptions

CACHES = ("int8", "int4")


@dataclass(kw_only=True)
class Evaluate(Report, Command):
    summary = "perplexity, accuracy and measured cache of models side by side"
    examples = (
        "eval runs/quick/models/pythia runs/quick/models/shared --samples 1200 --out eval",
        "eval EleutherAI/pythia-70m converted --data wikitext:wikitext-2-raw-v1 --cache int8 --cache int4",
        "eval runs/quick/models/pythia --tasks mine --tasks-path tasks --limit 100",
        "eval runs/s/models/pythia runs/s/models/shared --sequence-length 256 --recall 256 --out eval",
    )
    arguments = ("models",)
    sections = {"data": DataOptions}
    flagged = ("data",)

    models: list[str] = required("models' folders or Hub names; the others are compared to the first", metavar="MODEL")
    dtype: str = option("float32", "dtype of weights and cache", PRECISIONS)
    batch_size: int = option(16, "samples a pass", bounds=">= 1")
    cache: list[str] = option((), "also with this quantized cache; may be given several times", CACHES)
    cached_tokens: int = option(
        4096, "validation tokens that are also scored token by token through the cache", bounds=">= 1"
    )
    tasks: tuple[str, ...] = option((), "also run these tasks of lm-evaluation-harness", metavar="A,B")
    tasks_path: Path | None = option(None, "folder with task files of your own", metavar="DIR")
    limit: int | None = option(None, "at most N documents per task", bounds=">= 1")
    recall: int = option(0, "also test recall of words 32 tokens back and more, in N texts per distance", bounds=">= 0")
    out: Path | None = option(None, "folder for figures, report and picture (default: none)", metavar="DIR")

    def run(self) -> None:
        data = DataOptions(**{"tokenizer": self.models[0]} | self.values_of("data"))
        from context_pythia.report.report import show
        from context_pythia.runs.evaluate import evaluate

        with reported(self.out, self.lang):
            metrics = evaluate(
                models=self.models,
                data=data,
                dtype=self.dtype,
                batch_size=self.batch_size,
                cached_tokens=self.cached_tokens,
                caches=list(dict.fromkeys(self.cache)),
                tasks=self.tasks,
                tasks_path=self.tasks_path,
                limit=self.limit,
                recall_samples=self.recall,
                out=self.out,
                progress=not self.quiet,
            )
            show(metrics)
