"""What both products of grouped LoRA have in common: tokens in segments of one adapter, cut into tiles.

A program finds its segment on the device, as in `paged_attention`: the grid has T // tile + G programs, an
upper bound that needs no knowledge of the lengths, and the surplus leaves at once. Segments may be empty.

Shapes as in `engine.kernels.grouped_lora`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from engine.kernels.checks import (
    check_contiguous,
    check_device,
    check_dtype,
    check_index,
    check_rows,
    check_shape,
)
from engine.kernels.jit import jit, power_of_2_from, tl

MAX_RANK = 128
"""Of one launch; a larger rank takes several, each with its columns of A^T and B."""
LARGE_SEGMENT_TOKENS = 32
"""From this mean length on tiles have up to 64 tokens, else 16, the least that the matrix units take."""


class Tiling(NamedTuple):
    """Tiles of tokens: how many there may be, and the block sizes that follow from them."""

    programs: int
    block_t: int
    block_r: int
    block_g: int
    """Segments that a program looks through."""


def tiling(tokens: int, rank: int, segments: int) -> Tiling:
    """Of both kernels. ValueError for a padded rank that one launch does not take."""
    if rank > MAX_RANK:
        raise ValueError(f"the padded rank must be at most {MAX_RANK}, got {rank}")
    large = tokens >= LARGE_SEGMENT_TOKENS * segments
    block_r = max(16, power_of_2_from(rank))
    block_t = min(64, 2048 // block_r) if large else 16
    return Tiling(tokens // block_t + segments, block_t, block_r, max(256, power_of_2_from(segments)))


def rank_parts(rank: int) -> list[slice]:
    """Of the padded rank, one for each launch."""
    return [slice(first, min(first + MAX_RANK, rank)) for first in range(0, rank, MAX_RANK)]


@jit()
def locate(
    segment_start: tl.tensor,
    segments: tl.tensor,
    pid: tl.tensor,
    block_t: tl.constexpr,
    block_g: tl.constexpr,
) -> tl.tensor:
    """Segment of tile `pid` with its first token and its end: segment g owns the tiles from
    (start_g - start_0) // block_t + g."""
    index = tl.arange(0, block_g)
    origin = tl.load(segment_start)
    starts = tl.load(segment_start + index, mask=index < segments, other=0) - origin
    owned = (starts // block_t + index <= pid) & (index < segments)
    segment = tl.sum(owned.to(tl.int32), 0) - 1
    start = tl.load(segment_start + segment)
    first = start + (pid - ((start - origin) // block_t + segment)) * block_t
    return segment, first, tl.load(segment_start + segment + 1)


@jit()
def by_eights(r: tl.tensor, rank: tl.tensor, padded_rank: tl.tensor) -> tl.tensor:
    """Which of `r` are read: those below `rank`, and padding up to the next multiple of 8.

    Where ranks lie beside each other in memory, 8 of them are one access of 16 bytes; with a mask that may end
    between them each would be an access of its own.
    """
    return (r // 8 * 8 < rank) & (r < padded_rank)


def check_factor(name: str, wide: torch.Tensor, factor_name: str, factor: torch.Tensor) -> None:
    """Raise ValueError unless rows of `wide` are whole and `factor`, A or B, goes with it."""
    check_rows(name, wide)
    check_dtype(factor_name, factor, (wide.dtype,))
    if 1 not in factor.stride()[1:]:
        raise ValueError(f"{factor_name} must be contiguous along one side, got strides {factor.stride()}")
    check_device(factor_name, factor, wide.device)


def check_scales(scales: torch.Tensor, factor: torch.Tensor) -> None:
    """Raise ValueError unless `scales` are one for each adapter."""
    check_shape("scales", scales, (factor.shape[0],))
    check_dtype("scales", scales, (torch.float32,))
    check_contiguous("scales", scales)
    check_device("scales", scales, factor.device)


def check_segments(
    wide: torch.Tensor,
    factor: torch.Tensor,
    ranks: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    """Raise ValueError unless ranks and segments fit together and lie beside `wide`."""
    check_index("ranks", ranks, (factor.shape[0],))
    check_index("segment_adapter", segment_adapter, (None,))
    if segment_adapter.shape[0] == 0:
        raise ValueError("segment_adapter must have at least one segment, got none")
    check_index("segment_start", segment_start, (segment_adapter.shape[0] + 1,))
    for name, tensor in (
        ("ranks", ranks),
        ("segment_start", segment_start),
        ("segment_adapter", segment_adapter),
    ):
        check_device(name, tensor, wide.device)


def adapted(
    ranks: torch.Tensor, segment_start: torch.Tensor, segment_adapter: torch.Tensor
) -> Iterator[tuple[slice, int, int]]:
    """Tokens, adapter and rank of each segment with an adapter, for the references."""
    starts, rank_of = segment_start.tolist(), ranks.tolist()
    for (first, end), n in zip(pairwise(starts), segment_adapter.tolist(), strict=True):
        if n >= 0 and first < end and rank_of[n]:
            yield slice(first, end), n, rank_of[n]
