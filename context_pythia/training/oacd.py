"""OACD (Origin-Anchored Centroid Dispersion): the loss, the sweep over the tokens, and the iteration of a training.

Shapes: N tokens of the stream, n tokens of a batch, V distinct tokens of the stream, C context_dim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from context_pythia.config.recipe import Phase1Options
from context_pythia.errors import Failure

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedDataset
    from context_pythia.model import ContextPythiaForCausalLM

PROJECTED_TOKENS = 8192  # distinct tokens embedded at once


@torch.no_grad()
def oacd_loss(contexts: torch.Tensor, mean_penalty: float, batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of contexts X `[n, C]`, and the gradient `[n, C]` of the loss divided by `batches`.

    The loss is `-||X - mean||_F / n + mean_penalty * ||mean||^2`, a scalar, and its gradient `2 mean_penalty mean / n -
    (X - mean) / (n ||X - mean||_F)`. Autograd would make nine more passes over the contexts, and memory bandwidth
    limits phase 1.
    """
    mean = contexts.mean(dim=0)
    centered = contexts - mean
    norm = torch.linalg.vector_norm(centered)
    loss = mean_penalty * mean.square().sum() - norm / len(contexts)
    scale = torch.ones_like(norm) / batches / len(contexts)
    # As in autograd: equal contexts have no direction to spread in, so this part is 0.
    spread = torch.where(norm > 0, -scale / norm, 0.0)
    return loss, centered.mul_(spread).add_(2 * mean_penalty * scale * mean)


