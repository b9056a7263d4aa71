"""What a sweep searches: the keys and values of `--over`, and the trainings that result. Imports no torch.

A training is one model of the recipe with one setting and one seed. Its name lists the differences to the sweep's
recipe. An option that does not affect a model (such as the context width of the baseline) never causes a second
training of it, and a new option of the package changes no name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from context_pythia.config.recipe import OF_ONE_MODEL, SECTIONS, ModelOptions, Recipe
from context_pythia.config.recipe_files import options_by_path, overridden, path_of, plain_name
from context_pythia.errors import UsageError

SAMPLERS = ("grid", "tpe")
MODEL = "model"  # the section of a model's options
# The options that `--over` takes, by path.
KEYS = {
    path: declared
    for path, declared in options_by_path(SECTIONS | {MODEL: ModelOptions}).items()
    if path not in OF_ONE_MODEL and not declared.free
}


class Dimension(NamedTuple):
    """A searched option.

    Attributes:
        values: values to choose from, or the two ends of a range.
        ranged: whether `values` are the ends of a range (only for the sampler `tpe`).
    """

    path: str
    values: tuple[Any, ...]
    ranged: bool = False

    @property
    def log(self) -> bool:
        """Whether numbers of the range are drawn on a logarithmic scale."""
        option = KEYS[self.path]
        # Rates, thresholds and others that must be above 0.
        return self.ranged and option.kind is float and option.bounds.startswith("> 0") and "<" not in option.bounds


def parse_over(text: str) -> Dimension:
    """Parse `"train.learning_rate=1e-4,1e-3"`; `"low..high"` is a range.

    Raises:
        UsageError: the key is unknown, or the text has no valid values. `SweepPlan` checks the bounds of the option.
    """
    key, _, given = text.partition("=")
    if not given.strip():
        raise UsageError(f"--over {text!r}: give key=value,value or, with --sampler tpe, key=low..high")
    path = path_of(key, KEYS, "--over", "context-pythia sweep --set help")
    option = KEYS[path]
    ends = re.fullmatch(r"([^,]+?)\.\.([^,]+)", given)
    words = ends.groups() if ends else given.split(",")
    values = tuple(dict.fromkeys(option.parse(word.strip()) for word in words))
    if ends and (option.kind not in (int, float) or str in map(type, values) or values[0] >= values[-1]):
        raise UsageError(f"--over {path}: {given} must be two numbers, the lower one first")
    return Dimension(path, values, bool(ends))


class Setting(NamedTuple):
    """A training.

    Attributes:
        name: the name of its folder.
        recipe: the sweep's recipe with one model, one seed and the searched values.
    """

    name: str
    recipe: Recipe

    @property
    def model(self) -> ModelOptions:
        return self.recipe.models[0]

    def value(self, path: str) -> Any:
        """The value of any option; None if the option does not affect the model."""
        return _value_in(self.recipe, path) if _concerns(path, self.model) else None


@dataclass
class SweepPlan:
    """The request for a sweep. The constructor checks every setting, which finds a wrong value before any training.

    Attributes:
        recipe: has the models to train and the values that are not searched.
        trials: total number of trainings for the sampler `tpe`; all models and seeds get the same number.
        settings: for a grid, all trainings, each once; for `tpe`, settings that try each value and each end of a range.

    Raises:
        UsageError: the options are invalid, or contradict each other.
    """

    recipe: Recipe
    dimensions: Sequence[Dimension]
    seeds: Sequence[int]
    sampler: str = "grid"
    trials: int | None = None
    settings: list[Setting] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        paths, models = [one.path for one in self.dimensions], self.recipe.models
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise UsageError(f"--over {twice}: is given twice, list all values in one --over")
        if self.sampler == "grid":
            of_tpe = [f"--over {one.path}=low..high" for one in self.dimensions if one.ranged]
            of_tpe += [] if self.trials is None else ["--trials"]
            if of_tpe:
                raise UsageError(f"{of_tpe[0]}: needs --sampler tpe; the grid trains every combination of values")
        elif self.trials is None or self.trials % (share := len(models) * len(self.seeds)):
            raise UsageError(
                f"--trials {self.trials}: --sampler tpe needs a multiple of {share} "
                f"({len(models)} models x {len(self.seeds)} seeds), so each gets the same number"
            )
        healed = next((model.name for model in models if model.from_baseline), None)
        if healed and (self.sampler != "grid" or not any(model.is_baseline for model in models)):
            raise UsageError(
                f"{healed} starts from the trained baseline: "
                "name the baseline with --models too, and sweep with --sampler grid"
            )
        # Seed by seed, so an early report has all settings. Models that start from a trained baseline come last.
        asked = itertools.product(self.seeds, [model.name for model in models], list(self._combinations()))
        found = {one.name: one for one in (self.setting(model, values, seed) for seed, model, values in asked)}
        self.settings = sorted(found.values(), key=lambda one: one.model.from_baseline)

    def setting(self, model: str, values: Mapping[str, Any], seed: int) -> Setting:
        """The training of a model with the values (by path) that affect it.

        Raises:
            UsageError: a value is invalid, or the values contradict each other.
        """
        base = dataclasses.replace(self.recipe, models=[one for one in self.recipe.models if one.name == model])
        full = overridden(base, values)
        concerning = {path: value for path, value in values.items() if _concerns(path, full.models[0])}
        recipe = overridden(base, concerning | {"seed": seed})
        words = [f"{plain_name(path)}={_legible(path, value)}" for path, value in differences(recipe, base).items()]
        return Setting("_".join([recipe.models[0].folder, *words, f"seed={seed}"]), recipe)

    def origin(self, setting: Setting) -> Setting | None:
        """The training of the baseline from which the model of `setting` starts; None if it starts from scratch."""
        if not setting.model.from_baseline:
            return None
        baseline = next(model.name for model in self.recipe.models if model.is_baseline)
        return self.setting(baseline, differences(setting.recipe, self.recipe), setting.recipe.seed)

    def _combinations(self) -> Iterator[dict[str, Any]]:
        if self.sampler == "grid":
            for chosen in itertools.product(*(one.values for one in self.dimensions)):
                yield {one.path: value for one, value in zip(self.dimensions, chosen, strict=True)}
            return
        first = {one.path: one.values[0] for one in self.dimensions}
        yield first
        for one in self.dimensions:
            for value in one.values:
                yield first | {one.path: value}


def differences(recipe: Recipe, base: Recipe) -> dict[str, Any]:
    """The values of the recipe, by path, that differ from `base`. Models are compared by name."""
    alone = dataclasses.replace(base, models=[one for one in base.models if one.name == recipe.models[0].name])
    return {path: value for path in sorted(KEYS) if (value := _value_in(recipe, path)) != _value_in(alone, path)}


def _legible(path: str, value: Any) -> str:
    """The value as a part of a folder's name. Free text, such as a path, is shortened and gets a digest."""
    option = KEYS[path]
    if option.kind is not str or option.choices:
        return str(value)
    digest = hashlib.sha256(str(value).encode()).hexdigest()[:6]
    return re.sub(r"[^\w.+-]+", "-", str(value))[-30:] + f"-{digest}"


def _value_in(recipe: Recipe, path: str) -> Any:
    section, _, name = path.partition(".")
    return getattr(recipe.models[0] if section == MODEL else getattr(recipe, section), name)


def _concerns(path: str, model: ModelOptions) -> bool:
    """Whether the option at `path` affects the training of `model`."""
    section, _, name = path.partition(".")
    if section == "heal":
        return model.from_baseline
    if section == "phase1":
        return model.context_source in KEYS["model.phase1"].sources and model.phase1
    if section != MODEL:
        return True
    if model.from_baseline:
        return name == "context_dim" and model.context_source is not None
    if name == "context_dim" and model.layer_context_dims:
        return False  # which take its place
    sources = KEYS[path].sources
    return not sources or model.context_source in sources
