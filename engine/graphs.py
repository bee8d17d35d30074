"""Iterations that only decode, captured once for each of a few shapes and replayed.

Such an iteration launches hundreds of short kernels, and the host takes longer to launch them than the device
to run them. A capture repeats exactly: the same kernels, grids and addresses. So a batch is padded to the next
shape, and lies in buffers that never move. Padding writes and reads no page: its slot is -1, which `write_kv`
skips, and its context -1, which attention answers with 0.

A shape is a number of sequences, a bound of the longest sequence and whether adapters take part. The bound is
part of it because the width of the block table and the split of the keys over programs follow from it. The
lengths themselves, the pages and the adapters are read on the device and may be anything.

Chunks and finetuning windows have too many shapes to be captured. Sampling is left out because it depends on
the requests; it and the head are a handful of launches.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.lora import AdapterBank
from engine.model import Batch, Model, Pages
from engine.packing import Ints, Staging, segments_of
from engine.shelf import Segments

Body = Callable[[], torch.Tensor]
Capture = Callable[[Body], Body]
"""From what an iteration launches to what launches it again, on the same buffers."""

SHORT_KEYS = 1024


class Shape(NamedTuple):
    """What an iteration is captured for."""

    sequences: int
    max_keys: int
    """Bound of context + 1 of every sequence; a multiple of the block."""
    adapters: bool


class Decodes(NamedTuple):
    """An iteration that only decodes, on the host; entries of one adapter lie beside each other."""

    slots: Ints
    """[n] row of each sequence in the block table and among the last tokens."""
    contexts: Ints
    """[n] tokens in the cache before."""
    adapters: Ints
    """[n] slot in the bank; -1 is the base model."""


def sequence_sizes(most: int) -> list[int]:
    """Numbers of sequences that are captured. Up to some 200 rows a product waits for its weights, so
    padding costs little there; each shape costs time at the start."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, most, 32)]
    return [*(size for size in sizes if size < most), most]


