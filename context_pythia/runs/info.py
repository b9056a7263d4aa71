"""`context-pythia info`: parameters and cache bytes of a recipe's models or of a saved one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from context_pythia.config.recipe import HealOptions, ModelOptions, Recipe
from context_pythia.errors import UsageError
from context_pythia.evaluation.pretrained import load_pretrained
from context_pythia.runs.build import build_model, describe_cache, describe_parameters, expected_rows


def info(recipe: Recipe | None, model: str | None, length: int, dtype: str) -> list[dict[str, Any]]:
    """The figures of each model.

    Args:
        recipe: its models are built with random weights; figures that depend on a trained baseline stay unknown.
        model: folder or Hub name of a saved model, instead of a recipe.
        length: tokens in the measured cache.
        dtype: dtype of the model and its cache.

    Raises:
        UsageError: a cache longer than a model's positions.
    """
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if recipe is None:
        assert model is not None
        loaded = load_pretrained(model, torch_dtype)
        return [_describe(model, loaded, loaded, length)]
    rows = expected_rows(recipe)
    return [_planned(options, recipe, rows, length, torch_dtype) for options in recipe.models]


def _planned(options: ModelOptions, recipe: Recipe, rows: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """The figures of a recipe's model. Its parameters are counted without memory for them."""
    with torch.device("meta"):
        counted = build_model(options, recipe, rows).to(dtype)
    # The smallest MLP and vocabulary with the same cache: token ids take room by their number.
    body = replace(recipe.architecture, intermediate_size=1, model_vocab_size=None, match_parameters=False)
    cached = build_model(options, replace(recipe, architecture=body), rows if options.cache_token_ids else 2).to(dtype)
    if not options.from_baseline:
        return _describe(options.name, counted, cached, length)
    figures = _describe(options.name, counted, cached, length, recipe.heal)
    if options.context_source is not None:
        # The number of parameters depends on how the conversion splits the context into keys and latent.
        figures |= dict.fromkeys(("parameters", "trainable_parameters"))
    return figures


def _describe(
    name: str, counted: PreTrainedModel, cached: PreTrainedModel, length: int, healed: HealOptions | None = None
) -> dict[str, Any]:
    """The parameters of one model, and the cache of another with the same cache, as `generate()` fills it."""
    if length > (positions := cached.config.max_position_embeddings):
        raise UsageError(f"--length {length}: must be at most {positions}, the positions of {name}")
    cache = describe_cache(cached, length)
    return {
        "name": name,
        **describe_parameters(counted, healed),
        "cached_numbers_per_token": cache.pop("numbers_per_token"),
        "cache": cache,
    }
