"""Tensor parallelism: which part of a model a rank holds, and the collectives that add the parts up.

As Megatron has it (Shoeybi et al. 2019): heads, the MLP's inner features and the vocabulary are split, the
residual stream is whole on every rank. Each block therefore sums twice forward, after `o_proj` and
`down_proj`, and twice backward, where the gradient leaves the inputs of query, key and value and of gate and
up. Key and value heads that are fewer than ranks are repeated, as `sim.cost.memory` charges.

A group of one rank does nothing, so that a replica on one device is the same code without collectives.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from sim.compile.roles import ROW_PARALLEL
from sim.core.specs import ModelShape


class PeerLost(ConnectionError):
    """Another rank is gone: what it was needed for cannot be done."""


class Group:
    """The ranks of one replica, seen from one of them."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        assert 0 <= rank < size
        self.rank = rank
        self.size = size

    def share(self, length: int, parts: int | None = None) -> slice:
        """This rank's part of `length` in `parts` (one for each rank), which differ by at most one. Where
        parts are fewer than ranks, neighbours hold the same."""
        parts = self.size if parts is None else parts
        part = self.rank * parts // self.size
        return slice(length * part // parts, length * (part + 1) // parts)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over the ranks, in place."""
        if self.size > 1:
            try:
                dist.all_reduce(x)
            except RuntimeError as error:
                raise PeerLost(str(error)) from error
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's x, in place."""
        if self.size > 1:
            try:
                dist.broadcast(x, 0)
            except RuntimeError as error:
                raise PeerLost(str(error)) from error
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The x of all ranks, which have one shape: [size, *x.shape]."""
        if self.size == 1:
            return x[None]
        every = x.new_empty((self.size, *x.shape))
        try:
            dist.all_gather(list(every.unbind()), x.contiguous())
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        return every

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum over the ranks of x [size, ...]."""
        own = x.new_empty(x.shape[1:])
        try:
            dist.reduce_scatter(own, list(x.contiguous().unbind()))
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        return own

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """What every rank has for this one of its x [size, ...], in their order."""
        every = torch.empty_like(x, memory_format=torch.contiguous_format)
        try:
            dist.all_to_all_single(every, x.contiguous())
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        return every


ALONE = Group()
"""A replica on one device."""


def share_of(shape: ModelShape, tp: int) -> ModelShape:
    """Heads and inner features of one rank; the rest is whole. ValueError when `tp` does not divide them."""
    shape.check_tp(tp)
    kv_heads = max(1, shape.kv_heads // tp)
    return replace(shape, heads=shape.heads // tp, kv_heads=kv_heads, ffn=shape.ffn // tp, tp=tp)


def parts_of(target: str, shape: ModelShape, tp: int) -> int:
    """In how many parts linear layer `target` lies on `tp` ranks: fewer than these, where key and value
    heads are."""
    return min(tp, shape.kv_heads) if target in ("k_proj", "v_proj") else tp


def splits_input(target: str) -> bool:
    """Whether linear layer `target` is split by its input (row-parallel), and not by its output."""
    return target in ROW_PARALLEL


def gather_columns(group: Group, x: torch.Tensor, columns: int) -> torch.Tensor:
    """All `columns` of a matrix [N, *] of which every rank has its share."""
    if group.size == 1:
        return x
    ranks = [Group(rank, group.size).share(columns) for rank in range(group.size)]
    width = -(-columns // group.size)
    padded = x if x.shape[1] == width else torch.nn.functional.pad(x, (0, width - x.shape[1]))
    every = group.all_gather(padded)
    return torch.cat([part[:, : s.stop - s.start] for part, s in zip(every, ranks, strict=True)], dim=1)
