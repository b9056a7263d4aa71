"""The table of commands: what each takes, and which function does the work.

The function is named, not imported: it is loaded when the command runs, so that help answers before torch could be
imported.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from context_pythia import processes
from context_pythia.cli import arguments
from context_pythia.errors import UsageError


@dataclass(frozen=True)
class Command:
    """A row of the table.

    Attributes:
        usage: what the command takes, in a few words; its help lists the options one by one.
        summary: one line for the help.
        function: `module:function` that does the work.
        add_options: adds the command's own options to its parser.
        keywords: the function's keyword arguments, from the parsed options.
        examples: command lines for the help.
        resumable: whether the same command, run again, goes on where it was interrupted.
        joint: whether several processes, started by `torchrun`, can share the work.
    """

    usage: str
    summary: str
    function: str
    add_options: Callable[[argparse.ArgumentParser], None]
    keywords: Callable[[argparse.Namespace], dict[str, Any]]
    examples: tuple[str, ...]
    resumable: bool = False
    joint: bool = False

    def run(self, args: argparse.Namespace) -> None:
        """Check the options, then load and call the function."""
        if processes.count() > 1 and not self.joint:
            joint = ", ".join(name for name, command in COMMANDS.items() if command.joint)
            raise UsageError(f"this command runs in one process, {processes.count()} were started; in several: {joint}")
        keywords = self.keywords(args)
        module, function = self.function.split(":")
        getattr(importlib.import_module(module), function)(**keywords)


COMMANDS: dict[str, Command] = {
    "compare": Command(
        "[RECIPE] [options]",
        "train the models of a recipe on the same text and write the report",
        "context_pythia.cli.reported:compare",
        arguments.compare_options,
        arguments.compare_keywords,
        (
            "compare",
            "compare report --data corpus.jsonl.gz --tokenizer tokenizer.json --out runs/corpus",
            "compare quick --models Pythia,shared --epochs 2 --context-dim 32 --lang ja",
        ),
        resumable=True,
        joint=True,
    ),
    "phase1": Command(
        "[RECIPE] --model NAME [options]",
        "train the ContextBlock of one model (OACD) and stop",
        "context_pythia.runs.train:run_phase1",
        arguments.one_model_options,
        arguments.one_model_keywords,
        ("phase1 quick --model shared --phase1-convergence-rate 0.99",),
        resumable=True,
        joint=True,
    ),
    "train": Command(
        "[RECIPE] --model NAME [options]",
        "train one model, both phases",
        "context_pythia.runs.train:train",
        arguments.one_model_options,
        arguments.one_model_keywords,
        ("train quick --model layer --learning-rate 3e-4 --epochs 6",),
        resumable=True,
        joint=True,
    ),
    "sweep": Command(
        "[RECIPE] --over KEY=A,B [--over ...] --out DIR [options]",
        "train settings of a recipe over seeds, by any number of processes",
        "context_pythia.cli.reported:sweep",
        arguments.sweep_options,
        arguments.sweep_keywords,
        (
            "sweep quick --models Pythia,shared --over context_dim=32,64 --over learning_rate=5e-4,1e-3 --out runs/dim",
            "sweep report --over learning_rate=1e-4..1e-3 --sampler tpe --trials 50 --storage sqlite:///s.db --out s",
        ),
        resumable=True,
    ),
    "generate": Command(
        "MODEL --prompt TEXT [options]",
        "write text with a trained model",
        "context_pythia.runs.generate:generate",
        arguments.generate_options,
        arguments.generate_keywords,
        (
            'generate runs/quick/models/shared --prompt "def main(" --stats',
            'generate EleutherAI/pythia-70m --prompt "The sea" --temperature 0.8 --top-k 50 --seed 1',
        ),
    ),
    "info": Command(
        "(--recipe RECIPE | MODEL) [options]",
        "parameters and cache bytes, by formula and measured",
        "context_pythia.cli.reported:info",
        arguments.info_options,
        arguments.info_keywords,
        ("info --recipe report", "info runs/quick/models/shared --length 2048 --dtype bfloat16 --json"),
    ),
    "report": Command(
        "RUN [options]",
        "write the report of a run folder again",
        "context_pythia.report.report:report",
        arguments.report_options,
        arguments.report_keywords,
        ("report runs/quick --lang ja",),
    ),
    "convert": Command(
        "MODEL (--context-dim N | --kv-reduction R) --out DIR [options]",
        "give a trained GPT-NeoX model a smaller cache",
        "context_pythia.cli.reported:convert",
        arguments.convert_options,
        arguments.convert_keywords,
        (
            "convert EleutherAI/pythia-70m --kv-reduction 0.75 --data corpus.jsonl.gz --out pythia-70m-quarter",
            "convert runs/quick/models/pythia --kv-reduction 0.5 --out runs/exact",
            "convert runs/quick/models/pythia --context-dim 32 --heal-steps 50 --out runs/healed",
        ),
        resumable=True,
    ),
    "eval": Command(
        "MODEL [MODEL ...] [options]",
        "perplexity, accuracy and measured cache of models side by side",
        "context_pythia.cli.reported:evaluate",
        arguments.eval_options,
        arguments.eval_keywords,
        (
            "eval runs/quick/models/pythia runs/quick/models/shared --samples 1200 --out eval",
            "eval EleutherAI/pythia-70m converted --data wikitext:wikitext-2-raw-v1 --cache int8 --cache int4",
            "eval runs/quick/models/pythia --tasks mine --tasks-path tasks --limit 100",
        ),
    ),
    "bench": Command(
        "(MODEL ... | --recipe RECIPE | --size SIZE | --train) [options]",
        "speed and memory of prefill, decoding or training beside GPT-NeoX",
        "context_pythia.cli.reported:bench",
        arguments.bench_options,
        arguments.bench_keywords,
        (
            "bench --size pythia-70m --sources shared:256,layer:256,layer:512:exact --out bench",
            "bench runs/quick/models/pythia runs/quick/models/shared --batch-sizes 1,8 --lengths 64,120",
            "bench --train --recipe report --rounds 3 --out bench-train",
        ),
    ),
}
