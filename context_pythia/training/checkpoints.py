"""The folder of a run in training: which run it holds, its last sound checkpoint, and its weights when it is finished.

Nothing here unpickles: weights are safetensors, the rest is JSON or is only checked. The Trainer itself reads its
optimizer and random states with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from context_pythia.config.options import deciding
from context_pythia.config.recipe import TrainOptions
from context_pythia.errors import Failure, UsageError, first_line

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedData

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.pt"


def run_settings(model: PreTrainedModel, data: PackedData, options: TrainOptions, seed: int) -> dict[str, Any]:
    """All that decides a run's weights; two runs may share a folder only if theirs are equal."""
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


def check_same_run(held: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    """Raises UsageError where `folder` holds a run with other settings, naming the first that differs."""
    for key in [*settings, *held]:
        if held.get(key) != settings.get(key):
            raise UsageError(
                f"{folder} holds a run with {key} {held.get(key)}, not {settings.get(key)}: "
                "choose another output folder"
            )


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The newest sound checkpoint; newer ones that are not sound are removed.

    Raises:
        Failure: there are checkpoints, and all of them are damaged.
    """
    found = [path for path in checkpoints.glob("checkpoint-*") if path.is_dir()]
    found.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    unsound: dict[Path, str] = {}
    for checkpoint in found:
        damage = find_damage(checkpoint)
        if damage is None:
            break
        unsound[checkpoint] = damage
    else:
        # The state is written last, so without it the process ended amid its first checkpoint: nothing is lost.
        finished = [path for path in unsound if (path / STATE_FILE).exists()]
        if finished:
            raise Failure(
                f"{finished[0]} is damaged ({unsound[finished[0]]}) and there is no earlier one: "
                f"delete {checkpoints} to train from the start"
            )
    for path, damage in unsound.items():
        print(f"{path} is damaged ({damage}): removed, training goes on from before it", file=sys.stderr)
        shutil.rmtree(path)
    return next((path for path in found if path not in unsound), None)


def find_damage(checkpoint: Path) -> str | None:
    """What keeps training from going on from `checkpoint`, None where nothing does. Nothing is unpickled."""
    try:
        best_step = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["best_global_step"]
        weights = [checkpoint / WEIGHTS_FILE]
        if best_step is not None:
            weights.append(checkpoint.with_name(f"checkpoint-{best_step}") / WEIGHTS_FILE)
        for path in weights:
            # Opening compares the header with the file's length.
            with safe_open(path, framework="pt"):
                pass
        for path in [checkpoint / OPTIMIZER_FILE, checkpoint / "scheduler.pt", *checkpoint.glob("*.pth")]:
            with zipfile.ZipFile(path) as archive:
                if member := archive.testzip():
                    return f"{path.name}: {member} is corrupt"
    except (OSError, ValueError, KeyError, SafetensorError, zipfile.BadZipFile) as error:
        return first_line(error)
    return None


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values to `path`, whole and on the disk; OSError, in one line, if that fails."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {first_line(error)}; free some disk space and rerun") from error


def read_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `write_state` wrote; UsageError, in one line, if the file is damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(f"{path} is damaged ({first_line(error)}): delete it to begin again") from error


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Fills `model` from a Hugging Face folder and sets it to evaluation.

    Raises:
        Failure: the folder lacks weights of the model or is not sound.
    """
    try:
        # By `from_pretrained`, because a file's names need not be the module's: GPT-NeoX saves lm_head as embed_out.
        loaded, mended = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
        if wrong := {key: names for key, names in mended.items() if names}:
            raise Failure(f"{wrong}")
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise Failure(f"the weights in {folder} are damaged ({first_line(error)}): delete it to train again") from error
    model.load_state_dict(loaded.state_dict())
    model.eval()


def publish(model: PreTrainedModel, tokenizer, folder: Path, max_shard_size: str = "50GB") -> None:
    """Model and tokenizer in Hugging Face form, each file whole from the moment that it appears; weights last.

    Args:
        max_shard_size: of a file of weights. A model whose weights are on disk is read shard by shard.
    """
    partial, tied = folder / ".saving", model.all_tied_weights_keys
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            # A tied weight is stored once; of weights that are on disk transformers does not see that they are one.
            weights = {name: weight for name, weight in model.state_dict().items() if name not in tied}
            model.save_pretrained(partial, state_dict=weights, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        path.replace(folder / path.name)
    partial.rmdir()


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; Failure, in one line, if it is not one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Failure(f"{path} is damaged ({error}): delete {path.parent} to train again") from error
