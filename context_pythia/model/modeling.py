"""Context-Pythia: GPT-NeoX with a context in place of cached keys and values. Everything else is the host's."""

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import Any, Self, Unpack, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers import initialization as init
from transformers.cache_utils import Cache, QuantizedCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXForCausalLM,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXModel,
    GPTNeoXPreTrainedModel,
)
from transformers.utils.generic import TransformersKwargs, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import ContextAttention, PositionEmbeddings, RotaryUp, cache_context, turn_rotary_keys
from .cache import keep_context, previous_context
from .configuration import ContextPythiaConfig
from .context import ContextBlock, ContextLinear
from .grouped import GroupedAttention
from .layer_contexts import Contexts, TokenShift, to_digits
from .positions import positions_in_cache, text_masks
from .quantized import full_attention, hold_contexts
from .shortcuts import is_plain, only_values


class ContextPythiaPreTrainedModel(GPTNeoXPreTrainedModel):
    config: ContextPythiaConfig
    # Absorbed attention is one wide head; these kernels are untested with it.
    _supports_flash_attn = False
    _supports_flex_attn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ContextLinear):
            # OACD does not converge from Xavier weights, nor from weights as small as the rest of the model's.
            init.normal_(module.weight, mean=0.0, std=0.1)
            init.normal_(module.bias, mean=0.0, std=0.01)
        elif isinstance(module, nn.Linear) and (columns := getattr(module, "context_columns", 0)):
            # A layer's context is as large as GPT-NeoX's keys and values. What is rebuilt from it begins as large too.
            # The host's functions would not see in a part of the weight that a checkpoint has it.
            if not getattr(module.weight, "_is_hf_initialized", False):
                module.weight[:, :columns].normal_(std=columns**-0.5)
        elif isinstance(module, RotaryUp):
            # The pairs of a frequency together are as large as one key.
            init.normal_(module.weight, mean=0.0, std=(len(module.pairs) / sum(module.pairs)) ** 0.5)
        elif isinstance(module, TokenShift):
            # From the token alone in the first channel to nearly the token before it in the last: maps can choose.
            init.copy_(module.weight, torch.arange(len(module.weight)) / len(module.weight))

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        # The reentrant form gives gradients only to a layer's first argument, not to the contexts of other layers.
        gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


