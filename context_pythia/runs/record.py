"""A run is a folder, and this is the one module that writes its records.

recipe.yaml        the resolved recipe
metrics.json       a model's entry is added when the model is finished or has failed; what is there is not rerun
provenance.json    versions, device, commit, command and models of the last call, and of the earlier ones
phase1/NAME        the ContextBlock
models/NAME        the model in Hugging Face form
"""

from __future__ import annotations

import dataclasses
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

import context_pythia
from context_pythia import processes
from context_pythia.config.recipe import ModelOptions, Recipe
from context_pythia.config.recipe_files import deciding_values, load_recipe, recipe_to_dict, save_recipe
from context_pythia.config.same import check_same
from context_pythia.errors import Failure
from context_pythia.files import damaged, read_record, write_json

VERSIONS_OF = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "datasets", "numpy")


def model_entry(options: ModelOptions, **figures: Any) -> dict[str, Any]:
    """A model's entry in metrics.json. Readers rely on every key; what is not given is null."""
    source = options.context_source
    return {
        "name": options.name,
        "context_source": source,
        "context_dim": None if source in (None, "grouped") else options.context_dim,
        "context_sharing": options.context_sharing if source in ("layer", "grouped") else None,
        "key_value_heads": options.key_value_heads if source == "grouped" else None,
        "from_baseline": None,
        "baseline": options.is_baseline,
        "parameters": None,
        "trainable_parameters": None,
        "intermediate_size": None,
        "best_val_ppl": None,
        "best_epoch": None,
        "val_accuracy": None,
        "val_ppl_by_position": None,
        "history": [],
        "stop_reason": None,
        "seconds_per_epoch": None,
        "machine": None,
        "phase1": None,
        "cache": None,
        "error": None,
        **figures,
    }


def is_baseline(entry: Mapping[str, Any]) -> bool:
    """Whether a model's entry is that of a GPT-NeoX trained from its first weights."""
    return entry["context_source"] is None and not entry.get("from_baseline")


class Run:
    """The records of a run folder.

    Opening a folder that holds a run of the same recipe goes on with it; models may come in different calls, and from
    processes that run at one time: each write keeps what others have recorded. Anything else in the recipe that differs
    is refused, since figures in one folder must be comparable.

    Args:
        folder: made if it is not there.
        recipe: what is to be run now.
        origin: the run with the trained baseline for models that are made of one, if it is not this run.

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
        if (folder / "metrics.json").exists():
            self.metrics = read_metrics(folder / "metrics.json")
        self._entries: dict[str, dict[str, Any]] = {}  # of this process
        self._take_in_recorded()
        # All processes of one launch must pass over the same models, so what others finish later does not count.
        self._finished = {entry["name"] for entry in self.metrics["models"] if entry["error"] is None}

    def phase1_folder(self, model: ModelOptions) -> Path:
        return self.folder / "phase1" / model.folder

    def model_folder(self, model: ModelOptions) -> Path:
        return self.folder / "models" / model.folder

    def finished(self, name: str) -> bool:
        """Whether the folder held the finished model when it was opened."""
        return name in self._finished

    def baseline(self) -> tuple[ModelOptions, dict[str, Any]]:
        """The trained baseline, and its entry; Failure if there is none."""
        entries = {entry["name"]: entry for entry in self.metrics["models"] if entry["error"] is None}
        for model in self.recipe.models:
            if model.is_baseline and model.name in entries:
                return model, entries[model.name]
        raise Failure(f"no baseline in {self.folder} is trained: train it first, or find out why it failed")

    def add(self, entry: dict[str, Any]) -> None:
        """Record a model's entry in place of an earlier one."""
        self._entries[entry["name"]] = entry
        self.write()

    def use_data(self, summary: dict[str, Any]) -> None:
        """Take the packed data's `summary` for the run's; UsageError where its entries come from other text."""
        recorded = self.metrics["data"].get("fingerprint")
        if self.metrics["models"] and recorded is not None:
            check_same(
                {"data": {"fingerprint": recorded}},
                {"data": {"fingerprint": summary["fingerprint"]}},
                f"{self.folder} holds a run",
                "the text has changed; choose another folder with --out",
            )
        self.metrics["data"] = summary

    def write(self) -> None:
        """Write the recipe and the metrics. Opening a run only makes its folder, so a refused command locks nothing.

        Of several processes of one launch one writes.
        """
        if not processes.is_main():
            return
        with FileLock(self.folder / ".lock"):
            self._take_in_recorded()
            save_recipe(self.recipe, self.folder / "recipe.yaml")
            write_json(self.folder / "metrics.json", self.metrics)

    def _take_in_recorded(self) -> None:
        """Bring recipe and entries up to what the folder holds now and what this process adds.

        Reductions follow from the baseline's measured bytes, whoever has recorded it.
        """
        held = self.metrics["models"]
        if (self.folder / "metrics.json").exists():
            held = read_metrics(self.folder / "metrics.json")["models"]
        if (self.folder / "recipe.yaml").exists():
            healed = any(entry.get("from_baseline") for entry in held)
            self.recipe = merged(load_recipe(str(self.folder / "recipe.yaml")), self.recipe, self.folder, healed)
        entries = {entry["name"]: entry for entry in held} | self._entries
        order = [model.name for model in self.recipe.models]
        self.metrics["models"] = [entries[name] for name in order if name in entries]
        self.metrics["recipe"] = recipe_to_dict(self.recipe)
        done = [entry for entry in self.metrics["models"] if entry["cache"]]
        baseline = next((entry["cache"] for entry in done if is_baseline(entry)), None)
        for entry in done:
            reduction = None
            if baseline is not None and not is_baseline(entry):
                reduction = 1 - entry["cache"]["bytes_measured"] / baseline["bytes_measured"]
            entry["cache"]["reduction_measured"] = reduction

    def write_provenance(self, models: list[str], device: torch.device) -> None:
        """Record where, with what and by which command `models` are trained, and keep what earlier calls recorded.

        `created` is the date of the folder's first call.
        """
        if not processes.is_main():
            return
        of_run = {"seed": self.recipe.seed, "data_fingerprint": self.metrics["data"].get("fingerprint")}
        with FileLock(self.folder / ".lock"):
            write_call(self.folder / "provenance.json", provenance(device) | {"models": models}, of_run)


