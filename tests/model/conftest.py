"""Small random models whose weights are large enough (std 0.2) that a wrong formula shows."""

import pytest
import torch

from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM

SIZE = dict(
    vocab_size=97,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=128,
    eos_token_id=None,
    bos_token_id=1,
    pad_token_id=0,
)

SOURCES = {
    "input": dict(context_source="input", context_dim=20),
    "shared": dict(context_source="shared", context_dim=20),
    "shared, 2 block layers": dict(context_source="shared", context_dim=21, context_block_layers=2),
    "layer": dict(context_source="layer", context_dim=23),
    "layer, a rotary key a head": dict(context_source="layer", context_dim=30, num_rotary_keys=4),
    "layer, shared by 2": dict(context_source="layer", context_dim=23, context_sharing=2),
    "layer, contexts by layers": dict(
        context_source="layer", context_dim=15, context_layers=[0, 1, 1], layer_context_dims=[7, 23, 0]
    ),
    "layer, rotary keys reused": dict(context_source="layer", context_dim=30, reuse_rotary_keys=True),
    "layer, token ids": dict(
        context_source="layer",
        context_layers=[0, 1, 1],
        layer_context_dims=[4, 23, 0],
        context_dim=23,
        cache_token_ids=True,
    ),
    "layer, token ids and rotary pairs": dict(
        context_source="layer",
        context_layers=[0, 1, 1],
        layer_context_dims=[4, 23, 0],
        context_dim=23,
        rotary_pairs=[[1, 1], [2, 1], [2, 1]],
        cache_token_ids=True,
        context_bias=True,
    ),
    "grouped": dict(context_source="grouped", key_value_heads=2),
    "grouped, shared by 2": dict(context_source="grouped", context_sharing=2),
    "layer, rotary pairs": dict(
        context_source="layer",
        context_dim=24,
        rotary_pairs=[[4, 1], [2, 2], [1, 0]],
        layer_context_dims=[25, 21, 26],
        reuse_rotary_keys=True,
        context_bias=True,
    ),
}

# Each branch of the model once: what most tests run. SOURCES, whole, is for those that equate two ways of attention.
KINDS = [
    "input",
    "shared, 2 block layers",
    "layer, contexts by layers",
    "layer, rotary pairs",
    "layer, token ids",
    "grouped, shared by 2",
]


def randomise(model: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
    """Every parameter N(0, std), norms' scales around 1, so that no bias or scale is without effect."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def build(source: str, **overrides) -> ContextPythiaForCausalLM:
    return randomise(ContextPythiaForCausalLM(ContextPythiaConfig(**{**SIZE, **SOURCES[source], **overrides})))


@pytest.fixture(params=KINDS)
def source(request) -> str:
    return request.param


@pytest.fixture
def model(source) -> ContextPythiaForCausalLM:
    return build(source)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 97, (3, 17), generator=torch.Generator().manual_seed(1))
