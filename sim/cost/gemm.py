"""Seconds of a dense half-precision matrix product, from tiles, waves and bytes.

    y[m, n] = x[m, k] W[k, n]

    tile    t_tile(a, b) = 2 a b k / (P / S * e(a, b))              one a x b tile on one of S multiprocessors
    waves   t_flops = min over tiles (a, b) and split-k s in 1, 2, 4, 8 of
                      ceil(ceil(m/a) ceil(n/b) s / S) t_tile / s + [s > 1] 8 m n s / (q B)
    bytes   t_bytes = 2 (m k + k n + m n) / B
    total   t = t_fixed + (t_flops^p + t_bytes^p)^(1/p)

P is the peak FLOP/s, e the share of it that a full wave of such tiles reaches, B the share of the
memory bandwidth, q B the rate of the split-k partial sums (fp32, written and read). The staircase of
waves is NVIDIA's "Matrix Multiplication Background User's Guide" (tile and wave quantisation); the
minimum stands for the library's choice of kernel; the smooth maximum for loads that overlap with
arithmetic imperfectly. Constants: `sim.cost.efficiency`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.core.specs import DeviceSpec
from sim.cost.efficiency import Efficiency

SPLITS = (1, 2, 4, 8)


def gemm_s(
    m: NDArray[np.float64], k: int, n: int, device: DeviceSpec, efficiency: Efficiency
) -> NDArray[np.float64]:
    """Seconds of [m, k] x [k, n] for each m (rows >= 1, float64); same shape as `m`."""
    bandwidth = device.memory_bandwidth_bytes_s * efficiency.gemm_bandwidth
    power = efficiency.gemm_smoothness
    flop_s = wave_s(m, k, n, device, efficiency)
    byte_s = (2.0 * (k + n) * m + 2.0 * k * n) / bandwidth
    larger = np.maximum(flop_s, byte_s)
    smaller = np.minimum(flop_s, byte_s)
    return efficiency.gemm_fixed_s + larger * (1.0 + (smaller / larger) ** power) ** (1.0 / power)


def wave_s(
    m: NDArray[np.float64], k: int, n: int, device: DeviceSpec, efficiency: Efficiency
) -> NDArray[np.float64]:
    """The arithmetic alone: the fastest staircase over tiles and splits of k."""
    partial_byte_s = efficiency.gemm_split_k_bandwidth * (
        device.memory_bandwidth_bytes_s * efficiency.gemm_bandwidth
    )
    best = np.full_like(m, np.inf)
    for rows, columns, share in _tiles(efficiency):
        tiles = np.ceil(m / rows) * np.ceil(n / columns)
        tile_s = 2.0 * rows * columns * k * device.sms / (device.peak_flops * efficiency.gemm_flops * share)
        for split in SPLITS:
            seconds = np.ceil(tiles * (split / device.sms)) * (tile_s / split)
            if split > 1:
                seconds += m * (8.0 * n * split / partial_byte_s)
            np.minimum(best, seconds, out=best)
    return best


def _tiles(efficiency: Efficiency) -> tuple[tuple[int, int, float], ...]:
    return (
        (256, 128, 1.0),
        (128, 128, efficiency.gemm_tile_128x128),
        (64, 128, efficiency.gemm_tile_64x128),
        (64, 64, efficiency.gemm_tile_64x64),
        (16, 64, efficiency.gemm_tile_16x64),
    )
