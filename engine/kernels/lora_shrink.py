"""The first product of grouped LoRA: s = x A^T.

The long contraction is split over programs, whose partial sums the expand adds when it reads them: a decode
token alone would leave the device idle, and no atomics are needed.

Shapes as in `engine.kernels.grouped_lora`.
"""

from __future__ import annotations

import math

import torch

from engine.kernels.checks import FLOATS, check_dtype, check_shape
from engine.kernels.jit import Launch, by_layout, cdiv, jit, multiprocessors, tl, uses_triton
from engine.kernels.lora_segments import (
    MAX_RANK,
    adapted,
    by_eights,
    check_factor,
    check_segments,
    locate,
    rank_parts,
    tiling,
)

MAX_SPLITS = 16
MAX_PARTS = 8192
"""Partial sums that a program of the expand reads at once: 64 registers of each of its 128 threads.
Eight times as many spilled 3 KB per thread (compiled for sm_90)."""


def lora_shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> torch.Tensor:
    """The first product of `grouped_lora` alone: s = x A^T [T, R] (float32; float64 for float64 on the CPU).

    Columns beyond an adapter's rank are 0; tokens without an adapter are undefined. Raises ValueError for
    tensors that do not fit together.
    """
    run = lora_shrink_triton if uses_triton(x) else lora_shrink_reference
    return run(x, a, ranks, segment_start, segment_adapter)


def lora_shrink_triton(
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> torch.Tensor:
    """`lora_shrink` by the kernel of this file."""
    index = (segment_start, segment_adapter)
    if a.shape[1] > MAX_RANK:
        check_shrink(x, a, ranks, *index)
        found = [
            lora_shrink_triton(x, a[:, part], ranks - part.start, *index) for part in rank_parts(a.shape[1])
        ]
        return torch.cat(found, dim=1)
    shrink, splits = _alone(x, a, ranks, *index)
    parts = torch.empty((splits, x.shape[0], a.shape[1]), dtype=torch.float32, device=x.device)
    shrink.on(x, a, parts, ranks, *index).run()
    return parts[0] if splits == 1 else parts.sum(0)


@by_layout
def _alone(
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> tuple[Launch, int]:
    check_shrink(x, a, ranks, segment_start, segment_adapter)
    check_dtype("x", x, FLOATS)
    return shrink_launch(x, a, segment_adapter.shape[0])


def shrink_launch(x: torch.Tensor, a: torch.Tensor, segments: int) -> tuple[Launch, int]:
    """The shrink without its tensors, and into how many sums it splits the contraction."""
    (tokens, wide_in), rank = x.shape, a.shape[1]
    programs, block_t, block_r, block_g = tiling(tokens, rank, segments)
    block_i = 128 if block_r <= 32 else 64
    splits = choose_splits(
        programs, 4 * multiprocessors(x.device), block_t * block_r, wide_in // (2 * block_i)
    )
    launch = Launch(
        _shrink,
        (programs, splits),
        (
            *(segments, tokens, wide_in, rank, x.stride(0), *a.stride()),
            cdiv(cdiv(wide_in, splits), block_i),
        ),
        {"block_t": block_t, "block_r": block_r, "block_g": block_g, "block_i": block_i},
        4,
        4,
    )
    return launch, splits


def choose_splits(programs: int, wanted_programs: int, tile: int, limit: int) -> int:
    """Power of two that brings the shrink to about `wanted_programs`, at most `limit`, and few enough
    that a program of the expand holds a tile from each of them."""
    splits = 1
    while (
        2 * splits <= min(limit, MAX_SPLITS)
        and 2 * splits * programs <= wanted_programs
        and 2 * splits * tile <= MAX_PARTS
    ):
        splits *= 2
    return splits


def check_shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    """Raise ValueError unless the tensors of the first product fit together."""
    check_shape("x", x, (None, None))
    check_shape("a", a, (None, None, x.shape[1]))
    check_factor("x", x, "a", a)
    check_segments(x, a, ranks, segment_start, segment_adapter)


@jit("segment_start", "segment_adapter", "segments", "tokens", "blocks")
def _shrink(
    x: tl.tensor,
    a: tl.tensor,
    parts: tl.tensor,
    ranks: tl.tensor,
    segment_start: tl.tensor,
    segment_adapter: tl.tensor,
    segments: tl.tensor,
    tokens: tl.tensor,
    wide_in: tl.tensor,
    padded_rank: tl.tensor,
    stride_x: tl.tensor,
    stride_a: tl.tensor,
    stride_ar: tl.tensor,
    stride_ai: tl.tensor,
    blocks: tl.tensor,
    block_t: tl.constexpr,
    block_r: tl.constexpr,
    block_g: tl.constexpr,
    block_i: tl.constexpr,
) -> None:
    """Grid (tiles, C): parts[c, t, :] = x[t, c-th part] @ A[:, c-th part]^T."""
    segment, first, end = locate(segment_start, segments, tl.program_id(0), block_t, block_g)
    adapter = tl.load(segment_adapter + segment)
    if (first >= end) | (adapter < 0):
        return
    part = tl.program_id(1)
    token = first + tl.arange(0, block_t)
    r = tl.arange(0, block_r)
    has_token = token < end
    rank = tl.load(ranks + adapter)
    near_rank = by_eights(r, rank, padded_rank)
    x_row = (token.to(tl.int64) * stride_x)[:, None]
    a_column = adapter.to(tl.int64) * stride_a + (r * stride_ar)[None, :]
    acc = tl.zeros((block_t, block_r), dtype=tl.float32)
    # A count of blocks, not of features: so it is known that rows are read from aligned addresses.
    for i in range(part * blocks * block_i, tl.minimum((part + 1) * blocks * block_i, wide_in), block_i):
        feature = i + tl.arange(0, block_i)
        has_feature = feature < wide_in
        x_tile = tl.load(
            x + x_row + feature[None, :], mask=has_token[:, None] & has_feature[None, :], other=0.0
        )
        # As the product takes it: of a tile that is transposed after it was read, a long one is not pipelined.
        a_tile = tl.load(
            a + (feature * stride_ai)[:, None] + a_column,
            mask=has_feature[:, None] & near_rank[None, :],
            other=0.0,
        )
        acc = tl.dot(x_tile, a_tile, acc, input_precision="ieee")
    acc = tl.where((r < rank)[None, :], acc, 0.0)  # of padding, which may be NaN
    row = (part * tokens + token).to(tl.int64) * padded_rank
    mask = has_token[:, None] & (r < padded_rank)[None, :]
    tl.store(parts + row[:, None] + r[None, :], acc, mask=mask)


def lora_shrink_reference(
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> torch.Tensor:
    """`lora_shrink` in torch; s is NaN where it is undefined."""
    check_shrink(x, a, ranks, segment_start, segment_adapter)
    check_dtype("x", x, (*FLOATS, torch.float64))
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = torch.full((x.shape[0], a.shape[1]), math.nan, dtype=compute, device=x.device)
    for own, n, r in adapted(ranks, segment_start, segment_adapter):
        s[own, :r] = x[own].to(compute) @ a[n, :r].to(compute).T
    return s
