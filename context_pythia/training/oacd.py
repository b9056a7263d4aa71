"""OACD (Origin-Anchored Centroid Dispersion): its loss, its sweep, and the rank of the contexts that it leads to.

Shapes: n tokens of a batch, S tokens of a sample, C context_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedDataset
    from context_pythia.model import ContextPythiaForCausalLM

SCAN_TOKENS = 32_768  # held-out tokens scanned at once


def oacd_loss(contexts: torch.Tensor, mean_penalty: float) -> torch.Tensor:
    """`-||X - mean(X)||_F / n + mean_penalty * ||mean(X)||^2` of contexts X `[n, C]`, a scalar."""
    mean = contexts.mean(dim=0)
    return mean_penalty * mean.square().sum() - torch.linalg.vector_norm(contexts - mean) / len(contexts)


def sweep_tokens(
    model: ContextPythiaForCausalLM,
    input_ids: torch.Tensor,
    contexts: torch.Tensor,
    initial: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """`ContextBlock.sweep` over tokens `[n]`, a third faster: each distinct token is embedded and projected once.

    Contexts and noise are `[n, C]`, initial `[C]`; gives the new contexts `[n, C]`. The embeddings get no gradient.
    """
    distinct, place = input_ids.unique(return_inverse=True)
    with torch.no_grad():
        embeddings = model.gpt_neox.embed_context_input(distinct)
    contexts = torch.cat([initial.unsqueeze(0), contexts[:-1]]) + noise
    layers: Iterable[Any] = model.gpt_neox.context_block.layers
    for layer in layers:
        # `embedding` rather than an index: its backward pass is the faster.
        contexts = layer(contexts, nn.functional.embedding(place, layer.project(embeddings)))
    return contexts


def effective_rank(batches: Iterable[torch.Tensor]) -> float:
    """Exp of the entropy of the normalised singular values of the rows `[..., C]` of all batches, 1 to C.

    Singular values come from the fp64 Gram matrix `[C, C]`, so memory does not grow with the rows.
    """
    gram = sum(rows.T @ rows for rows in (batch.flatten(0, -2).cpu().double() for batch in batches))
    assert isinstance(gram, torch.Tensor), "no rows"
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


@torch.no_grad()
def held_out_contexts(model: ContextPythiaForCausalLM, dataset: PackedDataset) -> Iterator[torch.Tensor]:
    """The exact contexts of every sample of `dataset`, each started at zero as in phase 2, in batches `[b, S, C]`."""
    length, device = dataset.sequence_length, model.get_input_embeddings().weight.device
    rows = max(1, SCAN_TOKENS // length)
    for first in range(0, len(dataset), rows):
        ids = dataset.stream(first * length, min(first + rows, len(dataset)) * length).view(-1, length)
        yield model.gpt_neox.context_block.scan(model.gpt_neox.embed_context_input(ids.to(device)))
