"""Engines in this very process, on small random models: a start takes seconds, not the minute of a server."""

import os

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR")
os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_DO_NOT_TRACK="1")

import random
from contextlib import contextmanager

import pytest
import torch

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
# Widths of 384 numbers a token and model in GPT-NeoX; the converted ones have the form that `convert` gives them.
MODELS = {
    "layer": dict(context_source="layer", context_dim=23),
    "converted, -50 %": dict(context_source="layer", context_dim=64, num_rotary_keys=4, reuse_rotary_keys=True),
    "converted, -75 %": dict(
        context_source="layer",
        context_dim=32,
        rotary_pairs=[[4, 2], [2, 2], [1, 3]],
        layer_context_dims=[36, 24, 36],
        reuse_rotary_keys=True,
        context_bias=True,
    ),
    "converted, -87.5 %": dict(
        context_source="layer",
        context_dim=16,
        rotary_pairs=[[2, 1], [1, 1], [1, 0]],
        layer_context_dims=[17, 11, 20],
        reuse_rotary_keys=True,
        context_bias=True,
    ),
    "layer, shared by 3": dict(context_source="layer", context_dim=30, num_rotary_keys=4, context_sharing=3),
    "shared": dict(context_source="shared", context_dim=21, context_block_layers=2),
}


def build(settings: dict, **changes) -> ContextPythiaForCausalLM:
    """Weights so large (std 0.2) that a wrong formula shows."""
    torch.manual_seed(0)
    model = ContextPythiaForCausalLM(ContextPythiaConfig(**{**SIZE, **settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
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


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A model and the folder that it is saved in."""
    folder = tmp_path_factory.mktemp("model")
    model = build(MODELS[request.param])
    model.save_pretrained(folder)
    return model, folder