def sweep_tokens(
    layers: Iterable[Any],
    projected: Sequence[torch.Tensor],
    contexts: torch.Tensor,
    initial: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """One parallel fixed-point pass over n tokens: each token's context from the last estimate of its predecessor's.
    After k passes the first k contexts are exact.

    Args:
        projected: the projections of the tokens' embeddings, one tensor per layer, `[n, C]`.
        contexts: the old contexts, `[n, C]`.
        initial: the context before the first token, `[C]`.
        noise: `[n, C]`; overwritten.

    Returns:
        the new contexts, `[n, C]`.
    """
    noise[0] += initial
    noise[1:] += contexts[:-1]
    contexts = noise
    for layer, rows in zip(layers, projected, strict=True):
        contexts = layer(contexts, rows)
    return contexts


class TokenProjections:
    """Each layer's projection of the token embeddings, computed once per iteration.

    A token's embedding is fixed, and its projection changes only with the weights. So each iteration projects the V
    distinct tokens once, and batches look their rows up. The gradients of the rows are summed per distinct token, and
    `backward` passes each sum through the projection once. This is exact, because the projection is linear.

    Args:
        model: has the embeddings and the ContextBlock.
        distinct: the distinct ids of the stream, `[V]`.
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
        """Project with the current weights, and set the gradients to zero."""
        for chunk, embeddings in self._embeddings():
            for layer, table in zip(self.layers, self.tables, strict=True):
                table[chunk] = layer.project(embeddings)
        for gradient in self.gradients:
            gradient.zero_()

    def rows(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """Each layer's projections `[n, C]` of a batch's ids `[n]`, as leaves; `collect` takes their gradients."""
        place = self.place[input_ids]
        return [nn.functional.embedding(place, table).requires_grad_() for table in self.tables]

    def collect(self, input_ids: torch.Tensor, rows: Sequence[torch.Tensor]) -> None:
        for gradient, row in zip(self.gradients, rows, strict=True):
            assert row.grad is not None
            gradient.index_add_(0, self.place[input_ids], row.grad)

    def backward(self) -> None:
        """Add the collected gradients to those of the layers' weights."""
        for chunk, embeddings in self._embeddings():
            for layer, gradient in zip(self.layers, self.gradients, strict=True):
                product = layer.project(embeddings)
                product.backward(gradient[chunk].to(product.dtype))  # autocast gives a narrower dtype

    def _embeddings(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for first in range(0, len(self.distinct), PROJECTED_TOKENS):
            chunk = slice(first, first + PROJECTED_TOKENS)
            with torch.no_grad():
                embeddings = self.model.gpt_neox.embed_context_input(self.distinct[chunk])
            yield chunk, embeddings


class Oacd:
    """The state of one training, and its iteration."""

    def __init__(self, model: ContextPythiaForCausalLM, stream: PackedDataset, options: Phase1Options, seed: int):
        self.block, self.stream, self.options, self.seed = model.gpt_neox.context_block, stream, options, seed
        self.device = model.get_input_embeddings().weight.device
        self.optimizer = torch.optim.Adam(self.block.parameters(), lr=options.learning_rate)
        self.history: list[dict[str, float]] = []
        self.batches = math.ceil(stream.num_tokens / options.batch_tokens)
        dtype = getattr(torch, options.state_dtype)
        self.contexts = torch.empty(stream.num_tokens, self.block.context_dim, dtype=dtype, device=self.device)
        occurs = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        for batch, rows in enumerate(self.contexts.split(options.batch_tokens)):
            rows.copy_(self.normal(len(rows), 0, batch, 0.01))
            occurs[self.input_ids(batch)] = True
        self.projections = TokenProjections(model, occurs.nonzero().squeeze(1).to(self.device))

    def normal(self, rows: int, iteration: int, batch: int, deviation: float) -> torch.Tensor:
        """Normal numbers `[rows, C]` with mean 0. Iteration 0 gives the first contexts, later iterations the noise."""
        words = np.random.SeedSequence((self.seed % 2**64, iteration, batch)).generate_state(1)
        generator = torch.Generator(self.device).manual_seed(int(words[0]))
        numbers = torch.empty(rows, self.block.context_dim, device=self.device)
        return numbers.normal_(0, deviation, generator=generator)

    def input_ids(self, batch: int) -> torch.Tensor:
        first = batch * self.options.batch_tokens
        return self.stream.stream(first, first + self.options.batch_tokens)

    @property
    def finished(self) -> bool:
        """Whether training ends. The first iteration starts from random contexts, so its rate never ends training."""
        done = len(self.history)
        return done >= self.options.max_iterations or (
            done > 1 and self.history[-1]["convergence_rate"] >= self.options.convergence_rate
        )

    def iterate(self, bar: tqdm) -> None:
        """Sweep over all contexts in place, then take one Adam step on the mean of the batches' losses.

        Raises:
            Failure: the loss or its gradient is not finite; the weights do not change.
        """
        began, iteration, options = time.perf_counter(), len(self.history) + 1, self.options
        bar.set_description(f"phase 1, iteration {iteration}/{options.max_iterations}", refresh=False)
        self.block.zero_grad()
        dtype = next(self.block.parameters()).dtype
        with self._precision():
            self.projections.refresh()
        loss_sum: Any = 0.0
        converged: Any = 0
        previous = torch.zeros_like(self.contexts[0])  # the context before a batch
        for batch, rows in enumerate(self.contexts.split(options.batch_tokens)):
            ids, old = self.input_ids(batch).to(self.device), rows.to(dtype)
            noise = self.normal(len(rows), iteration, batch, options.noise).to(dtype)
            projected = self.projections.rows(ids)
            with self._precision():
                swept = sweep_tokens(self.block.layers, projected, old, previous.to(dtype), noise)
            new = swept.detach()
            loss, gradient = oacd_loss(new, options.mean_penalty, self.batches)
            swept.backward(gradient)
            self.projections.collect(ids, projected)
            # The next batch starts from the old value of this batch's last context.
            previous = rows[-1].clone()
            converged += (old.sub_(new).square_().mean(dim=-1) < options.threshold).sum()
            rows.copy_(new)
            loss_sum = loss.double() + loss_sum
            bar.update()
        with self._precision():
            self.projections.backward()
        norm = nn.utils.clip_grad_norm_(self.block.parameters(), options.max_grad_norm)
        # Sums stay on the device until here, because reading them waits for the device.
        mean_loss, rate = float(loss_sum) / self.batches, int(converged) / self.stream.num_tokens
        for what, value in (("loss", mean_loss), ("gradient", float(norm))):
            if not math.isfinite(value):
                raise Failure(
                    f"phase 1 diverged: {what} {value} in iteration {iteration}; lower its learning rate "
                    f"({options.learning_rate:g}) and use another output folder (the last good checkpoint stays)"
                )
        self.optimizer.step()
        seconds = time.perf_counter() - began
        self.history.append({"iteration": iteration, "loss": mean_loss, "convergence_rate": rate, "seconds": seconds})
        bar.set_postfix_str(f"converged {rate:.1%}", refresh=False)

    def _precision(self) -> torch.autocast:
        """The precision of the matrix products."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16")

    def state_dict(self) -> dict[str, Any]:
        return {
            "contexts": self.contexts,
            "block": self.block.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.contexts, self.history = state["contexts"], state["history"]
        self.block.load_state_dict(state["block"])
        self.optimizer.load_state_dict(state["optimizer"])
