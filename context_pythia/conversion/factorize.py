"""Rebuilds one layer's keys and values from fewer numbers: linear algebra on weights, moments and ranks.

A layer's keys and values are `y = W h + b` of its normalized input h. The context has rotary pairs r and a latent z,
both linear in h; an affine map rebuilds y from them (`model/attention.py`). Below full rank the factors minimize

    E (y - y')^T G (y - y'),

with moments of h and a metric G from `conversion/calibrate.py`. The default moments are the Kronecker factors of the
Fisher information, which make this the quadratic model of the loss. All in float64.

Shapes: D hidden size, H heads, d rotary dims of a head, F = d / 2 frequencies, P pairs, R = 2 P, L latent, C content.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

# Directions in which inputs or gradients hardly vary do not matter, but must not make a whitening infinite.
RIDGE = 1e-9
# Below this share, the part of the input that only this pair reads, or the error that it saves, is rounding.
ROUNDING = 1e-11
GRID = 16  # numbers of pairs that a frontier tries


@dataclass
class KeysAndValues:
    """A layer's weights, in float64.

    Attributes:
        weight: of the keys (before RoPE), then the values, each head by head, `[2 N, D]`; N is D for one layer.
        bias: in the same order, `[2 N]`; zero if the layer has none.
        num_heads: H.
        rotary_dim: d.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    num_heads: int
    rotary_dim: int

    @cached_property
    def rotary_rows(self) -> torch.Tensor:
        """Rows of the rotary dims, `[F, H, 2]`: frequency, head, real and imaginary part."""
        heads = torch.arange(self.num_heads) * (len(self.weight) // 2 // self.num_heads)
        frequencies = torch.arange(self.rotary_dim // 2)
        real = frequencies[:, None] + heads[None, :]
        return torch.stack([real, real + self.rotary_dim // 2], dim=-1)

    @cached_property
    def rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the rotary dims as complex numbers, `[F, H, D]` and `[F, H]`."""
        real, imaginary = self.rotary_rows.unbind(-1)
        return (
            torch.complex(self.weight[real], self.weight[imaginary]),
            torch.complex(self.bias[real], self.bias[imaginary]),
        )

    @cached_property
    def content_rows(self) -> torch.Tensor:
        """All other rows: keys' dims that are not rotary, then values."""
        rest = torch.ones(self.weight.shape[0], dtype=torch.bool)
        rest[self.rotary_rows.flatten()] = False
        return rest.nonzero()[:, 0]


@dataclass
class Known:
    """What the token's embedding e tells without the context (`cache_token_ids`); the maps are regressions.

    Attributes:
        weight: of keys and values by e, beside their weight by the input, `[2 N, D]`.
        inputs: of the input by e, `[D, D]`.
        mean: of e, `[D]`.
        rest: covariance of the part of the input that e does not tell, `[D, D]`.
    """

    weight: torch.Tensor
    inputs: torch.Tensor
    mean: torch.Tensor
    rest: torch.Tensor


@dataclass
class Factors:
    """The maps of one layer to its context and back, in the form of `ContextAttention`.

    Attributes:
        pairs: rotary pairs at each of the F frequencies.
        context_weight, context_bias: `[R + L, D]`, `[R + L]`.
        rotary_up: `[H, P, 2]`.
        key_up, value_up, value_bias: `[D - H d, C]`, `[D, C]`, `[D]`, with C = R + L, because rotary keys are reused;
            with token ids C = L + D, because the embedding is.
        error: E (y - y')^T G (y - y') / 2. With the gradients' moments its unit is nats per token. It ranks
            factorizations but does not predict losses: errors of layers interact, and a Kronecker product only
            approximates the Fisher information. For several layers y is what a regression makes of it (`readers.py`).
    """

    pairs: list[int]
    context_weight: torch.Tensor
    context_bias: torch.Tensor
    rotary_up: torch.Tensor
    key_up: torch.Tensor
    value_up: torch.Tensor
    value_bias: torch.Tensor
    error: float


class LayerFactorizer:
    """All factorizations of one layer with one weighting.

    The rotary pairs of a frequency are the leading components of a complex PCA over the heads' keys: RoPE turns all of
    them by one angle, so a complex combination of turned keys is the turned combination (RoRoPE, arXiv 2502.07864).
    The latent is a reduced-rank regression of everything else on the part of the input that the pairs do not read.

    With a known embedding, the latent regresses on the part of the input that the embedding does not tell. It also
    covers what the pairs read, because they are then not reused.

    Args:
        mean, covariance: of the inputs, by the weighting, `[D]` and `[D, D]`.
        metric: G, `[2 N, 2 N]`, ordered as the layer's weight.
    """

    def __init__(
        self,
        layer: KeysAndValues,
        mean: torch.Tensor,
        covariance: torch.Tensor,
        metric: torch.Tensor,
        known: Known | None = None,
    ):
        self.layer, self.mean, self.known = layer, mean, known
        # h - mean, or the part of it that is not known, stands for root @ (whitened input)
        self.root = symmetric_root(known.rest if known else covariance)
        rows = layer.content_rows
        content = layer.weight[rows] @ self.root
        self.gram = content.T @ metric[rows][:, rows] @ content
        self._find_components(covariance, metric)

    def _find_components(self, covariance: torch.Tensor, metric: torch.Tensor) -> None:
        """The heads' components at each frequency, in order of their value: errors, maps in, maps back."""
        weight, bias = self.layer.rotary
        mean = weight @ self.mean.to(weight.dtype) + bias
        reads = weight @ covariance.to(weight.dtype) @ weight.mH + mean[:, :, None] * mean[:, None].conj()
        real, imaginary = self.layer.rotary_rows.unbind(-1)

        def block(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return metric[a[:, :, None], b[:, None, :]]

        # The part of the real metric that commutes with the turning; RoPE averages out the rest.
        turning = torch.complex(
            (block(real, real) + block(imaginary, imaginary)) / 2,
            (block(imaginary, real) - block(real, imaginary)) / 2,
        )
        self.worth = torch.zeros(reads.shape[:2], dtype=torch.float64)
        self.inward, self.upward = torch.zeros_like(reads), torch.zeros_like(reads)
        for f in range(reads.shape[0]):
            root = symmetric_root(turning[f])
            values, vectors = torch.linalg.eigh(root @ reads[f] @ root)
            # If a frequency's metric is zero, any components do and all are worthless.
            self.worth[f], vectors = values.flip(0).clamp(min=0) * bool(turning[f].any()), vectors.flip(1)
            inward = vectors.mH @ root  # [component, H]
            # This makes a pair as large as a head's key. Gradients are small: their scale would give pairs that a
            # quantized cache rounds to zero and that one step of healing overwrites.
            size = torch.linalg.vector_norm(inward, dim=1)
            self.inward[f] = inward / size[:, None]
            self.upward[f] = torch.linalg.solve(root, vectors) * size  # [H, component]

    def keep_heads(self) -> None:
        """Take the heads' own keys for components. If all components are cached, this loses nothing, and a quantized
        cache rounds these less."""
        self.inward[:] = self.upward[:] = torch.eye(self.layer.num_heads)

    def pair_counts(self, total: int) -> list[int]:
        """The counts per frequency of the `total` most valuable components."""
        frequencies, heads = self.worth.shape
        order = self.worth.flatten().argsort(descending=True, stable=True)
        return torch.bincount(order[:total] // heads, minlength=frequencies).tolist()

    def _rotary(self, pairs: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the pairs, `[R, D]` and `[R]`, real parts first."""
        weight, bias = self.layer.rotary
        ways = [self.inward[f, :count] for f, count in enumerate(pairs)]
        weight = torch.cat([way @ weight[f] for f, way in enumerate(ways)])
        bias = torch.cat([way @ bias[f] for f, way in enumerate(ways)])
        return torch.cat([weight.real, weight.imag]), torch.cat([bias.real, bias.imag])

    def _free(self, rotary_weight: torch.Tensor) -> torch.Tensor:
        """Orthonormal directions of the whitened input for the latent: those that the pairs do not read,
        `[D, D - rank]`, or all of them if pairs are not reused.

        The rank is below R if pairs are linearly dependent, for example with equal or pruned heads.
        """
        if self.known:
            return torch.eye(len(self.root), dtype=self.root.dtype)
        _, sizes, directions = torch.linalg.svd(rotary_weight @ self.root, full_matrices=True)
        return directions[int((sizes > ROUNDING * sizes[0]).sum()) :].T

    def errors(self, pairs: list[int]) -> torch.Tensor:
        """Error with latents of 0, 1, … D - rank dims beside the pairs, `[D - rank + 1]`."""
        return self._errors(pairs, self._free(self._rotary(pairs)[0]))

    def _errors(self, pairs: list[int], free: torch.Tensor) -> torch.Tensor:
        """`errors`, from the directions that are free for the latent."""
        values = torch.linalg.eigvalsh(free.T @ self.gram @ free).clamp(min=0)
        tail = torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0)
        lost = sum(self.worth[f, count:].sum() for f, count in enumerate(pairs))
        return (tail + lost) / 2

    def frontier(self) -> tuple[torch.Tensor, list[list[int]]]:
        """The best split of each width into pairs and latent, of `GRID` numbers of pairs.

        Returns:
            least error at widths 0, 1, … D, `[D + 1]` (infinite if too narrow), and its counts of pairs per frequency.
        """
        width = self.layer.weight.shape[1]
        most = min(self.worth.numel(), width // 2)
        rounding = ROUNDING * float(self.gram.trace() + self.worth.sum())
        least = torch.full((width + 1,), torch.inf, dtype=torch.float64)
        choice = torch.zeros(width + 1, dtype=torch.int64)
        # Always try one pair, so every width with room for a pair and a latent has a finite error.
        for total in sorted({1, *(max(1, most * step // GRID) for step in range(1, GRID + 1))}):
            counts, widths = self.pair_counts(total), torch.arange(2 * total, width + 1)
            errors = self.errors(counts)[: len(widths)]
            better = errors < least[widths] - rounding
            least[widths[better]], choice[widths[better]] = errors[better], total
        return least, [self.pair_counts(total) for total in choice.tolist()]

    def factors(self, pairs: list[int], latent_dim: int) -> Factors:
        """The best factors with these pairs and a latent of this width, at most D - R, or D if an embedding is known.

        With all pairs and D - R they are exact, whatever the weighting: the input follows from rotary keys that are
        linearly independent and from the rest ("Slim attention", arXiv 2503.05840, caches the keys alone).
        """
        layer, rows = self.layer, self.layer.content_rows
        rotary_weight, rotary_bias = self._rotary(pairs)
        free = directions = self._free(rotary_weight)
        if latent_dim < directions.shape[1]:  # [D, L], of the greatest value
            _, vectors = torch.linalg.eigh(directions.T @ self.gram @ directions)
            directions = directions @ vectors.flip(1)[:, :latent_dim]
        latent_weight = torch.linalg.solve(self.root, directions).T
        content = layer.weight[rows] @ self.root
        up, content_mean = content @ directions, self.mean.new_zeros(latent_dim)
        if self.known:
            # The embedding also tells the part of the input that the latent leaves out.
            from_embedding = self.known.weight[rows] + (layer.weight[rows] - up @ latent_weight) @ self.known.inputs
            up, content_mean = torch.cat([up, from_embedding], dim=1), torch.cat([content_mean, self.known.mean])
        else:
            # The latent is orthogonal to the pairs, so the two regressions are independent.
            up = torch.cat([content @ torch.linalg.pinv(rotary_weight @ self.root), up], dim=1)
            content_mean = torch.cat([rotary_weight @ self.mean + rotary_bias, content_mean])
        # The biases make the rebuilt values right in the mean.
        offset = layer.weight[rows] @ self.mean + layer.bias[rows] - up @ content_mean
        keys = len(layer.weight) // 2 - layer.num_heads * layer.rotary_dim
        rotary_up = torch.cat([self.upward[f, :, :count] for f, count in enumerate(pairs)], dim=1)
        return Factors(
            pairs=pairs,
            context_weight=torch.cat([rotary_weight, latent_weight]),
            context_bias=torch.cat([rotary_bias, -latent_weight @ self.mean]),
            rotary_up=torch.view_as_real(rotary_up.contiguous()),
            key_up=up[:keys],
            value_up=up[keys:],
            value_bias=offset[keys:],
            error=float(self._errors(pairs, free)[latent_dim]),
        )


def symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric positive root of a positive semidefinite matrix; a ridge bounds its smallest eigenvalues.

    The zero matrix (of pruned heads, for example) gives the identity: all directions are alike.
    """
    values, vectors = torch.linalg.eigh(matrix)
    largest = float(values[-1])
    values = values.clamp(min=largest * RIDGE if largest > 0 else 1.0)
    return (vectors * values.sqrt()) @ vectors.mH
