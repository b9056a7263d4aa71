"""OACD (Origin-Anchored Centroid Dispersion): its loss, its sweep, and the rank of the contexts that it leads to.

Shapes: n tokens of a batch, V distinct tokens of the stream, S tokens of a sample, C context_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedDataset
    from context_pythia.model import ContextPythiaForCausalLM

SCAN_TOKENS = 32_768  # held-out tokens scanned at once
PROJECTED_TOKENS = 8192  # distinct tokens embedded at once


def oacd_loss(contexts: torch.Tensor, mean_penalty: float) -> torch.Tensor:
    """`-||X - mean(X)||_F / n + mean_penalty * ||mean(X)||^2` of contexts X `[n, C]`, a scalar."""
    mean = contexts.mean(dim=0)
    return mean_penalty * mean.square().sum() - torch.linalg.vector_norm(contexts - mean) / len(contexts)


class FusedOacdLoss(torch.autograd.Function):
    """`oacd_loss` with its gradient written out, `2 mean_penalty mean / n - (X - mean) / (n ||X - mean||_F)`.

    Autograd's own way passes over the contexts nine times more, and memory is what phase 1 waits for.
    """

    @staticmethod
    def forward(ctx: Any, contexts: torch.Tensor, mean_penalty: float) -> torch.Tensor:
        mean = contexts.mean(dim=0)
        centred = contexts - mean
        norm = torch.linalg.vector_norm(centred)
        ctx.save_for_backward(mean, centred, norm)
        ctx.mean_penalty = mean_penalty
        return mean_penalty * mean.square().sum() - norm / len(contexts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        mean, centred, norm = ctx.saved_tensors
        scale = gradients[0] / len(centred)
        # As autograd's: contexts that are all the same have no direction to spread in.
        spread = torch.where(norm > 0, -scale / norm, 0.0)
        return centred.mul_(spread).add_(2 * ctx.mean_penalty * scale * mean), None


def fused_oacd_loss(contexts: torch.Tensor, mean_penalty: float) -> torch.Tensor:
    return FusedOacdLoss.apply(contexts, mean_penalty)


def sweep_tokens(
    layers: Iterable[Any],
    projected: Sequence[torch.Tensor],
    contexts: torch.Tensor,
    initial: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """`ContextBlock.sweep` over n tokens whose embeddings each layer has already projected.

    Projected (a tensor a layer), contexts and noise are `[n, C]`, initial `[C]`; gives the new contexts `[n, C]`. The
    noise is written over.
    """
    noise[0] += initial
    noise[1:] += contexts[:-1]
    contexts = noise
    for layer, rows in zip(layers, projected, strict=True):
        contexts = layer(contexts, rows)
    return contexts


class TokenProjections:
    """The embeddings' half of each layer's product for every token of a stream, made once an iteration.

    A token's embedding is fixed and its projection changes only with the weights, so it is computed for the V distinct
    tokens and looked up for each batch. The gradient is collected in the same form, and goes through the product once,
    in `backward`: a sum of products is the product of the sum.

    Args:
        model: whose embeddings and ContextBlock these are.
        distinct: the ids `[V]` that the stream holds.
    """

    def __init__(self, model: ContextPythiaForCausalLM, distinct: torch.Tensor):
        self.model, self.distinct = model, distinct
        self.layers: list[Any] = list(model.gpt_neox.context_block.layers)
        self.place = torch.empty(model.config.vocab_size, dtype=torch.long, device=distinct.device)
        self.place[distinct] = torch.arange(len(distinct), device=distinct.device)
        width = model.gpt_neox.context_block.context_dim
        dtype = model.get_input_embeddings().weight.dtype
        self.tables = [torch.empty(len(distinct), width, dtype=dtype, device=distinct.device) for _ in self.layers]
        self.gradients = [torch.zeros_like(table) for table in self.tables]

    @torch.no_grad()
    def refresh(self) -> None:
        """Project with the weights as they are now, and forget the gradients."""
        for chunk, embeddings in self._embeddings():
            for layer, table in zip(self.layers, self.tables, strict=True):
                table[chunk] = layer.project(embeddings)
        for gradient in self.gradients:
            gradient.zero_()

    def rows(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """For each layer the projections `[n, C]` of a batch's ids `[n]`, as leaves whose gradients `collect` takes."""
        place = self.place[input_ids]
        return [nn.functional.embedding(place, table).requires_grad_() for table in self.tables]

    def collect(self, input_ids: torch.Tensor, rows: Sequence[torch.Tensor]) -> None:
        for gradient, row in zip(self.gradients, rows, strict=True):
            assert row.grad is not None
            gradient.index_add_(0, self.place[input_ids], row.grad)

    def backward(self) -> None:
        """Add what was collected to the gradients of the layers' weights."""
        for chunk, embeddings in self._embeddings():
            for layer, gradient in zip(self.layers, self.gradients, strict=True):
                product = layer.project(embeddings)
                product.backward(gradient[chunk].to(product.dtype))  # under autocast it is narrower

    def _embeddings(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for first in range(0, len(self.distinct), PROJECTED_TOKENS):
            chunk = slice(first, first + PROJECTED_TOKENS)
            with torch.no_grad():
                embeddings = self.model.gpt_neox.embed_context_input(self.distinct[chunk])
            yield chunk, embeddings


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
