"""Paged K/V accounting in counts: how many blocks are free, and how many the next decode takes.

All decoding sequences grow by one token at every decode tick. A sequence that had `c` tokens cached
at tick `t` needs a new block at tick `j` exactly when (c + j - 1 - t) is a multiple of the block size,
that is for one residue of `c - t`. So a histogram over residues answers in O(1) what would be a walk
over the running sequences.
"""

from __future__ import annotations


class KvBlocks:
    """Free blocks of one pipeline; the only place where they are counted."""

    def __init__(self, kv_tokens: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.total = kv_tokens // block_tokens
        self.free = self.total
        self._decoding_by_residue = [0] * block_tokens

    @property
    def used(self) -> int:
        return self.total - self.free

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` cached tokens."""
        return -(-tokens // self.block_tokens)

    def growth(self, tick: int) -> int:
        """Blocks taken by all decoding sequences at decode tick `tick`."""
        return self._decoding_by_residue[(1 - tick) % self.block_tokens]

    def join(self, cached_tokens: int, tick: int) -> None:
        """A sequence starts to decode after `tick`, with so many tokens cached."""
        self._decoding_by_residue[(cached_tokens - tick) % self.block_tokens] += 1

    def leave(self, cached_tokens: int, joined_tick: int) -> None:
        """Undo `join`; the arguments are those it was called with."""
        self._decoding_by_residue[(cached_tokens - joined_tick) % self.block_tokens] -= 1
