"""Seconds of a dense half-precision matrix product, from tiles, waves and bytes.

    y[m, n] = x[m, k] W[k, n]

    tile    t(a, b, s) = u 2 128 128 32 S/P + ceil(k / 32 s) 32 max(2 a b S/(P e), 2 (a + b) S/(P l))
    waves   t_flops    = min over tiles (a, b) and split-k s of
                         ceil(ceil(m/a) ceil(n/b) s / S) t(a, b, s) + [s > 1] (t_split + 16 m n s / (P l))
    bytes   t_bytes    = 2 (m k + k n) / (r B) + 2 m n / (w B)
    total   t          = t_fixed + (t_flops^p + t_bytes^p)^(1/p)

S multiprocessors, P the peak FLOP/s, B the memory bandwidth. A tile's inner loop is bound by its
arithmetic or by its operands coming through the L2, at l bytes per peak FLOP: from one architecture to
the next, what feeds the tensor cores grows with them and not with the memory. For the same reason a tile's
start and end are u steps of its loop and not seconds. With these two, constants of one device serve for
another (`profiles/README.md`). Few tiles cannot use all of the memory's rate.
The staircase of waves is NVIDIA's "Matrix Multiplication Background User's Guide" (tile and wave
quantisation); the minimum stands for the library's choice of kernel; the smooth maximum for loads that
overlap with arithmetic imperfectly; the partial sums of split-k are fp32, written and read, at half of the
L2's rate.
Constants: `sim.cost.efficiency`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.core.specs import DeviceSpec
from sim.cost.efficiency import Efficiency

Floats = NDArray[np.float64]

TILES = (
    (256, 128),
    (128, 256),
    (128, 128),
    (64, 256),
    (64, 128),
    (128, 64),
    (64, 64),
    (32, 64),
    (16, 64),
)
SPLITS = (1, 2, 3, 4, 6, 8, 16)
ROWS = 16
"""Every tile has a multiple of so many rows: the staircase is flat in between."""
STEP = 32
"""Columns of x that the inner loop takes at a time."""


def gemm_s(m: Floats, k: int, n: int, device: DeviceSpec, efficiency: Efficiency) -> Floats:
    """Seconds of [m, k] x [k, n] for each m (rows >= 1, float64); same shape as `m`."""
    stairs, where = np.unique(np.ceil(m / ROWS), return_inverse=True)
    flop_s = wave_s(stairs * ROWS, float(k), float(n), device, efficiency)[where]
    return total_s(flop_s, m, float(k), float(n), device, efficiency)


def gemm_rows_s(m: Floats, k: Floats, n: Floats, device: DeviceSpec, efficiency: Efficiency) -> Floats:
    """The same for rows that differ in all three."""
    flop_s = wave_s(np.ceil(m / ROWS) * ROWS, k, n, device, efficiency)
    return total_s(flop_s, m, k, n, device, efficiency)


def total_s(
    flop_s: Floats, m: Floats, k: Floats | float, n: Floats | float, device: DeviceSpec, e: Efficiency
) -> Floats:
    """Fixed time, and the smooth maximum of arithmetic and memory time."""
    bandwidth = device.memory_bandwidth_bytes_s
    read_s = 2.0 * (k * m + k * n) / (bandwidth * e.gemm_read_bandwidth)
    byte_s = read_s + 2.0 * n * m / (bandwidth * e.gemm_write_bandwidth)
    return e.gemm_fixed_s + smooth_maximum(flop_s, byte_s, e.gemm_smoothness)


def wave_s(
    m: Floats, k: Floats | float, n: Floats | float, device: DeviceSpec, efficiency: Efficiency
) -> Floats:
    """The arithmetic alone: the fastest staircase over tiles and splits of k."""
    sms, peak = device.sms, device.peak_flops
    flop_s = sms / (peak * efficiency.gemm_flops)
    feed_s = sms / (peak * efficiency.gemm_l2_bandwidth)
    tile_s = efficiency.gemm_tile_steps * (2.0 * 128 * 128 * STEP) * sms / peak
    partial_s = 16.0 / (peak * efficiency.gemm_l2_bandwidth)
    loops = [np.ceil(k / (split * STEP)) * STEP for split in SPLITS]
    best = np.full(np.broadcast_shapes(m.shape, np.shape(n)), np.inf)
    for rows, columns in TILES:
        step_s = max(2.0 * rows * columns * flop_s, 2.0 * (rows + columns) * feed_s)
        tiles = np.ceil(m / rows) * np.ceil(n / columns) / sms
        for split, loop in zip(SPLITS, loops, strict=True):
            seconds = np.ceil(tiles * split) * (tile_s + loop * step_s)
            if split > 1:
                seconds += efficiency.gemm_split_k_s + m * (n * (split * partial_s))
            np.minimum(best, seconds, out=best)
    return best


def smooth_maximum(a: Floats, b: Floats, power: float) -> Floats:
    """(a^p + b^p)^(1/p) for positive values."""
    larger, smaller = np.maximum(a, b), np.minimum(a, b)
    result: Floats = larger * (1.0 + (smaller / larger) ** power) ** (1.0 / power)
    return result
