"""`context-pythia eval`: models side by side on the same held-out text.

Each model is scored in one parallel pass, then token by token through its cache; the bytes are those of the filled
cache. With `--cache` quantized caches follow. The first model is the reference of the others, and stays in memory.
`evaluate_model` does the same for a model that is already loaded.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, PreTrainedModel

from context_pythia.config.recipe import DataOptions
from context_pythia.config.same import check_same
from context_pythia.data.packing import PackedData, PackedDataset, load_data
from context_pythia.data.tokenizers import load_tokenizer
from context_pythia.errors import Failure, UsageError, attempt
from context_pythia.evaluation.harness import require_tasks, run_tasks
from context_pythia.evaluation.perplexity import CachedScore, Score, equal_to_digits, score, score_cached
from context_pythia.evaluation.pretrained import (
    check_length,
    check_pretrained,
    hub_commit,
    load_pretrained,
    model_names,
)
from context_pythia.evaluation.quantized import quantized_cache, require_quantizer, residual_length
from context_pythia.evaluation.recall import choose_words, recall
from context_pythia.files import read_record, write_json
from context_pythia.model.cache import cache_bytes
from context_pythia.runs.build import best_device
from context_pythia.runs.provenance import provenance

# What a row has beside the model; a failed cache has only the error.
FIGURES = (
    "quantised", "perplexity", "accuracy", "tokens", "perplexity_by_position", "kl", "agreement", "logit_difference",
    "cached", "cache", "tasks", "recall", "error",
)  # fmt: skip


def evaluate(
    models: Sequence[str],
    data: DataOptions,
    dtype: str = "float32",
    batch_size: int = 16,
    cached_tokens: int = 4096,
    caches: Sequence[str] = (),
    tasks: Sequence[str] = (),
    tasks_path: Path | None = None,
    limit: int | None = None,
    recall_samples: int = 0,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the models' figures into `out` if it is given, and return them.

    Args:
        models: folders or Hub names of GPT-NeoX and Context-Pythia models.
        data: its validation split is scored. The options of a training give that training's validation text.
        cached_tokens: validation tokens to score token by token, too.
        caches: quantized caches (`int8`, `int4`) to score every model with, too.
        tasks: tasks of lm-evaluation-harness; `tasks_path` is a folder of own task files, `limit` bounds documents.
        recall_samples: texts per task and distance of the recall test; 0 for none.
        out: gets metrics.json after each model, and provenance.json at the end.

    Raises:
        UsageError, FileNotFoundError: unusable models, data or options; raised before anything is scored.
        Failure: a damaged model, or a task that failed.
    """
    paths = model_names(models)
    if caches:
        require_quantizer()
    manager = require_tasks(tasks, tasks_path) if tasks else None
    configs = {name: _config_of(path, getattr(torch, dtype)) for name, path in paths.items()}
    for name, config in configs.items():
        check_length(data.sequence_length, config, name)
    packed = load_data(data, progress)
    if recall_samples:
        choose_words(packed.tokenizer, data.sequence_length)
    metrics: dict[str, Any] = {
        "kind": "evaluation",
        "models": [],
        "data": packed.summary | {"tokens_validation": packed.validation.num_tokens},
        "settings": {
            "dtype": dtype,
            "batch_size": batch_size,
            "cached_tokens": cached_tokens,
            "caches": list(caches),
            "tasks": list(tasks),
            "limit": limit,
            "recall_samples": recall_samples or None,
        },
        "notes": _vocabulary_notes(paths, configs, packed),
    }
    for note in metrics["notes"]:
        print(f"note: {note}", flush=True)
    if out is not None:
        _check_out(out, list(paths), metrics)
        out.mkdir(parents=True, exist_ok=True)
    device, reference = best_device(), None
    for name, path in paths.items():
        model = load_pretrained(path, getattr(torch, dtype)).to(device)
        settings = (batch_size, cached_tokens, caches, reference, progress)
        rows, error = attempt(partial(evaluate_model, model, name, packed.validation, *settings))
        if rows is None:
            raise Failure(f"{name}: {error}")
        metrics["models"] += rows
        if recall_samples:
            rows[0]["recall"] = recall(
                model, packed.tokenizer, data.sequence_length, samples=recall_samples, batch_size=batch_size
            )
        if manager is not None:
            rows[0]["tasks"] = run_tasks(model, packed.tokenizer, tasks, manager, batch_size, limit)
        if out is not None:
            write_json(out / "metrics.json", metrics)
        if progress:
            print(f"{name}: perplexity {rows[0]['perplexity']:.4f}", file=sys.stderr, flush=True)
        reference = reference or model
        del model
        gc.collect()
    if out is not None:
        facts = {"data_fingerprint": packed.summary["fingerprint"]}
        facts["hub_commits"] = {path: commit for path in models if (commit := hub_commit(path))}
        write_json(out / "provenance.json", provenance(device) | facts)
    return metrics


