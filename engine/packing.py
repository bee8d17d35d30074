"""One packed batch from what an iteration computes: plain arrays on the host, one copy to the device.

Everything that a batch says in whole numbers goes into one buffer and is uploaded at once: a copy of its own
for each small array costs more than the copying.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int32]


class Piece(NamedTuple):
    """Consecutive tokens of one sequence or sample."""

    tokens: Ints
    context: int
    blocks: Ints
    """Its row of a block table, at least as far as this piece reaches."""
    adapter: int
    """Slot in the bank; -1 is the base model."""


class Packed(NamedTuple):
    """A batch as host arrays; names as in `engine.model.Batch`."""

    tokens: Ints
    positions: Ints
    slots: Ints
    block_tables: Ints
    query_start: Ints
    context_lens: Ints
    segment_start: Ints
    segment_adapter: Ints
    max_keys: int


def pack(pieces: Sequence[Piece], block_tokens: int) -> Packed:
    """Lay the pieces one after the other."""
    lengths = np.array([len(p.tokens) for p in pieces], np.int32)
    contexts = np.array([p.context for p in pieces], np.int32)
    start = np.zeros(len(pieces) + 1, np.int32)
    np.cumsum(lengths, out=start[1:])
    owner = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    positions = np.arange(start[-1], dtype=np.int32) - start[:-1][owner] + contexts[owner]
    max_keys = int((contexts + lengths).max())
    width = -(-max_keys // block_tokens)
    tables = np.zeros((len(pieces), width), np.int32)
    for row, piece in zip(tables, pieces, strict=True):
        used = -(-(piece.context + len(piece.tokens)) // block_tokens)
        row[:used] = piece.blocks[:used]
    slots = tables[owner, positions // block_tokens] * block_tokens + positions % block_tokens
    segment_start, segment_adapter = segments_of(np.array([p.adapter for p in pieces], np.int32), start)
    return Packed(
        tokens=np.concatenate([p.tokens for p in pieces]).astype(np.int32, copy=False),
        positions=positions,
        slots=slots.astype(np.int32, copy=False),
        block_tables=tables,
        query_start=start,
        context_lens=contexts,
        segment_start=segment_start,
        segment_adapter=segment_adapter,
        max_keys=max_keys,
    )


def segments_of(adapters: Ints, start: Ints) -> tuple[Ints, Ints]:
    """Neighbouring pieces with the same adapter as one segment: starts [G + 1] and adapters [G].

    `adapters` [n] of the pieces, whose tokens begin at `start` [n + 1].
    """
    first = np.flatnonzero(np.diff(adapters, prepend=-2))
    return np.append(start[first], start[-1]).astype(np.int32, copy=False), adapters[first]


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that nobody waits for; the tensor itself on the CPU.

    From pageable memory a copy would wait for all that the device still has to do.
    """
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class Staging:
    """Uploads int32 arrays through persistent buffers.

    On CUDA two pinned buffers take turns, each guarded by an event, so that the copy of one iteration may
    still be under way while the next is packed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[torch.Tensor] = [torch.empty(0, dtype=torch.int32)] * 2
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def upload(self, arrays: Sequence[Ints]) -> list[torch.Tensor]:
        """The arrays on the device, in their shapes."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        sizes = [array.size for array in arrays]
        copied = torch.empty(sum(sizes), dtype=torch.int32, device=self._device)
        self.upload_into(copied, np.concatenate([array.reshape(-1) for array in arrays]))
        return [part.view(a.shape) for part, a in zip(torch.split(copied, sizes), arrays, strict=True)]

    def upload_into(self, target: torch.Tensor, array: Ints) -> None:
        """`array` [n] into `target` [n], which is int32 and on the device; nobody waits for it."""
        if self._device.type == "cpu":
            target.copy_(torch.from_numpy(array))
            return
        self._turn ^= 1
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        if self._buffers[self._turn].numel() < array.size:
            self._buffers[self._turn] = torch.empty(2 * array.size, dtype=torch.int32, pin_memory=True)
        buffer = self._buffers[self._turn][: array.size]
        buffer.numpy()[:] = array
        target.copy_(buffer, non_blocking=True)
        event = self._events[self._turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
