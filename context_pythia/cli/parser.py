"""Builds argparse parsers from commands: each flag, its help and its check come from an option's declaration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

import context_pythia
from context_pythia import processes
from context_pythia.cli.command import Command
from context_pythia.config.options import Option, only_known, options_of, suggestion
from context_pythia.config.recipe import OF_ONE_MODEL
from context_pythia.config.recipe_files import options_by_path, path_of, plain_name
from context_pythia.errors import UsageError

PROGRAM = "context-pythia"
SETTING = "setting "  # begins the argparse destination of a section's flag


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as one line."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raises UsageError for an unknown command; options check their values themselves."""
        if action.choices is not None:
            only_known([value], action.choices, "command")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n" if processes.says_why() else None)


def build_parser(commands: dict[str, type[Command]]) -> argparse.ArgumentParser:
    """The parser of the whole program; its result has the command's class in `command`."""
    common: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser(
        PROGRAM,
        description="Train and compare Pythia with Context-Pythia, which caches one small context a token.",
        epilog=_examples(*(command.examples[0] for command in commands.values())),
        **common,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {context_pythia.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in commands.items():
        subparser = subparsers.add_parser(
            name,
            usage=f"{PROGRAM} {name} {_usage(command)}",
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=_examples(*command.examples),
            **common,
        )
        _add_options(subparser, command)
        subparser.set_defaults(command=command, parser=subparser)
    return parser


def parse(commands: dict[str, type[Command]], argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The parsed arguments, and the fields of their command.

    Raises:
        UsageError: `--set` names no option.
    """
    args, unknown = build_parser(commands).parse_known_args(argv)
    if unknown:
        known = [flag for action in args.parser._actions for flag in action.option_strings]
        args.parser.error(f"unknown argument {unknown[0]}{_advice(unknown[0], args.command, known)}")
    given = vars(args)
    values = {dest.removeprefix(SETTING): value for dest, value in given.items() if dest.startswith(SETTING)}
    values |= _set_values(args.command, given.get("set") or [], args.parser.prog)
    fields = {declared.name for declared in options_of(args.command)}
    return args, {name: value for name, value in given.items() if name in fields} | {"values": values}


class SetAction(argparse._AppendAction):
    """`--set KEY=VALUE`; `--set help` lists the keys and exits, as `--help` does."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values == "help":
            for path, declared in _settable(parser.get_default("command")).items():
                print(f"{path:32} {_help(declared)}")
            parser.exit()
        super().__call__(parser, namespace, values, option_string)


def _settable(command: type[Command]) -> dict[str, Option]:
    """The options that `--set` knows, by path."""
    known = options_by_path(command.sections)
    return {path: declared for path, declared in known.items() if path not in ("name", *OF_ONE_MODEL)}


def _set_values(command: type[Command], texts: Sequence[str], program: str) -> dict[str, Any]:
    known = _settable(command)
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text!r}: give section.key=value, such as {_setting_example(command)}")
        path = path_of(key, known, "--set", f"{program} --set help")
        values[path] = known[path].parse(value)
    return values


def _setting_example(command: type[Command]) -> str:
    return "train.max_grad_norm=0.5" if "train" in command.sections else "data.text_field=body"


def _advice(unknown: str, command: type[Command], flags: Sequence[str]) -> str:
    """A hint for an unknown flag: the `--set` option of that name, or the closest flag."""
    flag = unknown.split("=")[0]
    name = flag.lstrip("-").removeprefix("no-").replace("-", "_")
    path = next((path for path in _settable(command) if plain_name(path) == name), None)
    return f" (did you mean --set {path}=...?)" if path else suggestion(flag, flags)


def _usage(command: type[Command]) -> str:
    declared = options_of(command)
    arguments = [
        o.name.upper() if o.required else f"[{o.name.upper()}]" for o in declared if o.name in command.arguments
    ]
    flags = [f"--{o.name} {_metavar(o)}" for o in declared if o.required and o.name not in command.arguments]
    return " ".join([*arguments, *flags, "[options]"])


def _examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {PROGRAM} {line}" for line in lines)


def _add_options(parser: argparse.ArgumentParser, command: type[Command]) -> None:
    for declared in options_of(command):
        if declared.name in command.arguments:
            nargs = ("+" if declared.required else "*") if declared.several else None if declared.required else "?"
            parser.add_argument(
                declared.name, nargs=nargs, metavar=_metavar(declared), default=argparse.SUPPRESS, type=declared.parse,
                help=_help(declared),
            )  # fmt: skip
        elif declared.kind is bool and not declared.default:
            parser.add_argument(_flag(declared.name), action="store_true", help=_help(declared))
        else:
            _add_flag(parser, declared, _flag(declared.name), declared.name, _help(declared))
    of_recipe = "" in command.sections
    for section in command.flagged:
        owner = command.sections[section]
        title = (owner.__doc__ or "").split(". ")[0].splitlines()[0].rstrip(".")
        group = parser.add_argument_group(f"{section}: {title}" if section else "the run, over what the recipe says")
        for path, declared in options_by_path({section: owner}).items():
            if declared.flag:
                # The recipe decides the defaults.
                text = declared.help if of_recipe else _help(declared)
                _add_flag(group, declared, _flag(plain_name(path)), SETTING + path, text)
    if command.sections:
        parser.add_argument(
            "--set",
            action=SetAction,
            metavar="KEY=VALUE",
            help=f"any value of {', '.join(filter(None, command.sections))}, such as {_setting_example(command)}; "
            "`--set help` lists all; may be given several times",
        )


def _flag(name: str) -> str:
    return f"--{name}".replace("_", "-")


def _add_flag(group: argparse._ActionsContainer, declared: Option, flag: str, dest: str, help: str) -> None:
    settings: dict[str, Any] = {"dest": dest, "default": argparse.SUPPRESS, "help": help}
    if declared.kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings |= {"type": declared.parse, "metavar": _metavar(declared), "required": declared.required}
        settings["action"] = "append" if declared.repeated else "store"
    group.add_argument(flag, **settings)


def _metavar(declared: Option) -> str:
    if declared.metavar:
        return declared.metavar
    if declared.choices and declared.several is not tuple:
        return "{" + ",".join(declared.choices) + "}"
    return {int: "N", float: "X"}.get(declared.kind, declared.name.upper())


def _help(declared: Option) -> str:
    """The option's help with its default."""
    value = declared.default
    if declared.required or value is None or value is False or value == () or "(default" in declared.help:
        return declared.help
    default = "yes" if value is True else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"{declared.help} (default: {default})"
