"""Seconds of the short kernels of a layer: values read and written, at what the multiprocessors manage.

    t = (t_fixed^p + (b / (S h e) + x b' / B)^p)^(1/p),   b = 2 m v,   b' = b min(1, max(0, b / (0.6 L2) - 1))

m tokens, v half-precision values per token, e bytes per multiprocessor and clock h by kind of kernel: what the
kernel before has written lies in the L2, and a reduction over the row (norm) or a gather (rotary, embedding)
is bound by instructions. What no longer fits into the L2 (about half of it holds a stream, since both of its
halves keep copies) is b'; x of it costs a memory access that nothing hides. A kernel of few blocks takes its
latency, however few they are, so the two are nearly a maximum (p = 1.5). What runs once (optimizer, logits) has
a share of the memory's rate instead. Constants: `sim.cost.efficiency`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.core.specs import DeviceSpec
from sim.cost.efficiency import Efficiency
from sim.cost.gemm import smooth_maximum

Floats = NDArray[np.float64]

SHORT = ("norm", "add", "rotary", "activation", "embedding")
KINDS = (*SHORT, "elementwise")
HELD = 0.6
"""Share of the L2 that holds what passes through it."""
SMOOTHNESS = 1.5
BLOCK = 1024
"""Threads of a block, at most."""


def elementwise_s(
    m: Floats, values: Floats | float, kind: str, device: DeviceSpec, efficiency: Efficiency
) -> Floats:
    """Seconds of one kernel over m tokens with `values` read or written per token."""
    fixed_s: float = getattr(efficiency, f"{kind}_fixed_s")
    if kind not in SHORT:
        return fixed_s + m * (2.0 * values) / (
            device.memory_bandwidth_bytes_s * efficiency.elementwise_bandwidth
        )
    return _at_least(fixed_s, _moved_s(m, values, kind, device, efficiency))


def whole_blocks(width: Floats | float) -> Floats:
    """Values of a row as the threads of its block take them: 1,024 at a time (vLLM's activation kernel), so that a
    width of 1,376, a Llama-2-7B's on 8 devices, takes the time of 2,048."""
    return np.where(np.greater(width, BLOCK), np.ceil(np.divide(width, BLOCK)) * BLOCK, width)


def fused_norm_s(
    m: Floats, values: float, residual: float, device: DeviceSpec, efficiency: Efficiency
) -> Floats:
    """Seconds of a norm that adds the residual as well: one kernel, with the values of both."""
    moved_s = _moved_s(m, values, "norm", device, efficiency) + _moved_s(
        m, residual, "add", device, efficiency
    )
    return _at_least(efficiency.norm_fixed_s, moved_s)


def _moved_s(
    m: Floats, values: Floats | float, kind: str, device: DeviceSpec, efficiency: Efficiency
) -> Floats:
    moved = m * (2.0 * values)
    missed = moved * np.clip(moved / (HELD * device.cache_bytes) - 1.0, 0.0, 1.0)
    moved_s = moved / (device.sm_clocks_hz * getattr(efficiency, f"{kind}_clock_bytes"))
    missed_s = missed * (getattr(efficiency, f"{kind}_missed") / device.memory_bandwidth_bytes_s)
    return np.asarray(moved_s + missed_s, dtype=np.float64)


def _at_least(fixed_s: float, moved_s: Floats) -> Floats:
    return smooth_maximum(np.full_like(moved_s, fixed_s), moved_s, SMOOTHNESS)
