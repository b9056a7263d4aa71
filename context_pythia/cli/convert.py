"""`convert`: give a trained GPT-NeoX model a smaller cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from context_pythia.cli.command import Command, required
from context_pythia.config.convert import ConvertOptions
from context_pythia.config.options import option
from context_pythia.config.recipe import DataOptions, HealOptions


@dataclass(kw_only=True)
class Convert(Command):
    summary = "give a trained GPT-NeoX model a smaller cache"
    examples = (
        "convert EleutherAI/pythia-70m --kv-reduction 0.75 --data corpus.jsonl.gz --out pythia-70m-quarter",
        "convert runs/quick/models/pythia --kv-reduction 0.5 --out runs/exact",
        "convert runs/quick/models/pythia --context-dim 32 --heal-steps 50 --out runs/healed",
        "convert runs/quick/models/pythia --kv-reduction 0.9 --cache-token-ids --out runs/ids",
    )
    arguments = ("model",)
    sections = {"convert": ConvertOptions, "data": DataOptions, "heal": HealOptions}
    flagged = ("convert", "data", "heal")
    resumable = True

    model: str = required("a GPT-NeoX model's folder or Hub name")
    out: Path = required("folder of the converted model", metavar="DIR")
    ship_code: bool = option(False, "add the code of Context-Pythia, so that the model loads without the package")
    control: bool = option(False, "convert nothing: distill the original into itself for --heal-steps, as a control")
    quiet: bool = option(False, "show no progress bars")

    def run(self) -> None:
        options = ConvertOptions(**self.values_of("convert"))
        data = DataOptions(**{"tokenizer": self.model} | self.values_of("data"))
        healing = HealOptions(**self.values_of("heal"))
        from context_pythia.report.card import write_card
        from context_pythia.runs.convert import Conversion

        conversion = Conversion(
            self.model,
            self.out,
            options=options,
            data=data,
            healing=healing,
            ship_code=self.ship_code,
            control=self.control,
            progress=not self.quiet,
        )
        conversion.run()
        write_card(self.out)
