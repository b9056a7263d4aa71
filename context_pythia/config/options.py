"""Options that document and check themselves: the base of every dataclass that configures something.

A field made by `option` carries its help, its choices and its bounds; building the dataclass checks them, whether the
value came from a YAML file, a flag or Python code, and the command line makes its flags from the same words.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import operator
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args, get_type_hints

from context_pythia.errors import UsageError

COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def option(
    default: Any, help: str, choices: tuple[str, ...] | None = None, bounds: str = "", free: bool = False
) -> Any:
    """A documented dataclass field.

    Args:
        default: its default.
        help: one line for the command line's help.
        choices: the valid values, where there is a list of them.
        bounds: comparisons that a number must pass, with spaces and "and" as a user reads them: `"> 0 and <= 1"`.
        free: it changes results by rounding at most, so what was begun with one value may go on with another.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "bounds": bounds, "free": free})


@dataclass(frozen=True)
class Option:
    """What a field declares: its plain type `kind` (`str`, `int`, `float` or `bool`), and whether it may be None."""

    name: str
    kind: type[Any]
    optional: bool
    help: str
    choices: tuple[str, ...] | None
    bounds: str
    free: bool
    default: Any = None


@dataclass
class Options:
    """Base of the option dataclasses: building one with a wrong type, choice or number raises `UsageError`."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for declared in options_of(type(self)):
            setattr(self, declared.name, _checked(declared, getattr(self, declared.name), self.section))


def options_of(owner: type[Options]) -> list[Option]:
    """What the fields that `option` made declare, in order."""
    hints = get_type_hints(owner)
    declared = []
    for f in dataclasses.fields(owner):
        if "bounds" in f.metadata:
            kinds = get_args(hints[f.name]) or (hints[f.name],)
            kind = next(k for k in kinds if k is not types.NoneType)
            declared.append(Option(f.name, kind, types.NoneType in kinds, **f.metadata, default=f.default))
    return declared


def deciding(options: Options) -> dict[str, Any]:
    """The values that decide results, by name: all but those of free options (see `option`)."""
    return {
        declared.name: getattr(options, declared.name) for declared in options_of(type(options)) if not declared.free
    }


def suggestion(word: Any, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known word that looks most like `word`, or nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _checked(declared: Option, value: Any, section: str) -> Any:
    """`value` as the option's type; raises `UsageError` that names the option, the value and what is valid."""
    label = f"{section}.{declared.name}" if section else declared.name
    kind = declared.kind
    if value is None and declared.optional:
        return None
    # YAML 1.1 reads 1e-4, which has no point, as text.
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{label} {value!r}: must be {KINDS[kind]}")
    choices = declared.choices
    if choices and value not in choices:
        raise UsageError(f"{label} {value!r}: must be one of {', '.join(choices)}{suggestion(value, choices)}")
    if kind is float and not math.isfinite(value):
        raise UsageError(f"{label} {value}: must be a finite number")
    for bound in declared.bounds.split(" and ") if declared.bounds else ():
        comparison, limit = bound.split()
        if not COMPARISONS[comparison](value, float(limit)):
            raise UsageError(f"{label} {value}: must be {declared.bounds}")
    return value
