"""Seconds of an all-reduce inside one node.

    t(b, g) = t_fixed + [b > 2 MiB] t_large + 2 (g - 1)/g b / (L e)

b bytes per device, g devices, L the link bandwidth per direction, e its share. 2 (g - 1)/g b is what
each device must send in any bandwidth-optimal all-reduce (Patarasuk and Yuan, J. Parallel Distrib.
Comput. 69, 2009); inference engines use a one-kernel all-reduce up to 2 MiB and NCCL above, which the
measured times show as a step. Constants: `sim.cost.efficiency`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.core.specs import DeviceSpec
from sim.cost.efficiency import Efficiency

LARGE_BYTES = 2 * 2**20


def allreduce_s(
    size_bytes: NDArray[np.float64], tp: int, device: DeviceSpec, efficiency: Efficiency
) -> NDArray[np.float64]:
    """Seconds for each message size; zeros when there is one device."""
    if tp == 1:
        return np.zeros_like(size_bytes)
    if not device.link_bandwidth_bytes_s > 0:
        raise ValueError(
            f"device.link_bandwidth_bytes_s of {device.name} must be above 0 for tp {tp}, "
            f"got {device.link_bandwidth_bytes_s}"
        )
    rate = device.link_bandwidth_bytes_s * efficiency.allreduce_bandwidth
    large_s = np.where(size_bytes > LARGE_BYTES, efficiency.allreduce_large_s, 0.0)
    return efficiency.allreduce_fixed_s + large_s + size_bytes * (2 * (tp - 1) / tp / rate)
