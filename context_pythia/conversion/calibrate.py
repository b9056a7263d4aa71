"""Calibration: statistics of each layer's inputs, and of how much its keys and values matter.

The original model reads the calibration text once. The input moments of a layer show what it reads; the moments of its
weights' gradients show what errors do to the predictions. Labels are drawn from the model's own predictions, which
gives the true Fisher information. Gradients are summed over a sample's tokens, since errors add up along a text. The
two moments are those of Shampoo (arXiv 1802.09568). With moments of single tokens, as in K-FAC (arXiv 1503.05671), a
conversion to an eighth of the cache lost a tenth more.

Shapes: B samples, T tokens of each, D hidden size, H heads, X = D times the inputs, N = D times the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from threading import Event

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from tqdm import tqdm
from transformers import GPTNeoXForCausalLM

from context_pythia.conversion.readers import Readers
from context_pythia.data.packing import PackedDataset
from context_pythia.errors import Failure
from context_pythia.files import whole
from context_pythia.training.optimization import recompute_activations

HEAD_TOKENS = 256  # tokens whose logits are in memory at once


Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class LayerStatistics:
    """Sums over the calibration tokens, in float64, of the layers that read one context.

    Attributes:
        tokens: number of tokens, `[]`.
        input_sum: sum of the normalized inputs, `[X]`.
        input_moment: sum of their outer products, `[X, X]`.
        column_moment: sum of `dWᵀ dW` over the samples, `[X + 1, X + 1]`. `dW`, `[2 N, X + 1]`, is the gradient of a
            sample's summed loss by the weights of keys (before RoPE; they come first) and values, head by head. Its
            last column is the gradient by their bias.
        row_moment: sum of `dW dWᵀ` without the bias, `[2 N, 2 N]`.
    """

    tokens: torch.Tensor
    input_sum: torch.Tensor
    input_moment: torch.Tensor
    column_moment: torch.Tensor
    row_moment: torch.Tensor

    @classmethod
    def zeros(cls, hidden_size: int, inputs: int = 1, layers: int = 1) -> LayerStatistics:
        width = inputs * hidden_size
        moments = ((size, size) for size in (width, width + 1, 2 * layers * hidden_size))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in ((), (width,), *moments)))

    def save(self, path: Path) -> None:
        with whole(path) as partial:
            save_file({f.name: getattr(self, f.name) for f in fields(self)}, partial)

    @classmethod
    def load(cls, path: Path) -> LayerStatistics:
        """Raises Failure if the file is damaged."""
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise Failure(f"{path} is damaged ({error}): delete it to calibrate again") from error

    def input_moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `[X]` and covariance `[X, X]` of the inputs."""
        mean = self.input_sum / self.tokens
        return mean, self.input_moment / self.tokens - mean[:, None] * mean

    def fisher_factors(self) -> Moments:
        """Mean `[X]` of the inputs, covariance `[X, X]` and metric `[2 N, 2 N]`. The Kronecker product of the last two
        approximates the Fisher information of the weight per token.

        A Schur complement removes the bias, because its value is free after the conversion. Each of the two moments is
        a factor of the Kronecker product, scaled by the other factor's trace. So the covariance gets the trace of the
        inputs' covariance, and the metric the rest of the scale. The mean is that of the inputs: the mean in the bias
        column gained nothing.
        """
        mean, covariance = self.input_moments()
        bias, of_bias = self.column_moment[:-1, -1], self.column_moment[-1, -1]
        columns = self.column_moment[:-1, :-1] - bias[:, None] * bias / of_bias
        variance = covariance.trace()
        if not (variance > 0 and columns.trace() > 0):
            return mean, covariance, self.row_moment / self.tokens  # nothing varies, or nothing matters
        share = columns.trace() / variance
        return mean, columns / share, self.row_moment * (share / (self.row_moment.trace() * self.tokens))


# The inputs' mean and covariance and the errors' metric for a factorization. The last two are for comparison: principal
# components of keys and values, and singular values of the weights.
WEIGHTINGS: dict[str, Callable[[LayerStatistics], Moments]] = {
    "gradients": LayerStatistics.fisher_factors,
    "inputs": lambda sums: (*sums.input_moments(), torch.eye(len(sums.row_moment), dtype=torch.float64)),
    "none": lambda sums: (
        torch.zeros_like(sums.input_sum),
        torch.eye(len(sums.input_sum), dtype=torch.float64),
        torch.eye(len(sums.row_moment), dtype=torch.float64),
    ),
}


