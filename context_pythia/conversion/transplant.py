"""From a GPT-NeoX model and the factors of its layers to a Context-Pythia: every weight has a place or an error.

The converted model takes the original's tensors over and frees each layer's fused projection as its factors come, so
that the weights are held once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia.conversion.factorize import Factors, KeysAndValues
from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM

# A cached key is turned back by the angles of today; these kinds of RoPE change them as the text grows.
CHANGING_ROPE = ("dynamic", "longrope")


def check_convertible(config: GPTNeoXConfig, name: str) -> None:
    """Raises ValueError, in one line, for a model that cannot be converted."""
    if config.model_type != "gpt_neox":
        raise ValueError(
            f"{name} is a {config.model_type} model: only GPT-NeoX checkpoints (Pythia and its relatives) convert; "
            "families with grouped or latent keys and values, such as Llama, Qwen, Mistral or DeepSeek, do not"
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind in CHANGING_ROPE:
        raise ValueError(
            f"{name} has RoPE of the type {kind!r}, whose angles change with the length: it cannot convert"
        )


def split_projection(model: GPTNeoXForCausalLM, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The fused projection by parts: weight `[3, D, D]` and bias `[3, D]`, queries, keys and values, head by head."""
    fused, heads = model.gpt_neox.layers[layer_idx].attention.query_key_value, model.config.num_attention_heads
    weight = fused.weight.detach().unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2)
    if fused.bias is None:
        return weight, None
    return weight, fused.bias.detach().unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1)


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
    original: GPTNeoXConfig, context_dim: int, rotary_pairs: list[list[int]], widths: list[int]
) -> ContextPythiaConfig:
    """The original's configuration with the contexts of its layers."""
    body = original.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        body.pop(key, None)
    return ContextPythiaConfig(
        **body,
        context_source="layer",
        context_dim=context_dim,
        rotary_pairs=rotary_pairs,
        layer_context_dims=None if set(widths) == {context_dim} else widths,
        reuse_rotary_keys=True,
        context_bias=True,
    )


def transplant(
    original: GPTNeoXForCausalLM, factors: Iterable[Factors], config: ContextPythiaConfig
) -> ContextPythiaForCausalLM:
    """The converted model, in the original's dtype and on its device; the original is used up.

    Args:
        factors: of each layer in turn; may be made as they are asked for.

    Raises:
        RuntimeError: a weight of the original has no place, or a place has no weight.
    """
    with torch.device("meta"):
        model = ContextPythiaForCausalLM(config)
    state = {name: tensor for name, tensor in original.state_dict().items() if ".query_key_value." not in name}
    for layer_idx, layer_factors in enumerate(factors):
        prefix = f"gpt_neox.layers.{layer_idx}.attention."
        weight, bias = split_projection(original, layer_idx)
        ours = {
            "context.weight": layer_factors.context_weight,
            "context.bias": layer_factors.context_bias,
            "rotary_up.weight": layer_factors.rotary_up,
            "key_up.weight": layer_factors.key_up,
            "value_up.weight": layer_factors.value_up,
            "value_up.bias": layer_factors.value_bias,
            "query.weight": weight[0],
        }
        if bias is not None:
            ours["query.bias"] = bias[0]
        if not layer_factors.key_up.numel():
            del ours["key_up.weight"]
        # Contiguous clones, or views would keep the fused projection alive.
        state |= {
            prefix + name: tensor.to(weight).clone(memory_format=torch.contiguous_format)
            for name, tensor in ours.items()
        }
        original.gpt_neox.layers[layer_idx].attention.query_key_value = torch.nn.Identity()
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["gpt_neox.embed_in.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # Not among the weights, so still on the meta device.
    rotary = type(model.gpt_neox.rotary_emb)(config).to(original.device)
    model.gpt_neox.rotary_emb = rotary
    model.generation_config = original.generation_config
    return model.eval()
