"""Builds a recipe's models: one body, and the context of each model."""

from __future__ import annotations

from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from transformers import (
    CompileConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from context_pythia.config.recipe import RECURRENT, HealOptions, ModelOptions, Recipe
from context_pythia.data.tokenizers import load_tokenizer, vocabulary_rows
from context_pythia.errors import UsageError
from context_pythia.evaluation.memory import measure_generated_cache
from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.model.cache import cache_bytes, cached_numbers_per_token

VOCABULARY_MULTIPLE = 128
OF_TRAINING = ("name", "phase1", "freeze_context_block", "from_baseline")  # a model's options outside its configuration


def best_device() -> torch.device:
    """Where commands run models: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compiled_step() -> CompileConfig:
    """Settings for `generate()` to compile its decoding step in one graph, on a CPU too. It needs a static cache."""
    settings = CompileConfig(fullgraph=True)
    settings._compile_all_devices = True
    return settings


def embedding_rows(recipe: Recipe, tokenizer_size: int) -> int:
    """Rows of the embedding: the recipe's number, or the tokenizer's size up to a multiple of 128 (as in Pythia).

    Raises:
        UsageError: the recipe's number is smaller than the tokenizer needs.
    """
    rows = recipe.architecture.model_vocab_size
    if rows is None:
        return -(-tokenizer_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if rows < tokenizer_size:
        raise UsageError(f"architecture.model_vocab_size {rows}: the tokenizer needs at least {tokenizer_size}")
    return rows


def expected_rows(recipe: Recipe) -> int:
    """`embedding_rows` before any data is read. It assumes that a trained tokenizer will fill its vocabulary."""
    if recipe.data.tokenizer == "train":
        return embedding_rows(recipe, recipe.data.vocab_size)
    return embedding_rows(recipe, vocabulary_rows(load_tokenizer(recipe.data.tokenizer)))


def build_model(
    options: ModelOptions, recipe: Recipe, rows: int, tokenizer: PreTrainedTokenizerFast | None = None
) -> PreTrainedModel:
    """A model with random weights, which follow from the recipe's seed.

    The ContextBlock is frozen if the options say so; phase 1 trains it anyway.
    """
    body: dict[str, Any] = asdict(recipe.architecture) | {"vocab_size": rows}
    del body["model_vocab_size"], body["match_parameters"]
    end = None if tokenizer is None else tokenizer.eos_token_id
    body |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    if recipe.architecture.match_parameters:
        body["intermediate_size"] = _matched_width(options, body)
    set_seed(recipe.seed)
    model = _model(options, body)
    if options.context_source in RECURRENT and options.freeze_context_block:
        model.gpt_neox.context_block.requires_grad_(False)
    return model


def _model(options: ModelOptions, body: dict[str, Any]) -> PreTrainedModel:
    if options.context_source is None:
        return GPTNeoXForCausalLM(GPTNeoXConfig(**body))
    context = {name: value for name, value in asdict(options).items() if name not in OF_TRAINING}
    if not options.layer_context_dims:
        return ContextPythiaForCausalLM(ContextPythiaConfig(**body, **context))
    config = ContextPythiaConfig(**body, **context | {"context_dim": 1})
    config.context_dim = round(fmean(config.context_width(maker) for maker in set(config.makers)))
    return ContextPythiaForCausalLM(config)


def _matched_width(options: ModelOptions, body: dict[str, Any]) -> int:
    """The MLP width that gives the model the baseline's number of parameters, to half a column per layer.

    Raises:
        UsageError: the model without its MLP already has more.
    """
    with torch.device("meta"):
        surplus = _model(options, body).num_parameters() - _model(ModelOptions(), body).num_parameters()
    column = body["num_hidden_layers"] * (2 * body["hidden_size"] + 1)
    width = body["intermediate_size"] - round(surplus / column)
    if width < 1:
        raise UsageError(
            f"{options.name}: has {surplus} more parameters than the baseline, more than a narrower MLP can save: "
            "remove match_parameters"
        )
    return width


def describe_parameters(model: PreTrainedModel, healing: HealOptions | None = None) -> dict[str, int]:
    """Numbers of parameters, and of trained ones (by `healing`, if given)."""
    trained = (p for name, p in model.named_parameters() if (healing.trains(name) if healing else p.requires_grad))
    return {"parameters": model.num_parameters(), "trainable_parameters": sum(p.numel() for p in trained)}


def describe_cache(model: PreTrainedModel, length: int, decoded: int | None = None) -> dict[str, Any]:
    """The cache of one sequence of `length` tokens in the model's dtype, by formula and as `generate()` filled it (see
    `measure_generated_cache`)."""
    measured = measure_generated_cache(model, length, decoded=decoded)
    dtype: torch.dtype = model.dtype
    return {
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "numbers_per_token": cached_numbers_per_token(model.config),
        "bytes_formula": cache_bytes(model.config, length, dtype=dtype),
        "bytes_measured": measured.filled,
        "bytes_slack": measured.slack,
    }
