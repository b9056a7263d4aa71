"""What a sweep searches: the keys and values of `--over`, and the trainings that follow. Imports no torch.

A trial is one training: one model of the recipe, one setting, one seed. Its identity is what the recipe resolves to, so
a setting that does not concern a model (the context of the baseline, say) never makes a second trial of it. A model
that is made of the trained baseline waits for the baseline's trial of the same setting and seed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from context_pythia.config.options import Option, Options, options_of, suggestion
from context_pythia.config.recipe import PREFIXED, SECTIONS, ModelOptions, Recipe
from context_pythia.config.recipe_files import deciding_values, overridden
from context_pythia.errors import UsageError

SAMPLERS = ("grid", "tpe")
MODEL = "model"  # the searched dimension that says which model of the recipe is trained
NOT_SEARCHED = ("model.name", "model.from_baseline")
# The options of a model that only some context sources read.
SOURCES_OF = {
    "context_sharing": ("layer", "grouped"),
    "key_value_heads": ("grouped",),
    "num_rotary_keys": ("layer",),
    "context_block_layers": ("input", "shared"),
    "phase1": ("input", "shared"),
    "freeze_context_block": ("input", "shared"),
}


def _keys() -> dict[str, tuple[str, Option]]:
    """Every key of `--over`: an option's path, and its plain name as its flag has it."""
    found: dict[str, tuple[str, Option]] = {}
    owners: dict[str, type[Options]] = SECTIONS | {MODEL: ModelOptions}
    for section, owner in owners.items():
        prefix = f"{section}_" if section in PREFIXED else ""
        for declared in options_of(owner):
            path = f"{section}.{declared.name}"
            if path not in NOT_SEARCHED and not declared.free:
                found[path] = found[prefix + declared.name] = (path, declared)
    return found


KEYS = _keys()


@dataclass(frozen=True)
class Dimension:
    """A searched option: `values` to choose from or, for the sampler `tpe`, the range between two values.

    Attributes:
        path: the option, such as `train.learning_rate`.
        ranged: `values` are the two ends of a range.
        log: numbers are searched, drawn and weighed by their logarithms.
    """

    path: str
    values: tuple[Any, ...]
    ranged: bool = False
    log: bool = False

    @property
    def option(self) -> Option:
        return KEYS[self.path][1]

    @property
    def name(self) -> str:
        """The option's name as its flag has it, with underscores."""
        return next(key for key, (path, _) in KEYS.items() if path == self.path and "." not in key)


def parse_over(text: str) -> Dimension:
    """`"train.learning_rate=1e-4,1e-3"` -> the dimension; `"low..high"` and `"log:low..high"` are ranges.

    Raises:
        ValueError: the key is unknown, or the values are none; whether the option admits them is checked with the plan.
    """
    key, equals, given = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals or not given.strip():
        raise UsageError(f"--over {text!r}: give key=value,value or, with --sampler tpe, key=low..high")
    if key == "seed":
        raise UsageError("--over seed: seeds are given by --seeds 0,1,2")
    if key not in KEYS:
        paths = sorted({path for path, _ in KEYS.values()})
        raise UsageError(f"--over key {key!r} is unknown{suggestion(key, KEYS)}; valid: {', '.join(paths)}")
    path, option = KEYS[key]
    if found := re.fullmatch(r"(log:)?([^,:]+?)\.\.([^,]+)", given.strip()):
        return _range(path, option, found[2], found[3], bool(found[1]))
    values = tuple(_value(word.strip(), option) for word in given.split(","))
    if len(set(map(repr, values))) < len(values):
        raise UsageError(f"--over {key}: {given} names a value twice")
    return Dimension(path, values, log=by_logarithm(option))


def _range(path: str, option: Option, low: str, high: str, log: bool) -> Dimension:
    ends = [_value(word.strip(), option) for word in (low, high)]
    with_numbers = option.kind in (int, float) and all(isinstance(end, int | float) for end in ends)
    if not with_numbers or ends[0] >= ends[1]:
        raise UsageError(f"--over {path}: {low}..{high} is no range of numbers, low..high")
    if log and ends[0] <= 0:
        raise UsageError(f"--over {path}: log:{low}..{high} must begin above 0")
    return Dimension(path, tuple(ends), ranged=True, log=log or by_logarithm(option))


