"""Loads a saved model for evaluation; every error is one clear line.

A model's name is a folder, or `[OWNER/]NAME[@REVISION]` on the Hub; the revision is a branch, tag or commit other than
the main branch. A model that fails to load has faulty files, so every error here is about the files.
"""

import contextlib
import logging as standard_logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

import context_pythia.model  # noqa: F401  registers the model with the Auto classes
from context_pythia.data.corpora import hub_revision, is_hub_name, require_on_hub
from context_pythia.errors import Failure, UsageError, is_failure

SIZES = {"vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings"}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context, or a decorator, in which transformers prints only errors and shows no progress bars."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@quiet_transformers()
def load_pretrained(name: str, dtype: torch.dtype, device_map: dict[str, str] | None = None) -> PreTrainedModel:
    """The causal language model `name`, ready for evaluation.

    Only safetensors files are read: nothing is unpickled, and no code of the checkpoint runs.

    Args:
        device_map: as in transformers. The weights of modules on "disk" are meta tensors: accelerate reads them from
            the checkpoint, in `dtype`, whenever the module runs.

    Raises:
        FileNotFoundError: there is no such folder or model.
        ConnectionError: the Hub cannot be asked for the model, or fails while it is loaded.
        UsageError: the checkpoint needs something that is not installed, such as a quantizer.
        Failure: the checkpoint is damaged: it is unreadable, tensors are missing, unknown or of the wrong shape, or the
            configuration is impossible.
    """
    folder, revision = _place(name)
    stored = stored_config(name)
    if list(Path(name).glob("*.bin")) and not list(Path(name).glob("*.safetensors")):
        raise FileNotFoundError(
            f"{name} has no .safetensors file: save the weights in that format, the only one that is read"
        )
    standard_logging.getLogger("accelerate.big_modeling").setLevel(standard_logging.ERROR)
    try:
        _check_values(stored)
        model, state = AutoModelForCausalLM.from_pretrained(
            folder,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            device_map=device_map,
            ignore_mismatched_sizes=True,  # which the state below names
            trust_remote_code=False,
        )
        if quantizer_of(stored) and device_map is None:
            # Weights that the quantizer did not pack load without an error and fail in use.
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.long, device=model.device))
    except Exception as error:
        if isinstance(error, ConnectionError) or is_failure(error):
            raise
        raise _refusal(name, stored, error) from error
    if wrong := [f"{kind.replace('_', ' ')} {sorted(map(str, keys))[0]}" for kind, keys in state.items() if keys]:
        raise Failure(f"the checkpoint in {name} is damaged ({wrong[0]}): train or download it again")
    return model.eval()


def check_pretrained(name: str, dtype: torch.dtype) -> PreTrainedConfig:
    """The configuration of a model, after a check that `load_pretrained` can load it; raises the same errors.

    The check compares names and shapes of the weights without reading them, except for quantized ones.
    """
    device_map = None if quantizer_of(stored_config(name)) else {"": "meta"}
    return load_pretrained(name, dtype, device_map).config


def stored_config(name: str) -> dict[str, Any]:
    """The unchecked contents of the checkpoint's config.json; raises the errors of `load_pretrained`."""
    folder, revision = _place(name)
    try:
        stored = PreTrainedConfig.get_config_dict(folder, revision=revision)[0]
        if not isinstance(stored, dict):
            raise ValueError(f"it holds a {type(stored).__name__}")
        return stored
    except ConnectionError:
        raise
    except Exception as error:
        raise _refusal(name, {}, error) from error


def model_names(paths: Sequence[str]) -> dict[str, str]:
    """Names of the models in tables -> paths. A name is the last part of the path, if that is unique."""
    if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise UsageError(f"the model {twice[0]} is named twice")
    short = [Path(path).resolve().name if Path(path).is_dir() else path for path in paths]
    return {name if short.count(name) == 1 else path: path for name, path in zip(short, paths, strict=True)}


def hub_commit(name: str) -> str | None:
    """The commit of a loaded Hub model's files; None for a folder."""
    if Path(name).is_dir():
        return None
    repository, revision = hub_revision(name)
    file = try_to_load_from_cache(repository, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None  # models--OWNER--NAME/snapshots/COMMIT/config.json


def check_length(length: int, config: PreTrainedConfig, name: str = "the model") -> None:
    """Raises UsageError for samples of more tokens than the model has positions."""
    if length > config.max_position_embeddings:
        raise UsageError(
            f"sequence_length {length}: must be at most {config.max_position_embeddings}, {name}'s positions"
        )


def _place(name: str) -> tuple[str, str | None]:
    """The folder or Hub name, and the revision on the Hub; raises an error if there is no such model."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(f"{name} has no config.json: give the folder of one model, such as RUN/models/NAME")
        return name, None
    if not is_hub_name(name):
        raise FileNotFoundError(f"no such model: {name!r} (give a model's folder or a Hub name)")
    repository, revision = hub_revision(name)
    try:
        PreTrainedConfig.get_config_dict(repository, revision=revision, local_files_only=True)
    except OSError:
        require_on_hub("model", repository, revision)
    return repository, revision


def _check_values(stored: dict[str, Any]) -> None:
    """Raises ValueError for values that transformers accepts and no model can have."""
    rope = stored.get("rope_parameters")
    for name, value in (stored | (rope if isinstance(rope, dict) else {})).items():
        if name in SIZES and isinstance(value, int) and value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} {value}: must be a finite number")
        if name in ("rotary_pct", "partial_rotary_factor") and not 0 < value <= 1:
            raise ValueError(f"{name} {value}: must be above 0 and at most 1")


def _refusal(name: str, stored: dict[str, Any], error: Exception) -> Exception:
    """The error to show to the user for an `error` in loading."""
    cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    kind = "" if isinstance(cause, OSError | ValueError | ImportError) else f"{type(cause).__name__}: "
    # An error about an unknown attention lists all attentions, which helps; one about an unknown model lists hundreds.
    reason = shorten(f"{kind}{cause}", 1000, placeholder=" ...")
    if quantizer := quantizer_of(stored):
        return UsageError(
            f"{name} is quantized ({quantizer}) and cannot be loaded here ({reason}): install what it needs, or give "
            "the original checkpoint in full precision"
        )
    if isinstance(cause, ImportError):
        return UsageError(
            f"{name} needs a package or feature that is missing ({reason}): install it, or correct config.json"
        )
    if isinstance(cause, OSError | SafetensorError):
        return Failure(f"the checkpoint in {name} is damaged ({reason}): train or download it again")
    return Failure(f"{name} cannot be loaded ({reason}): correct its config.json, or train or download it again")


def quantizer_of(stored: Mapping[str, Any]) -> str | None:
    """The quantization method in a checkpoint's `stored_config`; None if it is not quantized."""
    settings = stored.get("quantization_config")
    if settings is None:
        return None
    return str(settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings)
