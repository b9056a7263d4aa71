"""One optimizer step of a language model, and its validation: AdamW, a schedule, clipped gradients, mixed precision.

Shapes: B samples of a batch, S tokens of a sample, N = B * S, D hidden size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, get_scheduler

from context_pythia import processes
from context_pythia.config.recipe import OptimizationOptions
from context_pythia.training.allocator import KEEP_FREED, set_malloc
from context_pythia.training.batches import Batch
from context_pythia.training.loss import IGNORED, linear_cross_entropy, token_scores

# For short samples on a CPU, plain attention is faster than the backward pass of PyTorch's fused attention. At 128
# tokens in bfloat16 a step of Pythia-70M took 0.93 times as long with plain attention, and a model of a quarter of its
# width 0.8 times, at 256 tokens too. For longer samples the attention weights take too much memory.
EAGER_ATTENTION_LENGTH = 256
STATEFUL = ("model", "optimizer", "schedule")  # the parts of `Optimization` in a checkpoint


def hidden_states(model: nn.Module, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The last hidden states `[N, D]` of `input_ids` `[B, S]`, and the head's weight `[V, D]`.

    It calls the whole model, not its body, because DDP wraps the whole model. The model computes the logits of only one
    token.
    """
    outputs = model(input_ids=input_ids, output_hidden_states=True, logits_to_keep=1, use_cache=False)
    return outputs.hidden_states[-1].flatten(0, 1), unwrapped(model).get_output_embeddings().weight


def unwrapped(model: nn.Module) -> Any:
    """The model without DDP around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the cross-entropy over the batch's tokens, in nats."""
    hidden, head = hidden_states(model, batch["input_ids"])
    return linear_cross_entropy(hidden, head, batch["labels"].flatten())


class Optimization:
    """A model with its optimizer, in one process or one of several. A step is `backward`, then `update`.

    Args:
        steps: optimizer steps of the whole training, for the schedule.
        loss: takes a model and a batch, returns the sum of the loss over the batch's tokens, a scalar.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: OptimizationOptions,
        steps: int,
        loss: Callable[[nn.Module, Batch], Tensor] = text_loss,
    ):
        self.model, self.options, self.loss, self.device = model, options, loss, model.device
        self.parallel: Any = model
        if processes.count() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(model, device_ids=devices)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Vectors (biases and norms) do not decay.
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)
        warmup = math.ceil(steps * options.warmup_ratio)
        self.schedule = get_scheduler(options.schedule, self.optimizer, warmup, steps)

    def backward(self, batches: list[Batch]) -> Tensor:
        """Compute the gradients of the mean loss over all tokens of the step, in all processes; returns it in fp64."""
        self.parallel.train()
        tokens = processes.total(torch.stack([batch["labels"].ne(IGNORED).sum() for batch in batches]).sum())
        mean: Any = 0.0
        for number, batch in enumerate(batches, 1):
            # DDP exchanges the sums of gradients at a step's last batch.
            alone = number < len(batches) and isinstance(self.parallel, DistributedDataParallel)
            with self.parallel.no_sync() if alone else contextlib.nullcontext():
                with self.autocast():
                    loss = self.loss(self.parallel, batch) / tokens
                # DDP averages over the processes, but the loss is a sum over them.
                (loss * processes.count()).backward()
            mean = loss.detach().double() + mean
        return processes.total(mean)

    def update(self) -> None:
        """Clip the gradients, then step."""
        if self.options.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.model.zero_grad()

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> Tensor:
        """Sums of losses, correct predictions and tokens at each position, over all processes; `[3, S]` on the CPU."""
        self.parallel.eval()
        totals: Any = 0.0
        for batch in batches:
            labels = batch["labels"]
            with self.autocast():
                hidden, head = hidden_states(self.parallel, batch["input_ids"])
                losses, correct = token_scores(hidden, head, labels.flatten())
            scores = (losses.view_as(labels), correct.view_as(labels), labels.ne(IGNORED))
            totals = torch.stack([values.double().sum(0) for values in scores]) + totals
        return processes.total(totals).cpu()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16")

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from. Processes start from one seed, so one random state serves all."""
        random_states = {"cpu": [torch.get_rng_state()]}
        if self.device.type == "cuda":
            random_states["cuda"] = [torch.cuda.get_rng_state()]
        return {name: getattr(self, name).state_dict() for name in STATEFUL} | {"random_states": random_states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random_states"]["cpu"][0])
        if self.device.type == "cuda" and "cuda" in state["random_states"]:
            torch.cuda.set_rng_state(state["random_states"]["cuda"][0])


@contextlib.contextmanager
def training_mode(model: PreTrainedModel, options: OptimizationOptions, length: int) -> Iterator[None]:
    """A context in which the model trains on samples of `length` tokens.

    On a CPU, the process keeps freed memory from then on, and a model with the default attention uses the faster one.
    """
    own, on_cpu = model.config._attn_implementation, model.device.type == "cpu"
    if on_cpu:
        set_malloc(KEEP_FREED)
    if on_cpu and own == "sdpa" and length <= EAGER_ATTENTION_LENGTH:
        model.set_attn_implementation("eager")
    if options.gradient_checkpointing:
        recompute_activations(model)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
        if options.gradient_checkpointing:
            recompute_activations(model, False)


def recompute_activations(model: PreTrainedModel, wanted: bool = True) -> None:
    """Switch the recomputation of activations in the backward pass on or off; transformers renamed its methods."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_{'enable' if wanted else 'disable'}")()
