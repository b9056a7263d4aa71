"""What a sweep searches: the keys and values of `--over`, and the trainings that follow. Imports no torch.

A training is one model of the recipe with one setting and one seed. Its name says what differs from the sweep's recipe:
a value that does not concern a model (the context of the baseline, say) never makes a second training of it, and an
option that is added to the package changes no name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from context_pythia.config.options import Option, Options, options_of, suggestion
from context_pythia.config.recipe import PREFIXED, SECTIONS, ModelOptions, Recipe
from context_pythia.config.recipe_files import overridden
from context_pythia.errors import UsageError

SAMPLERS = ("grid", "tpe")
MODEL = "model"  # the searched dimension that says which model of the recipe is trained
NOT_SEARCHED = ("model.name", "model.from_baseline")
# The options of a model that only some context sources read.
SOURCES_OF = {
    "context_dim": ("input", "shared", "layer"),
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
FLAGS = {path: key for key, (path, _) in KEYS.items() if "." not in key}  # plain names by path


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


def parse_over(text: str) -> Dimension:
    """`"train.learning_rate=1e-4,1e-3"` -> the dimension; `"low..high"` and `"log:low..high"` are ranges.

    Raises:
        UsageError: the key is unknown, or the values are none; whether the option admits them is checked with the plan.
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
    values = tuple(option.parse(word.strip()) for word in given.split(","))
    if len(set(map(repr, values))) < len(values):
        raise UsageError(f"--over {key}: {given} names a value twice")
    return Dimension(path, values, log=by_logarithm(option))


def _range(path: str, option: Option, low: str, high: str, log: bool) -> Dimension:
    ends = [option.parse(word.strip()) for word in (low, high)]
    with_numbers = option.kind in (int, float) and all(isinstance(end, int | float) for end in ends)
    if not with_numbers or ends[0] >= ends[1]:
        raise UsageError(f"--over {path}: {low}..{high} is no range of numbers, low..high")
    if log and ends[0] <= 0:
        raise UsageError(f"--over {path}: log:{low}..{high} must begin above 0")
    return Dimension(path, tuple(ends), ranged=True, log=log or by_logarithm(option))


def by_logarithm(option: Option) -> bool:
    """Rates, thresholds and the like, which are above 0 by their declaration, differ by factors."""
    return option.kind is float and option.bounds.startswith("> 0") and "<" not in option.bounds


@dataclass(frozen=True)
class Setting:
    """What can be trained: one model with one seed.

    Attributes:
        params: the searched values that concern the model, by path, and the model's name under `model`.
        recipe: the sweep's recipe with these values, this model alone and this seed.
        name: the model, each value that is not the sweep's recipe's, and the seed; it names the run folder.
    """

    params: Mapping[str, Any]
    recipe: Recipe
    name: str

    @property
    def model(self) -> ModelOptions:
        return self.recipe.models[0]

    def value(self, path: str) -> Any:
        """The option's value in the recipe, searched or not; None where it does not concern the model."""
        return _value_in(self.recipe, path) if _concerns(path, self.model) else None


@dataclass
class SweepPlan:
    """A sweep as it was asked for. Making one checks every setting, so that a wrong value is found before any training.

    Attributes:
        recipe: the recipe with its overrides, which holds what is not searched.
        models: names of the recipe's models to train; each setting that concerns it is tried with each.
        trials: trainings in all, of the sampler `tpe`; they are shared evenly by models and seeds.
        settings: of a grid, everything to train, each once; of `tpe`, each value and end of a range in turn.
    """

    recipe: Recipe
    models: Sequence[str]
    dimensions: Sequence[Dimension]
    seeds: Sequence[int]
    sampler: str = "grid"
    trials: int | None = None
    settings: list[Setting] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        paths = [one.path for one in self.dimensions]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise UsageError(f"--over {twice}: is given twice, name all its values in one")
        if self.sampler == "grid":
            if ranged := next((one.path for one in self.dimensions if one.ranged), None):
                raise UsageError(f"--over {ranged}: a range needs --sampler tpe; the grid takes values")
            if self.trials is not None:
                raise UsageError("--trials: is for --sampler tpe; the grid trains every combination")
        elif self.trials is None or self.trials % (share := len(self.models) * len(self.seeds)):
            raise UsageError(
                f"--trials {self.trials}: --sampler tpe needs a multiple of {share} "
                f"({len(self.models)} models x {len(self.seeds)} seeds), so that each gets as many"
            )
        healed = next((m.name for m in self.recipe.models if m.name in self.models and m.from_baseline), None)
        if healed is not None and self._baseline not in self.models:
            named = self._baseline or "a baseline of the recipe"
            raise UsageError(f"{healed} is made of the trained baseline: name {named} with --models too")
        if healed is not None and self.sampler != "grid":
            raise UsageError(f"{healed} is made of the trained baseline of its setting: sweep it with --sampler grid")
        # Seed by seed, so that an early look sees all settings; last what goes on from a trained baseline.
        made = [self.setting(params, seed) for seed in self.seeds for params in self._combinations()]
        self.settings = sorted({one.name: one for one in made}.values(), key=lambda one: one.model.from_baseline)

    def setting(self, params: Mapping[str, Any], seed: int) -> Setting:
        """The setting of `params` (values by path, and the model's name under `model`), reduced to what concerns it.

        Raises:
            UsageError: the values do not fit the options, or one another.
        """
        alone = dataclasses.replace(self.recipe, models=[m for m in self.recipe.models if m.name == params[MODEL]])
        values = {path: value for path, value in params.items() if path != MODEL}
        full = overridden(alone, values | {"seed": seed})
        values = {path: value for path, value in values.items() if _concerns(path, full.models[0])}
        recipe = overridden(alone, values | {"seed": seed})
        values = {path: _value_in(recipe, path) for path in sorted(values)}
        differs = {path: value for path, value in values.items() if value != _value_in(alone, path)}
        words = [recipe.models[0].folder, *(f"{FLAGS[path]}={_legible(path, v)}" for path, v in differs.items())]
        return Setting({MODEL: params[MODEL]} | values, recipe, "_".join([*words, f"seed={seed}"]))

    @property
    def _baseline(self) -> str | None:
        return next((model.name for model in self.recipe.models if model.is_baseline), None)

    def origin(self, setting: Setting) -> Setting | None:
        """The setting of the baseline that the model of `setting` is made of; None for one that is not made of any."""
        if not setting.model.from_baseline:
            return None
        return self.setting({**setting.params, MODEL: self._baseline}, setting.recipe.seed)

    def _combinations(self) -> Iterator[dict[str, Any]]:
        lists = [[one.values for one in self.dimensions]]
        if self.sampler != "grid":
            first = [values[:1] for values in lists[0]]
            lists = [first, *([*first[:i], one.values, *first[i + 1 :]] for i, one in enumerate(self.dimensions))]
        for values in lists:
            for name, *chosen in itertools.product(self.models, *values):
                yield {MODEL: name} | dict(zip((one.path for one in self.dimensions), chosen, strict=True))


def _legible(path: str, value: Any) -> str:
    """The value as a part of a folder's name; free text, a path say, in short and with a digest."""
    option = KEYS[path][1]
    if option.kind is not str or option.choices:
        return str(value)
    digest = hashlib.sha256(str(value).encode()).hexdigest()[:6]
    return re.sub(r"[^\w.+-]+", "-", str(value))[-30:] + f"-{digest}"


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
