"""From a GPT-NeoX checkpoint and the factors of its layers to a Context-Pythia: every weight has a place or an error.

Neither model is ever whole in memory: weights are read from the original's checkpoint one at a time and written to a
file each, from which the converted model reads them when it runs or is saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import torch
from accelerate import dispatch_model
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.integrations.accelerate import load_offloaded_parameter

from context_pythia.conversion.factorize import Factors, KeysAndValues
from context_pythia.errors import Failure, UsageError, first_line
from context_pythia.evaluation.pretrained import load_pretrained, quantizer_of, stored_config
from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM

# These kinds of RoPE change their angles as the text grows, and a cached key must be turned by its original angles.
CHANGING_ROPE = ("dynamic", "longrope")
# Entries of a configuration that point to code beside it; a converted model has no such code.
OF_ITS_FILES = ("auto_map", "custom_pipelines")


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


def context_config(
    original: GPTNeoXConfig,
    rotary_pairs: list[list[int]] | None,
    widths: list[int],
    context_layers: list[int] | None = None,
    cache_token_ids: bool = False,
) -> ContextPythiaConfig:
    """The original's configuration with the contexts of its layers.

    Args:
        rotary_pairs, widths: of the context that each layer attends to.
    """
    body = original.to_dict()
    for key in ("model_type", "architectures", "transformers_version", *OF_ITS_FILES):
        body.pop(key, None)
    return ContextPythiaConfig(
        **body,
        context_source="layer",
        context_dim=round(fmean(widths)),
        rotary_pairs=rotary_pairs,
        context_layers=context_layers,
        layer_context_dims=None if widths == widths[:1] * original.num_hidden_layers else widths,
        cache_token_ids=cache_token_ids,
        reuse_rotary_keys=not cache_token_ids,
        context_bias=True,
    )


def transplant(
    original: GPTNeoXForCausalLM,
    factors: Iterable[Factors],
    config: ContextPythiaConfig,
    folder: Path,
    dtype: torch.dtype,
) -> ContextPythiaForCausalLM:
    """The converted model. It reads a module's weights from disk when the module runs or is saved.

    Args:
        original: in memory or on disk.
        factors: factors of each layer in turn; may be a generator.
        folder: gets a file for each weight, which the converted model needs until it is saved.
        dtype: dtype of the converted model.

    Raises:
        Failure: a weight of the original is not part of the converted model, or one of its weights is missing.
    """
    files: dict[str, dict[str, str]] = {}

    def write(name: str, weight: torch.Tensor) -> None:
        path = folder / f"{name}.safetensors"
        save_file({name: weight.to(dtype).contiguous()}, path)
        files[name] = {"safetensors_file": str(path)}

    for layer_idx, layer_factors in enumerate(factors):
        for name, weight in _attention_weights(original, layer_idx, layer_factors, config).items():
            write(name, weight)
    for name in original.state_dict():
        if ".query_key_value." not in name:
            write(name, read_weight(original, name))
    with torch.device("meta"):
        model = ContextPythiaForCausalLM(config).to(dtype)
    places = set(model.state_dict())
    if wrong := sorted(files.keys() ^ places):
        what = "is missing from the checkpoint" if wrong[0] in places else "of the checkpoint is not part of the model"
        raise Failure(f"weight {wrong[0]} {what}")
    model.tie_weights()
    # Buffers are not among the weights, so they are still on the meta device.
    model.gpt_neox.rotary_emb = type(model.gpt_neox.rotary_emb)(config)
    model.generation_config = original.generation_config
    return dispatch_model(
        model.eval(),
        {"": "disk"},
        offload_index=files,
        # Absorbed attention reads the weights of its submodules without running them.
        preload_module_classes=["ContextAttention"],
    )


def _attention_weights(
    original: GPTNeoXForCausalLM, layer_idx: int, factors: Factors, config: ContextPythiaConfig
) -> dict[str, torch.Tensor]:
    """The weights that replace a layer's fused projection; for layer 0 also the norm of the embeddings in keys and
    values, which is its own."""
    weight, bias = split_projection(original, layer_idx)
    ours = {
        "rotary_up.weight": factors.rotary_up,
        "key_up.weight": factors.key_up,
        "value_up.weight": factors.value_up,
        "value_up.bias": factors.value_bias,
        "query.weight": weight[0],
    }
    if config.makers[layer_idx] == layer_idx:
        ours |= {"context.weight": factors.context_weight, "context.bias": factors.context_bias}
    if bias is not None:
        ours["query.bias"] = bias[0]
    if not factors.key_up.numel():
        del ours["key_up.weight"]
    named = {f"gpt_neox.layers.{layer_idx}.attention.{name}": tensor for name, tensor in ours.items()}
    if config.cache_token_ids and layer_idx == 0:
        for part in ("weight", "bias"):
            named[f"gpt_neox.token_norm.{part}"] = read_weight(original, f"gpt_neox.layers.0.input_layernorm.{part}")
        # The maps were found for the token's own embedding. Healing may mix in that of the token before it.
        named["gpt_neox.token_shift.weight"] = torch.zeros(config.hidden_size)
    return named
