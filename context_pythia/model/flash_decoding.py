"""Attention of few queries to one long sequence by all threads of a CPU.

In scaled_dot_product_attention each thread of the kernel works on one sequence, head and block of queries. Absorbed
decoding has one head and one block, so with fewer sequences than threads some threads are idle. Here a sequence is cut
into parts, which the kernel treats as separate sequences; each part's result is then weighted by its share of the
softmax (flash decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).

Shapes: B batch, Q queries (of all heads), T keys, W width, S parts.
"""

import torch

# Least tokens per part: merging shorter parts costs more than it saves.
LEAST_TOKENS = 512


@torch.compiler.assume_constant_result
def _threads() -> int:
    # torch.compile cannot trace the call itself.
    return torch.get_num_threads()


def splits_for(query: torch.Tensor, context: torch.Tensor, implementation: str | None) -> int:
    """Number of parts of `context` `[B, 1, T, W]` for queries `[B, 1, Q, W]`; 1 if the plain kernel is as fast."""
    if implementation != "sdpa" or query.device.type != "cpu" or torch.is_grad_enabled():
        return 1
    idle = _threads() // query.shape[0]
    return max(1, min(idle, context.shape[2] // LEAST_TOKENS))


def attend_in_splits(
    query: torch.Tensor, context: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float, splits: int
) -> torch.Tensor:
    """`scaled_dot_product_attention(query, context, context)`, as transformers returns it.

    Args:
        query: `[B, 1, Q, W]`.
        context: `[B, 1, T, W]`, keys and values at once.
        attention_mask: `[B, 1, 1 or Q, T]`, booleans or numbers to add.

    Returns:
        `[B, Q, 1, W]`.
    """
    if attention_mask is not None:
        least = torch.finfo(query.dtype).min
        if attention_mask.dtype == torch.bool:
            attention_mask = torch.where(attention_mask, query.new_zeros(()), least)
        # A part masked by -inf has a sum of 0; the kernel gives 0 as its logarithm.
        attention_mask = attention_mask.clamp(min=least)
        attention_mask = attention_mask.expand(query.shape[0], 1, query.shape[2], -1)
    cut = context.shape[2] // splits * splits
    parts = [_parts(query, context, attention_mask, scaling, slice(0, cut), splits)]
    if cut < context.shape[2]:
        parts.append(_parts(query, context, attention_mask, scaling, slice(cut, None), 1))
    outputs, totals = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    shares = totals.softmax(dim=1).unsqueeze(-1).to(outputs.dtype)
    return (outputs * shares).sum(dim=1).unsqueeze(2)


def _parts(
    query: torch.Tensor,
    context: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    tokens: slice,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each part's output `[B, S, Q, W]` and the logarithm of its scores' sum, `[B, S, Q]`, with the parts as heads."""
    keys = context[:, 0, tokens].unflatten(1, (splits, -1))
    if attention_mask is not None:
        attention_mask = attention_mask[:, 0, :, tokens].unflatten(2, (splits, -1)).transpose(1, 2)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.expand(-1, splits, -1, -1), keys, keys, attn_mask=attention_mask, scale=scaling
    )
