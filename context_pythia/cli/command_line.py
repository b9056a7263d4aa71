"""The command `context-pythia`: parses, runs a row of `commands.py`, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 a failure on the way, 2 something wrong with what was asked, 130 interrupted. A mistake of our own
keeps its traceback (see `errors.py`) and ends with 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import context_pythia
from context_pythia import processes
from context_pythia.cli.commands import COMMANDS
from context_pythia.config.options import suggestion
from context_pythia.errors import exit_code, first_line

PROGRAM = "context-pythia"
REPORT = f"a mistake of {PROGRAM} {context_pythia.__version__}, not yours: please report it with the lines above"


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n" if processes.says_why() else None)


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
    # A console that lacks a character of a table shows another one in its place: the work is done by then.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    args = _parse(argv)
    command = COMMANDS[args.command]
    try:
        command.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        advice = "; run the same command again to go on where it stopped" if command.resumable else ""
        if processes.is_main():
            print(f"\n{PROGRAM}: interrupted{advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; Python's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        code = exit_code(error)
        if code is None:
            # Python shows the note below the traceback.
            error.add_note(f"{PROGRAM}: {REPORT}")
        if processes.says_why():
            if code is None or args.debug:
                raise
            print(f"{PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return code or 1
    return 0


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return first_line(error)
