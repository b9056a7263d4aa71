"""What a run is, in typed options; `recipe_files.py` fills them from YAML.

Every option is declared, documented and bounded here once. The command line makes its flags from these dataclasses, so
this module imports neither torch nor transformers: `context-pythia compare --help` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from context_pythia.config.options import Options, default_of, option
from context_pythia.errors import UsageError, fitting

CONTEXT_SOURCES = ("input", "shared", "layer", "grouped")
RECURRENT = ("input", "shared")  # the sources with a ContextBlock
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
PRECISIONS = ("float32", "bfloat16", "float16")
AUTOCAST = ("float32", "bfloat16")
HEALED_PARAMETERS = ("attention", "all")
ROTARY_FRACTION = 0.25


@dataclass
class DataOptions(Options):
    """The text, its tokenizer, and how it is packed into samples."""

    section: ClassVar[str] = "data"
    data: str = option(
        "builtin",
        "builtin, a file or folder (text, JSONL, .jsonl.gz, Parquet), a Hub name[:config], recall (generated samples)",
        flag=True,
    )
    data_split: str = option("train", "split of a Hub data set")
    text_field: str = option("text", "field that holds the text in JSONL, Parquet and Hub data")
    tokenizer: str = option(
        "train",
        "train (byte-level BPE on the training split), a tokenizer.json, a folder or a Hub name "
        "(default: train; for saved models, theirs)",
        flag=True,
    )
    vocab_size: int = option(8192, "size of the vocabulary when the tokenizer is trained", bounds=">= 257")
    samples: int = option(10_000, "samples in all, training and validation together", bounds=">= 2", flag=True)
    sequence_length: int = option(
        128, "tokens a sample, the target of the last one not counted", bounds=">= 1", flag=True
    )
    validation_fraction: float = option(
        0.1, "share of the samples held out; documents are split before packing", bounds="> 0 and < 1"
    )
    cache_dir: str | None = option(
        None, "folder for packed data (default: $XDG_CACHE_HOME/context-pythia)", free=True, flag=True
    )

    def split_sizes(self, samples: int) -> tuple[int, int]:
        """Training and validation samples among so many, at least one each."""
        validation = min(max(round(samples * self.validation_fraction), 1), samples - 1)
        return samples - validation, validation


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
        0.0,
        "dropout after embedding, attention and MLP, and of the context of shared",
        bounds=">= 0 and < 1",
        flag=True,
    )
    attention_dropout: float = option(0.0, "dropout of attention weights", bounds=">= 0 and < 1")
    initializer_range: float = option(0.02, "standard deviation of the initial weights", bounds="> 0")
    match_parameters: bool = option(
        False, "give each model as many parameters as the baseline by another width of its MLP"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise UsageError(
                f"architecture.hidden_size {self.hidden_size}: must be a multiple of num_attention_heads = {heads}"
            )
        if self.rotary_dims < 2 or self.rotary_dims % 2:
            raise UsageError(
                f"architecture.hidden_size {self.hidden_size}: a quarter of a head is turned by RoPE in pairs, "
                f"so give a multiple of 8 * num_attention_heads = {8 * heads}"
            )

    @property
    def rotary_dims(self) -> int:
        """Dims of a head that RoPE turns, which is the width of one rotary key."""
        return int(self.hidden_size // self.num_attention_heads * ROTARY_FRACTION)


@dataclass
class Phase1Options(Options):
    """OACD, which iterates the ContextBlock alone to a fixed point.

    The defaults are the founding report's, but for the rate.
    """

    section: ClassVar[str] = "phase1"
    max_iterations: int = option(100, "iterations at most", bounds=">= 1")
    convergence_rate: float = option(
        0.95, "share of converged tokens at which training stops", bounds="> 0 and <= 1", flag=True
    )
    threshold: float = option(0.03, "mean squared movement below which a token counts as converged", bounds="> 0")
    learning_rate: float = option(0.003, "Adam learning rate", bounds="> 0")
    batch_tokens: int = option(5000, "tokens a batch of one iteration", bounds=">= 1")
    noise: float = option(0.05, "standard deviation of the noise added to the previous contexts", bounds=">= 0")
    mean_penalty: float = option(0.1, "weight of the squared norm of the mean context", bounds=">= 0")
    max_grad_norm: float = option(2.0, "gradient norm limit", bounds="> 0")
    state_dtype: str = option("float32", "dtype in which the contexts of the corpus are kept", AUTOCAST)
    precision: str = option("float32", "float32, or autocast to bfloat16", AUTOCAST)
    checkpoint_seconds: float = option(60.0, "least time between two checkpoints", bounds=">= 0", free=True)


@dataclass
class OptimizationOptions(Options):
    """What every training of a language model shares."""

    batch_size: int = option(32, "samples a batch, divided among the processes", bounds=">= 1", flag=True)
    learning_rate: float = option(1e-4, "AdamW learning rate", bounds="> 0", flag=True)
    schedule: str = option("constant", "learning-rate schedule", SCHEDULES, flag=True)
    warmup_ratio: float = option(0.0, "share of the steps in which the learning rate rises", bounds=">= 0 and <= 1")
    weight_decay: float = option(0.01, "AdamW weight decay", bounds=">= 0")
    max_grad_norm: float = option(1.0, "gradient norm limit, 0 for none", bounds=">= 0")
    gradient_accumulation: int = option(1, "batches a step", bounds=">= 1")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass", free=True)
    precision: str = option("float32", "float32, or autocast to bfloat16", AUTOCAST, flag=True)
    checkpoint_steps: int = option(
        0, "also checkpoint every so many steps (0: once an epoch)", bounds=">= 0", free=True
    )
    tensorboard: bool = option(False, "write TensorBoard logs (extra: context-pythia[tensorboard])", free=True)


@dataclass
class TrainOptions(OptimizationOptions):
    """Language-model training. The defaults are the founding report's settings."""

    section: ClassVar[str] = "train"
    epochs: int = option(10, "epochs at most", bounds=">= 1", flag=True)
    tokens: int | None = option(
        None,
        "train on N tokens, each read once, instead of epochs; validate ten times",
        bounds=">= 1",
        flag=True,
    )
    patience: int = option(1, "evaluations without a better validation perplexity before training stops", bounds=">= 1")

    def check_given(self, given: Iterable[str]) -> None:
        """Raise `UsageError` if an option that the user gave has no effect in a pass over `tokens`."""
        for name in ("epochs", "patience"):
            if name in given and self.tokens is not None:
                raise UsageError(
                    f"train.{name} {getattr(self, name)}: has no effect beside train.tokens {self.tokens}, which are "
                    "read once; drop it, or set train.tokens=none"
                )


