"""Interpreted kernels are watched: each access lies in a tensor of the launch, and no program of a launch touches
what another one writes.

On a GPU programs run in any order, and such an access is a race. The interpreter runs one after the other and
gives the same numbers each time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import numpy as np
import torch

GRAIN_BYTES = 2
"""Of what is told apart: the smallest number that kernels read."""
NOBODY, MANY = -1, -2


class Accesses:
    """Which program has read and written each place of the tensors of one launch."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        spans = sorted((t.data_ptr(), t.data_ptr() + _extent_bytes(t)) for t in tensors if t.numel())
        merged: list[list[int]] = []
        for start, end in spans:
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self._starts, self._ends = np.array(merged, np.int64).reshape(-1, 2).T
        sizes = -(-(self._ends - self._starts) // GRAIN_BYTES)
        self._first = np.cumsum(sizes) - sizes
        self._writer, self._reader = (np.full(sizes.sum(), NOBODY, np.int32) for _ in range(2))

    def read(self, addresses: np.ndarray, item_bytes: int, program: int) -> None:
        """Raise AssertionError for places outside of all tensors, and for those that another program wrote."""
        at = self._places(addresses, item_bytes)
        writer = self._writer[at]
        assert ((writer == NOBODY) | (writer == program)).all(), "a program reads what another one writes"
        reader = self._reader[at]
        self._reader[at] = np.where((reader == NOBODY) | (reader == program), program, MANY)

    def write(self, addresses: np.ndarray, item_bytes: int, program: int) -> None:
        """Raise AssertionError for places outside of all tensors, that another program read or wrote, or twice
        the same."""
        at = self._places(addresses, item_bytes)
        assert len(np.unique(at)) == at.size, "a store writes a place twice"
        writer, reader = self._writer[at], self._reader[at]
        assert ((writer == NOBODY) | (writer == program)).all(), "two programs write the same place"
        assert ((reader == NOBODY) | (reader == program)).all(), "a program writes what another one reads"
        self._writer[at] = program

    def _places(self, addresses: np.ndarray, item_bytes: int) -> np.ndarray:
        given = addresses.astype(np.int64).reshape(-1)
        if not given.size:
            return given
        span = np.searchsorted(self._starts, given, "right") - 1
        inside = (span >= 0) & (given + item_bytes <= self._ends[span])
        assert inside.all(), "an access lies outside of the launch's tensors"
        at = self._first[span] + (given - self._starts[span]) // GRAIN_BYTES
        return (at[:, None] + np.arange(item_bytes // GRAIN_BYTES)).reshape(-1)


def _extent_bytes(tensor: torch.Tensor) -> int:
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def not_interpreted() -> str | None:
    """Why no kernel can be interpreted here; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "kernels need triton"
    triton, numpy = (tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of triton 3.6 reads no bounds of loops with numpy 2.4 or later"
    return None


def watch() -> None:
    """From now on, for every kernel that this process interprets."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, prepare = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    accesses = Accesses(())

    def watched_prepare(self: Any, *given: Any) -> Any:
        nonlocal accesses
        args, kwargs = prepare(self, *given)
        every = (*args, *kwargs.values())
        accesses = Accesses(arg for arg in every if isinstance(arg, torch.Tensor))
        return args, kwargs

    def active(self: Any, ptrs: Any, mask: Any) -> tuple[np.ndarray, int, int]:
        addresses, used = np.broadcast_arrays(ptrs.data, mask.data)
        (x, y, z), (wide, high, _) = self.grid_idx, self.grid_dim
        item_bytes = ptrs.get_element_ty().primitive_bitwidth // 8
        return addresses[used.astype(bool)], item_bytes, x + wide * (y + high * z)

    def watched_load(self: Any, ptrs: Any, mask: Any, *given: Any) -> Any:
        accesses.read(*active(self, ptrs, mask))
        return load(self, ptrs, mask, *given)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *given: Any) -> Any:
        accesses.write(*active(self, ptrs, mask))
        return store(self, ptrs, value, mask, *given)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    executor._init_args_hst = watched_prepare
