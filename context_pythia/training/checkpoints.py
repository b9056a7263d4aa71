"""The files of a training: a state to resume from, and a model in Hugging Face form.

Nothing here unpickles: weights are safetensors, results are JSON, and torch reads a state with `weights_only`.
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from context_pythia.config.options import Options, deciding
from context_pythia.config.same import check_same
from context_pythia.errors import UsageError, first_line
from context_pythia.evaluation.pretrained import quiet_transformers
from context_pythia.files import whole

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedData


def run_settings(model: PreTrainedModel, data: PackedData, options: Options, seed: int) -> dict[str, Any]:
    """All settings that determine a run's weights. Two runs may share a folder only if these are equal."""
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    for key in ("transformers_version", "use_cache", "dtype", "architectures"):
        config.pop(key, None)
    settings = {
        "seed": seed,
        "data": data.summary["fingerprint"],
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "model_class": type(model).__name__,
        **deciding(options),
        **{f"config.{key}": value for key, value in config.items()},
    }
    return json.loads(json.dumps(settings, default=str))


def write_state(path: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write tensors and plain values to `path` atomically, with the settings that determine the run's result.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        with whole(path) as partial:
            torch.save(state | {"settings": settings}, partial)
    except (OSError, RuntimeError) as error:
        raise _cannot_write(path, error) from error


def read_state(
    path: Path, settings: dict[str, Any], holder: str, mend: str, device: torch.device | str = "cpu"
) -> dict[str, Any] | None:
    """Read a file of `write_state`; None if there is none.

    Args:
        holder, mend: as in `check_same`.

    Raises:
        UsageError: the file is damaged, or was written with other settings.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(f"{path} is damaged ({first_line(error)}): delete it to begin again") from error
    check_same(state["settings"], settings, holder, mend)
    return state


@quiet_transformers()
def publish(model: PreTrainedModel, tokenizer, folder: Path, max_shard_size: str = "50GB") -> None:
    """Write model and tokenizer in Hugging Face form. Each file appears complete, and weights appear last.

    Args:
        max_shard_size: largest file of weights. Weights that are offloaded to disk are read shard by shard.

    Raises:
        OSError: the folder cannot be written.
    """
    partial, tied = folder / ".saving", model.all_tied_weights_keys
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            # A tied weight is stored once. transformers does not notice the tie of weights that are offloaded to disk.
            weights = {name: weight for name, weight in model.state_dict().items() if name not in tied}
            model.save_pretrained(partial, state_dict=weights, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(partial)
        for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            path.replace(folder / path.name)
    except (SafetensorError, RuntimeError) as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cannot_write(path: Path, error: Exception) -> OSError:
    return OSError(f"cannot write {path}: {first_line(error)}; free some disk space and rerun")
