"""How many tokens vLLM finds room for in 1 GiB, at the size of Pythia-70M's cache in float32."""

import pytest
import torch

from context_pythia.model import ContextPythiaConfig
from context_pythia.model.cache import cached_numbers_per_token
from tests.serving.engines import engine

# The vocabulary and the MLP, which make no part of the cache, are small.
PYTHIA_70M = dict(vocab_size=97, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=64)
BASELINE = 43648


def tokens(config, folder) -> int:
    config.save_pretrained(folder)
    options = dict(load_format="dummy", kv_cache_memory_bytes=2**30, num_gpu_blocks_override=None, block_size=128)
    with engine(folder, **options) as llm:
        return llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens


def test_gpt_neox():
    """By the size of vLLM's blocks: an engine with a GPT-NeoX would leave it changed, and our models are made of it."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    # Its kernel on a CPU has blocks of 128 tokens.
    block = FullAttentionSpec(block_size=128, num_kv_heads=8, head_size=64, dtype=torch.float32)
    assert 2**30 // (6 * block.page_size_bytes) * 128 == BASELINE


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        (dict(context_source="layer", context_dim=256), 4),
        (dict(context_source="layer", context_dim=128, layer_context_dims=[160, 96, 130, 126, 144, 112]), 8),
        (dict(context_source="shared", context_dim=256), 22.6),
    ],
)
def test_contexts(settings, times, tmp_path):
    config = ContextPythiaConfig(**PYTHIA_70M, **settings, architectures=["ContextPythiaForCausalLM"])
    assert 6144 / cached_numbers_per_token(config) == pytest.approx(times, rel=0.01)
    assert tokens(config, tmp_path) == pytest.approx(times * BASELINE, rel=0.01)
