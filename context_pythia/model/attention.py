"""Attention to cached contexts instead of cached keys and values.

A context is `X = [r ; z]`: rotary keys r and a latent z. Keys and values are affine in the content c, `k_pass = U c`,
`v = V c + b`. (A constant added to all keys of a head drops out of the softmax, so U has no bias.) The content c is z,
and r is cached turned by RoPE. With `reuse_rotary_keys` c is all of X, and r is cached before RoPE turns it. With
`cache_token_ids` c is `[z ; e]`, where e mixes the embeddings of the token and the one before it, looked up by the ids
that the first context has.

Shapes: B batch, Q queries, T keys, H heads, D head size, d its rotary dims, F = d / 2 frequencies, R width of the
rotary keys, P = R / 2 pairs, C width of the content, W cached width.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    eager_attention_forward,
    rotate_half,
)

from .cache import bring_back
from .configuration import ContextPythiaConfig
from .flash_decoding import attend_in_splits, splits_for
from .layer_contexts import Contexts
from .shortcuts import is_plain, only_values

PositionEmbeddings = tuple[torch.Tensor, torch.Tensor]

# On a CPU, RoPE is applied to this many cached numbers at a time, so they are still in the processor's cache when they
# are read.
TURNED_NUMBERS = 2**18


class RotaryUp(nn.Module):
    """The heads' rotary keys from P cached pairs; each pair has one frequency and serves all heads.

    A pair is a complex number that RoPE turns by its frequency's angle. At each frequency a head's key is a complex
    combination of that frequency's pairs. This commutes with RoPE, so the same map gives the turned keys (the idea of
    RoRoPE, arXiv 2502.07864).

    Args:
        pairs: number of pairs at each of the F frequencies.
    """

    def __init__(self, num_heads: int, pairs: list[int]):
        super().__init__()
        self.pairs = pairs
        self.weight = nn.Parameter(torch.empty(num_heads, sum(pairs), 2))

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        """Turned pairs `[B, T, R]` -> keys of the heads `[B, H, T, d]`; both have real parts first."""
        return torch.einsum("btr,hdr->bhtd", keys, self.maps())

    def maps(self) -> torch.Tensor:
        """The maps of the heads, `[H, d, R]`."""
        frequencies = len(self.pairs)
        own = at_pairs(torch.eye(frequencies, dtype=self.weight.dtype, device=self.weight.device), self.pairs)
        real, imaginary = (part.unsqueeze(1) * own for part in self.weight.unbind(-1))
        return torch.cat([torch.cat([real, -imaginary], dim=-1), torch.cat([imaginary, real], dim=-1)], dim=1)


class ContextAttention(GPTNeoXAttention):
    """GPT-NeoX attention whose keys and values come from a context.

    Context source `layer`: a layer projects its input to a context and caches it; the layers that attend to it
    (`context_layers` or `context_sharing`) read it. Context source `shared`: the model makes the context, and every
    layer reads it.
    """

    def __init__(self, config: ContextPythiaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.query_key_value
        self.num_heads = config.num_attention_heads
        self.context_layer = config.makers[layer_idx]
        self.rotary_width, self.content_dim = config.rotary_width(layer_idx), config.content_dim(layer_idx)
        self.reuse_rotary_keys, self.reads_embedding = config.reuse_rotary_keys, config.cache_token_ids
        hidden, bias = config.hidden_size, config.attention_bias
        context_bias = bias if config.context_bias is None else config.context_bias
        self.query = nn.Linear(hidden, hidden, bias=bias)
        if config.context_source == "layer" and self.context_layer == layer_idx:
            self.context = nn.Linear(hidden, config.context_width(layer_idx), bias=context_bias)
            self.id_digits = config.cached_width(layer_idx) - config.context_width(layer_idx)
        if config.pairs is not None:
            self.pairs = config.pairs[self.context_layer]
            self.rotary_up = RotaryUp(self.num_heads, self.pairs)
        if self.rotary_ndims < self.head_size:
            self.key_up = nn.Linear(self.content_dim, self.num_heads * (self.head_size - self.rotary_ndims), bias=False)
        self.value_up = nn.Linear(self.content_dim, hidden, bias=context_bias)
        if config.context_source == "layer":
            for name in ("key_up", "value_up"):
                if hasattr(self, name):
                    getattr(self, name).context_columns = self.content_dim - hidden * self.reads_embedding

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layer_past: Cache | None = None,
        position_embeddings: PositionEmbeddings | None = None,
        contexts: Contexts | None = None,
        key_positions: PositionEmbeddings | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """With `reuse_rotary_keys`, `key_positions` are the cosines and sines of all T keys, `[1 or B, T, d]`."""
        assert position_embeddings is not None and contexts is not None
        batch, length, _ = hidden_states.shape
        query = self.query(hidden_states).view(batch, length, self.num_heads, self.head_size).transpose(1, 2)
        query = turn_rotary_keys(query, position_embeddings)
        if hasattr(self, "context"):
            new = self.context(hidden_states).unsqueeze(1)
            if not self.reuse_rotary_keys:
                new = turn_rotary_keys(new, self.columns(position_embeddings))
            if self.id_digits:
                assert contexts.digits is not None
                new = torch.cat([new, contexts.digits.to(new).unsqueeze(1)], dim=-1)
            context = cache_context(new, layer_past, self.layer_idx)
            if self.reads_embedding:
                context = contexts.with_embeddings(context, self.id_digits)
            contexts[self.layer_idx] = context
        context = contexts[self.context_layer].to(query.device)

        # Per cached token, rebuilding keys and values costs W (d_k + d_v); attending to the contexts costs W for each
        # query and head. So the absorbed form is cheaper for fewer queries than a head has dims. Without a mask,
        # several queries mean a causal prefill, which the expanded form leaves to the kernel.
        decoding = context.shape[2] > length and (length == 1 or attention_mask is not None)
        attend = self.absorbed if decoding and length <= self.head_size and self.is_plain else self.expanded
        output, weights = attend(query, context, attention_mask, key_positions, **kwargs)
        return self.dense(output), weights

    @property
    def is_plain(self) -> bool:
        """Whether the maps to keys and values may be absorbed; absorbed maps are not called."""
        maps = [("key_up", nn.Linear), ("value_up", nn.Linear), ("rotary_up", RotaryUp)]
        return all(is_plain(getattr(self, name), kind) for name, kind in maps if hasattr(self, name))

    def expanded(
        self,
        query: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None,
        key_positions: PositionEmbeddings | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Expanded attention, for training, prefill, and maps that must be called: rebuild keys and values
        `[B, H, T, D]`, then attend as GPT-NeoX does.

        Args:
            query: `[B, H, Q, D]`, rotary dims turned.
            context: `[B, 1, T, W]`.
            attention_mask: as transformers makes it, `[B, 1, Q, T]` or None.
            key_positions: as in `forward`.

        Returns:
            output `[B, Q, H D]` before the output projection, and the weights if the implementation gives them.
        """
        batch, _, length, _ = context.shape
        rotary, content = context[:, 0, :, : self.rotary_width], context[:, 0, :, -self.content_dim :]
        if self.reuse_rotary_keys:
            assert key_positions is not None
            rotary = turn_rotary_keys(rotary, self.columns(key_positions))
        if hasattr(self, "rotary_up"):
            key = self.rotary_up(rotary)
        else:
            key = rotary.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        if hasattr(self, "key_up"):
            key_pass = self.key_up(content).view(batch, length, self.num_heads, -1).transpose(1, 2)
            key = torch.cat([key, key_pass], dim=-1)
        value = self.value_up(content).view(batch, length, self.num_heads, self.head_size).transpose(1, 2)
        output, weights = self._interface(query, key, value, attention_mask, **kwargs)
        return output.reshape(batch, query.shape[2], -1), weights

    def absorbed(
        self,
        query: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None,
        key_positions: PositionEmbeddings | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Absorbed attention, for decoding: attend to the contexts themselves, with the heads as queries of one head.

        `q . k = [q_rot ; U^T q_pass] . [r ; c]` and `sum_t a_t v_t = V (sum_t a_t c_t) + b`. Arguments and results are
        those of `expanded`; keys and values are never built.
        """
        batch, heads, queries, _ = query.shape
        rotary, query_pass = query.split([self.rotary_ndims, self.head_size - self.rotary_ndims], dim=-1)
        if hasattr(self, "rotary_up"):
            rotary = torch.einsum("bhqd,hdr->bhqr", rotary, self.rotary_up.maps())
        if hasattr(self, "key_up"):
            key_up = self.key_up.weight.view(heads, -1, self.content_dim)
            content = torch.einsum("bhqd,hdc->bhqc", query_pass, key_up)
        else:
            content = query.new_zeros(batch, heads, queries, self.content_dim)

        if attention_mask is not None and queries > 1:
            attention_mask = attention_mask.expand(-1, heads, -1, -1).reshape(batch, 1, heads * queries, -1)
        if self.reuse_rotary_keys:
            # The keys are affine in X, except for the turned part. Its scores are added in the form of a mask.
            assert key_positions is not None
            keys = context[:, 0, :, : self.rotary_width]
            rotary = self.scaling * rotary.flatten(1, 2)
            scores = turned_scores(rotary, keys, self.columns(key_positions))
            attention_mask = add_mask(scores.unsqueeze(1), attention_mask)
            query = content
        else:
            query = torch.cat([rotary, content], dim=-1)
        output, weights = self._interface(
            query.reshape(batch, 1, heads * queries, -1), context, context, attention_mask, is_causal=False, **kwargs
        )
        content = output.reshape(batch, heads, queries, -1)[..., -self.content_dim :]
        value_up = self.value_up.weight.view(heads, self.head_size, -1)
        output = torch.einsum("bhqc,hdc->bqhd", content, value_up).flatten(-2)
        if self.value_up.bias is not None:
            output = output + self.value_up.bias
        return output, None if weights is None else weights.view(batch, heads, queries, -1)

    def columns(self, position_embeddings: PositionEmbeddings) -> PositionEmbeddings:
        """The columns for a cached rotary key: if it consists of pairs, one for each pair's frequency."""
        if not hasattr(self, "rotary_up"):
            return position_embeddings
        halves = (at_pairs(table[..., : self.rotary_ndims // 2], self.pairs) for table in position_embeddings)
        cos, sin = (torch.cat([half, half], dim=-1) for half in halves)
        return cos, sin

    def _interface(self, query, key, value, attention_mask, **kwargs):
        # Only absorbed attention passes the same tensor for both.
        splits = splits_for(query, key, self.config._attn_implementation) if value is key else 1
        if splits > 1:
            return attend_in_splits(query, key, attention_mask, self.scaling, splits), None
        return host_attention(self, query, key, value, attention_mask, **kwargs)


def host_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention that the module's configuration names: output `[B, Q, H, D]`, and the weights if it gives them."""
    attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
    dropout = module.attention_dropout if module.training else 0.0
    return attend(module, query, key, value, mask, scaling=module.scaling, dropout=dropout, **kwargs)


def at_pairs(table: torch.Tensor, pairs: list[int]) -> torch.Tensor:
    """`[..., F]` -> `[..., P]`: for each pair the entry of `table` at its frequency."""
    columns = zip(table.split(1, dim=-1), pairs, strict=True)
    return torch.cat([column.expand(*table.shape[:-1], count) for column, count in columns], dim=-1)


def turn_rotary_keys(context: torch.Tensor, position_embeddings: PositionEmbeddings) -> torch.Tensor:
    """`[..., T, >= R]` with the rotary keys in its first R columns turned to their positions."""
    cos, sin = position_embeddings
    if context.ndim == 4:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotary, latent = context.tensor_split([cos.shape[-1]], dim=-1)
    return torch.cat([rotary * cos + rotate_half(rotary) * sin, latent], dim=-1)


def turned_scores(query: torch.Tensor, keys: torch.Tensor, position_embeddings: PositionEmbeddings) -> torch.Tensor:
    """Products of queries `[B, HQ, R]` with rotary keys `[B, T, R]` that RoPE has not turned yet, `[B, HQ, T]`.

    `q . (k cos + half(k) sin) = [q ; -half(q)] . [k cos ; k sin]`, where half swaps real and imaginary parts. Each
    cached number thus needs only two products with tables that the sequences share.
    """
    queries = torch.cat([query, -rotate_half(query)], dim=-1)
    batch, tokens, width = keys.shape
    if keys.device.type == "cpu" and only_values():
        tokens = max(1, TURNED_NUMBERS // (2 * batch * width))
    scores = []
    for key, cos, sin in zip(*(table.split(tokens, dim=1) for table in (keys, *position_embeddings)), strict=True):
        scores.append(queries @ torch.cat([key * cos, key * sin], dim=-1).transpose(1, 2))
    return torch.cat(scores, dim=-1)


def add_mask(scores: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Scores with a mask of transformers: booleans, or numbers to add."""
    if attention_mask is None:
        return scores
    if attention_mask.dtype == torch.bool:
        return scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return scores + attention_mask


def cache_context(context: torch.Tensor, cache: Cache | None, layer_idx: int) -> torch.Tensor:
    """Append `[B, 1, T, W]` to the cache, if there is one, and return all its contexts. Values have width 0, so stock
    caches store only the contexts.

    Raises:
        ValueError: the cache has other contents, such as the keys of a prefix that PEFT trains.
    """
    if cache is None:
        return context
    bring_back(cache, layer_idx)
    keys: Any = getattr(cache.layers[layer_idx], "keys", None) if layer_idx < len(cache.layers) else None
    has_keys = isinstance(cache, DynamicCache) and keys is not None and keys.ndim == 4
    if has_keys and keys.shape[1::2] != context.shape[1::2]:
        raise ValueError(
            f"the cache has {keys.shape[1]} heads of {keys.shape[3]} numbers per token, but this model caches one "
            f"context of {context.shape[3]}: give a cache without keys and values of GPT-NeoX (such as prefix tuning's)"
        )
    return cache.update(context, context[..., :0], layer_idx)[0]
