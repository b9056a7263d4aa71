"""The ContextBlock: the recurrent map that compresses a token and its past into one context.

    c_t = LN(c_{t-1} + GELU(W [c_{t-1} ; e_t] + b)),    c_{-1} = 0

Two ways to run it: `step` (one token of a sequence; in phase 1 all of them in parallel, each from the last estimate of
its predecessor's context) and `scan` (the whole sequence).

Shapes: B batch, T tokens, C context_dim, E width of the token embeddings.
"""

from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import has_static_value

from .scan import Recurrence
from .shortcuts import is_plain


class ContextLinear(nn.Linear):
    """The product with `[c ; e]`; a separate class, because transformers chooses initial weights by class."""


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

    @property
    def is_plain(self) -> bool:
        """Whether the weights may be read directly, without calling the modules."""
        return is_plain(self.dense, ContextLinear) and is_plain(self.norm, nn.LayerNorm)

    def forward(self, contexts: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """`[..., C]` contexts and `[..., C]` projected embeddings (see `project`) -> `[..., C]`, for a plain layer."""
        product = nn.functional.linear(contexts, self.recurrent_weight)
        return self.norm(contexts + nn.functional.gelu(product + projected))

    def step(self, contexts: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """`[..., C]` contexts and `[..., E]` embeddings -> `[..., C]`, by calling the modules."""
        return self.norm(contexts + nn.functional.gelu(self.dense(torch.cat([contexts, embeddings], dim=-1))))


class ContextBlock(nn.Module):
    """The founding report's ContextBlock, with one or more layers a token.

    N layers refine the context of a token N times, each with its own weights. The last result is both the token's
    context and the state for the next token, so depth costs no cache.

    Args:
        context_dim: width C of the context.
        embedding_dim: width E of the token embeddings.
        num_layers: refinements a token.
    """

    def __init__(self, context_dim: int, embedding_dim: int, num_layers: int = 1, eps: float = 1e-5):
        super().__init__()
        self.context_dim = context_dim
        self.layers: Any = nn.ModuleList(ContextBlockLayer(context_dim, embedding_dim, eps) for _ in range(num_layers))

    def step(self, previous: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Previous contexts `[..., C]`, embeddings `[..., E]` -> contexts `[..., C]`."""
        for layer in self.layers:
            previous = layer.step(previous, embeddings)
        return previous

    def scan(
        self,
        embeddings: torch.Tensor,
        initial: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The exact recurrence over a sequence; equal to as many `step`s.

        Args:
            embeddings: `[B, T, E]`.
            initial: context before the first token `[B, C]`, zero if absent.
            mask: `[B, T]`, false for padding, which keeps the context of the token before it.
            starts: `[B or 1, T]`, true where a new text begins, with a context of zero.

        Returns:
            contexts `[B, T, C]`.

        Raises:
            ValueError: T is dynamic in `torch.export`.
        """
        if torch.compiler.is_exporting() and not has_static_value(embeddings.shape[1]):
            raise ValueError("the recurrence runs token by token: export it with a static length")
        if initial is None:
            initial = embeddings.new_zeros(embeddings.shape[0], self.context_dim)
        initial = initial.to(embeddings.dtype)
        at_once = embeddings.shape[1] > 1 and all(layer.is_plain for layer in self.layers)
        return (self._scan_at_once if at_once else self._scan_by_steps)(embeddings, initial, mask, starts)

    def _scan_by_steps(
        self, embeddings: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None, starts: torch.Tensor | None
    ) -> torch.Tensor:
        contexts = []
        for t, embedding in enumerate(embeddings.unbind(1)):
            previous = context if starts is None else context.masked_fill(starts[:, t, None], 0)
            context = self.step(previous, embedding)
            if mask is not None:
                context = torch.where(mask[:, t, None], context, previous)
            contexts.append(context)
        return torch.stack(contexts, dim=1)

    def _scan_at_once(
        self, embeddings: torch.Tensor, initial: torch.Tensor, mask: torch.Tensor | None, starts: torch.Tensor | None
    ) -> torch.Tensor:
        # The recurrence runs in the dtype of the weights, because autocast would round the state at each token.
        norm = self.layers[0].norm
        dtype = norm.weight.dtype
        projected = torch.stack([layer.project(embeddings).transpose(0, 1) for layer in self.layers]).to(dtype)
        keep, carry = (None if m is None else m.t().unsqueeze(-1) for m in (mask, None if starts is None else ~starts))
        parameters = [p for layer in self.layers for p in (layer.recurrent_weight, layer.norm.weight, layer.norm.bias)]
        with torch.autocast(embeddings.device.type, enabled=False):
            contexts = Recurrence.apply(projected, initial.to(dtype), keep, carry, norm.eps, *parameters)
        return contexts.transpose(0, 1)
