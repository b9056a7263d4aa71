"""What a conversion must know of the text: each layer's inputs, and how much its keys and values matter.

One pass over calibration text through the original model. A layer's input moments weigh the errors of a factorization
by what the layer really reads; the moments of the loss's gradients weigh them by what they do to the predictions
(the true Fisher information, labels drawn from the model's own predictions, as in K-FAC, arXiv 1503.05671).

Shapes: N tokens, D hidden size, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import GPTNeoXForCausalLM

from context_pythia.conversion.factorize import KeysAndValues, LayerFactorizer
from context_pythia.data.packing import PackedDataset


@dataclass
class LayerStatistics:
    """Sums over the calibration tokens, in float64.

    Attributes:
        tokens: number of tokens, `[]`.
        input_sum: of the normalised inputs, `[D]`.
        input_moment: of their outer products, `[D, D]`.
        gradient_moment: of the outer products of the loss's gradients by keys (not yet turned) and values,
            `[2 D, 2 D]`; keys come first, head by head.
    """

    tokens: torch.Tensor
    input_sum: torch.Tensor
    input_moment: torch.Tensor
    gradient_moment: torch.Tensor

    @classmethod
    def zeros(cls, hidden_size: int) -> LayerStatistics:
        shapes = (), (hidden_size,), (hidden_size, hidden_size), (2 * hidden_size, 2 * hidden_size)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        save_file({f.name: getattr(self, f.name) for f in fields(self)}, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> LayerStatistics:
        """Raises RuntimeError if the file is damaged."""
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise RuntimeError(f"{path} is damaged ({error}): delete it to calibrate again") from error

    def factorizer(self, layer: KeysAndValues, weighting: str) -> LayerFactorizer:
        """The layer's factorizations under one of `WEIGHTINGS`."""
        return LayerFactorizer(layer, *WEIGHTINGS[weighting](self))

    def input_moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `[D]` and covariance `[D, D]` of the inputs."""
        mean = self.input_sum / self.tokens
        return mean, self.input_moment / self.tokens - mean[:, None] * mean

    def identity(self) -> torch.Tensor:
        return torch.eye(len(self.gradient_moment), dtype=torch.float64)


Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# What a factorization takes for the inputs' mean and covariance and for the errors' metric. All but the first are there
# to compare with: principal components of keys and values, and the singular values of the weights alone.
WEIGHTINGS: dict[str, Callable[[LayerStatistics], Moments]] = {
    "gradients": lambda held: (*held.input_moments(), held.gradient_moment / held.tokens),
    "inputs": lambda held: (*held.input_moments(), held.identity()),
    "none": lambda held: (
        torch.zeros_like(held.input_sum),
        torch.eye(len(held.input_sum), dtype=torch.float64),
        held.identity(),
    ),
}


def collect(
    model: GPTNeoXForCausalLM,
    text: PackedDataset,
    layers: Sequence[int],
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> dict[int, LayerStatistics]:
    """Statistics of the given layers from one pass over all samples of `text`.

    Args:
        layers: those whose statistics are held at once; a layer takes `40 D^2` bytes.
        seed: of the labels drawn from the model's predictions.

    Raises:
        RuntimeError: a prediction, an input or a gradient is not finite.
    """
    statistics = {layer: LayerStatistics.zeros(model.config.hidden_size) for layer in layers}
    generator = torch.Generator(device=model.device).manual_seed(seed)
    batches = range(0, len(text), batch_size)
    with observed(model, statistics):
        for start in tqdm(batches, desc="calibration", unit="batch", disable=None if progress else True):
            samples = [text[i]["input_ids"] for i in range(start, min(start + batch_size, len(text)))]
            logits = model(torch.stack(samples).to(model.device), use_cache=False).logits
            if not bool(logits.isfinite().all()):
                raise RuntimeError(
                    f"the model's predictions are not finite in {model.dtype}: the checkpoint is damaged"
                )
            predictions = logits.detach().float().softmax(-1).flatten(0, 1)
            labels = torch.multinomial(predictions, 1, generator=generator)[:, 0]
            nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum").backward()
    for layer, held in statistics.items():
        if not all(bool(getattr(held, f.name).isfinite().all()) for f in fields(held)):
            raise RuntimeError(f"layer {layer} has inputs or gradients that are not finite: the checkpoint is damaged")
    return statistics


@contextmanager
def observed(model: GPTNeoXForCausalLM, statistics: dict[int, LayerStatistics]) -> Iterator[None]:
    """Within it a forward and backward pass adds to `statistics`. Gradients reach activations alone, no weights."""
    heads = model.config.num_attention_heads
    required = [parameter.requires_grad for parameter in model.parameters()]
    handles = []

    def watch(held: LayerStatistics):
        def forward(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            states = inputs[0].detach().flatten(0, 1).float()
            held.tokens += states.shape[0]
            held.input_sum += states.sum(0).double().cpu()
            held.input_moment += (states.T @ states).double().cpu()
            output.register_hook(backward)

        def backward(gradient: torch.Tensor) -> None:
            # [N, H, (query, key, value), head size] -> [N, 2 D]
            parts = gradient.flatten(0, 1).float().unflatten(-1, (heads, 3, -1))
            kept = parts[:, :, 1:].transpose(1, 2).flatten(1)
            held.gradient_moment += (kept.T @ kept).double().cpu()

        return forward

    try:
        model.eval().requires_grad_(False)
        model.enable_input_require_grads()
        for layer, held in statistics.items():
            handles.append(model.gpt_neox.layers[layer].attention.query_key_value.register_forward_hook(watch(held)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.disable_input_require_grads()
        for parameter, require in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(require)