def evaluate_model(
    model: PreTrainedModel,
    name: str,
    dataset: PackedDataset,
    batch_size: int = 16,
    cached_tokens: int = 4096,
    caches: Sequence[str] = (),
    reference: PreTrainedModel | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """The rows of one model as plain values: one for its own cache, then one for each of the quantized `caches`.

    `perplexity` comes from the parallel pass over all samples. `cached` has the figures of the token-by-token pass over
    the first samples, and `cache` the bytes of one sequence in the cache which that pass filled. `kl` and `agreement`
    compare with the reference: in the parallel pass, or for a quantized cache in the token-by-token pass. A quantized
    cache that runs out of memory, or whose loss is not a number, gives a row with an `error`.

    Args:
        reference: the model to compare with; None if `model` is the first.
    """
    whole = score(model, dataset, batch_size, reference, progress)
    through = score_cached(model, dataset, cached_tokens, batch_size=batch_size, progress=progress)
    rows = [_row(model, name) | _figures(whole) | _compared(whole) | _through_cache(model, through, whole)]
    for kind in caches:
        make = partial(quantized_cache, model.config, kind, dataset.sequence_length)
        settings = (cached_tokens, make, batch_size, reference or model, progress)
        quantized, error = attempt(partial(score_cached, model, dataset, *settings))
        row = _row(model, name) | {"quantised": kind, "error": error}
        if quantized is not None:
            row |= _compared(quantized) | _through_cache(model, quantized)
            # No formula knows a quantized cache.
            row["cache"] |= {"bytes_formula": None, "residual_length": residual_length(row["cache"]["length"])}
        rows.append(row)
    return rows


def _row(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """A row without figures. Readers rely on every key; missing values are null."""
    described = {
        "name": name,
        "context_source": getattr(model.config, "context_source", None),
        "context_dim": getattr(model.config, "context_dim", None),
        "parameters": model.num_parameters(),
    }
    return described | dict.fromkeys(FIGURES)


def _figures(found: Score) -> dict[str, Any]:
    return {
        "perplexity": found.perplexity,
        "accuracy": found.accuracy,
        "tokens": found.tokens,
        "perplexity_by_position": found.by_position,
    }


def _compared(found: Score) -> dict[str, Any]:
    return {"kl": found.kl, "agreement": found.agreement, "logit_difference": found.difference}


def _through_cache(model: PreTrainedModel, through: CachedScore, whole: Score | None = None) -> dict[str, Any]:
    """The figures of the token-by-token pass and of its cache; both passes must give one perplexity."""
    measured, sequences = through.measurement, through.sequences
    parallel = whole and whole.perplexity_of_first(len(through.losses))
    agrees = parallel and equal_to_digits(through.perplexity, parallel)
    cache = {
        "length": measured.length,
        "sequences": sequences,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bytes_measured": measured.filled / sequences,
        "bytes_formula": cache_bytes(model.config, measured.length, dtype=model.dtype),
        "bytes_slack": measured.slack / sequences,
        "residual_length": None,
    }
    cached = _figures(through) | {"parallel_perplexity": parallel, "agrees": agrees}
    return {"cached": cached, "cache": cache}


def _config_of(path: str, dtype: torch.dtype) -> GPTNeoXConfig:
    """The configuration of a model. It also checks the checkpoint, so damage shows before an hour of scoring."""
    config = check_pretrained(path, dtype)
    if not isinstance(config, GPTNeoXConfig):
        raise UsageError(f"{path} is a {config.model_type!r} model: give GPT-NeoX or Context-Pythia models")
    return config


def _vocabulary_notes(paths: dict[str, str], configs: dict[str, GPTNeoXConfig], data: PackedData) -> list[str]:
    """One line for each difference between vocabularies.

    Raises:
        UsageError: a model has fewer embedding rows than the tokenizer has tokens.
    """
    notes, first = [], next(iter(configs))
    vocabulary = data.tokenizer.get_vocab()
    for name, config in configs.items():
        if config.vocab_size < data.summary["vocab_size"]:
            raise UsageError(
                f"tokenizer {data.summary['tokenizer']} has {data.summary['vocab_size']} tokens, model {name} has "
                f"{config.vocab_size}: give the model's own with --tokenizer"
            )
        try:
            own = load_tokenizer(paths[name]).get_vocab()
        except (UsageError, OSError):
            own = vocabulary
        if own != vocabulary:
            notes.append(f"{name} was trained with another tokenizer than this text's: its figures mean little here")
        if config.vocab_size != configs[first].vocab_size:
            sizes = f"{config.vocab_size:,} rows, {first} {configs[first].vocab_size:,}"
            notes.append(f"{name} has a vocabulary of {sizes}: KL is left out")
    return notes


def _check_out(out: Path, names: list[str], metrics: dict[str, Any]) -> None:
    """Raises UsageError if `out` cannot be the folder of this evaluation, or holds another one, finished or not."""
    kinds = {"recipe.yaml": "training run", "config.json": "model"}
    what = next((f"holds a {kind}" for file, kind in kinds.items() if (out / file).exists()), None)
    if out.exists() and not out.is_dir():
        what = "is a file"
    if what:
        raise UsageError(f"--out {out}: {what}; choose another folder")
    if (out / "metrics.json").exists():
        recorded = read_record(out / "metrics.json")
        done = list(dict.fromkeys(row.get("name") for row in recorded.get("models", [])))
        wanted = {key: metrics[key] for key in ("kind", "data", "settings")} | {"models": names[: len(done)]}
        found = {key: recorded.get(key) for key in wanted} | {"models": done}
        check_same(found, wanted, f"--out {out}: holds an evaluation", "choose another folder")
