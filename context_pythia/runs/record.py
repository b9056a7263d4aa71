"""A run is a folder, and this is the one module that writes its records.

recipe.yaml        the resolved recipe
metrics.json       an entry for each model that has finished or failed; a finished model does not run again
provenance.json    versions, device, commit, command and models of the last call and of earlier ones
phase1/NAME        the ContextBlock
models/NAME        the model in Hugging Face form
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from context_pythia import processes
from context_pythia.config.recipe import ModelOptions, Recipe
from context_pythia.config.recipe_files import deciding_values, load_recipe, recipe_to_dict, save_recipe
from context_pythia.config.same import check_same
from context_pythia.errors import Failure
from context_pythia.files import damaged, read_record, write_json
from context_pythia.runs.provenance import provenance, write_call

# Filled in by a training; null until then, or where they do not apply.
FIGURES = (
    "from_baseline", "parameters", "trainable_parameters", "intermediate_size", "best_val_ppl", "best_epoch",
    "val_accuracy", "val_ppl_by_position", "stop_reason", "seconds_per_epoch", "machine", "phase1", "cache", "error",
)  # fmt: skip


def model_entry(options: ModelOptions, **figures: Any) -> dict[str, Any]:
    """A model's entry in metrics.json. Readers rely on every key; missing values are null."""
    source = options.context_source
    return {
        "name": options.name,
        "context_source": source,
        "context_dim": None if source in (None, "grouped") else options.context_dim,
        "context_sharing": options.context_sharing if source in ("layer", "grouped") else None,
        "context_layers": options.context_layers,
        "layer_context_dims": options.layer_context_dims,
        "cache_token_ids": options.cache_token_ids,
        "key_value_heads": options.key_value_heads if source == "grouped" else None,
        **dict.fromkeys(FIGURES),
        "history": [],
        **figures,
    }


class Run:
    """The records of a run folder.

    A folder with a run of the same recipe is resumed. Its models may come from different calls and from processes that
    run at the same time: each write keeps the records of others. Any other difference in the recipe is refused, because
    figures in one folder must be comparable.

    Args:
        folder: created if missing.
        recipe: the recipe of this call.
        origin: the run with the trained baseline that models are converted from, if it is not this run.

    Attributes:
        finished: names of the models that were finished when the folder was opened.

    Raises:
        UsageError: the folder holds a run of another recipe; the message names the first difference.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, recipe: Recipe, origin: Run | None = None):
        self.folder = folder
        self.origin = origin or self
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"cannot make the run folder {folder} ({error.strerror}): choose another with --out"
            ) from error
        self.recipe = recipe
        self.metrics: dict[str, Any] = {"models": [], "data": {}, "recipe": {}}
        self._take_in_recorded()
        # All processes of a launch must skip the same models, so models that others finish later do not count.
        self.finished = {entry["name"] for entry in self.metrics["models"] if entry["error"] is None}

    def phase1_folder(self, model: ModelOptions) -> Path:
        return self.folder / "phase1" / model.folder

    def model_folder(self, model: ModelOptions) -> Path:
        return self.folder / "models" / model.folder

    def baseline(self) -> tuple[ModelOptions, dict[str, Any]]:
        """The trained baseline, and its entry; Failure if there is none."""
        entries = {entry["name"]: entry for entry in self.metrics["models"] if entry["error"] is None}
        for model in self.recipe.models:
            if model.is_baseline and model.name in entries:
                return model, entries[model.name]
        raise Failure(f"{self.folder} has no trained baseline: train it first; if it failed, its report says why")

    def use_data(self, summary: dict[str, Any]) -> None:
        """Set the run's data `summary`; UsageError if the folder's entries come from other text."""
        recorded = self.metrics["data"].get("fingerprint")
        if self.metrics["models"] and recorded is not None:
            wanted = {"data.fingerprint": summary["fingerprint"]}
            mend = "the text has changed; choose another folder with --out"
            check_same({"data.fingerprint": recorded}, wanted, f"{self.folder} holds a run", mend)
        self.metrics["data"] = summary

    def write(self, *entries: dict[str, Any]) -> None:
        """Write the recipe and the metrics, in process 0 only. An entry replaces an earlier one of its model.

        Opening a run only creates its folder, so a refused command locks nothing.
        """
        if not processes.is_main():
            return
        with FileLock(self.folder / ".lock"):
            self._take_in_recorded()
            known = {entry["name"]: entry for entry in [*self.metrics["models"], *entries]}
            models = [known[model.name] for model in self.recipe.models if model.name in known]
            self.metrics |= {"models": models, "recipe": recipe_to_dict(self.recipe)}
            save_recipe(self.recipe, self.folder / "recipe.yaml")
            write_json(self.folder / "metrics.json", self.metrics)

    def _take_in_recorded(self) -> None:
        """Read the entries in the folder, where other calls may have added some, and merge the recipes."""
        if (self.folder / "metrics.json").exists():
            recorded = read_metrics(self.folder / "metrics.json")
            self.metrics |= {"models": recorded["models"], "data": self.metrics["data"] or recorded["data"]}
        if (self.folder / "recipe.yaml").exists():
            healed = any(entry["from_baseline"] for entry in self.metrics["models"])
            self.recipe = merged(load_recipe(str(self.folder / "recipe.yaml")), self.recipe, self.folder, healed)

    def write_provenance(self, models: list[str], device: torch.device) -> None:
        """Record the provenance of `models`, and keep that of earlier calls.

        `created` is the date of the folder's first call.
        """
        if not processes.is_main():
            return
        facts = {
            "models": models,
            "seed": self.recipe.seed,
            "data_fingerprint": self.metrics["data"].get("fingerprint"),
        }
        with FileLock(self.folder / ".lock"):
            write_call(self.folder / "provenance.json", provenance(device) | facts)


def merged(recorded: Recipe, wanted: Recipe, folder: Path, healed: bool) -> Recipe:
    """The wanted recipe with the recorded models before its own; `UsageError` if their figures are not comparable.

    Healing options are compared only if a model is `healed`.
    """
    old, new = deciding_values(recorded), deciding_values(wanted)
    for key in ("name", "models") if healed else ("name", "models", "heal"):
        del old[key], new[key]
    mend = "choose another folder with --out"
    check_same(old, new, f"{folder} holds a run", mend)
    models: dict[str, ModelOptions] = {model.name: model for model in recorded.models}
    for model in wanted.models:
        if models.setdefault(model.name, model) != model:
            old, new = dataclasses.asdict(models[model.name]), dataclasses.asdict(model)
            check_same(old, new, f"{folder} holds a model {model.name}", mend)
    return dataclasses.replace(wanted, name=recorded.name, models=list(models.values()))


def read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json of any version, with every key of a model's entry; UsageError if it is damaged or no run's."""
    metrics = read_record(path)
    if missing := {"models", "data", "recipe"} - metrics.keys():
        raise damaged(path, f"it has no {min(missing)!r}")
    every = dict.fromkeys(model_entry(ModelOptions()))
    return metrics | {"models": [every | model for model in metrics["models"]]}
