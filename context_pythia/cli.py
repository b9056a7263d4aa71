"""The command `context-pythia`: a table from name to function, and how errors become exit codes.

A row of `COMMANDS` says what a command takes and which function does the work. The function is named, not imported: it
is loaded when the command runs, so that help answers before torch could be imported. The flags that override a
recipe's values are made from the option dataclasses of `recipe.py`.

Exit codes: 0 done, 1 a failure on the way, 2 something wrong with what was asked, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import context_pythia
from context_pythia.options import Options, options_of, suggestion
from context_pythia.recipe import (
    PRECISIONS,
    SECTIONS,
    ModelOptions,
    Recipe,
    load_recipe,
    packaged_recipes,
)

PROGRAM = "context-pythia"
LANGUAGES = ("en", "ja")
OVERRIDE = "override "  # starts the argparse destination of a flag that overrides a recipe's value


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
    """

    usage: str
    summary: str
    function: str
    add_options: Callable[[argparse.ArgumentParser], None]
    keywords: Callable[[argparse.Namespace], dict[str, Any]]
    examples: tuple[str, ...]
    resumable: bool = False

    def run(self, args: argparse.Namespace) -> None:
        """Check the options, then load and call the function."""
        keywords = self.keywords(args)
        module, function = self.function.split(":")
        getattr(importlib.import_module(module), function)(**keywords)


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is not below `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    return parse


def temperature(text: str) -> float:
    """An argparse type: a finite number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be 0 (greedy) or more")
    return value


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(packaged_recipes())
    parser.add_argument(
        "recipe", nargs="?", default="quick", metavar="RECIPE", help=f"{known}, or a YAML file (default: quick)"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/NAME-OF-THE-RECIPE)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    def add(group: argparse._ArgumentGroup, owner: type[Options], path: str, prefix: str = "") -> None:
        for option in options_of(owner):
            if option.name == "name":
                continue
            settings: dict[str, Any] = {
                "dest": OVERRIDE + path + option.name,
                "default": argparse.SUPPRESS,
                "help": option.help.replace("%", "%%"),
            }
            if option.kind is bool:
                settings["action"] = argparse.BooleanOptionalAction
            elif option.choices:
                settings["choices"] = option.choices
            else:
                settings |= {"type": option.kind, "metavar": {int: "N", float: "X", str: "TEXT"}[option.kind]}
            group.add_argument(f"--{prefix}{option.name}".replace("_", "-"), **settings)

    add(parser.add_argument_group("the run, over what the recipe says"), Recipe, "")
    for section, owner in SECTIONS.items():
        title = f"{section}: {(owner.__doc__ or '').splitlines()[0].rstrip('.')}"
        prefix = "phase1-" if section == "phase1" else ""
        add(parser.add_argument_group(title), owner, f"{section}.", prefix)
    add(parser.add_argument_group("model: every model of the recipe that has a context source"), ModelOptions, "model.")


def _recipe(args: argparse.Namespace, name: str, models: list[str] | None = None) -> Recipe:
    return load_recipe(name, _overrides(args), models)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    return {dest.removeprefix(OVERRIDE): value for dest, value in vars(args).items() if dest.startswith(OVERRIDE)}


def _run_keywords(args: argparse.Namespace, models: list[str] | None) -> dict[str, Any]:
    recipe = _recipe(args, args.recipe, models)
    return {"recipe": recipe, "out": args.out or Path("runs") / recipe.name, "progress": not args.quiet}


def _compare_options(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    _add_run(parser)
    parser.add_argument("--models", metavar="A,B", help="only these models of the recipe")
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="language of the report (default: en)")
    _add_overrides(parser)


def _compare_keywords(args: argparse.Namespace) -> dict[str, Any]:
    models = None if args.models is None else [name.strip() for name in args.models.split(",")]
    return _run_keywords(args, models) | {"lang": args.lang}


def _one_model_options(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--model", required=True, metavar="NAME", help="the model of the recipe")
    _add_run(parser)
    _add_overrides(parser)


def _one_model_keywords(args: argparse.Namespace) -> dict[str, Any]:
    return _run_keywords(args, [args.model])


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's folder, or a Hub name")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to go on from")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=64, metavar="N", help="default: 64")
    parser.add_argument("--temperature", type=temperature, default=0.0, metavar="X", help="default: 0, greedy")
    parser.add_argument("--top-k", type=at_least(1), metavar="N", help="sample from the N likeliest tokens only")
    parser.add_argument("--num-beams", type=at_least(1), default=1, metavar="N", help="beam search (default: 1, none)")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="seed of the sampling (default: 0)")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32", help="default: float32")
    parser.add_argument("--stats", action="store_true", help="also print tokens a second and the measured cache")


def _generate_keywords(args: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "prompt", "max_new_tokens", "temperature", "top_k", "num_beams", "seed", "dtype", "stats")
    return {name: getattr(args, name) for name in names}


def _info_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model's folder, or a Hub name")
    parser.add_argument("--recipe", metavar="RECIPE", help=f"{', '.join(packaged_recipes())}, or a YAML file")
    parser.add_argument("--json", action="store_true", dest="as_json", help="JSON in place of a table")
    parser.add_argument(
        "--length", type=at_least(1), default=128, metavar="N", help="tokens in the cache (default: 128)"
    )
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32", help="of model and cache (default: float32)")
    _add_overrides(parser)


def _info_keywords(args: argparse.Namespace) -> dict[str, Any]:
    if (args.model is None) == (args.recipe is None):
        raise ValueError("info: give either --recipe RECIPE or a MODEL")
    if args.recipe is None and _overrides(args):
        raise ValueError("info: options of a recipe were given without --recipe; a saved MODEL has its own")
    recipe = None if args.recipe is None else _recipe(args, args.recipe)
    return {"recipe": recipe} | {name: getattr(args, name) for name in ("model", "length", "dtype", "as_json")}


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of `compare`")
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="language of the report (default: en)")


COMMANDS: dict[str, Command] = {
    "compare": Command(
        "[RECIPE] [options]",
        "train the models of a recipe on the same text and write the report",
        "context_pythia.experiments.compare:compare",
        _compare_options,
        _compare_keywords,
        (
            "compare",
            "compare report --data corpus.jsonl.gz --tokenizer tokenizer.json --out runs/corpus",
            "compare quick --models Pythia,shared --epochs 2 --context-dim 32 --lang ja",
        ),
        resumable=True,
    ),
    "phase1": Command(
        "[RECIPE] --model NAME [options]",
        "train the ContextBlock of one model (OACD) and stop",
        "context_pythia.experiments.compare:run_phase1",
        _one_model_options,
        _one_model_keywords,
        ("phase1 quick --model shared --phase1-convergence-rate 0.99",),
        resumable=True,
    ),
    "train": Command(
        "[RECIPE] --model NAME [options]",
        "train one model, both phases",
        "context_pythia.experiments.compare:train",
        _one_model_options,
        _one_model_keywords,
        ("train quick --model layer --learning-rate 3e-4 --epochs 6",),
        resumable=True,
    ),
    "generate": Command(
        "MODEL --prompt TEXT [options]",
        "write text with a trained model",
        "context_pythia.experiments.generate:generate",
        _generate_options,
        _generate_keywords,
        (
            'generate runs/quick/models/shared --prompt "def main(" --stats',
            'generate EleutherAI/pythia-70m --prompt "The sea" --temperature 0.8 --top-k 50 --seed 1',
        ),
    ),
    "info": Command(
        "(--recipe RECIPE | MODEL) [options]",
        "parameters and cache bytes, by formula and measured",
        "context_pythia.experiments.info:info",
        _info_options,
        _info_keywords,
        ("info --recipe report", "info runs/quick/models/shared --length 2048 --dtype bfloat16 --json"),
    ),
    "report": Command(
        "RUN [options]",
        "write the report of a run folder again",
        "context_pythia.experiments.report:write_report",
        _report_options,
        lambda args: {"run": args.run, "lang": args.lang},
        ("report runs/quick --lang ja",),
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; each command's name is in `command`, its row in `COMMANDS`."""
    common: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser(
        PROGRAM,
        description="Train and compare Pythia with Context-Pythia, which caches one small context a token.",
        epilog=_examples(*(command.examples[0] for command in COMMANDS.values())),
        **common,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {context_pythia.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            usage=f"{PROGRAM} {name} {command.usage}",
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=_examples(*command.examples),
            **common,
        )
        subparser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        command.add_options(subparser)
        subparser.set_defaults(parser=subparser)
    return parser


def _examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {PROGRAM} {line}" for line in lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        known = [flag for action in args.parser._actions for flag in action.option_strings]
        args.parser.error(f"unknown argument {unknown[0]}{suggestion(unknown[0].split('=')[0], known)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; an error is one line on standard error."""
    args = _parse(argv)
    command = COMMANDS[args.command]
    try:
        command.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        advice = "; run the same command again to go on where it stopped" if command.resumable else ""
        print(f"\n{PROGRAM}: interrupted{advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; Python's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if args.debug:
            raise
        print(f"{PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | FileNotFoundError | NotADirectoryError) else 1
    return 0


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
