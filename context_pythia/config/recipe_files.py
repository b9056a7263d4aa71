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


def _option_names(owner: type[Options]) -> list[str]:
    return [declared.name for declared in options_of(owner)]


def packaged_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


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


def load_recipe(
    name_or_path: str, overrides: Mapping[str, Any] | None = None, models: Sequence[str] | None = None
) -> Recipe:
    """Read a recipe, apply the overrides, and check the result.

    Args:
        name_or_path: a packaged name (see `packaged_recipes`) or a YAML file, which holds what differs from the
            defaults: `name`, `seed`, the sections of `SECTIONS`, and a list `models`.
        overrides: values by dotted path: `train.learning_rate`, `seed`; `model.context_dim` goes to every model with a
            context source.
        models: the names of the models to keep, in the recipe's order; all of them if absent.

    Raises:
        UsageError: unknown recipe, section, option, value or model; the message names it and the valid ones.
    """
    stem, content = _read(name_or_path)
    values = {"name": stem} | _mapping({} if content is None else content, f"recipe {name_or_path}")
    if models is not None:
        values = _selected(values, models)  # before the overrides, which the other models may not fit
    return recipe_from_dict(_overlaid(values, overrides or {}))


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe of nested plain values; missing ones get their defaults.

    Raises:
        UsageError: a key or value that is not valid.
    """
    scalars = _option_names(Recipe)
    only_known(values, [*scalars, *SECTIONS, "models"], "section")
    arguments: dict[str, Any] = {name: values[name] for name in scalars if name in values}
    for section, options in SECTIONS.items():
        # A section whose every line is commented out is None to YAML.
        given = _mapping(values.get(section) or {}, f"section {section}")
        only_known(given, _option_names(options), f"option {section}:")
        arguments[section] = options(**given)
    if "models" in values:
        if not isinstance(values["models"], list):
            raise UsageError(f"section models: must be a list, not {values['models']!r}")
        arguments["models"] = [_model_from_dict(model, i) for i, model in enumerate(values["models"], 1)]
    return Recipe(**arguments)


def _selected(values: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """A recipe's nested values with only the wanted models. An invalid list of models stays, to be refused later."""
    models = values.get("models", [{"name": model.name} for model in Recipe().models])
    if not isinstance(models, list) or not models:
        return values
    names = [_model_from_dict(model, i).name for i, model in enumerate(models, 1)]
    kept = in_order(wanted, names, values["name"])
    return values | {"models": [model for model, name in zip(models, names, strict=True) if name in kept]}


def in_order(wanted: Sequence[str], names: Sequence[str], recipe: str) -> list[str]:
    """The wanted of a recipe's models, in the recipe's order.

    Raises:
        UsageError: the recipe lacks a wanted model.
    """
    only_known(wanted, names, f"recipe {recipe}: model")
    return [name for name in names if name in wanted]


def _model_from_dict(values: Any, position: int) -> ModelOptions:
    given = _mapping(values, f"model {position}")
    label = f"model {given.get('name', position)}"
    only_known(given, _option_names(ModelOptions), f"{label}: option")
    if "name" not in given:
        raise UsageError(f"{label}: has no name, give each model its own")
    try:
        return ModelOptions(**given)
    except UsageError as error:
        raise UsageError(f"{label}: {error}") from None


def _mapping(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise UsageError(f"{what}: must be a mapping of names to values, not {values!r}")
    return dict(values)


def overridden(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe after overrides by dotted path, checked as a whole; see `load_recipe`."""
    return recipe_from_dict(_overlaid(recipe_to_dict(recipe), overrides))


def _overlaid(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's nested values after overrides. Only the result is checked: one override may need another."""
    changes: dict[str, dict[str, Any]] = {section: {} for section in OF_A_RECIPE}
    only_known(overrides, options_by_path(OF_A_RECIPE), "option", "context-pythia compare --set help")
    for path, value in overrides.items():
        section, _, name = path.rpartition(".")
        changes[section][name] = value
    result = dict(values) | changes.pop("")
    of_models = changes.pop("model")
    for section, given in changes.items():
        if given:
            result[section] = _mapping(values.get(section) or {}, f"section {section}") | given
    if of_models and isinstance(values.get("models"), list):
        result["models"] = [_overlaid_model(model, of_models) for model in values["models"]]
    return result


def _overlaid_model(model: Any, changes: Mapping[str, Any]) -> Any:
    if not isinstance(model, Mapping) or model.get("context_source") is None:
        return model
    if model.get("from_baseline"):
        # A conversion chooses everything but the width.
        changes = {name: value for name, value in changes.items() if name == "context_dim"}
    return {**model, **changes}


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as nested plain values; `recipe_from_dict` is the inverse."""
    return dataclasses.asdict(recipe)


def deciding_values(recipe: Recipe) -> dict[str, Any]:
    """`recipe_to_dict` without the options that change no result."""
    return recipe_to_dict(recipe) | {section: deciding(getattr(recipe, section)) for section in SECTIONS}


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as a YAML file that `load_recipe` reads."""
    write_bytes(path, yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True).encode())
