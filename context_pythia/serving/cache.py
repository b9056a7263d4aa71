"""The cache of contexts, one vector per token and context, and the blocks of vLLM that a batch reads and writes.

Shapes: N new tokens of all sequences, B sequences, W cached width, S tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpec, MLAAttentionSpec

# Sequences decode in groups, padded to the longest. The longest has at most so many times the tokens of the shortest.
MOST_PADDING = 2


@dataclass
class Prefill:
    """A sequence with several new tokens.

    Attributes:
        tokens: its new tokens among the N.
        blocks: its blocks, `[ceil(length / S)]`.
        length: its tokens, including the new ones.
    """

    tokens: slice
    blocks: torch.Tensor
    length: int


@dataclass
class Decoding:
    """Sequences of similar length with one new token each.

    Attributes:
        tokens: the new tokens' indices among the N, `[B]`.
        blocks: the blocks of each sequence, `[B, most blocks]`; the row of a shorter sequence ends with any blocks.
        lengths: tokens of each sequence, including the new one, `[B]`.
    """

    tokens: torch.Tensor
    blocks: torch.Tensor
    lengths: torch.Tensor


@dataclass
class Batch(AttentionMetadata):
    """What the attention of one step reads and writes.

    Attributes:
        slots: the slots of the N new contexts, `[N]`; slot i is the i-th token of the cache's blocks.
        starts: the first new token of each sequence, `[B]`.
        counts: new tokens of each sequence.
        before: cached tokens of each sequence.
        last_slots: slot of each sequence's last cached token; any slot where `before` is 0, `[B]`.
        longest: tokens of the longest sequence.
    """

    prefills: list[Prefill]
    decodings: list[Decoding]
    slots: torch.Tensor
    starts: torch.Tensor
    counts: list[int]
    before: list[int]
    last_slots: torch.Tensor
    longest: int


class BatchBuilder(AttentionMetadataBuilder[Batch]):
    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        common, size = common_attn_metadata, self.kv_cache_spec.block_size
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        exact = common.seq_lens_cpu_upper_bound
        lengths = (common.seq_lens if exact is None else exact)[: common.num_reqs].tolist()
        counts = [end - start for start, end in zip(starts, starts[1:], strict=False)]
        before = [length - count for length, count in zip(lengths, counts, strict=True)]
        table, device = common.block_table_tensor, common.block_table_tensor.device

        rows = range(common.num_reqs)
        prefills = [
            Prefill(slice(starts[i], starts[i + 1]), table[i, : -(-lengths[i] // size)], lengths[i])
            for i in rows
            if counts[i] > 1
        ]
        decodings = []
        for group in similar({i: lengths[i] for i in rows if counts[i] == 1}):
            index = torch.tensor(group, device=device)
            tokens = torch.tensor([starts[i] for i in group], device=device)
            blocks = table[index, : -(-lengths[group[0]] // size)]
            decodings.append(Decoding(tokens, blocks, torch.tensor([lengths[i] for i in group], device=device)))

        last = torch.tensor([max(count - 1, 0) for count in before], device=device)
        blocks = table[torch.arange(common.num_reqs, device=device), last // size]
        return Batch(
            prefills,
            decodings,
            common.slot_mapping[: starts[-1]],
            torch.tensor(starts[:-1], device=device),
            counts,
            before,
            blocks * size + last % size,
            max(lengths, default=0),
        )


def similar(lengths: dict[int, int]) -> list[list[int]]:
    """The keys in groups, longest first, in which the longest is at most MOST_PADDING times the shortest."""
    groups: list[list[int]] = []
    for key in sorted(lengths, key=lambda key: -lengths[key]):
        if not groups or lengths[groups[-1][0]] > MOST_PADDING * lengths[key]:
            groups.append([])
        groups[-1].append(key)
    return groups


class ContextBackend(AttentionBackend):
    """Tells vLLM the layout of the cache and the builder of batches. The model itself computes attention."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes = ["auto"]
    # Otherwise vLLM writes keys and values into the blocks, in its own layout.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("Context-Pythia's attention is a part of its model")

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        return BatchBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # The tokens of a layer are contiguous: a slot is a row, and each layer may have its own width.
        return (KVCacheLayout.LBHNC,)


class ContextCache(nn.Module, AttentionLayerBase):
    """The cache of one context. vLLM allocates it as `kv_cache` `[blocks, 1, S, W]` and assigns its blocks.

    Args:
        width: W.
        name: vLLM's name for it, with the index of the layer that makes the context.
    """

    supports_dcp = False

    def __init__(self, width: int, vllm_config: VllmConfig, name: str) -> None:
        super().__init__()
        if vllm_config.cache_config.cache_dtype != "auto":
            raise ValueError(
                f"kv_cache_dtype {vllm_config.cache_config.cache_dtype!r}: a Context-Pythia caches contexts in the "
                "model's dtype alone, leave it at auto"
            )
        self.width, self.name, self.dtype = width, name, vllm_config.model_config.dtype
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return ContextBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size, num_kv_heads=1, head_size=self.width, dtype=self.dtype
        )

    def batch(self) -> Batch | None:
        """The batch of this step; None while vLLM measures what the model needs without a cache."""
        batches = get_forward_context().attn_metadata
        return None if batches is None else batches[self.name]

    def write(self, contexts: torch.Tensor, slots: torch.Tensor) -> None:
        """Write the contexts `[N, W]` of the new tokens to their slots `[N]`."""
        self.rows[slots] = contexts[: len(slots)]

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        """Read the contexts `[..., n * S, W]` of the blocks `[..., n]`."""
        contexts = self.kv_cache[:, 0].index_select(0, blocks.flatten())
        return contexts.view(*blocks.shape[:-1], -1, self.width)

    @property
    def rows(self) -> torch.Tensor:
        """All slots, `[blocks * S, W]`."""
        return self.kv_cache.view(-1, self.width)
