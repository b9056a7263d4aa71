"""The ContextBlock's recurrence over a whole sequence as one differentiable function.

Plain autograd records about ten operations per token, and multiplies small matrices for the weights' gradients at each
token. Here a token costs four operations forward and four backward. The gradients of weights, biases and norms need no
order in time and are computed for all tokens at once.

Shapes: T tokens, B batch, C context_dim, N layers of the ContextBlock.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


class Recurrence(torch.autograd.Function):
    """`c_t = f_N(... f_1(b_t))`, or `c_t = b_t` for padding.

    Here `b_t = c_{t-1}`, or 0 where a new text begins, and `f_i(c) = LN_i(c + GELU(W_i c + p_{i,t}))`.

    Arguments of `apply`:
        projected: `p`, `[N, T, B, C]`.
        initial: context before the first token, `[B, C]`.
        keep: `[T, B, 1]`, false for padding, or None.
        carry: `[T, B or 1, 1]`, false where a new text begins, or None.
        eps: of the norms.
        parameters: `W_1` `[C, C]`, the first norm's weight and bias `[C]`, and so on: 3 N tensors.

    Returns:
        contexts `[T, B, C]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        initial: Tensor,
        keep: Tensor | None,
        carry: Tensor | None,
        eps: float,
        *parameters: Tensor,
    ) -> Tensor:
        weights, norms = parameters[::3], list(zip(parameters[1::3], parameters[2::3], strict=True))
        transposed = [weight.t().contiguous() for weight in weights]
        # The products W c + p, and the norms' inputs.
        products, residuals = torch.empty_like(projected), torch.empty_like(projected)
        contexts = torch.empty_like(projected[0])
        width, context = contexts.shape[-1:], initial
        for t, out in enumerate(contexts):
            context = previous = context if carry is None else context * carry[t]
            for i, (weight, bias) in enumerate(norms):
                product, residual = products[i, t], residuals[i, t]
                torch.addmm(projected[i, t], context, transposed[i], out=product)
                torch.add(context, aten.gelu(product), out=residual)
                context = aten.native_layer_norm(residual, width, weight, bias, eps)[0]
            context = out.copy_(context) if keep is None else torch.where(keep[t], context, previous, out=out)
        ctx.save_for_backward(products, residuals, contexts, initial, keep, carry, *parameters)
        ctx.eps = eps
        return contexts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        products, residuals, contexts, initial, keep, carry, *parameters = ctx.saved_tensors
        weights, norms = parameters[::3], list(zip(parameters[1::3], parameters[2::3], strict=True))
        width = contexts.shape[-1:]
        normed = [
            aten.native_layer_norm(residual, width, weight, bias, ctx.eps)
            for residual, (weight, bias) in zip(residuals, norms, strict=True)
        ]
        # Gradients of the norms' outputs, and of the products.
        of_outputs, of_products = torch.empty_like(residuals), torch.empty_like(products)
        flow = torch.zeros_like(initial)
        for t in reversed(range(len(contexts))):
            flow = flow + gradient[t]
            if keep is not None:
                past, flow = flow * ~keep[t], flow * keep[t]
            for i in reversed(range(len(norms))):
                of_outputs[i, t], of_product = flow, of_products[i, t]
                mean, rstd = (part[t] for part in normed[i][1:])
                flow = aten.native_layer_norm_backward(
                    flow, residuals[i, t], width, mean, rstd, *norms[i], [True, False, False]
                )[0]
                aten.gelu_backward.grad_input(flow, products[i, t], grad_input=of_product)
                flow = torch.addmm(flow, of_product, weights[i])
            if keep is not None:
                flow = flow + past
            if carry is not None:
                flow = flow * carry[t]
        previous = torch.cat([initial.unsqueeze(0), contexts[:-1]])
        before = [previous if carry is None else previous * carry] + [output for output, _, _ in normed[:-1]]
        of_parameters: list[Tensor | None] = []
        for i, (weight, bias) in enumerate(norms):
            first = 5 + 3 * i
            needs_weight, needs_norm = ctx.needs_input_grad[first], any(ctx.needs_input_grad[first + 1 : first + 3])
            of_parameters.append(of_products[i].flatten(0, 1).t() @ before[i].flatten(0, 1) if needs_weight else None)
            of_norm: Any = (None, None, None)
            if needs_norm:
                of_norm = aten.native_layer_norm_backward(
                    of_outputs[i], residuals[i], width, *normed[i][1:], weight, bias, [False, True, True]
                )
            of_parameters += of_norm[1:]
        return of_products, flow, None, None, None, *of_parameters
