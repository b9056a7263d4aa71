"""Flags made from option dataclasses, and the argparse types of the others."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from context_pythia.config.options import Option, Options, options_of
from context_pythia.config.recipe import PREFIXED, SECTIONS, ModelOptions, Recipe
from context_pythia.config.recipe_files import packaged_recipes

OVERRIDE = "override "  # starts the argparse destination of a flag that was made from an option


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


def comma_separated(text: str) -> list[str]:
    """The words between commas, without the spaces around them."""
    return [word.strip() for word in text.split(",")]


def numbers(text: str) -> tuple[int, ...]:
    """An argparse type: different whole numbers from 1 on, separated by commas."""
    values = tuple(at_least(1)(word) for word in comma_separated(text))
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text}: names a number twice")
    return values


def add_flags(
    group: argparse._ArgumentGroup,
    owner: type[Options],
    path: str,
    prefix: str = "",
    defaults: bool = True,
    **other: str | None,
) -> None:
    """A flag for each option of `owner`; `other` gives some of them another help, or None for no flag.

    Args:
        defaults: whether the dataclass's defaults hold where a flag is not given, so that the help names them.
    """
    for option in options_of(owner):
        text = other.get(option.name, option.help)
        if option.name == "name" or text is None:
            continue
        settings: dict[str, Any] = {
            "dest": OVERRIDE + path + option.name,
            "default": argparse.SUPPRESS,
            "help": _help(option, text, defaults),
        }
        if option.kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif option.choices:
            settings["choices"] = option.choices
        else:
            settings |= {"type": option.kind, "metavar": {int: "N", float: "X", str: "TEXT"}[option.kind]}
        group.add_argument(f"--{prefix}{option.name}".replace("_", "-"), **settings)


def _help(option: Option, text: str, defaults: bool) -> str:
    if defaults and option.default is not None and "default:" not in text:
        shown = {True: "yes", False: "no"}[option.default] if option.kind is bool else option.default
        text += f" (default: {shown})"
    return text.replace("%", "%%")


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    return {dest.removeprefix(OVERRIDE): value for dest, value in vars(args).items() if dest.startswith(OVERRIDE)}


def add_recipe(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(packaged_recipes())
    parser.add_argument(
        "recipe", nargs="?", default="quick", metavar="RECIPE", help=f"{known}, or a YAML file (default: quick)"
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    add_flags(parser.add_argument_group("the run, over what the recipe says"), Recipe, "", defaults=False)
    for section, owner in SECTIONS.items():
        title = f"{section}: {(owner.__doc__ or '').splitlines()[0].rstrip('.')}"
        prefix = f"{section}-" if section in PREFIXED else ""
        add_flags(parser.add_argument_group(title), owner, f"{section}.", prefix, defaults=False)
    of_models = parser.add_argument_group("model: every model of the recipe that has a context source")
    add_flags(of_models, ModelOptions, "model.", defaults=False, from_baseline=None)
