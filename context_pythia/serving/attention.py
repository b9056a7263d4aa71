"""A layer of Context-Pythia for vLLM. It uses vLLM's parallel linear maps and reads vLLM's paged cache.

The mathematics is that of `model/attention.py`. Prefill uses expanded attention, sequence by sequence; decoding uses
absorbed attention, for all sequences together. Tensor parallelism divides the heads among the ranks, and each rank
caches whole contexts, because all heads read them.

Shapes: N new tokens of all sequences, B sequences, T cached tokens, H heads of this rank, W cached width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from context_pythia.model.attention import ContextAttention, PositionEmbeddings, RotaryUp, turn_rotary_keys
from context_pythia.model.configuration import ContextPythiaConfig
from context_pythia.serving.cache import ContextCache, Decoding, Prefill

# The kernel splits a sequence into so many parts, as in vLLM's own call.
KERNEL_SPLITS = 4


@dataclass
class Paged:
    """The contexts of decoding sequences in their blocks, for a kernel that reads blocks."""

    cache: ContextCache
    decoding: Decoding


@dataclass
class Positions:
    """Cosines and sines of RoPE.

    Attributes:
        new: for the new tokens, `[1, N, d]`.
        places: for positions 0 to T - 1 of a sequence, `[1, T, d]`; None unless the model caches keys before RoPE
            (`reuse_rotary_keys`).
    """

    new: PositionEmbeddings
    places: PositionEmbeddings | None


class ServedAttention(ContextAttention):
    """Attention of this rank's heads.

    Args:
        cache: the cache of the context that this layer reads.
        prefix: the layer's name in the checkpoint.

    Raises:
        ValueError: the heads cannot be divided among the ranks.
    """

    def __init__(
        self, config: ContextPythiaConfig, layer_idx: int, cache: ContextCache, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__(config, layer_idx)
        ranks = get_tensor_model_parallel_world_size()
        if self.num_heads % ranks:
            raise ValueError(f"tensor_parallel_size {ranks}: must divide the model's {self.num_heads} heads")
        self.num_heads //= ranks
        self.cache = cache
        maps = {"query": ColumnParallelLinear, "context": ReplicatedLinear, "dense": RowParallelLinear}
        for name, kind in maps.items():
            if hasattr(self, name):
                setattr(self, name, parallel(kind, getattr(self, name), vllm_config, f"{prefix}.{name}"))
        for name in ("key_up", "value_up"):
            if hasattr(self, name):
                full = getattr(self, name)
                own = nn.Linear(full.in_features, full.out_features // ranks, bias=full.bias is not None)
                setattr(self, name, by_heads(own))
        if hasattr(self, "rotary_up"):
            self.rotary_up = by_heads(RotaryUp(self.num_heads, self.rotary_up.pairs))

    def forward(self, hidden_states: torch.Tensor, positions: Positions) -> torch.Tensor:  # type: ignore[override]
        """`[N, D]` -> `[N, D]`."""
        tokens = len(hidden_states)
        query = self.query(hidden_states).view(1, tokens, self.num_heads, self.head_size).transpose(1, 2)
        query = turn_rotary_keys(query, positions.new)
        new = self.context(hidden_states)[None, None] if hasattr(self, "context") else None
        output = hidden_states.new_zeros(tokens, self.num_heads * self.head_size)
        batch = self.cache.batch()
        if batch is not None:
            if new is not None:
                if not self.reuse_rotary_keys:
                    new = turn_rotary_keys(new, self.columns(positions.new))
                self.cache.write(new[0, 0], batch.slots)
            for prefill in batch.prefills:
                output[prefill.tokens] = self._prefill(query[:, :, prefill.tokens], prefill, positions.places)
            for decoding in batch.decodings:
                rows = query[0, :, decoding.tokens].transpose(0, 1).unsqueeze(2)
                output[decoding.tokens] = self._decode(rows, decoding, positions.places)
        return self.dense(output)

    def _prefill(self, query: torch.Tensor, prefill: Prefill, places: PositionEmbeddings | None) -> torch.Tensor:
        """`[1, H, Q, D]` -> `[Q, H D]`."""
        context = self.cache.read(prefill.blocks)[None, None, : prefill.length]
        mask, queries = None, query.shape[2]
        if queries < prefill.length:
            # With cached tokens before it, the kernel's own causal mask starts at the wrong token.
            mask = query.new_ones(queries, prefill.length, dtype=torch.bool).tril(prefill.length - queries)[None, None]
        return self.expanded(query, context, mask, up_to(places, prefill.length))[0][0]

    def _decode(self, query: torch.Tensor, decoding: Decoding, places: PositionEmbeddings | None) -> torch.Tensor:
        """`[B, H, 1, D]` -> `[B, H D]`."""
        if self._kernel_takes(query):
            paged: Any = Paged(self.cache, decoding)  # absorbed attention only passes it to `_interface`
            return self.absorbed(query, paged, None)[0][:, 0]
        context = self.cache.read(decoding.blocks).unsqueeze(1)
        length = context.shape[2]
        mask = torch.arange(length, device=query.device) < decoding.lengths[:, None, None, None]
        return self.absorbed(query, context, mask, up_to(places, length))[0][:, 0]

    def _kernel_takes(self, query: torch.Tensor) -> bool:
        """Whether vLLM's Triton kernel for MLA can decode: on a GPU, with keys that are cached after RoPE."""
        return query.is_cuda and not self.reuse_rotary_keys

    def _interface(self, query, key, value, attention_mask, **kwargs):
        if isinstance(key, Paged):
            return decode_by_kernel(query, key, self.scaling), None
        return super()._interface(query, key, value, attention_mask, **kwargs)