def key_sizes(width: int, block_tokens: int) -> list[int]:
    """Bounds of the longest sequence, up to `width` blocks. A wider table is only more to copy, and a finer
    split of the keys than is needed leaves a few programs idle: so the steps are large."""
    sizes, longest = [], width * block_tokens
    keys = -(-SHORT_KEYS // block_tokens) * block_tokens
    while keys < longest:
        sizes.append(keys)
        keys *= 4
    return [*sizes, longest]


class CudaCapture:
    """Captures CUDA graphs, which share one memory pool: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = capture_stream()

    def __call__(self, body: Body) -> Body:
        # Once by itself: kernels are compiled and loaded, which a capture must not do.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            body()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # A stream keeps the workspace of its products, and torch from 2.13 at the latest frees it with any one graph
        # that was captured there. One that is made while capturing lies in the pool, as long as what uses it.
        torch._C._cuda_clearCublasWorkspaces()
        captured = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with _nothing_collected(), captured:
            out = body()
        torch._C._cuda_clearCublasWorkspaces()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Garbage stays until the end: a graph among it that is destroyed while another is captured breaks that one."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@cache
def capture_stream() -> torch.cuda.Stream:
    """One for the process: what the allocator keeps for one stream no other gets, and a pool is shared by captures
    of one stream. Replays run elsewhere."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class _Captured:
    """One shape: its input on the device, and what replays it. A graph holds addresses and no tensors, so
    whatever it reads must be held here or by who is served."""

    def __init__(self, shape: Shape, graphs: Graphs, capture: Capture) -> None:
        n, model, bank = shape.sequences, graphs.model, graphs.bank
        self.shape = shape
        self.width = shape.max_keys // graphs.block_tokens
        self.segments = min(n, 1 + bank.slots) if bank is not None and shape.adapters else 0
        sizes = [n, n, n, n * self.width, self.segments + 1, self.segments]
        self._flat = torch.zeros(sum(sizes), dtype=torch.int32, device=model.device)
        self.slots, contexts, kv_slots, tables, start, adapter = torch.split(self._flat, sizes)
        graphs.staging.upload_into(self._flat, self._pack(Decodes(*[_NONE] * 3), graphs))
        self._query_start = torch.arange(n + 1, dtype=torch.int32, device=model.device)
        lora = bank.batch(Segments(start, adapter)) if bank is not None and shape.adapters else None

        def body() -> torch.Tensor:
            batch = Batch(
                tokens=graphs.last_token[self.slots],
                positions=contexts,
                slots=kv_slots,
                block_tables=tables.view(n, self.width),
                query_start=self._query_start,
                context_lens=contexts,
                decodes=n,
                max_keys=shape.max_keys,
                lora=lora,
            )
            return model.forward(batch, graphs.pages)

        self._replay = capture(body)

    def run(self, decodes: Decodes, graphs: Graphs) -> torch.Tensor:
        """The residual stream [N, E] of the padded batch; valid until the next run."""
        graphs.staging.upload_into(self._flat, self._pack(decodes, graphs))
        return self._replay()

    def _pack(self, decodes: Decodes, graphs: Graphs) -> Ints:
        """All of the input in one array, padded."""
        n, used, block = self.shape.sequences, len(decodes.slots), graphs.block_tokens
        slots, contexts, kv_slots = np.zeros(n, np.int32), np.full(n, -1, np.int32), np.full(n, -1, np.int32)
        tables = np.zeros((n, self.width), np.int32)
        slots[:used], contexts[:used] = decodes.slots, decodes.contexts
        tables[:used] = graphs.table[decodes.slots, : self.width]
        page = tables[np.arange(used), decodes.contexts // block]
        kv_slots[:used] = page * block + decodes.contexts % block
        start, adapter = np.full(self.segments + 1, used, np.int32), np.full(self.segments, -1, np.int32)
        if self.segments:
            start_used, adapter_used = segments_of(decodes.adapters, np.arange(used + 1, dtype=np.int32))
            start[: len(start_used)], adapter[: len(adapter_used)] = start_used, adapter_used
        return np.concatenate((slots, contexts, kv_slots, tables.reshape(-1), start, adapter))


class Graphs:
    """Captured iterations of one engine. A bank that has moved its buffers makes all of them void."""

    def __init__(
        self,
        *,
        model: Model,
        pages: Pages,
        bank: AdapterBank | None,
        last_token: torch.Tensor,
        table: NDArray[np.int32],
        block_tokens: int,
        captures: Callable[[], Capture],
    ) -> None:
        """`last_token` [slots] and `table` [slots, M] are the engine's and change; `captures` makes what
        captures, anew whenever all that was captured is given up."""
        self.model = model
        self.pages = pages
        self.bank = bank
        self.last_token = last_token
        self.table = table
        self.block_tokens = block_tokens
        self.staging = Staging(model.device)
        self._captures = captures
        self._capture = captures()
        self._captured: dict[Shape, _Captured] = {}
        self._bank_moved = 0 if bank is None else bank.moved
        self._sequences = sequence_sizes(len(table))
        self._keys = key_sizes(table.shape[1], block_tokens)

    def warm_up(self, adapters: bool = True) -> int:
        """Capture every shape now, the largest first, whose memory the others reuse; without `adapters` only
        those of the base model. Returns how many."""
        for adapted in (True, False) if adapters and self.bank is not None else (False,):
            for keys in reversed(self._keys):
                for sequences in reversed(self._sequences):
                    self._of(Shape(sequences, keys, adapted))
        return len(self._captured)

    def run(self, decodes: Decodes) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual stream [n, E] of the decodes, and their slots [n] on the device; both valid until the next
        run."""
        used = len(decodes.slots)
        captured = self._of(self.shape(decodes))
        return captured.run(decodes, self)[:used], captured.slots[:used]

    def shape(self, decodes: Decodes) -> Shape:
        """The smallest shape that `decodes` fit in."""
        return Shape(
            self._sequences[bisect_left(self._sequences, len(decodes.slots))],
            self._keys[bisect_left(self._keys, int(decodes.contexts.max()) + 1)],
            bool((decodes.adapters >= 0).any()),
        )

    def _of(self, shape: Shape) -> _Captured:
        if self.bank is not None and self.bank.moved != self._bank_moved:
            self._bank_moved = self.bank.moved
            self._captured.clear()
            self._capture = self._captures()
        if shape not in self._captured:
            self._captured[shape] = _Captured(shape, self, self._capture)
        return self._captured[shape]


_NONE = np.zeros(0, np.int32)
