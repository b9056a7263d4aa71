"""Options of a conversion, without torch, so that help answers at once; those of healing are in `recipe.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from context_pythia.config.options import Options, option
from context_pythia.config.recipe import PRECISIONS
from context_pythia.errors import UsageError

WEIGHTINGS = ("gradients", "inputs", "none")


@dataclass
class ConvertOptions(Options):
    """How a checkpoint's keys and values are compressed."""

    section: ClassVar[str] = "convert"
    context_dim: int | None = option(
        None,
        "numbers cached a token and layer, the layers' mean; the original caches 2 * hidden_size",
        bounds=">= 1",
        flag=True,
    )
    kv_reduction: float | None = option(
        None, "share of the cache that is saved, in place of context_dim; 0.5 is exact", bounds="> 0 and < 1", flag=True
    )
    context_layers: list[int] | None = option(
        None,
        "for each layer whose context it reads: its own index, or the entry before",
        flag=True,
        metavar="N,N",
    )
    layer_context_dims: list[int] | None = option(
        None,
        "width of each layer's context, in place of context_dim; ignored for a layer without its own context",
        flag=True,
        metavar="N,N",
    )
    cache_token_ids: bool = option(
        False, "cache token ids too, so that contexts need not tell which token it was", flag=True
    )
    calibration_tokens: int = option(32_768, "tokens of the training split to calibrate on", bounds=">= 1", flag=True)
    weighting: str = option(
        "gradients",
        "what errors are weighed by: gradients of the loss; for comparison inputs alone (principal components of keys "
        "and values) or none (singular values of the weights)",
        WEIGHTINGS,
        flag=True,
    )
    uniform: bool = option(False, "give all layers the same width", flag=True)
    batch_size: int | None = option(
        None, "samples a pass of the calibration (default: 4,096 tokens of them)", bounds=">= 1", free=True
    )
    dtype: str = option("float32", "dtype of the converted model; it is computed in float32", PRECISIONS, flag=True)
    seed: int = option(0, "seed of the calibration and of healing", bounds=">= 0 and < 4294967296", flag=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if [self.context_dim, self.kv_reduction, self.layer_context_dims].count(None) < 2:
            raise UsageError("convert: give only one of --context-dim, --kv-reduction and --layer-context-dims")
        if self.layer_context_dims and self.uniform:
            raise UsageError("convert: --layer-context-dims gives the widths, so drop --uniform")
        if self.weighting == "none" and not self.plain:
            raise UsageError("weighting none: knows of no text, which contexts of several layers and token ids need")

    @property
    def plain(self) -> bool:
        """Whether each layer reads a context of its own, and nothing else."""
        return self.context_layers is None and not self.cache_token_ids

    @property
    def asked(self) -> str:
        """The size that the user asked for, for errors; empty if none is given."""
        names = ("context_dim", "kv_reduction", "layer_context_dims")
        return next((f"{name} {value}" for name in names if (value := getattr(self, name)) is not None), "")

    def width(self, hidden_size: int) -> int:
        """The layers' mean context_dim for a model of this width, unless `layer_context_dims` are given."""
        if self.kv_reduction is None:
            assert self.context_dim is not None
            return self.context_dim
        return round((1 - self.kv_reduction) * 2 * hidden_size)
