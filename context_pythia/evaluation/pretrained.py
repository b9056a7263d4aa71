"""Load a saved model for evaluation, with one clear line for everything that can be wrong with it."""

import logging as standard_logging
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

import context_pythia.model  # noqa: F401  registers the model with the Auto classes
from context_pythia.data.corpora import is_hub_name, require_on_hub
from context_pythia.errors import Failure, UsageError


def load_pretrained(name: str, dtype: torch.dtype, device_map: dict[str, str] | None = None) -> PreTrainedModel:
    """The causal language model in the folder, or of the Hub name, `name`, ready for evaluation.

    Weights are read from safetensors alone; nothing is unpickled.

    Args:
        device_map: as transformers takes it. Modules on "disk" hold no weights (theirs are meta tensors): accelerate
            reads them from the checkpoint, in `dtype`, each time that the module runs.

    Raises:
        FileNotFoundError: there is no such folder and no such model.
        ConnectionError: the Hub cannot be reached.
        Failure: the checkpoint is damaged: unreadable, or with tensors missing, left over or of another shape.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(
                f"{name} holds no config.json: give the folder of one model, such as RUN/models/NAME"
            )
    elif is_hub_name(name):
        try:
            AutoConfig.from_pretrained(name, local_files_only=True)
        except OSError:
            require_on_hub("model", name)
    else:
        raise FileNotFoundError(f"no such model: {name!r} (give a model's folder or a Hub name)")
    if list(Path(name).glob("*.bin")) and not list(Path(name).glob("*.safetensors")):
        raise FileNotFoundError(f"{name} holds no safetensors: save its weights in that format, no other is read")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    standard_logging.getLogger("accelerate.big_modeling").setLevel(standard_logging.ERROR)
    try:
        model, state = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, device_map=device_map
        )
    except ConnectionError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Failure(f"the checkpoint in {name} is damaged ({reason}): train or download it again") from error
    if wrong := [f"{kind.replace('_', ' ')} {sorted(map(str, keys))[0]}" for kind, keys in state.items() if keys]:
        raise Failure(f"the checkpoint in {name} is damaged ({wrong[0]}): train or download it again")
    return model.eval()


def check_length(length: int, config: PreTrainedConfig) -> None:
    """Raises UsageError for samples of more tokens than the model has positions."""
    if length > config.max_position_embeddings:
        raise UsageError(
            f"sequence_length {length}: the model has {config.max_position_embeddings} positions, give at most so many"
        )
