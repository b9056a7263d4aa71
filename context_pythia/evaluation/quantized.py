"""transformers' quantized cache for `eval`: of GPT-NeoX's keys and values, or of Context-Pythia's smaller cache.

The backend is HQQ: it runs on any device, and only it has both int8 and packed int4 (Quanto's cache has no int8).

Groups of at most 64 neighboring numbers of one token (axis 1, as HQQ's cache requires) share a scale and a zero point,
both in the model's dtype.
"""

from __future__ import annotations

from importlib.util import find_spec

from transformers import GPTNeoXConfig
from transformers.cache_utils import Cache, QuantizedCache

from context_pythia.errors import UsageError
from context_pythia.model.quantized import full_attention, hold_contexts

BITS = {"int8": 8, "int4": 4}
GROUP = 64


def require_quantizer() -> None:
    """Raise `UsageError`, with the mend, if HQQ is not installed."""
    if find_spec("hqq") is None:
        raise UsageError("a quantized cache needs HQQ: pip install 'context-pythia[quantized]'")


def residual_length(length: int) -> int:
    """Residual length of the quantized cache for sequences of `length` tokens: newest tokens that stay unquantized
    until there are enough to quantize together.

    transformers' default, 128, would leave a short sequence unquantized. A sixteenth of the sequence quantizes about
    sixteen times.
    """
    return max(1, (length - 1) // 16)


def quantized_cache(config: GPTNeoXConfig, kind: str, length: int) -> Cache:
    """An empty quantized cache for sequences of `length` tokens.

    Args:
        kind: `int8` or `int4`.

    Raises:
        UsageError: HQQ is not installed, or the model caches token ids.
    """
    require_quantizer()
    head_size = config.hidden_size // config.num_attention_heads
    group = max(size for size in range(1, min(GROUP, head_size) + 1) if head_size % size == 0)
    if getattr(config, "context_source", None) in ("shared", "layer"):
        group = GROUP  # a context needs no group size that divides its width
    cache = QuantizedCache(
        "hqq",
        full_attention(config),
        nbits=BITS[kind],
        axis_key=1,
        axis_value=1,
        q_group_size=group,
        residual_length=residual_length(length),
    )
    try:
        return hold_contexts(cache, config)
    except ValueError as error:
        raise UsageError(str(error)) from None
