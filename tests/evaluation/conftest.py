"""Small random models with large weights (std 0.2), and samples of random tokens to score them on."""

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.data.packing import PackedDataset
from context_pythia.data.tokenizers import train_tokenizer

BODY = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
)
SOURCES = ("pythia", "input", "shared", "layer")


def build(source: str, seed: int = 0, **changes):
    body = BODY | changes
    if source == "pythia":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**body))
    else:
        model = ContextPythiaForCausalLM(ContextPythiaConfig(**{"context_dim": 13} | body, context_source=source))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def tokenizer_of_words():
    """A tokenizer with some 300 whole words."""
    words = [a + b + c for a in "abcdefgh" for b in "abcdefgh" for c in "abcde"]
    return train_tokenizer([f" {' '.join(words)} is. The sky is wide and the day is long."] * 3, 900, progress=False)


@pytest.fixture
def dataset() -> PackedDataset:
    """7 samples of 17 tokens."""
    return PackedDataset(np.random.default_rng(0).integers(0, 61, (7, 18), dtype=np.uint16))
