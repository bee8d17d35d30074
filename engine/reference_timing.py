"""Times of repeated work, and what this machine can do at best: copy bandwidth and the rate of products."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

WARM_UP = 2
"""Repeats left out: kernels are compiled and memory is allocated in them."""
LEAST, MOST = 3, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of one repeat."""

    p20_s: float
    p50_s: float
    p80_s: float

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        p20, p50, p80 = (float(np.percentile(seconds, p)) for p in (20, 50, 80))
        return cls(p20_s=p20, p50_s=p50, p80_s=p80)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What no version of anything gets beyond."""

    copy_bytes_s: float
    """Read plus written, of a large copy on the device."""
    product_flops: float
    """Of a large square product in the model's type, on random numbers."""
    copy: Times
    product: Times


def enough(seconds: float) -> Iterator[int]:
    """0, 1, 2, ... for `seconds` after the warm-up: at least LEAST and at most MOST repeats beyond it."""
    for n in range(WARM_UP):
        yield n
    end_s = time.perf_counter() + seconds
    for n in range(MOST):
        if n >= LEAST and time.perf_counter() >= end_s:
            return
        yield WARM_UP + n


def timed(call: Callable[[], object], device: torch.device, seconds: float) -> Times:
    """Seconds of a call that waits for nothing itself."""
    taken = []
    for _ in enough(seconds):
        synchronize(device)
        start_s = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - start_s)
    return Times.of(taken[WARM_UP:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(
    device: torch.device, dtype: torch.dtype, copy_bytes: int, product: int, seconds: float
) -> Ceilings:
    """Measured on random numbers: on zeros a product can be faster than real data ever is."""
    source = torch.randn(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device, seconds / 2)
    a, b = (torch.randn(product, product, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    multiplied = timed(lambda: torch.mm(a, b, out=out), device, seconds / 2)
    return Ceilings(
        copy_bytes_s=2 * source.nbytes / copy.p50_s,
        product_flops=2 * product**3 / multiplied.p50_s,
        copy=copy,
        product=multiplied,
    )


class PeakMemory:
    """The allocator's peak above what was there before; nothing where there is no such allocator."""

    def __init__(self, device: torch.device, beside_bytes: int) -> None:
        """`beside_bytes` are not counted: the weights."""
        self._device = device
        self._beside_bytes = beside_bytes
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._beside_bytes


def allocated_bytes(device: torch.device) -> int:
    """What the allocator has handed out now; 0 where there is no such allocator."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
