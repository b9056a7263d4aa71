"""Context-Pythia for vLLM: many sequences at once, with one paged cache of contexts.

Submodules have the names of the checkpoint's tensors. `shared` needs no state besides the cache: a sequence's
recurrence resumes from its last cached context. So prefix caching, chunked prefill and preemption just work.

Shapes: N new tokens of all sequences, B sequences, C context_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from context_pythia.model.attention import turn_rotary_keys
from context_pythia.model.configuration import ContextPythiaConfig
from context_pythia.model.context import ContextBlock
from context_pythia.serving.attention import Positions, ServedLayer
from context_pythia.serving.cache import Batch, ContextCache

SERVED_SOURCES = ("layer", "shared")
# Buffers in checkpoints of older GPT-NeoX, and the old name of the output head.
OLD_BUFFERS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
OLD_HEAD = "embed_out."


class ServedModel(nn.Module):
    def __init__(self, config: ContextPythiaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.config, self.block_size = config, vllm_config.cache_config.block_size
        self.embed_in = VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_in")
        self.rotary_emb = GPTNeoXRotaryEmbedding(config)
        if config.context_source == "shared":
            self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.context_block = ContextBlock(
                config.context_dim, config.hidden_size, config.context_block_layers, config.layer_norm_eps
            )
            self.rotary_key = ReplicatedLinear(
                config.context_dim, config.rotary_dim, bias=config.attention_bias, return_bias=False
            )
        caches: dict[int, ContextCache] = {}
        layers = []
        for i in range(config.num_hidden_layers):
            maker, name = config.makers[i], f"{prefix}.layers.{i}"
            if maker == i:
                caches[i] = ContextCache(config.cached_width(i), vllm_config, f"{name}.attention.cache")
            layers.append(ServedLayer(config, i, caches[maker], vllm_config, name))
        self.layers, self.cache = nn.ModuleList(layers), caches[0]
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, inputs_embeds: torch.Tensor | None):
        """`[N]` -> `[N, D]`."""
        hidden_states = self.embed_in(input_ids) if inputs_embeds is None else inputs_embeds
        batch = self.cache.batch()
        new = self.rotary_emb(hidden_states, positions[None])
        rotary = Positions(new, self._places(hidden_states, batch))
        if self.config.context_source == "shared" and batch is not None:
            tokens = len(batch.slots)
            embeddings = self.embedding_norm(hidden_states[:tokens])
            before = self.cache.rows[batch.last_slots, self.config.rotary_dim :]
            context = scan(self.context_block, embeddings, before, batch)
            cached = torch.cat([self.rotary_key(context), context], dim=-1)[None]
            cos, sin = (table[:, :tokens] for table in new)
            self.cache.write(turn_rotary_keys(cached, (cos, sin))[0], batch.slots)
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotary)
        return self.final_layer_norm(hidden_states)

    def _places(self, hidden_states: torch.Tensor, batch: Batch | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        if batch is None or not self.config.reuse_rotary_keys:
            return None
        # Attention reads whole blocks, which extend beyond a sequence's last token.
        places = torch.arange(batch.longest + self.block_size, device=hidden_states.device)
        return self.rotary_emb(hidden_states, places[None])


def scan(block: ContextBlock, embeddings: torch.Tensor, before: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The recurrence of all sequences at once: step t takes the t-th new token of every sequence that has one.

    Args:
        embeddings: embeddings of the new tokens, `[N, E]`.
        before: each sequence's last cached context, `[B, C]`; ignored where nothing is cached yet.

    Returns:
        contexts of the new tokens, `[N, C]`.
    """
    layers: Iterable[Any] = block.layers
    projected = [layer.project(embeddings) for layer in layers]
    # Sequences with more tokens first, so that each step takes the first few.
    order = sorted(range(len(batch.counts)), key=lambda i: -batch.counts[i])
    counts = [batch.counts[i] for i in order]
    index = torch.tensor(order, device=embeddings.device)
    starts = batch.starts[index]
    fresh = torch.tensor([batch.before[i] == 0 for i in order], device=embeddings.device)
    contexts = before[index].masked_fill(fresh[:, None], 0)
    output = torch.empty_like(projected[0])
    active = len(counts)
    for step in range(counts[0]):
        while counts[active - 1] <= step:
            active -= 1
        rows, contexts = starts[:active] + step, contexts[:active]
        for layer, part in zip(layers, projected, strict=True):
            contexts = layer(contexts, part[rows])
        output[rows] = contexts
    return output


class ContextPythiaForCausalLM(nn.Module):
    """What vLLM asks of a model that generates text.

    Raises:
        ValueError: the context source or `cache_token_ids` cannot be served, or the checkpoint's tensors do not fit its
            configuration.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = copy.deepcopy(vllm_config.model_config.hf_config)
        if config.context_source not in SERVED_SOURCES:
            raise ValueError(
                f"context_source {config.context_source!r}: it caches keys and values and is here for comparison; only "
                f"{' and '.join(SERVED_SOURCES)} can be served"
            )
        if config.cache_token_ids:
            raise ValueError("cache_token_ids: a model that caches token ids cannot be served; use generate()")
        config._attn_implementation = "sdpa"
        self.config = config
        self.gpt_neox = ServedModel(config, vllm_config, "gpt_neox")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix="lm_head")
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.gpt_neox.embed_in)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.gpt_neox.embed_in(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.gpt_neox(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint's tensors into this rank's parameters; a tensor without a place is an error."""
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            if name.endswith(OLD_BUFFERS):
                continue
            if name.startswith(OLD_HEAD):
                name = name.replace(OLD_HEAD, "lm_head.", 1)
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if name not in parameters:
                raise ValueError(f"{name} in the checkpoint does not belong to the model of its config.json")
            loader = getattr(parameters[name], "weight_loader", default_weight_loader)
            try:
                loader(parameters[name], tensor)
            except (AssertionError, RuntimeError, ValueError) as error:
                shape = list(tensor.shape)
                raise ValueError(f"{name} {shape} in the checkpoint does not fit its config.json") from error
            loaded.add(name)
        if missing := sorted(set(parameters) - loaded):
            raise ValueError(f"{missing[0]} is missing from the checkpoint")
        return loaded
