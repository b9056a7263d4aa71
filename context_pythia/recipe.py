"""What a run is: typed options, and the YAML recipes that fill them.

Every option is declared, documented and bounded here once. The command line makes its flags from these dataclasses, so
this module imports neither torch nor transformers: `context-pythia compare --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from context_pythia.files import write_bytes
from context_pythia.options import Options, deciding, option, options_of, suggestion

CONTEXT_SOURCES = ("input", "shared", "layer")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
PRECISIONS = ("float32", "bfloat16", "float16")
ROTARY_FRACTION = 0.25


@dataclass
class DataOptions(Options):
    """The text, its tokenizer, and how it is packed into samples."""

    section: ClassVar[str] = "data"
    data: str = option("builtin", "builtin, a file or folder (text, JSONL, .jsonl.gz, Parquet), or a Hub name[:config]")
    data_split: str = option("train", "split of a Hub data set")
    text_field: str = option("text", "field that holds the text in JSONL, Parquet and Hub data")
    tokenizer: str = option(
        "train", "train (byte-level BPE on the training split), a tokenizer.json, a folder or a Hub name"
    )
    vocab_size: int = option(8192, "size of the vocabulary when the tokenizer is trained", bounds=">= 257")
    samples: int = option(10_000, "samples in all, training and validation together", bounds=">= 2")
    sequence_length: int = option(128, "tokens a sample, the target of the last one not counted", bounds=">= 1")
    validation_fraction: float = option(
        0.1, "share of the samples held out; documents are split before packing", bounds="> 0 and < 1"
    )
    cache_dir: str | None = option(None, "folder for packed data (default: $XDG_CACHE_HOME/context-pythia)", free=True)


@dataclass
class ArchitectureOptions(Options):
    """The GPT-NeoX body of the baseline and every context model. The defaults are Pythia-70M's."""

    section: ClassVar[str] = "architecture"
    hidden_size: int = option(512, "width of the residual stream", bounds=">= 1")
    num_hidden_layers: int = option(6, "layers", bounds=">= 1")
    num_attention_heads: int = option(8, "attention heads a layer", bounds=">= 1")
    intermediate_size: int = option(2048, "width of the MLP", bounds=">= 1")
    max_position_embeddings: int = option(2048, "longest sequence", bounds=">= 1")
    model_vocab_size: int | None = option(
        None, "rows of the embedding (default: the tokenizer's, up to a multiple of 128)", bounds=">= 1"
    )
    hidden_dropout: float = option(
        0.0, "dropout after embedding, attention and MLP, and of the context of shared", bounds=">= 0 and < 1"
    )
    attention_dropout: float = option(0.0, "dropout of attention weights", bounds=">= 0 and < 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise ValueError(
                f"architecture.hidden_size {self.hidden_size}: must be a multiple of num_attention_heads = {heads}"
            )
        if self.rotary_dims < 2 or self.rotary_dims % 2:
            raise ValueError(
                f"architecture.hidden_size {self.hidden_size}: a quarter of a head is turned by RoPE in pairs, "
                f"so give a multiple of 8 * num_attention_heads = {8 * heads}"
            )

    @property
    def rotary_dims(self) -> int:
        """Dims of a head that RoPE turns, which is the width of one rotary key."""
        return int(self.hidden_size // self.num_attention_heads * ROTARY_FRACTION)


@dataclass
class Phase1Options(Options):
    """OACD, which iterates the ContextBlock alone to a fixed point. The defaults are the report's, but for the rate."""

    section: ClassVar[str] = "phase1"
    max_iterations: int = option(100, "iterations at most", bounds=">= 1")
    convergence_rate: float = option(0.95, "share of converged tokens at which training stops", bounds="> 0 and <= 1")
    threshold: float = option(0.03, "mean squared movement below which a token counts as converged", bounds="> 0")
    learning_rate: float = option(0.003, "Adam learning rate", bounds="> 0")
    batch_tokens: int = option(5000, "tokens a batch of one iteration", bounds=">= 1")
    noise: float = option(0.05, "standard deviation of the noise added to the previous contexts", bounds=">= 0")
    mean_penalty: float = option(0.1, "weight of the squared norm of the mean context", bounds=">= 0")
    max_grad_norm: float = option(2.0, "gradient norm limit", bounds="> 0")
    state_dtype: str = option("float32", "dtype in which the contexts of the corpus are kept", ("float32", "bfloat16"))
    precision: str = option("float32", "float32, or autocast to bfloat16", ("float32", "bfloat16"))
    checkpoint_seconds: float = option(60.0, "least time between two checkpoints", bounds=">= 0", free=True)


@dataclass
class TrainOptions(Options):
    """Language-model training. The defaults are the report's settings."""

    section: ClassVar[str] = "train"
    epochs: int = option(10, "epochs at most", bounds=">= 1")
    batch_size: int = option(32, "samples a batch, divided among the processes", bounds=">= 1")
    learning_rate: float = option(1e-4, "AdamW learning rate", bounds="> 0")
    schedule: str = option("constant", "learning-rate schedule", SCHEDULES)
    warmup_ratio: float = option(0.0, "share of the steps in which the learning rate rises", bounds=">= 0 and <= 1")
    weight_decay: float = option(0.01, "AdamW weight decay", bounds=">= 0")
    patience: int = option(1, "evaluations without a better validation perplexity before training stops", bounds=">= 1")
    max_grad_norm: float = option(1.0, "gradient norm limit, 0 for none", bounds=">= 0")
    gradient_accumulation: int = option(1, "batches a step", bounds=">= 1")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass", free=True)
    precision: str = option("float32", "float32, or autocast to bfloat16 or float16", PRECISIONS)
    checkpoint_steps: int = option(
        0, "also checkpoint every so many steps (0: once an epoch)", bounds=">= 0", free=True
    )
    tensorboard: bool = option(False, "write TensorBoard logs (extra: context-pythia[tensorboard])", free=True)


@dataclass
class ModelOptions(Options):
    """One model of a run. Without a `context_source` it is the baseline, `GPTNeoXForCausalLM` itself."""

    name: str = option("Pythia", "name in tables and of the model's folder")
    context_source: str | None = option(None, "who makes the context; empty for the baseline", CONTEXT_SOURCES)
    context_dim: int = option(256, "width of the context")
    context_block_layers: int = option(1, "layers of the ContextBlock (sources input and shared)", bounds=">= 1")
    context_sharing: int = option(1, "consecutive layers that attend to one context (source layer)", bounds=">= 1")
    num_rotary_keys: int = option(
        1, "rotary keys in a layer's context: 1, shared by the heads, or one a head (source layer)", bounds=">= 1"
    )
    phase1: bool = option(True, "train the ContextBlock by OACD first (sources input and shared)")
    freeze_context_block: bool = option(True, "keep the ContextBlock fixed in phase 2")

    @property
    def folder(self) -> str:
        """The name of the model's folder: `"Context-Pythia layer 256"` -> `"context-pythia-layer-256"`."""
        return re.sub(r"\W+", "-", self.name.casefold()).strip("-")


@dataclass
class Recipe(Options):
    """A whole run: `models` trained on the same data with the same seed."""

    name: str = option("custom", "name of the recipe")
    seed: int = option(0, "seed of initial weights, order of the samples and noise", bounds=">= 0 and < 4294967296")
    data: DataOptions = field(default_factory=DataOptions)
    architecture: ArchitectureOptions = field(default_factory=ArchitectureOptions)
    phase1: Phase1Options = field(default_factory=Phase1Options)
    train: TrainOptions = field(default_factory=TrainOptions)
    models: list[ModelOptions] = field(default_factory=lambda: [ModelOptions()])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w.+ -]*", self.name):
            raise ValueError(f"name {self.name!r}: must be letters, digits, spaces and . + - _ (it names the folder)")
        if self.data.sequence_length > self.architecture.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length}: "
                f"must be at most max_position_embeddings = {self.architecture.max_position_embeddings}"
            )
        rows = self.architecture.model_vocab_size
        if rows is not None and self.data.tokenizer == "train" and rows < self.data.vocab_size:
            raise ValueError(
                f"architecture.model_vocab_size {rows}: must be at least vocab_size = {self.data.vocab_size}"
            )
        self._check_models()

    def _check_models(self) -> None:
        if not self.models:
            raise ValueError("models: is empty, name at least one model")
        folders: dict[str, str] = {}
        for model in self.models:
            folder = model.folder
            if not folder or "," in model.name:
                raise ValueError(f"models: name {model.name!r}: must hold letters or digits, and no comma")
            if folder in folders:
                raise ValueError(f"models: name {model.name!r}: is taken by {folders[folder]!r}, give each its own")
            folders[folder] = model.name
            if model.context_source is not None:
                _check_context(model, self.architecture)