def by_logarithm(option: Option) -> bool:
    """Rates, thresholds and the like, which are above 0 by their declaration, differ by factors."""
    return option.kind is float and option.bounds.startswith("> 0") and "<" not in option.bounds


def _value(word: str, option: Option) -> Any:
    """The word as the option's kind; what does not fit stays as it is, for the option's own check to name it."""
    if option.optional and word in ("null", "none", "None"):
        return None
    if option.kind is str:
        return word
    try:
        value = yaml.safe_load(word)
        return float(value) if option.kind is float and not isinstance(value, bool) else value
    except (ValueError, TypeError, yaml.YAMLError):
        return word


def trial_values(recipe: Recipe) -> dict[str, Any]:
    """What decides a recipe's trials; options that are newer than old trials count only where they are set."""
    values = deciding_values(recipe)
    if values["train"]["tokens"] is None:
        del values["train"]["tokens"]
    if not values["architecture"]["match_parameters"]:
        del values["architecture"]["match_parameters"]
    for model in values["models"]:
        if model["context_source"] != "grouped":
            del model["key_value_heads"]
    if not any(model.from_baseline for model in recipe.models):
        del values["heal"]
        for model in values["models"]:
            del model["from_baseline"]
    return values


@dataclass(frozen=True)
class Setting:
    """A setting that can be trained: the values searched that concern the model, and the recipe they make of it."""

    params: Mapping[str, Any]
    recipe: Recipe

    @functools.cached_property
    def identity(self) -> str:
        """A hash of all that decides the result."""
        values = trial_values(self.recipe)
        del values["name"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def folder(self) -> str:
        """The name of its run folder: what was searched, legible, and the identity."""
        searched = [f"{path.rpartition('.')[2]}={value}" for path, value in self.params.items() if path != MODEL]
        words = [self.recipe.models[0].folder, *searched, f"seed={self.recipe.seed}"]
        legible = re.sub(r"[^\w.=+-]+", "-", "_".join(words))[:140]
        return f"{legible}_{self.identity}"

    def value(self, path: str) -> Any:
        """The option's value in the recipe, searched or not; None where it does not concern the model."""
        return _value_in(self.recipe, path) if _concerns(path, self.recipe.models[0]) else None

    def describe(self) -> str:
        """The setting on one line, as the console has it."""
        return ", ".join(
            [self.recipe.models[0].name]
            + [f"{path.rpartition('.')[2]} {value}" for path, value in self.params.items() if path != MODEL]
            + [f"seed {self.recipe.seed}"]
        )


@dataclass(frozen=True)
class SweepPlan:
    """A sweep as it was asked for. Making one checks every setting, so that a wrong value is found before any training.

    Attributes:
        recipe: the recipe with its overrides, which holds what is not searched.
        models: names of the recipe's models to train; each setting that concerns it is tried with each.
        trials: trainings in all, of the sampler `tpe`; they are shared evenly by models and seeds.
    """

    recipe: Recipe
    models: Sequence[str]
    dimensions: Sequence[Dimension]
    seeds: Sequence[int]
    sampler: str = "grid"
    trials: int | None = None
    _known: dict[str, Setting] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        trained = [model for model in self.recipe.models if model.name in self.models]
        healed = next((model.name for model in trained if model.from_baseline), None)
        if healed is not None and self._baseline not in self.models:
            named = self._baseline or "a baseline of the recipe"
            raise UsageError(f"{healed} is made of the trained baseline: name {named} with --models too")
        if healed is not None and self.sampler != "grid":
            raise UsageError(f"{healed} is made of the trained baseline of its setting: sweep it with --sampler grid")
        paths = [dimension.path for dimension in self.dimensions]
        for path in paths:
            if paths.count(path) > 1:
                raise UsageError(f"--over {path}: is given twice, name all its values in one")
        if self.sampler == "grid":
            if ranged := next((one for one in self.dimensions if one.ranged), None):
                raise UsageError(f"--over {ranged.path}: a range needs --sampler tpe; the grid takes values")
            if self.trials is not None:
                raise UsageError("--trials: is for --sampler tpe; the grid trains every combination")
        else:
            share = len(self.models) * len(self.seeds)
            if self.trials is None or self.trials % share:
                raise UsageError(
                    f"--trials {self.trials}: --sampler tpe needs a multiple of {share} "
                    f"({len(self.models)} models x {len(self.seeds)} seeds), so that each gets as many"
                )
        self.probes()

    def setting(self, params: Mapping[str, Any], seed: int) -> Setting:
        """The setting of `params` (values by path, and the model's name under `model`), reduced to what concerns it.

        Raises:
            ValueError: the values do not fit the options, or one another.
        """
        key = repr((sorted(params.items()), seed))
        if key not in self._known:
            self._known[key] = self._make(params, seed)
        return self._known[key]

    def _make(self, params: Mapping[str, Any], seed: int) -> Setting:
        name, given = params[MODEL], {path: value for path, value in params.items() if path != MODEL}
        alone = dataclasses.replace(self.recipe, models=[one for one in self.recipe.models if one.name == name])
        if alone.models[0].from_baseline:
            given = {path: value for path, value in given.items() if _concerns(path, alone.models[0])}
        elif alone.models[0].context_source is None:
            given = {path: value for path, value in given.items() if not path.startswith("model.")}
        full = overridden(alone, given | {"seed": seed})
        kept = [path for path in given if _concerns(path, full.models[0])]
        recipe = overridden(alone, {path: given[path] for path in kept} | {"seed": seed})
        resolved = {path: _value_in(recipe, path) for path in kept}
        return Setting({MODEL: name} | resolved, recipe)

    @property
    def _baseline(self) -> str | None:
        return next((model.name for model in self.recipe.models if model.is_baseline), None)

    def origin(self, setting: Setting) -> Setting | None:
        """The setting of the baseline that the model of `setting` is made of; None for one that is not made of any."""
        if not setting.recipe.models[0].from_baseline:
            return None
        return self.setting({**setting.params, MODEL: self._baseline}, setting.recipe.seed)

    def combinations(self) -> list[Setting]:
        """Every setting of the grid once, seed by seed, so that an early look at the study sees all of the settings."""
        found: dict[str, Setting] = {}
        for seed in self.seeds:
            for params in self._products([one.values for one in self.dimensions]):
                setting = self.setting(params, seed)
                found.setdefault(setting.identity, setting)
        return list(found.values())

    def probes(self) -> list[Setting]:
        """Settings that show whether all values are valid: the whole grid, or each value and end of a range in turn."""
        if self.sampler == "grid":
            return self.combinations()
        first = [one.values[:1] for one in self.dimensions]
        lists = ([*first[:i], one.values, *first[i + 1 :]] for i, one in enumerate(self.dimensions))
        return [self.setting(params, seed) for each in [first, *lists] for params in self._products(each)
                for seed in self.seeds]  # fmt: skip

    def _products(self, values: Sequence[Sequence[Any]]) -> Iterator[dict[str, Any]]:
        paths = [one.path for one in self.dimensions]
        for name in self.models:
            for combination in itertools.product(*values):
                yield {MODEL: name} | dict(zip(paths, combination, strict=True))


def _value_in(recipe: Recipe, path: str) -> Any:
    section, _, name = path.partition(".")
    return getattr(recipe.models[0] if section == MODEL else getattr(recipe, section), name)


def _concerns(path: str, model: ModelOptions) -> bool:
    """Whether the option at `path` can change what is trained of `model`."""
    section, _, name = path.partition(".")
    if section == "heal":
        return model.from_baseline
    if section == "phase1":
        return model.context_source in SOURCES_OF["phase1"] and model.phase1
    if section != MODEL:
        return True
    if model.from_baseline:
        return name == "context_dim" and model.context_source is not None
    if name == "context_source":
        return True
    return model.context_source is not None and model.context_source in SOURCES_OF.get(name, (model.context_source,))