class ContextPythiaModel(ContextPythiaPreTrainedModel, GPTNeoXModel):
    def __init__(self, config: ContextPythiaConfig):
        super().__init__(config)
        if config.context_source in ("input", "shared"):
            self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.context_block = ContextBlock(
                config.context_dim, config.hidden_size, config.context_block_layers, config.layer_norm_eps
            )
        if config.context_source == "input":
            self.context_proj = nn.Linear(config.context_dim, config.hidden_size)
        else:
            attention = GroupedAttention if config.context_source == "grouped" else ContextAttention
            for layer_idx, layer in enumerate(self.layers):
                layer.attention = attention(config, layer_idx)
        if config.cache_token_ids:
            self.token_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.token_shift = TokenShift(config.hidden_size)
            self.room = max(config.context_width(i) for i in config.makers)
            self._table: tuple[Any, Any, Any] = None, None, None  # state of the weights, their table, the weights
        if config.context_source == "shared":
            self.rotary_key = nn.Linear(config.context_dim, config.rotary_dim, bias=config.attention_bias)
        self.post_init()

    def embed_context_input(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The ContextBlock's input for each token, `e_t = LN(embedding(id_t))`: `[...] -> [..., hidden_size]`."""
        return self.embedding_norm(self.embed_in(input_ids))

    def embed_token(self, ids: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """What `cache_token_ids` adds to each content: ids and the places of the tokens before, `[B, T]` each, ->
        `[B, T, hidden_size]`."""
        return self.token_shift(self.token_norm(self.emb_dropout(self.embed_in(ids))), before)

    def token_table(self, past: int | torch.Tensor | None) -> torch.Tensor | None:
        """For decoding, the table by which `TokenShift` looks up what `embed_token` computes; None without `past`
        tokens, and where the table could go stale or a module must be called.

        It follows from weights and is more than twice as large as the embedding, so it is not part of a cache. A change
        of the weights makes a new one, but for changes in place through `parameter.data`, which PyTorch hides.
        """
        if self.training or not only_values() or not past:
            return None
        modules = [(self.embed_in, nn.Embedding), (self.token_norm, nn.LayerNorm), (self.token_shift, TokenShift)]
        if not all(is_plain(module, kind) for module, kind in modules):
            return None
        weights = (self.embed_in.weight, self.token_norm.weight, self.token_norm.bias, self.token_shift.weight)
        if any(weight.is_inference() for weight in weights):
            return None  # their changes cannot be seen
        if torch.is_autocast_enabled(weights[0].device.type):
            return None  # it chooses the embeddings' dtype
        state = [(weight.data_ptr(), weight._version, weight.dtype) for weight in weights]
        if self._table[0] != state:
            # The weights are kept, so that no new ones get their addresses.
            self._table = state, self.token_shift.table(self.token_norm(self.embed_in.weight), self.room), weights
        return self._table[1]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self._table = None, None, None  # not to stay where the weights were
        return super()._apply(fn, recurse)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        token_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]  # of a package without types
    ) -> BaseModelOutputWithPast:
        """As GPT-NeoX.

        Args:
            past_key_values, cache: the cache; `cache` is its name since transformers 5.24.
            token_mask: `[B, T]`, false where a new token is padding, which the recurrence and the search for the token
                before another skip. Needed only with a four-dimensional `attention_mask`: a two-dimensional one says
                the same.

        Raises:
            ValueError: a cache under any other name, or two caches; `inputs_embeds` with `cache_token_ids`; a tree of
                continuations in a row, with a recurrence or `cache_token_ids`.
        """
        cache = _only_cache(past_key_values, cache, kwargs)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if self.config.cache_token_ids and input_ids is None:
            raise ValueError("inputs_embeds: this model caches token ids (cache_token_ids): give input_ids")
        if inputs_embeds is None:
            inputs_embeds = self.embed_in(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = None if cache is None else cache.get_seq_length()
        is_text = starts = None
        if self.config.cache_token_ids or self.config.context_source in ("input", "shared"):
            is_text, starts = text_masks(attention_mask, token_mask, position_ids, inputs_embeds.shape[1], past)
        given_positions = position_ids
        if position_ids is None:
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
            position_ids = cast(torch.LongTensor, positions + (0 if past is None else past))

        # Positional, because transformers 5.24 renamed the fourth argument.
        causal_mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        key_positions = position_embeddings
        if self.config.reuse_rotary_keys and cache is not None:
            position_embeddings, key_positions = self._positions_in_cache(
                inputs_embeds, cache, causal_mask, given_positions
            )

        contexts = Contexts()
        if self.config.cache_token_ids:
            digits = to_digits(cast(torch.Tensor, input_ids), self.config.id_digits, is_text, starts)
            table = self.token_table(past)
            embed = self.embed_token if table is None else partial(self.token_shift.look_up, table=table)
            contexts = Contexts(digits, embed, 0 if table is None else self.room)
        # The ContextBlock reads what the layers read: keys and values must not escape the dropout of the embedding.
        hidden_states = self.emb_dropout(inputs_embeds)
        if self.config.context_source in ("input", "shared"):
            context = self.context_block.scan(
                self.embedding_norm(hidden_states),
                previous_context(self.config, cache),
                is_text,
                starts,
            )
            keep_context(cache, context)
            if self.config.context_source == "input":
                hidden_states = self.context_proj(context)
            else:
                # One dropout of the context for all layers, instead of one for each layer's keys and values.
                content = self.emb_dropout(context)
                new = torch.cat([self.rotary_key(context).to(content.device), content], dim=-1)
                new = turn_rotary_keys(new, position_embeddings)
                contexts[0] = cache_context(new.unsqueeze(1), cache, 0)

        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                layer_past=cache,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                contexts=contexts,
                key_positions=key_positions,
                **kwargs,
            )
        return BaseModelOutputWithPast(self.final_layer_norm(hidden_states), cache)

    def _positions_in_cache(
        self, states: torch.Tensor, cache: Cache, causal_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> tuple[PositionEmbeddings, PositionEmbeddings]:
        """Position embeddings of the new tokens, and of all tokens in the cache, which stores no positions."""
        length, _ = cache.get_mask_sizes(states.shape[1], 0)
        new = torch.arange(states.shape[1], device=states.device) + cache.get_seq_length()
        positions = torch.arange(length, device=states.device).unsqueeze(0)
        if position_ids is not None:
            positions = positions_in_cache(position_ids, causal_mask, length, new)
        cos, sin = self.rotary_emb(states, position_ids=positions)
        return (cos[:, new], sin[:, new]), (cos, sin)


def _only_cache(past_key_values: Cache | None, cache: Cache | None, others: Mapping[str, object]) -> Cache | None:
    if unknown := [name for name, value in others.items() if isinstance(value, Cache)]:
        raise ValueError(f"{unknown[0]}: no argument of this model; give the cache as past_key_values or as cache")
    if cache is not None and past_key_values not in (None, cache):
        raise ValueError("past_key_values and cache: are one argument by two names; give one of them")
    return past_key_values if cache is None else cache


class ContextPythiaForCausalLM(ContextPythiaPreTrainedModel, GPTNeoXForCausalLM):
    def __init__(self, config: ContextPythiaConfig):
        # Skip the host's __init__, which would build a whole GPT-NeoX for nothing.
        PreTrainedModel.__init__(self, config)
        self.gpt_neox = ContextPythiaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, past_key_values=None, **kwargs):
        """The mask of a compiled forward, built before it. The host's function knows only its own layer types."""
        # transformers 5.24 renamed the cache.
        return create_causal_mask(
            config, inputs_embeds, attention_mask, kwargs.get("cache", past_key_values), kwargs.get("position_ids")
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As the host's; its quantized cache accepts only full attention, so build that and adapt it to contexts."""
        quantized = generation_config.cache_implementation == "quantized"
        if quantized:
            generation_config = copy(generation_config)
            settings = generation_config.cache_config or {}
            generation_config.cache_config = {**settings, "config": full_attention(self.config)}
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        for cache in model_kwargs.values():
            if quantized and isinstance(cache, QuantizedCache):
                hold_contexts(cache, self.config)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        if attention_mask is not None and attention_mask.ndim == 2:
            # With a static cache the host turns the mask into a four-dimensional one, which hides the padding.
            new = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
            # A copy, because strides that grow with the mask would recompile each step.
            inputs["token_mask"] = attention_mask[:, -new.shape[1] :].clone(memory_format=torch.contiguous_format)
        return inputs


class ContextPythiaForSequenceClassification(ContextPythiaPreTrainedModel, GPTNeoXForSequenceClassification):
    """Scores of a text, `[B, num_labels]`, from its last token that is not padding."""

    def __init__(self, config: ContextPythiaConfig):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.gpt_neox = ContextPythiaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class ContextPythiaForTokenClassification(ContextPythiaPreTrainedModel, GPTNeoXForTokenClassification):
    """Scores of each token, `[B, T, num_labels]`."""

    def __init__(self, config: ContextPythiaConfig):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.gpt_neox = ContextPythiaModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class ContextPythiaForQuestionAnswering(ContextPythiaPreTrainedModel, GPTNeoXForQuestionAnswering):
    """Scores of each token as the first and as the last one of an answer, `[B, T]` each."""

    def __init__(self, config: ContextPythiaConfig):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.gpt_neox = ContextPythiaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()