def _check_context(model: ModelOptions, architecture: ArchitectureOptions) -> None:
    """Raise `ValueError` where a model's context does not fit the body."""
    widest = 2 * architecture.hidden_size
    if not 1 <= model.context_dim <= widest:
        raise ValueError(f"context_dim {model.context_dim}: must be between 1 and 2 * hidden_size = {widest}")
    layers = architecture.num_hidden_layers
    if model.context_sharing > layers:
        raise ValueError(f"context_sharing {model.context_sharing}: must be between 1 and num_hidden_layers = {layers}")
    if model.context_source != "layer":
        return
    heads, keys = architecture.num_attention_heads, model.num_rotary_keys
    if keys not in (1, heads):
        raise ValueError(f"num_rotary_keys {keys}: must be 1 or num_attention_heads = {heads}")
    rotary = keys * architecture.rotary_dims
    if model.context_dim <= rotary:
        raise ValueError(
            f"context_dim {model.context_dim}: must be more than the {rotary} dims of the rotary keys "
            f"that a layer's context includes ({keys} of {architecture.rotary_dims})"
        )


SECTIONS: dict[str, type[Options]] = {
    "data": DataOptions,
    "architecture": ArchitectureOptions,
    "phase1": Phase1Options,
    "train": TrainOptions,
}


