"""Checks that a model's context fits the recipe's body, before any text is read."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from context_pythia.errors import UsageError

if TYPE_CHECKING:
    from context_pythia.config.recipe import ArchitectureOptions, ModelOptions


def check_context(model: ModelOptions, architecture: ArchitectureOptions) -> None:
    """Raise `UsageError` if the model's context does not fit the body."""
    widest = 2 * architecture.hidden_size
    if model.context_source != "grouped" and not model.layer_context_dims and not 1 <= model.context_dim <= widest:
        raise UsageError(f"context_dim {model.context_dim}: must be between 1 and 2 * hidden_size = {widest}")
    layers = architecture.num_hidden_layers
    if model.context_sharing > layers:
        raise UsageError(f"context_sharing {model.context_sharing}: must be between 1 and num_hidden_layers = {layers}")
    heads = architecture.num_attention_heads
    if heads % model.key_value_heads:
        raise UsageError(f"key_value_heads {model.key_value_heads}: must divide num_attention_heads = {heads}")
    if model.context_source != "layer":
        for name in ("context_layers", "layer_context_dims", "cache_token_ids"):
            if value := getattr(model, name):
                raise UsageError(f"{name} {value}: is for the source layer, not {model.context_source}: remove it")
        return
    keys = model.num_rotary_keys
    if keys not in (1, heads):
        raise UsageError(f"num_rotary_keys {keys}: must be 1 or num_attention_heads = {heads}")
    makers = model.context_layers
    if makers is None:
        makers = [i - i % model.context_sharing for i in range(layers)]
    elif model.context_sharing > 1:
        raise UsageError(f"context_sharing {model.context_sharing}: says what context_layers says, remove one")
    steps = enumerate(pairwise([0, *makers]))
    if len(makers) != layers or any(maker not in (i, before) for i, (before, maker) in steps):
        raise UsageError(
            f"context_layers {makers}: must have {layers} entries, each the layer's own index or the entry before it"
        )
    label, widths = "context_dim", [model.context_dim]
    if (dims := model.layer_context_dims) is not None:
        if len(dims) != layers:
            raise UsageError(f"layer_context_dims {dims}: must have {layers} entries, one a layer")
        label, widths = "layer_context_dims", [dims[i] for i in sorted(set(makers))]
    rotary = keys * architecture.rotary_dims
    if min(widths) < rotary + (not model.cache_token_ids):
        bound = "at least" if model.cache_token_ids else "more than"
        raise UsageError(
            f"{label} {min(widths)}: must be {bound} the {rotary} dims of the rotary keys "
            f"that a layer's context includes ({keys} of {architecture.rotary_dims})"
        )
