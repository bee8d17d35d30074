"""What attention and its backward have in common: keys and values lie in pages, and splits share them.

Shapes as in `engine.kernels.paged_attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.kernels.jit import cdiv, jit, tl

LOG2_E = 1.4426950408889634
MAX_SPLITS = 32
MIN_SPLIT_KEYS = 256
"""Fewer keys than this are not worth a program and their share of what is joined."""


class Tile(NamedTuple):
    """Rows and keys of a program, its warps and pipeline depth."""

    rows: int
    keys: int
    warps: int
    stages: int


def choose_splits(programs: int, wanted_programs: int, max_keys: int) -> int:
    """Power of two that brings `programs` to about `wanted_programs`, none with too few keys."""
    limit = min(MAX_SPLITS, max_keys // MIN_SPLIT_KEYS)
    splits = 1
    while splits * 2 <= limit and programs * splits * 2 <= wanted_programs:
        splits *= 2
    return splits


@jit()
def share_of_keys(keys: tl.tensor, split: tl.tensor, splits: tl.tensor, block_n: tl.constexpr) -> tl.tensor:
    """(begin, end) of what a split reads of `keys`: whole tiles, but for the end of all keys."""
    share = tl.cdiv(tl.cdiv(keys, splits), block_n) * block_n
    begin = split * share
    return begin, tl.minimum(begin + share, keys)


@jit()
def load_keys(
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    table: tl.tensor,
    kv_head_offset: tl.tensor,
    key: tl.tensor,
    end: tl.tensor,
    stride_page: tl.tensor,
    stride_slot: tl.tensor,
    masked: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
) -> tl.tensor:
    """k and v [N, D] at the positions `key` [N] of one sequence; where `masked`, those from `end` on are 0."""
    dim = tl.arange(0, head_dim)
    if masked:
        inside = key < end
        page = tl.load(table + key // block_size, mask=inside, other=0)
    else:
        page = tl.load(table + key // block_size)
    slot = page.to(tl.int64) * stride_page + (key % block_size) * stride_slot + kv_head_offset
    where = slot[:, None] + dim[None, :]
    if masked:
        k = tl.load(k_pages + where, mask=inside[:, None], other=0.0)
        v = tl.load(v_pages + where, mask=inside[:, None], other=0.0)
    else:
        k = tl.load(k_pages + where)
        v = tl.load(v_pages + where)
    return k, v


def gather_pages(pages: torch.Tensor, table: torch.Tensor, tokens: int) -> torch.Tensor:
    """The first `tokens` keys or values of a table row, for the references: [tokens, K, D]."""
    blocks = table[: cdiv(tokens, pages.shape[1])].long()
    return pages[blocks].flatten(0, 1)[:tokens]
