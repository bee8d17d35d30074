"""Backward of SwiGLU in one pass, its two gradients side by side for the product that follows.

What a window keeps of gate and up may be two tensors or the halves of one. Liger's kernel for two tensors
overwrites them, which a window may still need, and leaves the gradients apart; its kernel for one wants that
one. `engine.elementwise.swiglu_backward` is the reference, and chooses.

Shapes: T tokens, F MLP.
"""

from __future__ import annotations

import torch

from engine.kernels.checks import FLOATS, check_device, check_dtype, check_out, check_rows, check_shape
from engine.kernels.jit import Launch, by_layout, cdiv, jit, tl

BLOCK = 1024


def swiglu_backward_triton(d_active: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`engine.elementwise.swiglu_backward` by the kernel of this file."""
    tokens, width = gate.shape
    out = torch.empty((tokens, 2 * width), dtype=gate.dtype, device=gate.device)
    swiglu_backward_launch(d_active, gate, up, out).run()
    return out


def swiglu_backward_launch(
    d_active: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor
) -> Launch:
    """Programs of BLOCK features. d_active, gate, up [T, F]; out [T, 2 F] contiguous. ValueError if they do
    not fit."""
    return _launch(d_active, gate, up, out).on(d_active, gate, up, out)


@by_layout
def _launch(d_active: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> Launch:
    check_shape("gate", gate, (None, None))
    for name, tensor in (("gate", gate), ("up", up), ("d_active", d_active)):
        check_shape(name, tensor, tuple(gate.shape))
        check_dtype(name, tensor, FLOATS)
        check_device(name, tensor, gate.device)
        check_rows(name, tensor)
    tokens, width = gate.shape
    check_out("out", out, (tokens, 2 * width), gate)
    return Launch(
        _swiglu_backward,
        (tokens, cdiv(width, BLOCK)),
        (d_active.stride(0), gate.stride(0), up.stride(0)),
        {"width": width, "block": BLOCK},
        4,
        1,
    )


@jit()
def _swiglu_backward(
    d_active: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    stride_d: tl.tensor,
    stride_gate: tl.tensor,
    stride_up: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Grid (T, blocks of F): with s the sigmoid of gate, d up s (1 + gate (1 - s)) and d gate s."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * block + tl.arange(0, block)
    mask = index < width
    d = tl.load(d_active + row * stride_d + index, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * stride_gate + index, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + index, mask=mask, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    target = out + row * (2 * width) + index
    kind = out.dtype.element_ty
    tl.store(target, (d * u * s * (1.0 + g * (1.0 - s))).to(kind), mask=mask)
    tl.store(target + width, (d * g * s).to(kind), mask=mask)
