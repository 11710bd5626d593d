"""Train through a kernel that has no backward pass: its gradients are those of exact attention.

Without this, a forward-only kernel hands out tensors that autograd knows nothing of: the loss still
falls, by the other weights, while q, k and v never learn.
Source: https://github.com/thu-ml/SageAttention/issues/198 (2026-11-21).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


class _ForwardOnly(torch.autograd.Function):  # type: ignore[misc]  # torch's types are not followed
    """Forward by one function, backward by another, recomputed from the saved q, k and v."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, exact: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.exact = exact
        ctx.save_for_backward(q, k, v)
        return kernel(q, k, v)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]  # as above
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        device = gradient.device.type
        # q, k and v have their precision already; autocast would change it a second time.
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            out = ctx.exact(*leaves)
        return None, None, *torch.autograd.grad(out, leaves, gradient.to(out.dtype))


def with_exact_backward(kernel: Kernel, exact: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run a forward-only kernel so that gradients reach q, k and v.

    Args:
        kernel: q, k, v to the output; autograd is off inside.
        exact: the same function, differentiable.
        q: queries, in the layout that both take.
        k: keys.
        v: values.

    Returns:
        The kernel's output.
    """
    out: Tensor = _ForwardOnly.apply(kernel, exact, q, k, v)
    return out
