"""Grouped-query attention on GPT-NeoX, for comparison with contexts: it caches fewer heads of keys and values.

H heads of queries read the keys and values of `key_value_heads` heads (arXiv 2305.13245; 1 is multi-query attention,
arXiv 1911.02150), which consecutive layers may share (cross-layer attention, arXiv 2405.12981).

Shapes: B batch, Q queries, T keys, H heads, G heads of keys and values, D head size.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

from .attention import PositionEmbeddings, host_attention, turn_rotary_keys
from .configuration import ContextPythiaConfig
from .layer_contexts import Contexts


class GroupedAttention(GPTNeoXAttention):
    """GPT-NeoX attention whose H heads read G heads of keys and values, its own or those of an earlier layer."""

    def __init__(self, config: ContextPythiaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.query_key_value
        self.num_heads, self.key_value_heads = config.num_attention_heads, config.key_value_heads
        self.context_layer = config.makers[layer_idx]
        hidden, bias = config.hidden_size, config.attention_bias
        self.query = nn.Linear(hidden, hidden, bias=bias)
        if self.context_layer == layer_idx:
            self.key_value = nn.Linear(hidden, config.cached_width(layer_idx), bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layer_past: Cache | None = None,
        position_embeddings: PositionEmbeddings | None = None,
        contexts: Contexts | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`contexts` holds a layer's keys and values, `[B, G, T, D]` twice, for the layers that share them."""
        assert position_embeddings is not None and contexts is not None
        batch, length, _ = hidden_states.shape
        query = self.query(hidden_states).view(batch, length, self.num_heads, self.head_size).transpose(1, 2)
        query = turn_rotary_keys(query, position_embeddings)
        if hasattr(self, "key_value"):
            heads = self.key_value(hidden_states).view(batch, length, 2 * self.key_value_heads, self.head_size)
            key, value = heads.transpose(1, 2).chunk(2, dim=1)
            key = turn_rotary_keys(key, position_embeddings)
            if layer_past is not None:
                key, value = layer_past.update(key, value, self.layer_idx)
            contexts[self.layer_idx] = key, value
        group = self.num_heads // self.key_value_heads
        shared = (heads.to(query.device) for heads in contexts[self.context_layer])
        key, value = (heads.repeat_interleave(group, dim=1) for heads in shared)
        output, weights = host_attention(self, query, key, value, attention_mask, **kwargs)
        return self.dense(output.reshape(batch, length, -1)), weights
