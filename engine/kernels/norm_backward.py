"""Backward of RMSNorm with a frozen weight, from its input alone, in one pass.

A window keeps no 1 / rms of its rows: it follows from x, which the gradient needs anyway. Liger's backward
wants it given, so its forward would have to run once more, and it compiles anew when the number of rows is 1,
16 k or another: pauses while serving. `engine.elementwise.rms_norm_backward` is the reference, and chooses.

Shapes: T tokens, E hidden size.
"""

from __future__ import annotations

import torch

from engine.kernels.checks import (
    FLOATS,
    check_contiguous,
    check_device,
    check_dtype,
    check_out,
    check_rows,
    check_shape,
)
from engine.kernels.jit import Launch, by_layout, jit, power_of_2_from, tl


def rms_norm_backward_triton(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """`engine.elementwise.rms_norm_backward` by the kernel of this file."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    norm_backward_launch(dy, x, weight, dx, eps).run()
    return dx


def norm_backward_launch(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, dx: torch.Tensor, eps: float
) -> Launch:
    """One program per row. dy, x, dx [T, E], dx contiguous; weight [E]. ValueError if they do not fit."""
    return _launch(dy, x, weight, dx, float(eps)).on(dy, x, weight, dx)


@by_layout
def _launch(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, dx: torch.Tensor, eps: float) -> Launch:
    check_shape("x", x, (None, None))
    check_shape("dy", dy, tuple(x.shape))
    check_shape("weight", weight, (x.shape[1],))
    for name, tensor in (("x", x), ("dy", dy), ("weight", weight)):
        check_dtype(name, tensor, FLOATS)
        check_device(name, tensor, x.device)
    check_contiguous("weight", weight)
    check_rows("x", x)
    check_rows("dy", dy)
    check_out("dx", dx, tuple(x.shape), x)
    tokens, width = x.shape
    block = power_of_2_from(width)
    return Launch(
        _norm_backward,
        (tokens,),
        (eps, dy.stride(0), x.stride(0)),
        {"width": width, "block": block},
        4 if block < 2048 else 8 if block < 8192 else 16,
        1,
    )


@jit()
def _norm_backward(
    dy: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    dx: tl.tensor,
    eps: tl.tensor,
    stride_dy: tl.tensor,
    stride_x: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Grid (T,): dx = r (g - n mean(g n)) with r = 1 / sqrt(mean x^2 + eps), n = x r, g = dy weight."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, block)
    mask = index < width
    x_row = tl.load(x + row * stride_x + index, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dy + row * stride_dy + index, mask=mask, other=0.0).to(tl.float32)
    g *= tl.load(weight + index, mask=mask, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x_row * x_row, 0) / width + eps)
    n = x_row * r
    result = r * (g - n * (tl.sum(g * n, 0) / width))
    tl.store(dx + row * width + index, result.to(dx.dtype.element_ty), mask=mask)