@dataclass
class HealOptions(OptimizationOptions):
    """Distillation: a converted model, or the original as its control, learns from the original's predictions."""

    section: ClassVar[str] = "heal"
    schedule: str = default_of(OptimizationOptions, "schedule", "cosine")
    warmup_ratio: float = default_of(OptimizationOptions, "warmup_ratio", 0.05)
    weight_decay: float = default_of(OptimizationOptions, "weight_decay", 0.0)
    steps: int = option(0, "optimizer steps (0: no distillation)", bounds=">= 0", flag=True)
    parameters: str = option(
        "attention",
        "what is trained: attention (its projections, but for the output's) or all",
        HEALED_PARAMETERS,
        flag=True,
    )
    ce_weight: float = option(
        0.0,
        "weight of the cross-entropy with the text; the rest is the divergence from the original",
        bounds=">= 0 and <= 1",
        flag=True,
    )

    def trains(self, parameter: str) -> bool:
        """Whether the parameter of this name is trained."""
        return self.parameters == "all" or (".attention." in parameter and ".attention.dense." not in parameter)

    def check_control(self, control: str, body: Any) -> None:
        """Raise `UsageError` if a control would learn nothing from a teacher that is its copy; `body` has dropouts."""
        if not (self.ce_weight or body.hidden_dropout or body.attention_dropout):
            raise UsageError(
                f"heal.ce_weight 0: without dropout {control} matches its own teacher and learns nothing; "
                "give a weight above 0"
            )


