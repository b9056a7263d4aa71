"""Engines in this very process, on small random models: a start takes seconds, not the minute of a server."""

import random
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia.config.convert import ConvertOptions
from context_pythia.conversion.compress import checked_form, compressed
from context_pythia.data.packing import PackedData, PackedDataset
from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM

LENGTH = 1024
SIZE = dict(
    vocab_size=97,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=LENGTH,
    eos_token_id=None,
    bos_token_id=1,
    pad_token_id=0,
)
# GPT-NeoX caches 384 numbers a token.
MODELS = {
    "layer": dict(context_source="layer", context_dim=23),
    "layer, contexts by layers": dict(
        context_source="layer",
        context_dim=30,
        num_rotary_keys=4,
        context_layers=[0, 1, 1],
        layer_context_dims=[26, 34, 0],
    ),
    "shared": dict(context_source="shared", context_dim=21, context_block_layers=2),
}
CONVERTED = {"converted, -50 %": 0.5, "converted, -75 %": 0.75, "converted, -87.5 %": 0.875}


def build(settings: dict, **changes) -> ContextPythiaForCausalLM:
    return randomise(ContextPythiaForCausalLM(ContextPythiaConfig(**{**SIZE, **settings, **changes})))


def randomise(model):
    """Weights so large (std 0.2) that a wrong formula shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def convert(kv_reduction: float, folder: Path) -> ContextPythiaForCausalLM:
    """A GPT-NeoX with random weights, converted as `context-pythia convert` does, on random text."""
    original = randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE)))
    text = np.random.default_rng(0).integers(1, SIZE["vocab_size"], (16, 33), dtype=np.uint16)
    packed = PackedData(PackedDataset(text), PackedDataset(text), None, {})
    options = ConvertOptions(kv_reduction=kv_reduction, calibration_tokens=512)
    form = checked_form(options, original)
    model, _ = compressed(original, form, options, None if kv_reduction == 0.5 else packed, folder, progress=False)
    return model.eval()


def prompts(lengths: list[int], common: int = 0, seed: int = 0) -> list[list[int]]:
    """Random tokens, the first `common` of them the same in all."""
    dice = random.Random(seed)
    start = [dice.randrange(1, SIZE["vocab_size"]) for _ in range(common)]
    return [(start + [dice.randrange(1, SIZE["vocab_size"]) for _ in range(length)])[:length] for length in lengths]


@contextmanager
def engine(folder, **options):
    """vLLM's engine on a saved model, with room for 4 times the longest sequence unless `options` say otherwise."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    options.setdefault("block_size", 32)
    options.setdefault("num_gpu_blocks_override", 4 * LENGTH // 32)
    llm = LLM(
        str(folder),
        **{
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "kv_cache_memory_bytes": 2**26,
            "disable_log_stats": False,
            **options,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
