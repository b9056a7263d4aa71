"""The layers that read one context, as one layer with the heads of all.

A context is a map of one input: that of the first layer that reads it. For the keys and values of the layers after it,
the best that such a map can give is their regression on this input. With token ids the normalized embedding, which is
the input of layer 0, is known besides. So only the rest of keys and values takes room in the context.

Shapes: D hidden size, X = D times the number of inputs, N = D times the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from context_pythia.conversion.factorize import RIDGE, Factors, KeysAndValues, Known, LayerFactorizer
from context_pythia.model import ContextPythiaConfig


@dataclass(frozen=True)
class Readers:
    """Layers that read the context of the first of them.

    Attributes:
        layers: their indices.
        embedding: whether keys and values are also rebuilt from the token's embedding.
    """

    layers: tuple[int, ...]
    embedding: bool = False

    @property
    def inputs(self) -> tuple[int, ...]:
        """The layers whose inputs the statistics describe."""
        return tuple(sorted({*self.layers, *([0] if self.embedding else [])}))

    def statistics_bytes(self, hidden_size: int) -> int:
        """Bytes of the two moments of inputs and the metric (`LayerStatistics`), nearly."""
        return 8 * hidden_size**2 * (2 * len(self.inputs) ** 2 + 4 * len(self.layers) ** 2)

    def factorizer(
        self, layers: Sequence[KeysAndValues], mean: torch.Tensor, covariance: torch.Tensor, metric: torch.Tensor
    ) -> LayerFactorizer:
        """The factorizer of the common context.

        Args:
            layers: the weights of each layer.
            mean, covariance: of all inputs, one after the other, `[X]` and `[X, X]`.
            metric: of the keys of all layers, then their values, `[2 N, 2 N]`.
        """
        width = layers[0].weight.shape[1]
        columns = {layer: torch.arange(width) + i * width for i, layer in enumerate(self.inputs)}
        weight = covariance.new_zeros(2, len(layers), width, len(mean))
        for i, (layer_idx, layer) in enumerate(zip(self.layers, layers, strict=True)):
            weight[:, i, :, columns[layer_idx]] = layer.weight.unflatten(0, (2, -1))
        weight = weight.flatten(0, 2)
        bias = torch.stack([layer.bias.unflatten(0, (2, -1)) for layer in layers], dim=1).flatten()
        expected = weight @ mean + bias

        own, known = columns[self.layers[0]], None
        heads = sum(layer.num_heads for layer in layers)
        joint = KeysAndValues(weight @ regression(covariance, own), bias, heads, layers[0].rotary_dim)
        if self.embedding:
            embedding = columns[0]
            both = torch.cat([embedding, own]).unique()
            from_both = torch.zeros_like(weight)
            from_both[:, both] = weight @ regression(covariance, both)
            # The first context's input is the embedding, which leaves nothing to read.
            joint.weight[joint.content_rows] = from_both[joint.content_rows][:, own] * float(self.layers[0] > 0)
            inputs = regression(covariance, embedding)[own]
            rest = covariance[own][:, own] - inputs @ covariance[embedding][:, own]
            known = Known(from_both[:, embedding], inputs, mean[embedding], (rest + rest.T) / 2)
        joint.bias = expected - joint.weight @ mean[own]
        return LayerFactorizer(joint, mean[own], covariance[own][:, own], metric, known)

    def split(self, factors: Factors) -> list[Factors]:
        """The factors of each layer."""
        names = ("rotary_up", "key_up", "value_up", "value_bias")
        parts = zip(*(getattr(factors, name).chunk(len(self.layers)) for name in names), strict=True)
        return [replace(factors, **dict(zip(names, part, strict=True))) for part in parts]


def readers_of(config: ContextPythiaConfig) -> list[Readers]:
    """The readers of each context, in order."""
    makers = config.makers
    return [
        Readers(tuple(i for i, maker in enumerate(makers) if maker == own), config.cache_token_ids)
        for own in sorted(set(makers))
    ]


def regression(covariance: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Coefficients `[X, columns]` of the least-squares prediction of all numbers from those in `columns`."""
    others = torch.ones(len(covariance), dtype=torch.bool)
    others[columns] = False
    coefficients = covariance.new_zeros(len(covariance), len(columns))
    coefficients[columns] = torch.eye(len(columns), dtype=covariance.dtype)
    if others.any():
        inverse = torch.linalg.pinv(covariance[columns][:, columns], rtol=RIDGE, hermitian=True)
        coefficients[others] = covariance[others][:, columns] @ inverse
    return coefficients