def decode_by_kernel(query: torch.Tensor, paged: Paged, scaling: float) -> torch.Tensor:
    """`scaled_dot_product_attention(query, X, X)` in the layout of transformers. Triton reads X block by block.

    Args:
        query: `[B, 1, H, W]`; the heads are positions of one head.

    Returns:
        `[B, H, 1, W]`.
    """
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    query = query[:, 0].contiguous()
    batch, heads, width = query.shape
    contexts = paged.cache.kv_cache.transpose(1, 2)  # [blocks, S, 1, W]
    output = torch.empty_like(query)
    scratch = query.new_empty(batch, heads, KERNEL_SPLITS, width + 1, dtype=torch.float32)
    decode_attention_fwd(
        query,
        contexts,
        contexts,
        output,
        query.new_empty(batch, heads, dtype=torch.float32),
        paged.decoding.blocks,
        paged.decoding.lengths,
        scratch,
        KERNEL_SPLITS,
        scaling,
        contexts.shape[1],
    )
    return output.unsqueeze(2)


class ServedLayer(nn.Module):
    """GPT-NeoX's layer around our attention."""

    def __init__(
        self, config: ContextPythiaConfig, layer_idx: int, cache: ContextCache, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ServedAttention(config, layer_idx, cache, vllm_config, f"{prefix}.attention")
        self.mlp = ServedMLP(config, vllm_config, f"{prefix}.mlp")

    def forward(self, hidden_states: torch.Tensor, positions: Positions) -> torch.Tensor:
        attended = hidden_states + self.attention(self.input_layernorm(hidden_states), positions)
        source = hidden_states if self.use_parallel_residual else attended
        return attended + self.mlp(self.post_attention_layernorm(source))


class ServedMLP(nn.Module):
    def __init__(self, config: ContextPythiaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        wide, narrow = config.intermediate_size, config.hidden_size
        options = dict(quant_config=vllm_config.quant_config, return_bias=False)
        self.dense_h_to_4h = ColumnParallelLinear(narrow, wide, prefix=f"{prefix}.dense_h_to_4h", **options)
        self.dense_4h_to_h = RowParallelLinear(wide, narrow, prefix=f"{prefix}.dense_4h_to_h", **options)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(hidden_states)))


def parallel(kind: Any, linear: nn.Linear, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """vLLM's linear map of that kind, in the shape of `linear`."""
    return kind(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
        return_bias=False,
    )


def by_heads(module: nn.Module) -> Any:
    """`module`; its parameters load only the rows of this rank's heads.

    It stays a plain module, because absorbed attention reads its weights.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        set_weight_attrs(parameter, {"weight_loader": load_own_rows})
    return module


def load_own_rows(parameter: torch.Tensor, loaded: torch.Tensor) -> None:
    own = loaded.chunk(get_tensor_model_parallel_world_size())[get_tensor_model_parallel_rank()]
    default_weight_loader(parameter, own)


def up_to(places: PositionEmbeddings | None, length: int) -> PositionEmbeddings | None:
    return None if places is None else (places[0][:, :length], places[1][:, :length])
