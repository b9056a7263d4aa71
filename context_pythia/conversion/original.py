"""Opens and checks the checkpoint to convert; its weights are read from disk when needed."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.integrations.accelerate import load_offloaded_parameter

from context_pythia.conversion.factorize import KeysAndValues
from context_pythia.errors import Failure, UsageError, first_line
from context_pythia.evaluation.pretrained import load_pretrained, quantizer_of, stored_config

# These kinds of RoPE change their angles as the text grows, and a cached key must be turned by its original angles.
CHANGING_ROPE = ("dynamic", "longrope")


def load_original(name: str, device: torch.device) -> GPTNeoXForCausalLM:
    """The model to convert, with its weights on disk.

    Args:
        device: the device on which it computes.

    Raises:
        UsageError: a model of another family, a quantized one, or one whose kind of RoPE cannot be converted.
        Failure: a damaged checkpoint.
    """
    # Read the bare file first: transformers may not know the family. Without a family in it, loading reports the fault.
    stored = stored_config(name)
    family = stored.get("model_type")
    if family not in (None, GPTNeoXConfig.model_type):
        raise UsageError(f"{name} is a {family} model: only GPT-NeoX checkpoints (Pythia and its relatives) convert")
    if quantizer := quantizer_of(stored):
        raise UsageError(f"{name} is quantized ({quantizer}): give the original checkpoint in full precision")
    # A module on the GPU makes accelerate compute there.
    parts = dict.fromkeys(("gpt_neox.embed_in", "gpt_neox.layers", "lm_head"), "disk")
    parts |= dict.fromkeys(("gpt_neox.rotary_emb", "gpt_neox.final_layer_norm"), str(device))
    original = load_pretrained(name, torch.float32, parts)
    kind = original.config.rope_parameters.get("rope_type", "default")
    if kind in CHANGING_ROPE:
        raise UsageError(
            f"{name} has RoPE of the type {kind!r}, whose angles change with the length: it cannot convert"
        )
    return original


def check_weights(original: GPTNeoXForCausalLM, name: str) -> None:
    """Read every weight; Failure for one that is unreadable, of another shape or not finite."""
    for parameter, place in original.state_dict().items():
        try:
            weight = read_weight(original, parameter)
        except (OSError, SafetensorError) as error:
            damage = first_line(error)
        else:
            if weight.shape == place.shape and bool(weight.isfinite().all()):
                continue
            damage = f"{parameter} is not finite"
            if weight.shape != place.shape:
                damage = f"{parameter} has the shape {list(weight.shape)}, not {list(place.shape)}"
        raise Failure(f"the checkpoint in {name} is damaged ({damage}): download or train it again")


def read_weight(model: GPTNeoXForCausalLM, name: str) -> torch.Tensor:
    """A parameter on the CPU, read from the checkpoint if the model left it on disk."""
    weight = model.get_parameter(name).detach()
    return (load_offloaded_parameter(model, name) if weight.is_meta else weight).cpu()


def split_projection(model: GPTNeoXForCausalLM, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The fused projection split into queries, keys and values, head by head: weight `[3, D, D]`, bias `[3, D]`."""
    name, heads = f"gpt_neox.layers.{layer_idx}.attention.query_key_value", model.config.num_attention_heads
    weight = read_weight(model, f"{name}.weight").unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2)
    if model.get_submodule(name).bias is None:
        return weight, None
    return weight, read_weight(model, f"{name}.bias").unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1)


def keys_and_values(model: GPTNeoXForCausalLM, layer_idx: int) -> KeysAndValues:
    """A layer's key and value weights, in float64."""
    weight, bias = split_projection(model, layer_idx)
    weight = weight[1:].flatten(0, 1).double()
    return KeysAndValues(
        weight,
        weight.new_zeros(len(weight)) if bias is None else bias[1:].flatten().double(),
        model.config.num_attention_heads,
        model.gpt_neox.layers[layer_idx].attention.rotary_ndims,
    )
