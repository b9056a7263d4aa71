"""`generate`: write text with a trained model."""

from __future__ import annotations

from dataclasses import dataclass

from context_pythia.cli.command import Command, required
from context_pythia.config.options import option
from context_pythia.config.recipe import PRECISIONS


@dataclass(kw_only=True)
class Generate(Command):
    summary = "write text with a trained model"
    examples = (
        'generate runs/quick/models/shared --prompt "def main(" --stats',
        'generate EleutherAI/pythia-70m --prompt "The sea" --temperature 0.8 --top-k 50 --seed 1',
    )
    arguments = ("model",)

    model: str = required("a model's folder or Hub name")
    prompt: str = required("text to continue")
    max_new_tokens: int = option(64, "tokens to write at most", bounds=">= 1")
    temperature: float = option(0.0, "sampling temperature; 0 is greedy", bounds=">= 0")
    top_k: int | None = option(None, "sample from the N likeliest tokens only", bounds=">= 1")
    num_beams: int = option(1, "beams of a beam search; 1 is no search", bounds=">= 1")
    seed: int = option(0, "seed of the sampling", bounds=">= 0")
    dtype: str = option("float32", "dtype of weights and cache", PRECISIONS)
    stats: bool = option(False, "also print tokens a second and the measured cache")

    def run(self) -> None:
        from context_pythia.runs.generate import generate

        generate(**{name: value for name, value in vars(self).items() if name != "values"})
