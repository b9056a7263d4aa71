"""The ContextBlock: the recurrent map that compresses a token and its past into one context.

    c_t = LN(c_{t-1} + GELU(W [c_{t-1} ; e_t] + b)),    c_{-1} = 0

Three ways to run it: `step` (decoding, one token), `scan` (exact, the whole sequence) and `sweep` (one parallel
fixed-point pass, what phase 1 iterates; T sweeps over T tokens equal the scan).

Shapes: B batch, T tokens, C context_dim, E width of the token embeddings.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .scan import Recurrence


class ContextLinear(nn.Linear):
    """The product with `[c ; e]`; a class of its own because transformers picks initial weights by a leaf's class."""


class ContextBlockLayer(nn.Module):
    """One refinement of the context, `LN(c + GELU(W [c ; e] + b))`."""

    def __init__(self, context_dim: int, embedding_dim: int, eps: float = 1e-5):
        super().__init__()
        self.dense = ContextLinear(context_dim + embedding_dim, context_dim)
        self.norm = nn.LayerNorm(context_dim, eps=eps)

    def project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The embeddings' half of the product plus the bias, `[..., E] -> [..., C]`: it needs no recurrence."""
        weight = self.dense.weight[:, self.norm.normalized_shape[0] :]
        return nn.functional.linear(embeddings, weight, self.dense.bias)

    @property
    def recurrent_weight(self) -> torch.Tensor:
        """The contexts' half of the product, `[C, C]`."""
        return self.dense.weight[:, : self.norm.normalized_shape[0]]

    def forward(self, contexts: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """`[..., C]` contexts and `[..., C]` projected embeddings (see `project`) -> `[..., C]`."""
        product = nn.functional.linear(contexts, self.recurrent_weight)
        return self.norm(contexts + nn.functional.gelu(product + projected))


class ContextBlock(nn.Module):
    """The report's ContextBlock, with one or more layers a token.

    With N layers the context of a token is refined N times, each layer with weights of its own, and the last result is
    both the token's context and the state for the next token: depth costs no cache.

    Args:
        context_dim: width C of the context.
        embedding_dim: width E of the token embeddings.
        num_layers: refinements a token.
    """

    def __init__(self, context_dim: int, embedding_dim: int, num_layers: int = 1, eps: float = 1e-5):
        super().__init__()
        self.context_dim = context_dim
        self.layers = nn.ModuleList(ContextBlockLayer(context_dim, embedding_dim, eps) for _ in range(num_layers))

    def _project(self, embeddings: torch.Tensor) -> list[torch.Tensor]:
        layers: Iterable[Any] = self.layers
        return [layer.project(embeddings) for layer in layers]

    def _refine(self, contexts: torch.Tensor, projected: list[torch.Tensor]) -> torch.Tensor:
        for layer, embedding in zip(self.layers, projected, strict=True):
            contexts = layer(contexts, embedding)
        return contexts

    def step(self, previous: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Previous contexts `[..., C]`, embeddings `[..., E]` -> contexts `[..., C]`."""
        return self._refine(previous, self._project(embeddings))

    def sweep(
        self,
        contexts: torch.Tensor,
        embeddings: torch.Tensor,
        initial: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One parallel fixed-point pass: every token from the last estimate of its predecessor's context.

        Args:
            contexts: last estimates `[..., T, C]`.
            embeddings: `[..., T, E]`.
            initial: context before the first token `[..., C]`, zero if absent.
            noise: added to the predecessors' contexts `[..., T, C]`.

        Returns:
            new estimates `[..., T, C]`; the first k are exact after k sweeps.
        """
        initial = torch.zeros_like(contexts[..., 0, :]) if initial is None else initial
        previous = torch.cat([initial.unsqueeze(-2), contexts[..., :-1, :]], dim=-2)
        return self.step(previous if noise is None else previous + noise, embeddings)

    def scan(
        self, embeddings: torch.Tensor, initial: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The exact recurrence over a sequence; equal to as many `step`s.

        Args:
            embeddings: `[B, T, E]`.
            initial: context before the first token `[B, C]`, zero if absent.
            mask: `[B, T]`, false where a token is padding: its context is zero, so the next one starts afresh.

        Returns:
            contexts `[B, T, C]`.
        """
        initial = embeddings.new_zeros(embeddings.shape[0], self.context_dim) if initial is None else initial
        if embeddings.shape[1] == 1:
            context = self.step(initial, embeddings[:, 0])
            return (context if mask is None else context * mask.to(context.dtype)).unsqueeze(1)
        layers: list[Any] = list(self.layers)
        # The recurrence runs in the weights' own dtype: under autocast it would round the state at each token.
        dtype = layers[0].norm.weight.dtype
        projected = torch.stack([part.transpose(0, 1) for part in self._project(embeddings)]).to(dtype)
        keep = None if mask is None else mask.t().unsqueeze(-1).to(dtype)
        parameters = [p for layer in layers for p in (layer.recurrent_weight, layer.norm.weight, layer.norm.bias)]
        with torch.autocast(embeddings.device.type, enabled=False):
            contexts = Recurrence.apply(projected, initial.to(dtype), keep, layers[0].norm.eps, *parameters)
        return contexts.transpose(0, 1)
