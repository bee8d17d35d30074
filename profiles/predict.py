"""What the roofline says of measured operators: one formula of `sim.cost` per kind."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profiles.rows import Measured
from sim.core.specs import DeviceSpec
from sim.cost.attention import cache_write_s, mixed_s, prefill_s
from sim.cost.collective import allreduce_s, eager_allreduce_s, nccl_s
from sim.cost.efficiency import Efficiency
from sim.cost.elementwise import KINDS, elementwise_s
from sim.cost.gemm_table import product_rows_s

Floats = NDArray[np.float64]


def predicted_s(
    measured: Measured, device: DeviceSpec, efficiency: Efficiency | None = None, gemm: str | None = None
) -> Floats:
    """Seconds of each row of `measured`; the device's own efficiency unless another is given.

    `gemm` None: products of a layer as such, GEMMs by the curve.
    """
    e = Efficiency.of(device) if efficiency is None else efficiency
    c, kind = measured.columns, measured.kind
    if kind in ("gemm", "product"):
        how = gemm or ("layer" if kind == "product" else "curve")
        return product_rows_s(c["m"], c["k"], c["n"], device, e, how)
    if kind == "attention":
        shape = (c["heads"], c["kv_heads"], c["head_dim"], c["window"])
        seconds = prefill_s(c["batch"], c["tokens"], *shape, device, e, c["context"])
        if "written" in c:  # 0: the time is of attention without writing the cache
            write_s = cache_write_s(c["batch"] * c["tokens"], c["kv_heads"], c["head_dim"], device, e)
            seconds -= np.where(c["written"] > 0, 0.0, write_s)
        return seconds
    if kind == "mixed attention":
        heads = (c["heads"], c["kv_heads"], c["head_dim"])
        return mixed_s(c["tokens"], c["context"], c["decodes"], c["decode_context"], *heads, device, e)
    if kind in KINDS:
        return elementwise_s(c["m"], c["values"], kind, device, e)
    return _collective_s(measured, device, e)


def _collective_s(measured: Measured, device: DeviceSpec, e: Efficiency) -> Floats:
    size, devices = measured.columns["bytes"], measured.columns["devices"]
    seconds = np.zeros_like(size)
    for count in np.unique(devices).astype(int).tolist():
        rows = devices == count
        if measured.kind.startswith("nccl "):
            operation = measured.kind.removeprefix("nccl ")
            seconds[rows] = nccl_s(size[rows], count, operation, device, e)
        else:
            formula = eager_allreduce_s if measured.kind.endswith("eager") else allreduce_s
            seconds[rows] = formula(size[rows], count, device, e)
    return seconds


def relative_errors(measured: Measured, seconds: Floats) -> Floats:
    """Predicted over measured, minus 1."""
    errors: Floats = seconds / measured.seconds - 1.0
    return errors
