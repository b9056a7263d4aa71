"""The command `context-pythia`: parses, runs a command, and turns errors into one line and an exit code.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted. A bug of ours keeps its traceback (see `errors.py`)
and exits with 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import context_pythia
from context_pythia import processes
from context_pythia.cli.bench import Bench
from context_pythia.cli.command import Command
from context_pythia.cli.compare import Compare, Phase1, Train
from context_pythia.cli.convert import Convert
from context_pythia.cli.evaluate import Evaluate
from context_pythia.cli.generate import Generate
from context_pythia.cli.info import Info
from context_pythia.cli.parser import PROGRAM, parse
from context_pythia.cli.report import WriteReport
from context_pythia.cli.sweep import Sweep
from context_pythia.errors import UsageError, exit_code, first_line

REPORT = f"a mistake of {PROGRAM} {context_pythia.__version__}, not yours: please report it with the lines above"
COMMANDS: dict[str, type[Command]] = {
    "compare": Compare,
    "phase1": Phase1,
    "train": Train,
    "sweep": Sweep,
    "generate": Generate,
    "info": Info,
    "report": WriteReport,
    "convert": Convert,
    "eval": Evaluate,
    "bench": Bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; an error is one line on standard error."""
    # A console that lacks a character of a table prints a substitute: an error there would lose finished work.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    args = None
    try:
        args, fields = parse(COMMANDS, argv)
        _run(args.command, fields)
        sys.stdout.flush()
    except KeyboardInterrupt:
        resumable = args is not None and args.command.resumable
        if processes.is_main():
            advice = "; run the same command again to resume" if resumable else ""
            print(f"\n{PROGRAM}: interrupted{advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        code = exit_code(error)
        if code is None:
            # Python shows the note below the traceback.
            error.add_note(f"{PROGRAM}: {REPORT}")
        if processes.says_why():
            if code is None:
                raise
            print(f"{PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return code or 1
    return 0


def _run(command: type[Command], fields: dict) -> None:
    if processes.count() > 1 and not command.joint:
        joint = ", ".join(name for name, one in COMMANDS.items() if one.joint)
        raise UsageError(
            f"this command runs in one process, but {processes.count()} were started; {joint} run in several"
        )
    command(**fields).run()


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return first_line(error)
