"""The models that `bench` times: saved ones, a recipe's, or those of a named size, with a GPT-NeoX for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, StaticCache, set_seed
from transformers.cache_utils import Cache

from context_pythia.bench.options import COMPILED, SIZES, Source
from context_pythia.config.recipe import Recipe
from context_pythia.errors import UsageError
from context_pythia.evaluation.pretrained import load_pretrained, model_names
from context_pythia.evaluation.quantized import quantized_cache, require_quantizer
from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.model.cache import cache_bytes
from context_pythia.runs.build import build_model, compiled_step, expected_rows

PEER = "GPT-NeoX (random weights)"
LABELS = {
    "dynamic": "DynamicCache",
    "static": "StaticCache",
    "int4": "int4 cache",
    COMPILED: "StaticCache, compiled",
}


@dataclass(frozen=True)
class Subject:
    """A model and its kind of cache: `dynamic` (its own, by default), `static`, `int4`, or `compiled` (a static cache
    and a compiled decoding step)."""

    name: str
    model: PreTrainedModel
    cache: str = "dynamic"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def is_static(self) -> bool:
        return self.cache in ("static", COMPILED)

    @property
    def settings(self) -> dict[str, Any]:
        """Of `generate()`."""
        return {"compile_config": compiled_step()} if self.cache == COMPILED else {"disable_compile": True}

    def empty_cache(self, length: int) -> Cache:
        """An empty cache with room for `length` tokens."""
        if self.cache == "int4":
            return quantized_cache(self.model.config, "int4", length)
        if self.is_static:
            return StaticCache(config=self.model.config, max_cache_len=length)
        return DynamicCache(config=self.model.config)

    def bytes_needed(self, batch_size: int, length: int) -> int:
        """Rough memory of a cell beside the weights: two caches, and one layer's activations of a prefill."""
        config, size = self.model.config, self.model.dtype.itemsize
        activations = batch_size * length * (2 * config.intermediate_size + 6 * config.hidden_size) * size
        return 2 * cache_bytes(config, length, batch_size, self.model.dtype) + activations


def saved_models(paths: Sequence[str], dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """Models of folders or Hub names."""
    return {name: load_pretrained(path, dtype) for name, path in model_names(paths).items()}


def recipe_models(recipe: Recipe, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """A recipe's models with random weights."""
    rows = expected_rows(recipe)
    return {options.name: build_model(options, recipe, rows).to(dtype) for options in recipe.models}


def sized_models(size: str, sources: Sequence[Source], positions: int, dtype: torch.dtype) -> dict[str, Any]:
    """GPT-NeoX of a named size and a Context-Pythia for each source, with random weights.

    The models share parameters of the same name and shape (embedding, MLPs, output), so large sizes fit side by side.

    Args:
        positions: longest sequence.

    Raises:
        ValueError: an `exact` source of another width than the model, or a context_dim that does not fit.
    """
    shape = SIZES[size]
    body = {
        "vocab_size": shape.model_vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": positions,
    }
    configs = {source.name: ContextPythiaConfig(**body, **_context(source, size)) for source in sources}
    baseline = _random_model(GPTNeoXForCausalLM, GPTNeoXConfig(**body), dtype)
    models = {size: baseline}
    for name, config in configs.items():
        models[name] = _random_model(ContextPythiaForCausalLM, config, dtype)
        share_parameters(models[name], baseline)
    return models


def share_parameters(model: nn.Module, other: nn.Module) -> None:
    """Replace parameters of `model` by those of `other` with the same name and shape."""
    others = dict(other.named_parameters())
    for name, parameter in list(model.named_parameters()):
        if name in others and others[name].shape == parameter.shape:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, others[name])


def is_peer(model: PreTrainedModel) -> bool:
    """Whether the model is a peer, the reference of the ratios: any model but a Context-Pythia."""
    return not isinstance(model.config, ContextPythiaConfig)


def subjects(models: dict[str, PreTrainedModel], caches: Sequence[str]) -> tuple[list[Subject], list[str]]:
    """The rows of the bench: a Context-Pythia with its own cache and compiled, other models with each kind of cache.

    If no model is a GPT-NeoX, one of the first model's shape, with random weights, comes first.

    Returns:
        the subjects, and a line for each omission or addition.
    """
    notes, caches = [], list(caches)
    if not any(map(is_peer, models.values())):
        first = next(iter(models.values()))
        models = {PEER: _peer_of(first)} | models
        notes.append(f"none of the models is a GPT-NeoX: {PEER} of the first one's shape is timed beside them")
    if "int4" in caches:
        try:
            require_quantizer()
        except UsageError as error:
            caches.remove("int4")
            notes.append(f"no row with an int4 cache: {error}")
    found = []
    for name, model in models.items():
        model.eval().requires_grad_(False)
        if is_peer(model):
            found += [Subject(f"{name}, {LABELS[cache]}", model, cache) for cache in caches]
        else:
            found.append(Subject(name, model))
            if COMPILED in caches:
                found.append(Subject(f"{name}, {LABELS[COMPILED]}", model, COMPILED))
    return found, notes


def _context(source: Source, size: str) -> dict[str, Any]:
    """The configuration values of the source."""
    shape, context = SIZES[size], {"context_source": source.context_source, "context_dim": source.context_dim}
    if source.form == "exact" and source.context_dim != shape.hidden_size:
        raise UsageError(
            f"source {source.name!r}: form exact needs context_dim {shape.hidden_size}, the width of {size}: use "
            f"{shape.hidden_size}, or the form heads"
        )
    keys = shape.num_attention_heads if source.form else 1
    return context | {"num_rotary_keys": keys, "reuse_rotary_keys": source.form == "exact"}


def _random_model(kind: Any, config: GPTNeoXConfig, dtype: torch.dtype) -> PreTrainedModel:
    set_seed(0)
    return kind._from_config(config, dtype=dtype)


def _peer_of(model: PreTrainedModel) -> PreTrainedModel:
    """A GPT-NeoX of the model's shape, which shares weights with it."""
    own, none = model.config.to_dict(), {"model_type", "architectures", "transformers_version", "layer_types", "dtype"}
    config = GPTNeoXConfig(**{key: own[key] for key in GPTNeoXConfig().to_dict() if key in own and key not in none})
    peer = _random_model(GPTNeoXForCausalLM, config, model.dtype).to(model.device)
    share_parameters(peer, model)
    return peer