def _only_known(given: Iterable[Any], known: Sequence[str], what: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{what} {key!r} is unknown{suggestion(key, known)}; valid: {', '.join(known)}")


def _option_names(owner: type[Options]) -> list[str]:
    return [declared.name for declared in options_of(owner)]


def packaged_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    folder = importlib.resources.files("context_pythia") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _read(name_or_path: str) -> tuple[str, Any]:
    """Name and parsed YAML of a packaged recipe or a recipe file."""
    path = Path(name_or_path)
    if name_or_path in packaged_recipes():
        text = (importlib.resources.files("context_pythia") / "recipes" / f"{name_or_path}.yaml").read_text("utf-8")
    elif path.is_file():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe {name_or_path}: is not UTF-8 text ({error.reason})") from None
    else:
        known = packaged_recipes()
        raise ValueError(
            f"recipe {name_or_path!r} is unknown{suggestion(name_or_path, known)}; "
            f"valid: {', '.join(known)}, or a YAML file"
        )
    try:
        return path.name.removesuffix(".yaml").removesuffix(".yml"), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name_or_path}: is not valid YAML ({' '.join(str(error).split())})") from None


def load_recipe(
    name_or_path: str, overrides: Mapping[str, Any] | None = None, models: Sequence[str] | None = None
) -> Recipe:
    """Read a recipe, put the overrides over its values, and check the whole.

    Args:
        name_or_path: a packaged name (see `packaged_recipes`) or a YAML file, which holds what differs from the
            defaults: `name`, `seed`, the sections `data`, `architecture`, `phase1` and `train`, and a list `models`.
        overrides: values by dotted path: `train.learning_rate`, `seed`; `model.context_dim` goes to every model with a
            context source.
        models: the names of the models to keep, in the recipe's order; all of them if absent.

    Raises:
        ValueError: unknown recipe, section, option, value or model; the message names it and the valid ones.
    """
    stem, values = _read(name_or_path)
    recipe = recipe_from_dict({"name": stem} | _mapping({} if values is None else values, f"recipe {name_or_path}"))
    if models is not None:
        _only_known(models, [model.name for model in recipe.models], f"recipe {recipe.name}: model")
        recipe = dataclasses.replace(recipe, models=[model for model in recipe.models if model.name in models])
    return overridden(recipe, overrides or {})


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe that nested plain values describe, what they leave out at its default.

    Raises:
        ValueError: a key or value that is not valid.
    """
    scalars = _option_names(Recipe)
    _only_known(values, [*scalars, *SECTIONS, "models"], "section")
    arguments: dict[str, Any] = {name: values[name] for name in scalars if name in values}
    for section, options in SECTIONS.items():
        # A section whose every line is commented out is None to YAML.
        given = _mapping(values.get(section) or {}, f"section {section}")
        _only_known(given, _option_names(options), f"option {section}:")
        arguments[section] = options(**given)
    if "models" in values:
        if not isinstance(values["models"], list):
            raise ValueError(f"section models: must be a list, not {values['models']!r}")
        arguments["models"] = [_model_from_dict(model, i) for i, model in enumerate(values["models"], 1)]
    return Recipe(**arguments)


def _model_from_dict(values: Any, position: int) -> ModelOptions:
    given = _mapping(values, f"model {position}")
    label = f"model {given.get('name', position)}"
    _only_known(given, _option_names(ModelOptions), f"{label}: option")
    if "name" not in given:
        raise ValueError(f"{label}: has no name, give each model its own")
    try:
        return ModelOptions(**given)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


def _mapping(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{what}: must be a mapping of names to values, not {values!r}")
    return dict(values)


def overridden(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with values by dotted path over its own, checked as a whole; see `load_recipe`."""
    owners: dict[str, type[Options]] = {"": Recipe, "model": ModelOptions} | SECTIONS
    changes: dict[str, dict[str, Any]] = {section: {} for section in owners}
    known = [f"{s}.{name}".lstrip(".") for s, owner in owners.items() for name in _option_names(owner)]
    _only_known(overrides, known, "option")
    for path, value in overrides.items():
        section, _, name = path.rpartition(".")
        changes[section][name] = value
    arguments: dict[str, Any] = changes.pop("")
    of_models = changes.pop("model")
    for section, values in changes.items():
        arguments[section] = dataclasses.replace(getattr(recipe, section), **values)
    arguments["models"] = [
        model if model.context_source is None else dataclasses.replace(model, **of_models) for model in recipe.models
    ]
    return dataclasses.replace(recipe, **arguments)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as nested plain values; `recipe_from_dict` is the way back."""
    return dataclasses.asdict(recipe)


def deciding_values(recipe: Recipe) -> dict[str, Any]:
    """`recipe_to_dict` without the options that change no result."""
    return recipe_to_dict(recipe) | {section: deciding(getattr(recipe, section)) for section in SECTIONS}


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as a YAML file that `load_recipe` reads."""
    write_bytes(path, yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True).encode())