def collect(
    model: GPTNeoXForCausalLM,
    text: PackedDataset,
    contexts: Sequence[Readers],
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> dict[Readers, LayerStatistics]:
    """Statistics of the readers of the given contexts from one pass over all samples of `text`.

    The backward pass recomputes each layer from its input. It needs the activations of one layer at a time, and, if
    weights are read from disk (`load_pretrained`), the weights of one layer.

    Args:
        contexts: the layers to observe; statistics take `8 (2 X^2 + 4 N^2)` bytes per context.
        batch_size: samples per pass; it changes only rounding.
        seed: seed of the labels, which are drawn from the model's predictions.

    Raises:
        Failure: a prediction, an input or a gradient is not finite.
    """
    statistics = {
        readers: LayerStatistics.zeros(model.config.hidden_size, len(readers.inputs), len(readers.layers))
        for readers in contexts
    }
    batches = range(0, len(text), batch_size)
    device = model.base_model.rotary_emb.inv_freq.device  # where the model computes, even if its weights are elsewhere
    with observed(model, statistics) as recording:
        for start in tqdm(batches, desc="calibration", unit="batch", disable=None if progress else True):
            stop = min(start + batch_size, len(text))
            ids = torch.stack([text[i]["input_ids"] for i in range(start, stop)])
            recording.set()
            states = model.base_model(ids.to(device), use_cache=False).last_hidden_state
            recording.clear()
            # Each sample has its own seed, so labels do not depend on the batch size. Generators read 32 bits.
            seeds = [(seed * 1_000_003 + i) % 2**32 for i in range(start, stop)]
            gradients = [loss_gradients(model, state, own) for state, own in zip(states.detach(), seeds, strict=True)]
            states.backward(torch.stack(gradients))
    for readers, sums in statistics.items():
        if not all(bool(getattr(sums, f.name).isfinite().all()) for f in fields(sums)):
            raise Failure(
                f"layer {readers.layers[0]} has inputs or gradients that are not finite: the checkpoint is damaged"
            )
    return statistics


def loss_gradients(model: GPTNeoXForCausalLM, states: torch.Tensor, seed: int) -> torch.Tensor:
    """Gradients of a sample's summed loss by its last hidden states `[T, D]`. The labels are drawn from the model's own
    predictions. Only `HEAD_TOKENS` rows of logits are in memory at a time, each as long as the vocabulary.

    Raises:
        Failure: a prediction is not finite.
    """
    generator = torch.Generator(device=states.device).manual_seed(seed)
    gradients = []
    for chunk in states.detach().split(HEAD_TOKENS):
        logits = model.get_output_embeddings()(chunk.requires_grad_(True)).float()
        if not bool(logits.isfinite().all()):
            raise Failure(f"the model's predictions are not finite in {model.dtype}: the checkpoint is damaged")
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradients += torch.autograd.grad(loss, chunk)
    return torch.cat(gradients)


def _sandwich(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """The sum over samples of `outerᵀ (inner innerᵀ) outer`, `[X, X]`, of `[B, T, X]` and `[B, T, Y]`."""
    weighed = (inner @ inner.mT) @ outer
    return outer.flatten(0, 1).T @ weighed.flatten(0, 1)


@contextmanager
def observed(model: GPTNeoXForCausalLM, statistics: dict[Readers, LayerStatistics]) -> Iterator[Event]:
    """In the `with` block, a forward pass while the event is set, and its backward pass, add to `statistics`.

    Weights get no gradients, now or later. Clear the event before the backward pass, which runs each layer forward
    again.
    """
    heads = model.config.num_attention_heads
    recording = Event()
    inputs: dict[int, torch.Tensor] = {}  # of each layer, `[B, T, D]`
    gradients: dict[int, torch.Tensor] = {}  # of each layer's keys, then values, `[B, T, 2, D]`

    def joined(readers: Readers) -> torch.Tensor:
        return torch.cat([inputs[layer] for layer in readers.inputs], dim=-1)

    def watch(layer: int):
        readers = next((readers for readers in statistics if layer in readers.layers), None)

        def forward(module: nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
            if not recording.is_set():
                return
            states = arguments[0].detach()
            inputs[layer] = states.to(torch.promote_types(states.dtype, torch.float32))
            if readers is None:
                return
            output.register_hook(partial(backward, readers))
            if layer == readers.layers[-1]:
                sums, states = statistics[readers], joined(readers).flatten(0, 1)
                sums.tokens += states.shape[0]
                sums.input_sum += states.sum(0).double().cpu()
                sums.input_moment += (states.T @ states).double().cpu()

        def backward(readers: Readers, gradient: torch.Tensor) -> None:
            # [B, T, H * (query, key, value) * head size] -> [B, T, 2, D]
            parts = gradient.to(inputs[layer].dtype).unflatten(-1, (heads, 3, -1))
            gradients[layer] = parts[..., 1:, :].transpose(2, 3).flatten(3)
            if layer == readers.layers[0]:
                sums, states = statistics[readers], nn.functional.pad(joined(readers), (0, 1), value=1.0)
                rows = torch.cat([gradients.pop(i) for i in readers.layers], dim=-1).flatten(2)
                # dW is rowsᵀ states. Products between tokens give its moments without forming dW for each sample.
                sums.column_moment += _sandwich(states, rows).double().cpu()
                sums.row_moment += _sandwich(rows, states[..., :-1]).double().cpu()

        return forward

    handles = []
    try:
        model.eval().requires_grad_(False)
        recompute_activations(model)  # this also makes embeddings require gradients
        for layer in model.base_model.layers:
            layer.training = True  # Checkpointing requires it; the submodules, and so dropout, stay in eval mode.
        for layer in {layer for readers in statistics for layer in readers.inputs}:
            handles.append(model.gpt_neox.layers[layer].attention.query_key_value.register_forward_hook(watch(layer)))
        # With an early stop, a layer's last module would not finish, and its weights would stay in memory.
        with set_checkpoint_early_stop(False):
            yield recording
    finally:
        for handle in handles:
            handle.remove()
        recompute_activations(model.eval(), False)
        model.disable_input_require_grads()
