"""Options that document and check themselves: the base of every dataclass that configures something.

A field made by `option` declares its help, its choices and its bounds. The dataclass checks them when it is built,
whether the value comes from a YAML file, the command line or Python code. The command line makes its flags from them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import operator
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from context_pythia.errors import UsageError

COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
TRUTH = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True)
class Option:
    """What a field of an option dataclass declares.

    Attributes:
        help: one line for the command line's help.
        choices: the valid values; empty if any value is valid.
        bounds: comparisons that a number must pass, as a user reads them: `"> 0 and <= 1"`.
        sources: the context sources whose models the option affects; empty if it affects all.
        free: the option changes results by rounding at most, so work may resume with another value.
        flag: commands that take a recipe have a flag for it; other options are set by `--set`.
        metavar: the placeholder of the value in the help; by default it follows from the kind.
        default: `dataclasses.MISSING` if the user must give a value.
        kind: type of each value: `str`, `int`, `float`, `bool` or `Path`.
        several: `tuple` or `list` if the field takes any number of values. On the command line, commas separate the
            values of a tuple and of a list of numbers; for a list of texts the flag is repeated.
        optional: None is valid.
    """

    help: str
    choices: tuple[str, ...] = ()
    bounds: str = ""
    sources: tuple[str, ...] = ()
    free: bool = False
    flag: bool = False
    metavar: str = ""
    default: Any = None
    name: str = ""
    kind: type[Any] = str
    several: type[Any] | None = None
    optional: bool = False

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    def parse(self, text: str) -> Any:
        """The value of a user's text. Text that does not parse stays text, and the check names it."""
        if self.repeated or self.several is None:
            return self._parse_one(text)
        return self.several(self._parse_one(word.strip()) for word in text.split(","))

    @property
    def repeated(self) -> bool:
        """Whether the flag is given once for each value."""
        return self.several is list and self.kind is str

    def _parse_one(self, text: str) -> Any:
        if self.optional and text.casefold() in ("null", "none"):
            return None
        if self.kind is bool:
            return TRUTH.get(text.casefold(), text)
        with contextlib.suppress(ValueError):
            return self.kind(text)
        return text


def option(default: Any, help: str, choices: Iterable[str] = (), bounds: str = "", **declared: Any) -> Any:
    """A dataclass field that declares an `Option`; the help ends with its sources."""
    if sources := declared.get("sources"):
        help += f" (source {', '.join(sources)})"
    return field(
        default=default, metadata={"option": Option(help, tuple(choices), bounds, default=default, **declared)}
    )


def default_of(owner: type[Options], name: str, default: Any) -> Any:
    """The field that `owner` declares, with another default, for a subclass."""
    declared = dataclasses.replace(owner.__dataclass_fields__[name].metadata["option"], default=default)
    return field(default=default, metadata={"option": declared})


@dataclass
class Options:
    """Base of the option dataclasses: building one with a wrong type, choice or number raises `UsageError`."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for declared in options_of(type(self)):
            setattr(self, declared.name, _checked(declared, getattr(self, declared.name), self.label(declared.name)))

    @classmethod
    def of_record(cls, values: Mapping[str, Any]) -> Self:
        """The options in a record of any version. Missing options get their defaults; unknown ones are ignored."""
        return cls(**{one.name: values[one.name] for one in options_of(cls) if one.name in values})

    def label(self, name: str) -> str:
        """The option's name in error messages."""
        return f"{self.section}.{name}" if self.section else name


def options_of(owner: type[Options]) -> list[Option]:
    """The `Option` of each field that declares one, in order."""
    return _declared(owner)  # type: ignore[arg-type]  # a class is hashable even if its instances are not


@functools.cache
def _declared(owner: type[Options]) -> list[Option]:
    hints = get_type_hints(owner)
    declared = []
    for f in dataclasses.fields(owner):
        if "option" not in f.metadata:
            continue
        hint = hints[f.name]
        alternatives = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
        kind = next(k for k in alternatives if k is not types.NoneType)
        several = get_origin(kind)
        found = {"kind": get_args(kind)[0] if several else kind, "several": several}
        optional = types.NoneType in alternatives
        declared.append(dataclasses.replace(f.metadata["option"], name=f.name, optional=optional, **found))
    return declared


def deciding(options: Options) -> dict[str, Any]:
    """The values that decide results, by name: all options but the free ones (see `Option`)."""
    return {
        declared.name: getattr(options, declared.name) for declared in options_of(type(options)) if not declared.free
    }


def suggestion(word: Any, known: Iterable[str], most: int = 1) -> str:
    """` (did you mean X?)` for the known words closest to `word`; empty if none is close."""
    close = difflib.get_close_matches(str(word), list(known), n=most)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def only_known(given: Iterable[Any], known: Iterable[str], what: str, listed_by: str = "") -> None:
    """Raise `UsageError` for the first given name that is unknown.

    Args:
        listed_by: the command that lists the known names, if they are too many for one line.
    """
    known = list(known)
    for name in given:
        if name not in known:
            close = suggestion(name, known, 3 if listed_by else 1)
            where = f"`{listed_by}` lists all" if listed_by else f"valid: {', '.join(known)}"
            raise UsageError(f"{what} {name!r} is unknown{close}; {where}")


def _checked(declared: Option, value: Any, label: str) -> Any:
    """`value` as the option's type; raises `UsageError` that names the option, the value and what is valid."""
    if declared.several is None and isinstance(value, str):
        value = declared.parse(value)  # YAML 1.1 reads 1e-4 as text, because it has no decimal point
    if value is None and declared.optional:
        return None
    if declared.several is None:
        return _checked_one(declared, value, label)
    given = value if isinstance(value, list | tuple) else [value]
    values = declared.several(_checked_one(declared, one, label) for one in given)
    if declared.several is tuple and len(set(values)) < len(values):
        raise UsageError(f"{label} {','.join(map(str, values))}: has the same value twice")
    return values


def _checked_one(declared: Option, value: Any, label: str) -> Any:
    kind = declared.kind
    if kind is float and type(value) is int:
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
