"""Attention to cached contexts instead of cached keys and values.

A context is `X = [r ; z]`: rotary keys r, already turned, and a latent z. Keys and values are affine in the content c,
`k_pass = U c`, `v = V c + b`, which is z, or with `reuse_rotary_keys` z beside the rotary keys turned back. (A constant
added to all keys of a head drops out of the softmax, so U has no bias.)

Shapes: B batch, Q queries, T keys, H heads, D head size, d its rotary dims, F = d / 2 frequencies, R width of the
rotary keys, P = R / 2 pairs, C width of the content, W cached width.
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

PositionEmbeddings = tuple[torch.Tensor, torch.Tensor]


class RotaryUp(nn.Module):
    """The heads' rotary keys from P cached pairs, each of one frequency and common to all heads.

    A pair is a complex number that RoPE turns by its frequency's angle. At each frequency a head's key is a complex
    combination of the pairs there, which commutes with the turning: it is the same for turned keys (the idea of
    RoRoPE, arXiv 2502.07864).

    Args:
        pairs: number of pairs at each of the F frequencies.
    """

    def __init__(self, num_heads: int, pairs: list[int]):
        super().__init__()
        self.pairs = pairs
        self.weight = nn.Parameter(torch.empty(num_heads, sum(pairs), 2))

    def frequencies(self) -> list[int]:
        """The frequency of each pair, `[P]`."""
        return [frequency for frequency, count in enumerate(self.pairs) for _ in range(count)]

    def forward(self) -> torch.Tensor:
        """The maps of the heads, `[H, d, R]`; rotary keys and pairs alike have real parts first."""
        own = self.weight.new_zeros(len(self.pairs), self.weight.shape[1])
        own[self.frequencies(), range(own.shape[1])] = 1
        real, imaginary = (part.unsqueeze(1) * own for part in self.weight.unbind(-1))
        return torch.cat([torch.cat([real, -imaginary], dim=-1), torch.cat([imaginary, real], dim=-1)], dim=1)


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
        self.rotary_width, self.content_dim = config.rotary_width(layer_idx), config.content_dim(layer_idx)
        self.reuse_rotary_keys = config.reuse_rotary_keys
        hidden, bias = config.hidden_size, config.attention_bias
        context_bias = bias if config.context_bias is None else config.context_bias
        self.query = nn.Linear(hidden, hidden, bias=bias)
        if config.context_source == "layer" and self.context_layer == layer_idx:
            self.context = nn.Linear(hidden, config.cached_width(layer_idx), bias=context_bias)
        if config.rotary_pairs is not None:
            self.num_rotary_keys = 1
            self.rotary_up = RotaryUp(self.num_heads, config.rotary_pairs[layer_idx])
        if self.rotary_ndims < self.head_size:
            self.key_up = nn.Linear(self.content_dim, self.num_heads * (self.head_size - self.rotary_ndims), bias=False)
        self.value_up = nn.Linear(self.content_dim, hidden, bias=context_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layer_past: Cache | None = None,
        position_embeddings: PositionEmbeddings | None = None,
        contexts: MutableMapping[int, torch.Tensor] | None = None,
        turn_back: PositionEmbeddings | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`contexts` maps the index of a layer to the context it made, `[B, 1, T, W]`, for the layers that share it;
        `turn_back` undoes `position_embeddings` for all T keys (`reuse_rotary_keys`)."""
        assert position_embeddings is not None and contexts is not None
        batch, length, _ = hidden_states.shape
        query = self.query(hidden_states).view(batch, length, self.num_heads, self.head_size).transpose(1, 2)
        query = rotate(query, position_embeddings)
        if hasattr(self, "context"):
            new = self.turn(self.context(hidden_states), position_embeddings)
            contexts[self.layer_idx] = cache_context(new, layer_past, self.layer_idx)
        context = contexts[self.context_layer]
        if self.reuse_rotary_keys:
            assert turn_back is not None
            content = self.turn(context[:, 0], turn_back)
            context = torch.cat([context[..., : self.rotary_width], content], dim=-1)

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
            context: `[B, 1, T, R + C]`, turned rotary keys and content.
            attention_mask: as transformers makes it, `[B, 1, Q, T]` or None.

        Returns:
            output `[B, Q, H D]` before the output projection, and the weights if the implementation gives them.
        """
        batch, _, length, _ = context.shape
        rotary, content = context[:, 0].split([self.rotary_width, self.content_dim], dim=-1)
        if hasattr(self, "rotary_up"):
            key = torch.einsum("btr,hdr->bhtd", rotary, self.rotary_up())
        else:
            key = rotary.view(batch, length, self.num_rotary_keys, self.rotary_ndims).transpose(1, 2)
            key = key.expand(-1, self.num_heads, -1, -1)
        if hasattr(self, "key_up"):
            key_pass = self.key_up(content).view(batch, length, self.num_heads, -1).transpose(1, 2)
            key = torch.cat([key, key_pass], dim=-1)
        value = self.value_up(content).view(batch, length, self.num_heads, self.head_size).transpose(1, 2)
        output, weights = self._interface(query, key, value, attention_mask, **kwargs)
        return output.reshape(batch, query.shape[2], -1), weights

    def absorbed(
        self, query: torch.Tensor, context: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decoding: attend to the contexts themselves, with the heads as query positions of a single head.

        `q . k = [q_rot ; U^T q_pass] . [r ; c]` and `sum_t a_t v_t = V (sum_t a_t c_t) + b`. Arguments and results as
        in `expanded`; no key or value is ever built.
        """
        batch, heads, queries, _ = query.shape
        rotary, query_pass = query.split([self.rotary_ndims, self.head_size - self.rotary_ndims], dim=-1)
        if hasattr(self, "rotary_up"):
            rotary = torch.einsum("bhqd,hdr->bhqr", rotary, self.rotary_up())
        elif self.num_rotary_keys > 1:
            # Each head sees its own rotary key: its query is zero in the columns of the others.
            own = torch.eye(heads, dtype=query.dtype, device=query.device)
            rotary = torch.einsum("bhqd,hr->bhqrd", rotary, own).flatten(-2)
        content = query.new_zeros(batch, heads, queries, self.content_dim)
        if hasattr(self, "key_up"):
            key_up = self.key_up.weight.view(heads, -1, self.content_dim)
            content = torch.einsum("bhqd,hdc->bhqc", query_pass, key_up)
        query = torch.cat([rotary, content], dim=-1)

        if attention_mask is not None and queries > 1:
            attention_mask = attention_mask.expand(-1, heads, -1, -1).reshape(batch, 1, heads * queries, -1)
        output, weights = self._interface(
            query.reshape(batch, 1, heads * queries, -1), context, context, attention_mask, is_causal=False, **kwargs
        )
        content = output.reshape(batch, heads, queries, -1)[..., self.rotary_width :]
        value_up = self.value_up.weight.view(heads, self.head_size, -1)
        output = torch.einsum("bhqc,hdc->bqhd", content, value_up).flatten(-2)
        if self.value_up.bias is not None:
            output = output + self.value_up.bias
        return output, None if weights is None else weights.view(batch, heads, queries, -1)

    def turn(self, context: torch.Tensor, position_embeddings: PositionEmbeddings) -> torch.Tensor:
        """`[B, T, W]` -> `[B, 1, T, W]` with the rotary keys turned."""
        if hasattr(self, "rotary_up"):
            columns = self.rotary_up.frequencies() * 2
            cos, sin = position_embeddings
            position_embeddings = cos[..., columns], sin[..., columns]
        return turn_rotary_keys(context, self.num_rotary_keys, position_embeddings)

    def _interface(self, query, key, value, attention_mask, **kwargs):
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        return interface(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)


def rotate(states: torch.Tensor, position_embeddings: PositionEmbeddings) -> torch.Tensor:
    """Turn the rotary dims of `[B, heads, T, >= d]`."""
    cos, sin = position_embeddings
    return apply_rotary_pos_emb(states, states[:, :0], cos, sin)[0]


def turn_rotary_keys(
    context: torch.Tensor, num_rotary_keys: int, position_embeddings: PositionEmbeddings
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
