"""Seconds of the short kernels of a layer: values read and written, at what the multiprocessors manage.

    t = t_fixed + 2 m v / (S h e)

m tokens, v half-precision values per token, e bytes per multiprocessor and clock h by kind of kernel: what the
kernel before has written lies in the L2, and a reduction over the row (norm) or a gather (rotary, embedding)
is bound by instructions. An addition, and what runs once (optimizer, logits), has a share of the memory's rate
instead. Constants: `sim.cost.efficiency`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.core.specs import DeviceSpec
from sim.cost.efficiency import Efficiency

Floats = NDArray[np.float64]

IN_L2 = ("norm", "rotary", "activation", "embedding")
KINDS = ("norm", "add", "rotary", "activation", "embedding", "elementwise")


def elementwise_s(
    m: Floats, values: Floats | float, kind: str, device: DeviceSpec, efficiency: Efficiency
) -> Floats:
    """Seconds of one kernel over m tokens with `values` read or written per token."""
    if kind in IN_L2:
        rate = device.sm_clocks_hz * getattr(efficiency, f"{kind}_clock_bytes")
    else:
        rate = device.memory_bandwidth_bytes_s * getattr(efficiency, f"{kind}_bandwidth")
    fixed_s: float = getattr(efficiency, f"{kind}_fixed_s")
    seconds: Floats = fixed_s + m * (2.0 * values / rate)
    return seconds
