"""Token ids in a cache of floating-point numbers.

An id is cached as its digits in base 256: every floating-point type has these numbers exactly, so the context stays one
tensor, which caches crop, reorder, offload and copy like any other.

Shapes: B batch, T tokens, N digits.
"""

import torch


def to_digits(ids: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Ids `[B, T]` -> `[B, T, N]`, the last digit first."""
    return torch.stack([(ids >> (8 * i)) & 255 for i in range(count)], dim=-1).to(dtype)


def from_digits(digits: torch.Tensor) -> torch.Tensor:
    """`[B, T, N]` -> ids `[B, T]`."""
    columns = digits.long().unbind(-1)
    return torch.stack([column << (8 * i) for i, column in enumerate(columns)]).sum(dim=0)
