"""Rotary embedding of the heads of a packed batch, in one pass.

Queries and keys are strided views of one fused projection. Liger's kernel rotates in place and wants q and k
contiguous by themselves, so it would copy both first, and it compiles anew for batches of 1, 16 k and other
lengths; torch's own operations pass over float32 copies seven times. Here each number is read once and
written once. `engine.elementwise.rotate` is the reference, and chooses.

Shapes: T packed tokens, H heads, D head size.
"""

from __future__ import annotations

import torch

from engine.kernels.checks import FLOATS, check_contiguous, check_device, check_dtype, check_rows, check_shape
from engine.kernels.jit import Launch, by_layout, jit, power_of_2_from, tl


def rotate_triton(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`engine.elementwise.rotate` by the kernel of this file; a result of its own is contiguous."""
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rotate_launch(x, cos, sin, out).run()
    return out


def rotate_launch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> Launch:
    """One program per token. x, out [T, H, D] with contiguous rows; cos, sin [T, 1, D / 2] float32.

    Raises ValueError for tensors that do not fit together.
    """
    return _launch(x, cos, sin, out).on(x, cos, sin, out)


@by_layout
def _launch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> Launch:
    check_shape("x", x, (None, None, None))
    check_shape("out", out, tuple(x.shape))
    for name, tensor in (("x", x), ("out", out)):
        check_dtype(name, tensor, FLOATS)
        check_rows(name, tensor)
    check_device("out", out, x.device)
    tokens, heads, head_dim = x.shape
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, got {head_dim}")
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_shape(name, tensor, (tokens, 1, head_dim // 2))
        check_dtype(name, tensor, (torch.float32,))
        check_device(name, tensor, x.device)
        check_contiguous(name, tensor)
    size = heads * head_dim // 2
    return Launch(
        _rotate,
        (tokens,),
        (x.stride(0), out.stride(0)),
        {"half": head_dim // 2, "size": size, "block": power_of_2_from(size)},
        4,
        1,
    )


@jit()
def _rotate(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    stride_x: tl.tensor,
    stride_out: tl.tensor,
    half: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Grid (T,): the first half of each head against its second."""
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, block)
    mask = index < size
    column = index // half * (2 * half) + index % half
    angle = token * half + index % half
    c = tl.load(cos + angle, mask=mask, other=0.0)
    s = tl.load(sin + angle, mask=mask, other=0.0)
    source = x + token * stride_x + column
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    target = out + token * stride_out + column
    kind = out.dtype.element_ty
    tl.store(target, (first * c - second * s).to(kind), mask=mask)
    tl.store(target + half, (second * c + first * s).to(kind), mask=mask)