@dataclass
class ModelOptions(Options):
    """One model of a run. Without a `context_source` it is the baseline, `GPTNeoXForCausalLM` itself.

    With `from_baseline` the model starts from the run's trained baseline instead of random weights: it is converted,
    then healed. Without a `context_source` it is only healed: the control, which shows the gain of longer training.
    """

    name: str = option("Pythia", "name in tables and of the model's folder")
    context_source: str | None = option(None, "what computes the context; empty for the baseline", CONTEXT_SOURCES)
    context_dim: int = option(256, "width of the context", sources=("input", "shared", "layer"), flag=True)
    context_block_layers: int = option(1, "layers of the ContextBlock", bounds=">= 1", sources=RECURRENT)
    context_sharing: int = option(
        1, "consecutive layers with one context, or one layer's keys", bounds=">= 1", sources=("layer", "grouped")
    )
    context_layers: list[int] | None = option(
        None, "for each layer whose context it reads: its own index, or the entry before", sources=("layer",)
    )
    layer_context_dims: list[int] | None = option(None, "width of each layer's context", sources=("layer",))
    cache_token_ids: bool = option(
        False, "cache token ids too; keys and values are also rebuilt from the embeddings of tokens", sources=("layer",)
    )
    key_value_heads: int = option(1, "heads of keys and values, 1 is multi-query", bounds=">= 1", sources=("grouped",))
    num_rotary_keys: int = option(
        1, "rotary keys in a context: 1, shared by the heads, or one a head", bounds=">= 1", sources=("layer",)
    )
    phase1: bool = option(True, "train the ContextBlock by OACD first", sources=RECURRENT, flag=True)
    freeze_context_block: bool = option(True, "keep the ContextBlock fixed in phase 2", sources=RECURRENT, flag=True)
    from_baseline: bool = option(False, "convert the run's trained baseline and heal it (source layer)")

    @property
    def folder(self) -> str:
        """Name of the model's folder: `"Context-Pythia layer 256"` -> `"context-pythia-layer-256"`."""
        return re.sub(r"\W+", "-", self.name.casefold()).strip("-")

    @property
    def is_baseline(self) -> bool:
        """Whether it is a GPT-NeoX that starts from random weights."""
        return self.context_source is None and not self.from_baseline


