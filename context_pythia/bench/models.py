"""What `bench` times: models with a kind of cache, and models of a named size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, StaticCache, set_seed
from transformers.cache_utils import Cache

from context_pythia.bench.options import COMPILED, SIZES, Source
from context_pythia.errors import UsageError, fitting
from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.runs.build import compiled_step

LABELS = {"dynamic": "DynamicCache", "static": "StaticCache", COMPILED: "StaticCache, compiled"}


@dataclass(frozen=True)
class Subject:
    """A model and its kind of cache: `dynamic` (its own), `static`, or `compiled` (a static cache and a compiled
    decoding step)."""

    name: str
    model: PreTrainedModel
    cache: str = "dynamic"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def is_static(self) -> bool:
        return self.cache != "dynamic"

    @property
    def settings(self) -> dict[str, Any]:
        """Of `generate()`."""
        return {"compile_config": compiled_step()} if self.cache == COMPILED else {"disable_compile": True}

    def empty_cache(self, length: int) -> Cache:
        """An empty cache with room for `length` tokens."""
        if self.is_static:
            return StaticCache(config=self.model.config, max_cache_len=length)
        return DynamicCache(config=self.model.config)


def sized_models(size: str, sources: Sequence[Source] | None, positions: int, dtype: torch.dtype) -> dict[str, Any]:
    """GPT-NeoX of a named size and a Context-Pythia for each source, with random weights.

    The models share parameters of the same name and shape (embedding, MLPs, output), so large sizes fit side by side.

    Args:
        sources: by default `shared` and `layer` of half the width, and `layer` of the whole width, exact.
        positions: longest sequence.

    Raises:
        UsageError: an `exact` source of another width than the model, or a context_dim that does not fit.
    """
    if sources is None:
        width = SIZES[size].hidden_size
        sources = Source("shared", width // 2), Source("layer", width // 2), Source("layer", width, "exact")
    body: dict[str, Any] = asdict(SIZES[size]) | {"max_position_embeddings": positions}
    body["vocab_size"] = body.pop("model_vocab_size")
    del body["match_parameters"]
    configs = {}
    for source in sources:
        with fitting(f"source {source.name!r}"):
            configs[source.name] = ContextPythiaConfig(**body, **_context(source, size))
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


def subjects(models: dict[str, PreTrainedModel], caches: Sequence[str]) -> list[Subject]:
    """The rows of the bench: a Context-Pythia with its own cache and compiled, other models with each kind of cache.

    Raises:
        UsageError: no model is a GPT-NeoX.
    """
    if not any(map(is_peer, models.values())):
        raise UsageError("bench: add a GPT-NeoX model, the reference of the ratios")
    found = []
    for name, model in models.items():
        model.eval().requires_grad_(False)
        if is_peer(model):
            found += [Subject(f"{name}, {LABELS[cache]}", model, cache) for cache in caches]
        else:
            found.append(Subject(name, model))
            if COMPILED in caches:
                found.append(Subject(f"{name}, {LABELS[COMPILED]}", model, COMPILED))
    return found


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
