"""Seconds of collectives inside one node.

One kernel for messages below 8 MiB over NVLink (vLLM's custom all-reduce, its limits on one and two shots):

    one shot   t = t_fixed + t_hop (g - 1) + (g - 1) b / (L e1)                  g = 2, or b small
    two shots  t = t_fixed + t_hop (g - 1) + t_2 + 2 (g - 1)/g b / (L e2)

and NCCL above, or for other collectives:

    t = t_nccl + t_hop h (g - 1) + min3(x / (L e_ll), z t_nccl + x / (L e)),  x = h (g - 1)/g b

b bytes of the whole message, g devices, L the link bandwidth per direction; h = 2 for an all-reduce, else
1. h (g - 1)/g b is what each device must send in any bandwidth-optimal algorithm (Patarasuk and Yuan, J.
Parallel Distrib. Comput. 69, 2009). The minimum is NCCL's choice of protocol, rounded off since a third one
lies between: min3(a, b) = (a^-3 + b^-3)^(-1/3). Constants: `sim.cost.efficiency`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.core.specs import DeviceSpec
from sim.cost.architectures import NVLINK_BYTES_S
from sim.cost.efficiency import Efficiency

Floats = NDArray[np.float64]

LARGE_BYTES = 8 * 2**20
"""The one-kernel all-reduce takes smaller messages (vLLM's default limit)."""
ONE_SHOT_BYTES = {2: LARGE_BYTES, 4: 512 * 2**10, 8: 256 * 2**10}
"""Up to so many devices -> messages below it go in one shot (vLLM's custom_all_reduce.cuh)."""
PROTOCOLS = 3.0
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "alltoall")


def allreduce_s(size_bytes: Floats, tp: int, device: DeviceSpec, efficiency: Efficiency) -> Floats:
    """Seconds for each message size inside a captured graph; zeros when there is one device."""
    if tp == 1:
        return np.zeros_like(size_bytes)
    large_s = nccl_s(size_bytes, tp, "all_reduce", device, efficiency)
    # vLLM's rule: more than two devices on PCIe have no one-kernel all-reduce.
    if tp > 2 and device.link_bandwidth_bytes_s < NVLINK_BYTES_S:
        return large_s
    small_s = custom_s(size_bytes, tp, device, efficiency)
    return np.where(size_bytes < LARGE_BYTES, small_s, large_s)


def collective_s(
    kind: str, size_bytes: Floats, tp: int, device: DeviceSpec, efficiency: Efficiency
) -> Floats:
    """Any collective on a tensor of `size_bytes` in all, of which a device has its part before or after; kinds are
    `sim.core.specs.Collective`'s."""
    if kind == "all_reduce":
        return allreduce_s(size_bytes, tp, device, efficiency)
    if kind == "all_to_all":
        # NCCL counts what one device has.
        return nccl_s(size_bytes / tp, tp, "alltoall", device, efficiency)
    return nccl_s(size_bytes, tp, kind, device, efficiency)


def one_collective_s(
    kind: str, size_bytes: float, tp: int, device: DeviceSpec, efficiency: Efficiency
) -> float:
    """`collective_s` of one size."""
    return float(collective_s(kind, np.array([size_bytes]), tp, device, efficiency)[0])


def eager_allreduce_s(size_bytes: Floats, tp: int, device: DeviceSpec, efficiency: Efficiency) -> Floats:
    """The same outside a graph: at least a launch, and the data is first copied to a shared buffer."""
    copy_s = 2.0 * size_bytes / (device.memory_bandwidth_bytes_s * efficiency.elementwise_bandwidth)
    graph_s = allreduce_s(size_bytes, tp, device, efficiency)
    return np.maximum(efficiency.allreduce_eager_s, graph_s + copy_s)


def custom_s(size_bytes: Floats, tp: int, device: DeviceSpec, efficiency: Efficiency) -> Floats:
    """The one-kernel all-reduce."""
    link = _link(device, tp)
    limit = next((b for devices, b in ONE_SHOT_BYTES.items() if tp <= devices), 0)
    one_s = size_bytes * ((tp - 1) / (link * efficiency.allreduce_one_shot))
    two_s = size_bytes * (2 * (tp - 1) / tp / (link * efficiency.allreduce_two_shot))
    moved_s = np.where(size_bytes < limit, one_s, efficiency.allreduce_two_shot_s + two_s)
    return efficiency.allreduce_fixed_s + efficiency.allreduce_hop_s * (tp - 1) + moved_s


def nccl_s(size_bytes: Floats, tp: int, operation: str, device: DeviceSpec, e: Efficiency) -> Floats:
    """A collective of NCCL; ValueError for an operation that is not in OPERATIONS."""
    if operation not in OPERATIONS:
        raise ValueError(f"collective {operation!r} is not known; known: {', '.join(OPERATIONS)}")
    link = _link(device, tp)
    rounds = 2 if operation == "all_reduce" else 1
    relative = {
        "all_reduce": e.nccl_switch if tp >= 8 else 1.0,
        "all_gather": e.nccl_all_gather,
        "reduce_scatter": e.nccl_reduce_scatter,
        "alltoall": e.nccl_alltoall,
    }[operation]
    sent = size_bytes * (rounds * (tp - 1) / tp)
    simple = link * e.nccl_bandwidth * relative / (1.0 + e.nccl_few_devices / tp)
    low, simple_s = e.nccl_low_latency, e.nccl_simple * e.nccl_fixed_s
    if operation == "alltoall":
        low, simple_s = e.nccl_alltoall_low_latency, e.nccl_alltoall_simple_s
    low_s = sent / (link * low)
    moved_s = low_s / (1.0 + (low_s / (simple_s + sent / simple)) ** PROTOCOLS) ** (1.0 / PROTOCOLS)
    return e.nccl_fixed_s + e.nccl_hop_s * rounds * (tp - 1) + moved_s


def _link(device: DeviceSpec, tp: int) -> float:
    if not device.link_bandwidth_bytes_s > 0:
        raise ValueError(
            f"device.link_bandwidth_bytes_s of {device.name} must be above 0 for tp {tp}, "
            f"got {device.link_bandwidth_bytes_s}"
        )
    return device.link_bandwidth_bytes_s
