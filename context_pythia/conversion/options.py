"""Options of a conversion and of healing; like `recipe.py` without torch, so that help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from context_pythia.options import Options, option
from context_pythia.recipe import PRECISIONS, SCHEDULES

HEALED_PARAMETERS = ("attention", "all")
WEIGHTINGS = ("gradients", "inputs", "none")


@dataclass
class ConvertOptions(Options):
    """How a checkpoint's keys and values are compressed."""

    section: ClassVar[str] = "convert"
    context_dim: int | None = option(
        None, "numbers cached a token and layer, the layers' mean; the original caches 2 * hidden_size", bounds=">= 1"
    )
    kv_reduction: float | None = option(
        None, "share of the cache that is saved, in place of context_dim; 0.5 is exact", bounds="> 0 and < 1"
    )
    calibration_tokens: int = option(32_768, "tokens of the training split to calibrate on", bounds=">= 1")
    weighting: str = option(
        "gradients",
        "what errors are weighed by: gradients of the loss; for comparison inputs alone (principal components of keys "
        "and values) or none (singular values of the weights)",
        WEIGHTINGS,
    )
    uniform: bool = option(False, "give all layers the same width")
    batch_size: int | None = option(
        None, "samples a pass of the calibration (default: 4,096 tokens of them)", bounds=">= 1", free=True
    )
    statistics_gb: float = option(
        8.0,
        "memory for statistics, at most half of what is free; more passes over the text if it is short",
        bounds="> 0",
        free=True,
    )
    dtype: str = option("float32", "of the converted model; it is computed in float32", PRECISIONS)
    seed: int = option(0, "seed of the calibration and of healing", bounds=">= 0 and < 4294967296")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.context_dim is None) == (self.kv_reduction is None):
            raise ValueError("convert: give either --context-dim N or --kv-reduction R")

    def width(self, hidden_size: int) -> int:
        """The layers' mean context_dim for a model of this width."""
        if self.kv_reduction is None:
            assert self.context_dim is not None
            return self.context_dim
        return round((1 - self.kv_reduction) * 2 * hidden_size)


@dataclass
class HealOptions(Options):
    """Training of a converted model to match its original."""

    section: ClassVar[str] = "heal"
    steps: int = option(0, "optimizer steps (0: no healing)", bounds=">= 0")
    parameters: str = option(
        "attention", "what is trained: attention (its projections, but for the output's) or all", HEALED_PARAMETERS
    )
    ce_weight: float = option(
        0.0,
        "weight of the cross-entropy with the text; the rest is the divergence from the original",
        bounds=">= 0 and <= 1",
    )
    batch_size: int = option(32, "samples a batch and device", bounds=">= 1")
    learning_rate: float = option(1e-4, "AdamW learning rate", bounds="> 0")
    schedule: str = option("cosine", "learning-rate schedule", SCHEDULES)
    warmup_ratio: float = option(0.05, "share of the steps in which the learning rate rises", bounds=">= 0 and <= 1")
    weight_decay: float = option(0.0, "AdamW weight decay", bounds=">= 0")
    max_grad_norm: float = option(1.0, "gradient norm limit, 0 for none", bounds=">= 0")
    gradient_accumulation: int = option(1, "batches a step", bounds=">= 1")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass", free=True)
    precision: str = option("float32", "float32, or autocast to bfloat16 or float16", PRECISIONS)
    checkpoint_steps: int = option(
        0, "also checkpoint every so many steps (0: once an epoch)", bounds=">= 0", free=True
    )
