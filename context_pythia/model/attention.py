"""Attention to cached contexts instead of cached keys and values.

A context is `X = [r ; z]`: rotary keys r, already turned, and a latent z. Keys and values are affine in z:
`k_pass = U z`, `v = V z + b`. (A constant added to all keys of a head drops out of the softmax, so U has no bias.)

Shapes: B batch, Q queries, T keys, H heads, D head size, d its rotary dims, R rotary keys, L latent, W = R d + L.
"""

from collections.abc import Callable, MutableMapping

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration import ContextPythiaConfig


class ContextAttention(GPTNeoXAttention):
    """GPT-NeoX attention whose keys and values come from a context.

    Context source `layer`: the first of `context_sharing` layers projects its input to the context and caches it; the
    others read it. Context source `shared`: the model makes the context, and every layer reads it.
    """

    def __init__(self, config: ContextPythiaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.query_key_value
        self.num_heads = config.num_attention_heads
        self.num_rotary_keys = config.num_rotary_keys if config.context_source == "layer" else 1
        self.context_layer = config.context_layer(layer_idx)
        hidden, bias = config.hidden_size, config.attention_bias
        self.query = nn.Linear(hidden, hidden, bias=bias)
        if config.context_source == "layer" and self.context_layer == layer_idx:
            self.context = nn.Linear(hidden, config.cached_width, bias=bias)
        self.key_up = nn.Linear(config.latent_dim, self.num_heads * (self.head_size - self.rotary_ndims), bias=False)
        self.value_up = nn.Linear(config.latent_dim, hidden, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layer_past: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        contexts: MutableMapping[int, torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`contexts` maps the index of a layer to the context it made, `[B, 1, T, W]`, for the layers that share it."""
        assert position_embeddings is not None and contexts is not None
        batch, length, _ = hidden_states.shape
        query = self.query(hidden_states).view(batch, length, self.num_heads, self.head_size).transpose(1, 2)
        query = rotate(query, position_embeddings)
        if hasattr(self, "context"):
            new = turn_rotary_keys(self.context(hidden_states), self.num_rotary_keys, position_embeddings)
            contexts[self.layer_idx] = cache_context(new, layer_past, self.layer_idx)
        context = contexts[self.context_layer]

        # Rebuilding keys and values costs W (d_k + d_v) a cached token, attending to the contexts W for each query and
        # head: fewer queries than a head has dims are cheaper absorbed. Without a mask, several queries mean a causal
        # prefill, which the expanded form leaves to the kernel.
        decoding = context.shape[2] > length and (length == 1 or attention_mask is not None)
        attend = self.absorbed if decoding and length <= self.head_size else self.expanded
        output, weights = attend(query, context, attention_mask, **kwargs)
        return self.dense(output), weights

    def expanded(
        self, query: torch.Tensor, context: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Training and prefill: rebuild keys and values `[B, H, T, D]`, then attend as GPT-NeoX does.

        Args:
            query: `[B, H, Q, D]`, rotary dims turned.
            context: `[B, 1, T, W]`.
            attention_mask: as transformers makes it, `[B, 1, Q, T]` or None.

        Returns:
            output `[B, Q, H D]` before the output projection, and the weights if the implementation gives them.
        """
        batch, _, length, _ = context.shape
        rotary, latent = context[:, 0].split([self.num_rotary_keys * self.rotary_ndims, self.key_up.in_features], -1)
        rotary = rotary.view(batch, length, self.num_rotary_keys, self.rotary_ndims).transpose(1, 2)
        key_pass = self.key_up(latent).view(batch, length, self.num_heads, -1).transpose(1, 2)
        key = torch.cat([rotary.expand(-1, self.num_heads, -1, -1), key_pass], dim=-1)
        value = self.value_up(latent).view(batch, length, self.num_heads, self.head_size).transpose(1, 2)
        output, weights = self._interface(query, key, value, attention_mask, **kwargs)
        return output.reshape(batch, query.shape[2], -1), weights

    def absorbed(
        self, query: torch.Tensor, context: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decoding: attend to the contexts themselves, with the heads as query positions of a single head.

        `q . k = [q_rot ; U^T q_pass] . [r ; z]` and `sum_t a_t v_t = V (sum_t a_t z_t) + b`. Arguments and results as
        in `expanded`; no key or value is ever built.
        """
        batch, heads, queries, _ = query.shape
        rotary, query_pass = query.split([self.rotary_ndims, self.head_size - self.rotary_ndims], dim=-1)
        if self.num_rotary_keys > 1:
            # Each head sees its own rotary key: its query is zero in the columns of the others.
            own = torch.eye(heads, dtype=query.dtype, device=query.device)
            rotary = torch.einsum("bhqd,hr->bhqrd", rotary, own).flatten(-2)
        key_up = self.key_up.weight.view(heads, -1, self.key_up.in_features)
        query = torch.cat([rotary, torch.einsum("bhqd,hdl->bhql", query_pass, key_up)], dim=-1)

        if attention_mask is not None and queries > 1:
            attention_mask = attention_mask.expand(-1, heads, -1, -1).reshape(batch, 1, heads * queries, -1)
        output, weights = self._interface(
            query.reshape(batch, 1, heads * queries, -1), context, context, attention_mask, is_causal=False, **kwargs
        )
        latent = output.reshape(batch, heads, queries, -1)[..., -self.value_up.in_features :]
        value_up = self.value_up.weight.view(heads, self.head_size, -1)
        output = torch.einsum("bhql,hdl->bqhd", latent, value_up).flatten(-2)
        if self.value_up.bias is not None:
            output = output + self.value_up.bias
        return output, None if weights is None else weights.view(batch, heads, queries, -1)

    def _interface(self, query, key, value, attention_mask, **kwargs):
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        return interface(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)


def rotate(states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the rotary dims of `[B, heads, T, >= d]`."""
    cos, sin = position_embeddings
    return apply_rotary_pos_emb(states, states[:, :0], cos, sin)[0]


def turn_rotary_keys(
    context: torch.Tensor, num_rotary_keys: int, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """`[B, T, W]` -> `[B, 1, T, W]` with the rotary keys in its first columns turned to their positions."""
    batch, length, _ = context.shape
    width = position_embeddings[0].shape[-1]
    rotary, latent = context[..., : num_rotary_keys * width], context[..., num_rotary_keys * width :]
    rotary = rotate(rotary.view(batch, length, num_rotary_keys, width).transpose(1, 2), position_embeddings)
    return torch.cat([rotary.transpose(1, 2).flatten(2), latent], dim=-1).unsqueeze(1)


def cache_context(context: torch.Tensor, cache: Cache | None, layer_idx: int) -> torch.Tensor:
    """Append `[B, 1, T, W]` to the cache, if there is one, and return all contexts in it. Values have no width: stock
    caches then hold the contexts alone."""
    return context if cache is None else cache.update(context, context[..., :0], layer_idx)[0]
