"""Engines in this very process, on small random models: a start takes seconds, not the minute of a server."""

import random
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia.config.convert import ConvertOptions
from context_pythia.conversion.compress import checked_form, compressed
from context_pythia.data.packing import PackedData, PackedDataset
from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM
from tests.model.conftest import SIZE as MODEL_SIZE
from tests.model.conftest import randomise

LENGTH = 1024
SIZE = MODEL_SIZE | {"max_position_embeddings": LENGTH}
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