@dataclass
class Recipe(Options):
    """A whole run: it trains `models` on the same data with the same seed."""

    name: str = option("custom", "name of the recipe")
    seed: int = option(
        0, "seed of initial weights, order of the samples and noise", bounds=">= 0 and < 4294967296", flag=True
    )
    data: DataOptions = field(default_factory=DataOptions)
    architecture: ArchitectureOptions = field(default_factory=ArchitectureOptions)
    phase1: Phase1Options = field(default_factory=Phase1Options)
    train: TrainOptions = field(default_factory=TrainOptions)
    heal: HealOptions = field(default_factory=HealOptions)
    models: list[ModelOptions] = field(default_factory=lambda: [ModelOptions()])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w.+ -]*", self.name):
            raise UsageError(f"name {self.name!r}: must be letters, digits, spaces and . + - _ (it names the folder)")
        if self.data.sequence_length > self.architecture.max_position_embeddings:
            raise UsageError(
                f"data.sequence_length {self.data.sequence_length}: "
                f"must be at most max_position_embeddings = {self.architecture.max_position_embeddings}"
            )
        self._check_tokens()
        self._check_models()

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step of `train`."""
        return self.train.batch_size * self.train.gradient_accumulation * self.data.sequence_length

    def _check_tokens(self) -> None:
        """Raise `UsageError` if `train.tokens` is more than the packed data, or less than one step."""
        tokens, length = self.train.tokens, self.data.sequence_length
        if tokens is None:
            return
        if tokens < self.step_tokens:
            raise UsageError(f"train.tokens {tokens}: must be at least {self.step_tokens}, the tokens of one step")
        packed = self.data.split_sizes(self.data.samples)[0] * length
        if tokens > packed:
            raise UsageError(
                f"train.tokens {tokens}: data.samples {self.data.samples} gives {packed} training tokens, "
                "lower train.tokens or raise data.samples"
            )

    def _check_models(self) -> None:
        if not self.models:
            raise UsageError("models: is empty, name at least one model")
        folders: dict[str, str] = {}
        for model in self.models:
            if not model.folder or "," in model.name:
                raise UsageError(f"models: name {model.name!r}: must hold letters or digits, and no comma")
            if model.folder in folders:
                taken = folders[model.folder]
                raise UsageError(f"models: name {model.name!r}: is taken by {taken!r}, give each its own")
            folders[model.folder] = model.name
            if model.from_baseline:
                self._check_healed(model)
            elif model.context_source is not None:
                self._check_context(model)

    def _check_context(self, model: ModelOptions) -> None:
        """Raise `UsageError` if the model's context does not fit the body, by the rules of the model itself."""
        # Only here, because help must answer without torch.
        from context_pythia.model.configuration import ContextPythiaConfig

        known = {declared.name for declared in fields(ContextPythiaConfig)}
        values = {name: value for name, value in (asdict(self.architecture) | asdict(model)).items() if name in known}
        if model.layer_context_dims:
            values["context_dim"] = 1  # they take its place
        with fitting(f"model {model.name}"):
            ContextPythiaConfig(**values)

    def _check_healed(self, model: ModelOptions) -> None:
        """Raise `UsageError` if the model cannot be converted from the baseline."""
        body, baselines = self.architecture, [one.name for one in self.models if one.is_baseline]
        if len(baselines) > 1:
            raise UsageError(
                f"models: {model.name} is converted from the baseline, but the recipe has two, "
                f"{baselines[0]} and {baselines[1]}: keep one"
            )
        if not self.heal.steps:
            raise UsageError(f"heal.steps 0: {model.name} is healed after its conversion, give at least 1")
        if model.context_source is None:
            self.heal.check_control(f"the control {model.name}", body)
            return
        if model.context_source != "layer":
            raise UsageError(f"{model.name}: from_baseline makes contexts of source layer, not {model.context_source}")
        for name in ("context_sharing", "context_layers", "layer_context_dims", "cache_token_ids", "num_rotary_keys"):
            if getattr(model, name) != getattr(ModelOptions(), name):
                raise UsageError(
                    f"{model.name}: {name} {getattr(model, name)} does not apply to a converted model: remove it"
                )
        least, most = body.rotary_dims + 1, body.hidden_size
        if not least <= model.context_dim <= most:
            raise UsageError(
                f"{model.name}: context_dim {model.context_dim}: must be between {least} (a rotary key and a latent) "
                f"and hidden_size = {most} (exact)"
            )


SECTIONS: dict[str, type[Options]] = {
    "data": DataOptions,
    "architecture": ArchitectureOptions,
    "phase1": Phase1Options,
    "train": TrainOptions,
    "heal": HealOptions,
}
# The sections of a recipe, by the first part of a dotted path.
OF_A_RECIPE: dict[str, type[Options]] = {"": Recipe} | SECTIONS | {"model": ModelOptions}
# Options that differ between the models of a recipe, so no single value can be set for all.
OF_ONE_MODEL = ("model.name", "model.from_baseline", "model.context_layers", "model.layer_context_dims")
PREFIXED = ("phase1", "heal")  # sections whose flags begin with their name, since train has options of the same names
