"""Dropout whose mask is a function of where a number lies, so that nothing of it is kept between passes.

Every number of a row has 32 bits drawn by hashing a key, the row's position and the column; it is dropped where
they are less than `rate` of 2^32, and else divided by 1 - rate:

    bits = mix(mix(key + G position) + H column)        out = x [bits >= 2^32 rate] / (1 - rate)

mix is the finalizer of MurmurHash3 (Appleby, public domain), in which every bit of the input reaches every bit of
the result; G and H are odd. However rows are cut into windows, and whichever pass asks, a number's fate is the same.
torch's own dropout draws by the order of calls, and would need its masks kept.

Shapes: N rows, I columns.
"""

from __future__ import annotations

import torch

from engine.kernels.checks import FLOATS, check_dtype, check_out, check_rows, check_shape
from engine.kernels.jit import Launch, by_layout, cdiv, jit, tl, uses_triton

BLOCK = 1024
MASK = 0xFFFFFFFF
G, H = 0x9E3779B1, 0x85EBCA77


def dropout(x: torch.Tensor, rate: float, key: int, position: int, column: int = 0) -> torch.Tensor:
    """x [N, I] with numbers dropped, contiguous; its first row lies at `position`, its first column at `column`.

    `key` has 32 bits. ValueError where kernels read no such x.
    """
    if uses_triton(x):
        return dropout_triton(x, rate, key, position, column)
    rows = torch.arange(position, position + x.shape[0], device=x.device)
    columns = torch.arange(column, column + x.shape[1], device=x.device)
    bits = _mixed(_mixed(key + G * rows)[:, None] + H * columns)
    return torch.where(bits >= _dropped(rate), x / (1.0 - rate), 0.0)


def dropout_triton(x: torch.Tensor, rate: float, key: int, position: int, column: int = 0) -> torch.Tensor:
    """`dropout` by the kernel of this file."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dropout_launch(x, out, rate, key, position, column).run()
    return out


def dropout_launch(
    x: torch.Tensor, out: torch.Tensor, rate: float, key: int, position: int, column: int = 0
) -> Launch:
    """Programs of BLOCK columns. x [N, I] with contiguous rows; out [N, I] contiguous. ValueError if they do not
    fit."""
    # One kind of number for the kernel, whose keys are otherwise of 32 bits or more.
    signed = key - (key >> 31 << 32)
    return _launch(x, out, rate).on(x, out, signed, position, column)


@by_layout
def _launch(x: torch.Tensor, out: torch.Tensor, rate: float) -> Launch:
    check_shape("x", x, (None, None))
    check_dtype("x", x, FLOATS)
    check_rows("x", x)
    check_out("out", out, tuple(x.shape), x)
    rows, width = x.shape
    return Launch(
        _dropout,
        (rows, cdiv(width, BLOCK)),
        (x.stride(0),),
        {"width": width, "dropped": _dropped(rate), "scale": 1.0 / (1.0 - rate), "block": BLOCK},
        4,
        1,
    )


@jit()
def _mix(number: tl.tensor) -> tl.tensor:
    """`mixed`, of uint32."""
    number = (number ^ (number >> 16)) * 0x85EBCA6B
    number = (number ^ (number >> 13)) * 0xC2B2AE35
    return number ^ (number >> 16)


@jit("key", "position", "column")
def _dropout(
    x: tl.tensor,
    out: tl.tensor,
    key: tl.tensor,
    position: tl.tensor,
    column: tl.tensor,
    stride_x: tl.tensor,
    width: tl.constexpr,
    dropped: tl.constexpr,
    scale: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Grid (N, blocks of I)."""
    row = tl.program_id(0)
    index = tl.program_id(1) * block + tl.arange(0, block)
    mask = index < width
    # Of equal numbers, one for each column: hashes are of vectors.
    at = (position + row + 0 * index).to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32)
    bits = _mix(_mix(at) + (column + index).to(tl.uint32) * 0x85EBCA77)
    wide = row.to(tl.int64)
    number = tl.load(x + wide * stride_x + index, mask=mask, other=0.0).to(tl.float32)
    kept = tl.where(bits >= dropped, number * scale, 0.0)
    tl.store(out + wide * width + index, kept.to(out.dtype.element_ty), mask=mask)


def _dropped(rate: float) -> int:
    """Of the 2^32 values of bits, those that drop a number."""
    return round(rate * 2**32)


def mixed(number: int) -> int:
    """The hash of the 32 lowest bits of a number."""
    number &= MASK
    number = ((number ^ (number >> 16)) * 0x85EBCA6B) & MASK
    number = ((number ^ (number >> 13)) * 0xC2B2AE35) & MASK
    return number ^ (number >> 16)


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """`mixed` of int64 numbers, whose products keep their lowest bits when they overflow."""
    numbers = numbers & MASK
    numbers = ((numbers ^ (numbers >> 16)) * 0x85EBCA6B) & MASK
    numbers = ((numbers ^ (numbers >> 13)) * 0xC2B2AE35) & MASK
    return numbers ^ (numbers >> 16)