def write_call(path: Path, facts: Mapping[str, Any], of_folder: Mapping[str, Any] | None = None) -> None:
    """Record the `provenance` of a call in the file, and keep what it holds of earlier ones. The caller has the lock.

    Args:
        of_folder: what is the same for all calls.
    """
    of_folder = of_folder or {}
    now = facts["created"]
    held = read_record(path) if path.exists() else {}
    created, earlier = held.pop("created", now), held.pop("earlier", [])
    if held:
        earlier.append({key: value for key, value in held.items() if key not in of_folder})
    write_json(path, {**facts, "created": created, "updated": now, **of_folder, "earlier": earlier})


def machine(device: torch.device) -> dict[str, Any]:
    """What decides how fast a training on `device` is; seconds compare between equal ones alone."""
    return {
        "device": _device_name(device),
        "processes": processes.count(),
        "threads": torch.get_num_threads(),
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """Where, when and with what figures were made on `device`."""
    return {
        "versions": {
            "python": platform.python_version(),
            "context_pythia": context_pythia.__version__,
            **{name: version(name) for name in VERSIONS_OF},
        },
        "platform": platform.platform(),
        **machine(device),
        "commit": _commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([_program(Path(sys.argv[0])), *map(without_password, sys.argv[1:])]),
    }


def without_password(text: str) -> str:
    """`text` with `***` for what a URL in it keeps secret: a password, a user that is a token, an option named so."""
    text = re.sub(r"(://[^:/@\s]*:)\S*@", r"\1***@", text)
    text = re.sub(r"://[^:/@\s]+@", "://***@", text)
    return re.sub(r"([?&](?:password|passwd|pwd|token|secret|key)=)[^&\s]*", r"\1***", text, flags=re.IGNORECASE)


def _program(path: Path) -> str:
    """As it is installed: `python -m context_pythia` is the command by another name."""
    return "context-pythia" if path.parts[-2:] == ("context_pythia", "__main__.py") else path.name


def merged(recorded: Recipe, wanted: Recipe, folder: Path, healed: bool) -> Recipe:
    """The wanted recipe with the recorded models before its own; `UsageError` where the two would not compare.

    Options of healing matter only where something is `healed`.
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
    """metrics.json with all that its readers rely on; UsageError, in one line, if something is missing."""
    metrics, keys = read_record(path), set(model_entry(ModelOptions()))
    # Older runs have none of these.
    keys -= {"val_ppl_by_position", "machine", "from_baseline", "baseline", "key_value_heads", "intermediate_size"}
    for key, kind in {"models": list, "data": dict, "recipe": dict}.items():
        if not isinstance(metrics.get(key), kind):
            raise damaged(path, f"it has no {key!r}")
    for number, model in enumerate(metrics["models"], start=1):
        missing = sorted(keys - set(model)) if isinstance(model, dict) else ["name"]
        if missing:
            raise damaged(path, f"model {number} has no {missing[0]!r}")
    return metrics


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpu.read_text()) if cpu.exists() else []
    return f"CPU ({names[0] if names else platform.machine()})"


def _commit() -> str | None:
    """Commit of the source tree that the package runs from, `None` if it runs from an installation.

    An environment may lie inside some other repository, which does not track this file.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40") or None
    except (OSError, subprocess.SubprocessError):
        return None
