"""What a training leaves in its folder: a state to go on from, and a model in Hugging Face form.

Nothing here unpickles: weights are safetensors, results are JSON, and a state is read by torch with `weights_only`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from context_pythia.config.options import deciding
from context_pythia.config.recipe import TrainOptions
from context_pythia.errors import Failure, UsageError, first_line
from context_pythia.files import whole

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedData
OTHER_FOLDER = "choose another output folder"


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


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values to `path`, whole and on the disk; OSError, in one line, if that fails."""
    try:
        with whole(path) as partial, partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write {path}: {first_line(error)}; free some disk space and rerun") from error


def read_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `write_state` wrote; UsageError, in one line, if the file is damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(f"{path} is damaged ({first_line(error)}): delete it to begin again") from error


def load_weights(model: PreTrainedModel, folder: Path, root: Path | None = None) -> None:
    """Fills `model` from a Hugging Face folder and sets it to evaluation.

    Raises:
        Failure: the folder lacks weights of the model or is not sound; the mend is to delete it, or `root`.
    """
    try:
        # By `from_pretrained`, because a file's names need not be the module's: GPT-NeoX saves lm_head as embed_out.
        loaded, mended = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
        if wrong := {key: names for key, names in mended.items() if names}:
            raise Failure(f"{wrong}")
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise Failure(
            f"the weights in {folder} are damaged ({first_line(error)}): delete {root or folder} to train again"
        ) from error
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
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError | RuntimeError):
            raise OSError(f"cannot write {folder}: {first_line(error)}; free some disk space and rerun") from error
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


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers prints errors alone, and no bar for each file that it saves."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
