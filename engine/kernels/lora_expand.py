"""The second product of grouped LoRA: y += scale * s B^T, with s whole or in the parts that the shrink leaves.

Shapes as in `engine.kernels.grouped_lora`.
"""

from __future__ import annotations

import torch

from engine.kernels.checks import FLOATS, check_device, check_dtype, check_rows, check_shape
from engine.kernels.jit import Launch, by_layout, cdiv, jit, tl, uses_triton
from engine.kernels.lora_segments import (
    MAX_RANK,
    adapted,
    by_eights,
    check_factor,
    check_scales,
    check_segments,
    locate,
    rank_parts,
    tiling,
)


def lora_expand(
    y: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    """The second product alone: y += scale * s B^T, with s [T, >= R] of y's type or that of sums. y is modified.

    Raises ValueError for tensors that do not fit together.
    """
    run = lora_expand_triton if uses_triton(y) else lora_expand_reference
    run(y, s, b, ranks, scales, segment_start, segment_adapter)


def lora_expand_triton(
    y: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    """`lora_expand` by the kernel of this file."""
    index = (segment_start, segment_adapter)
    if b.shape[2] > MAX_RANK:
        check_expand(y, s, b, ranks, scales, *index)
        for part in rank_parts(b.shape[2]):
            lora_expand_triton(y, s[:, part], b[:, :, part], ranks - part.start, scales, *index)
        return
    expand = _alone(y, s, b, ranks, scales, *index)
    s = s[:, : b.shape[2]].contiguous()
    expand.on(y, b, s, s, ranks, scales, *index).run()


@by_layout
def _alone(
    y: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> Launch:
    check_expand(y, s, b, ranks, scales, segment_start, segment_adapter)
    check_dtype("y", y, FLOATS)
    return expand_launch(y, b, segment_adapter.shape[0], 1)


def expand_launch(y: torch.Tensor, b: torch.Tensor, segments: int, splits: int) -> Launch:
    """The expand of so many partial sums, without its tensors; their sum goes to s where there are several."""
    (tokens, wide_out), rank = y.shape, b.shape[2]
    programs, block_t, block_r, block_g = tiling(tokens, rank, segments)
    block_o = 128
    return Launch(
        _expand,
        (programs, cdiv(wide_out, block_o)),
        (segments, tokens, wide_out, rank, y.stride(0), *b.stride()),
        {"block_t": block_t, "block_r": block_r, "block_g": block_g, "block_o": block_o, "splits": splits},
        4,
        1,
    )


def check_expand(
    y: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    """Raise ValueError unless the tensors of the second product fit together."""
    check_shape("y", y, (None, None))
    check_shape("s", s, (y.shape[0], None))
    check_shape("b", b, (None, y.shape[1], None))
    if s.shape[1] < b.shape[2]:
        raise ValueError(f"s must have at least {b.shape[2]} columns, got {s.shape[1]}")
    check_rows("s", s)
    check_dtype("s", s, (y.dtype, torch.float32, torch.float64))
    check_device("s", s, y.device)
    check_factor("y", y, "b", b)
    check_scales(scales, b)
    check_segments(y, b, ranks, segment_start, segment_adapter)


@jit("segment_start", "segment_adapter", "segments", "tokens")
def _expand(
    y: tl.tensor,
    b: tl.tensor,
    parts: tl.tensor,
    s: tl.tensor,
    ranks: tl.tensor,
    scales: tl.tensor,
    segment_start: tl.tensor,
    segment_adapter: tl.tensor,
    segments: tl.tensor,
    tokens: tl.tensor,
    wide_out: tl.tensor,
    padded_rank: tl.tensor,
    stride_y: tl.tensor,
    stride_b: tl.tensor,
    stride_bo: tl.tensor,
    stride_br: tl.tensor,
    block_t: tl.constexpr,
    block_r: tl.constexpr,
    block_g: tl.constexpr,
    block_o: tl.constexpr,
    splits: tl.constexpr,
) -> None:
    """Grid (tiles, blocks of O): y[t, block] += scale * sum_c parts[c, t] @ B[block]^T."""
    segment, first, end = locate(segment_start, segments, tl.program_id(0), block_t, block_g)
    adapter = tl.load(segment_adapter + segment)
    if (first >= end) | (adapter < 0):
        return
    token = first + tl.arange(0, block_t)
    r = tl.arange(0, block_r)
    feature = tl.program_id(1) * block_o + tl.arange(0, block_o)
    has_token = (token < end)[:, None]
    has_feature = (feature < wide_out)[None, :]
    rank = tl.load(ranks + adapter)
    s_at = (token.to(tl.int64) * padded_rank)[:, None] + r[None, :]
    s_mask = has_token & (r < padded_rank)[None, :]
    if splits > 1:
        # Read at once, parts of one number by one thread. Added one after the other they would be read so as well:
        # the compiler takes each of them through shared memory by itself.
        part = tl.arange(0, splits).to(tl.int64) * padded_rank * tokens
        every = tl.load(parts + s_at[:, :, None] + part[None, None, :], mask=s_mask[:, :, None], other=0.0)
        s_tile = tl.sum(every, 2)
        if tl.program_id(1) == 0:
            tl.store(s + s_at, s_tile, mask=s_mask)
    else:
        s_tile = tl.load(parts + s_at, mask=s_mask, other=0.0)
    b_at = adapter.to(tl.int64) * stride_b + (feature * stride_bo)[None, :] + (r * stride_br)[:, None]
    near_rank = by_eights(r, rank, padded_rank)
    b_tile = tl.load(b + b_at, mask=near_rank[:, None] & has_feature, other=0.0)
    b_tile = tl.where((r < rank)[:, None], b_tile, 0.0)  # padding may be NaN
    update = tl.dot(s_tile.to(b_tile.dtype), b_tile, input_precision="ieee") * tl.load(scales + adapter)
    y_at = y + (token.to(tl.int64) * stride_y)[:, None] + feature[None, :]
    old = tl.load(y_at, mask=has_token & has_feature, other=0.0).to(tl.float32)
    tl.store(y_at, (old + update).to(y.dtype.element_ty), mask=has_token & has_feature)


def lora_expand_reference(
    y: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    """`lora_expand` in torch."""
    check_expand(y, s, b, ranks, scales, segment_start, segment_adapter)
    check_dtype("y", y, (*FLOATS, torch.float64))
    compute = torch.float64 if y.dtype == torch.float64 else torch.float32
    scale_of = scales.tolist()
    for own, n, r in adapted(ranks, segment_start, segment_adapter):
        update = s[own, :r].to(compute) @ b[n, :, :r].to(compute).T
        y[own] = (y[own].to(compute) + update * scale_of[n]).to(y.dtype)
