"""Recipes as YAML files and nested values: those that come with the package, and anyone's own."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from context_pythia.config.options import Option, Options, deciding, only_known, options_of, suggestion
from context_pythia.config.recipe import OF_A_RECIPE, PREFIXED, SECTIONS, ModelOptions, Recipe
from context_pythia.errors import UsageError
from context_pythia.files import write_bytes

RECIPES = importlib.resources.files("context_pythia.config") / "recipes"


def options_by_path(sections: Mapping[str, type[Options]]) -> dict[str, Option]:
    """The options of sections by dotted path, such as `train.learning_rate`; those of the section "" by name."""
    return {
        f"{section}.{declared.name}".lstrip("."): declared
        for section, owner in sections.items()
        for declared in options_of(owner)
    }


def plain_name(path: str) -> str:
    """The option's name without its section, as its flag has it: `learning_rate`, `phase1_noise`."""
    section, _, name = path.rpartition(".")
    return f"{section}_{name}" if section in PREFIXED else name


def path_of(key: str, paths: Iterable[str], what: str, listed_by: str) -> str:
    """The path that the user's key means: `train.learning_rate`, or `learning_rate` if one section alone has it.

    Raises:
        UsageError: no option has this name; the message names close ones, and the command that lists all.
    """
    paths = list(paths)
    plain = [plain_name(path) for path in paths]
    names = {name: path for name, path in zip(plain, paths, strict=True) if plain.count(name) == 1}
    names |= {path: path for path in paths}
    key = key.strip().replace("-", "_")
    only_known([key], names, what, listed_by)
    return names[key]


def packaged_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(
    name_or_path: str, overrides: Mapping[str, Any] | None = None, models: Sequence[str] | None = None
) -> Recipe:
    """Read a recipe, apply the overrides, and check the result.

    Args:
        name_or_path: a packaged name (see `packaged_recipes`) or a YAML file, which has what differs from the defaults:
            `name`, `seed`, the sections of `SECTIONS`, and a list `models`.
        overrides, models: as in `recipe_from_dict`.

    Raises:
        UsageError: unknown recipe, section, option, value or model; the message names it and the valid ones.
    """
    stem, content = _read(name_or_path)
    values = _mapping({} if content is None else content, f"recipe {name_or_path}")
    return recipe_from_dict({"name": stem} | values, overrides, models)


def _read(name_or_path: str) -> tuple[str, Any]:
    """Name and parsed YAML of a packaged recipe or a recipe file."""
    path = Path(name_or_path)
    if name_or_path in packaged_recipes():
        text = (RECIPES / f"{name_or_path}.yaml").read_text("utf-8")
    elif path.is_file():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"recipe {name_or_path}: is not UTF-8 text ({error.reason})") from None
    else:
        known = packaged_recipes()
        raise UsageError(
            f"recipe {name_or_path!r} is unknown{suggestion(name_or_path, known)}; "
            f"valid: {', '.join(known)}, or a YAML file"
        )
    try:
        return path.name.removesuffix(".yaml").removesuffix(".yml"), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {name_or_path}: is not valid YAML ({' '.join(str(error).split())})") from None


def recipe_from_dict(
    values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, models: Sequence[str] | None = None
) -> Recipe:
    """The recipe of nested plain values; missing ones get their defaults.

    Args:
        overrides: values by dotted path: `train.learning_rate`, `seed`; `model.context_dim` goes to every model with a
            context source. Only the result is checked, because one override may need another.
        models: the names of the models to keep, in the recipe's order; all of them if absent.

    Raises:
        UsageError: a key or value that is not valid.
    """
    only_known(values, [*_names(Recipe), *SECTIONS, "models"], "section")
    changes: dict[str, dict[str, Any]] = {section: {} for section in OF_A_RECIPE}
    only_known(overrides or {}, options_by_path(OF_A_RECIPE), "option", "context-pythia compare --set help")
    for path, value in (overrides or {}).items():
        section, _, name = path.rpartition(".")
        changes[section][name] = value
    arguments: dict[str, Any] = {name: values[name] for name in _names(Recipe) if name in values} | changes[""]
    for section, owner in SECTIONS.items():
        # A section whose every line is commented out is None to YAML.
        given = _mapping(values.get(section) or {}, f"section {section}")
        only_known(given, _names(owner), f"option {section}:")
        arguments[section] = owner(**given | changes[section])
    # Only here, because a recorded recipe has every option.
    arguments["train"].check_given(changes["train"])
    listed = values.get("models", [{"name": ModelOptions().name}])
    if not isinstance(listed, list):
        raise UsageError(f"section models: must be a list, not {listed!r}")
    built = [_model(model, number, changes["model"]) for number, model in enumerate(listed, 1)]
    if models is not None and built:
        only_known(models, [model.name for model in built], f"recipe {arguments.get('name', Recipe.name)}: model")
        built = [model for model in built if model.name in models]
    return Recipe(**arguments, models=built)


def _model(values: Any, number: int, changes: dict[str, Any]) -> ModelOptions:
    given = _mapping(values, f"model {number}")
    label = f"model {given.get('name', number)}"
    only_known(given, _names(ModelOptions), f"{label}: option")
    if "name" not in given:
        raise UsageError(f"{label}: has no name, give each model its own")
    if given.get("context_source") is not None:
        # A conversion chooses everything but the width.
        fit = ("context_dim",) if given.get("from_baseline") else changes
        given |= {name: value for name, value in changes.items() if name in fit}
    try:
        return ModelOptions(**given)
    except UsageError as error:
        raise UsageError(f"{label}: {error}") from None


def _names(owner: type[Options]) -> list[str]:
    return [declared.name for declared in options_of(owner)]


def _mapping(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise UsageError(f"{what}: must be a mapping of names to values, not {values!r}")
    return dict(values)


def overridden(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe after the overrides of `recipe_from_dict`, checked as a whole."""
    return recipe_from_dict(recipe_to_dict(recipe), overrides)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as nested plain values; `recipe_from_dict` is the inverse."""
    return dataclasses.asdict(recipe)


def deciding_values(recipe: Recipe) -> dict[str, Any]:
    """`recipe_to_dict` without the options that change no result."""
    return recipe_to_dict(recipe) | {section: deciding(getattr(recipe, section)) for section in SECTIONS}


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as a YAML file that `load_recipe` reads."""
    write_bytes(path, yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True).encode())
