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
    adapters = np.array([p.adapter for p in pieces], np.int32)
    # Neighbours with the same adapter are one segment.
    first = np.flatnonzero(np.diff(adapters, prepend=adapters[0] - 1))
    return Packed(
        tokens=np.concatenate([p.tokens for p in pieces]).astype(np.int32, copy=False),
        positions=positions,
        slots=slots.astype(np.int32, copy=False),
        block_tables=tables,
        query_start=start,
        context_lens=contexts,
        segment_start=np.append(start[first], start[-1]).astype(np.int32, copy=False),
        segment_adapter=adapters[first],
        max_keys=max_keys,
    )


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
        self._turn ^= 1
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        total = sum(array.size for array in arrays)
        if self._buffers[self._turn].numel() < total:
            self._buffers[self._turn] = torch.empty(2 * total, dtype=torch.int32, pin_memory=True)
        buffer = self._buffers[self._turn]
        host = buffer.numpy()
        at = 0
        for array in arrays:
            host[at : at + array.size] = array.reshape(-1)
            at += array.size
        copied = buffer[:total].to(self._device, non_blocking=True)
        event = self._events[self._turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        parts = torch.split(copied, [array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
