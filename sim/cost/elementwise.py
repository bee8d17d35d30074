"""Seconds of the short kernels of a layer: values read and written over a share of the memory bandwidth.

    t = t_fixed + 2 m v / (B e)

m tokens, v half-precision values per token, e by kind of kernel: a reduction over the row (norm) or a
gather (rotary, embedding) is further from the memory's rate than an addition. Constants:
`sim.cost.efficiency`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.core.specs import DeviceSpec
from sim.cost.efficiency import Efficiency

Floats = NDArray[np.float64]

KINDS = ("norm", "add", "rotary", "activation", "embedding", "elementwise")


def elementwise_s(
    m: Floats, values: Floats | float, kind: str, device: DeviceSpec, efficiency: Efficiency
) -> Floats:
    """Seconds of one kernel over m tokens with `values` read or written per token."""
    share: float = getattr(efficiency, f"{kind}_bandwidth")
    fixed_s: float = getattr(efficiency, f"{kind}_fixed_s")
    rate = device.memory_bandwidth_bytes_s * share
    seconds: Floats = fixed_s + m * (2.0 * values / rate)
    return seconds
