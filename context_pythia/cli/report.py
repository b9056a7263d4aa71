"""`report`: write the report of a folder again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from context_pythia.cli.command import LANGUAGES, Command, required
from context_pythia.config.options import option


@dataclass(kw_only=True)
class WriteReport(Command):
    summary = "write the report of a folder again"
    examples = ("report runs/quick --lang ja",)
    arguments = ("folder",)

    folder: Path = required("folder of `compare`, `sweep`, `bench`, `eval` or `convert`")
    lang: str = option("en", "language of the report", LANGUAGES)

    def run(self) -> None:
        from context_pythia.report.report import write_report

        print("\n".join(f"wrote {path}" for path in write_report(self.folder, self.lang)))
