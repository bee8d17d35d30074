"""Matrix products as the roofline counts them: `gemm: layer`, `table` or `curve`.

`layer` is the curve with the constants of a running layer (`Efficiency.in_layer`). `table` and `curve` are a
product alone, the former with measured corrections:

    t(m, k, n) = curve(m, k, n) r(m, k, n)

r, measured over predicted, is interpolated linearly in the logarithms of m, n and k between the shapes of
a shipped table (`profiles/tables/*-gemm.json`) and held at its edge beyond. The curve carries what an
interpolation would smear, the staircase of waves; r the library's choice of kernels. A device that no table
names keeps the curve alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sim.core.specs import DeviceSpec
from sim.cost.efficiency import Efficiency
from sim.cost.gemm import gemm_rows_s, gemm_s

Floats = NDArray[np.float64]

GEMMS = ("layer", "table", "curve")
TABLES = Path(__file__).resolve().parents[2] / "profiles" / "tables"


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmTable:
    """Corrections on a grid, and where they come from."""

    name: str
    devices: tuple[str, ...]
    """Names of the devices that it is used for."""
    source: str
    date: str
    licence: str
    error: str
    """In words: in sample and held out."""
    m: Floats
    n: Floats
    k: Floats
    ratio: Floats = field(repr=False)
    """Measured over curve, shape (m, n, k)."""

    def __post_init__(self) -> None:
        shape = (len(self.m), len(self.n), len(self.k))
        if self.ratio.shape != shape or not (self.ratio > 0).all():
            raise ValueError(f"gemm table {self.name}: ratio must be positive and of shape {shape}")

    def shape_text(self) -> str:
        return f"GEMM corrections at {len(self.m)} m x {len(self.n)} n x {len(self.k)} k"

    def ratios(self, m: Floats, k: int, n: int) -> Floats:
        """Corrections of one product for each m."""
        near = _blend(_blend(self.ratio, self.k, k, 2), self.n, n, 1)
        return np.interp(np.log(m), np.log(self.m), near)

    def row_ratios(self, m: Floats, k: Floats, n: Floats) -> Floats:
        """The same for rows that differ in all three."""
        result: Floats = np.empty_like(m)
        shapes, which = np.unique(np.column_stack([k, n]), axis=0, return_inverse=True)
        for i, (inputs, outputs) in enumerate(shapes):
            rows = which.ravel() == i
            result[rows] = self.ratios(m[rows], inputs, outputs)
        return result


def _blend(values: Floats, nodes: Floats, at: float, axis: int) -> Floats:
    """`values` at one point of an axis, which goes."""
    place = float(np.interp(np.log(at), np.log(nodes), np.arange(len(nodes))))
    low = min(int(place), len(nodes) - 2)
    share = place - low
    result = (1 - share) * values.take(low, axis) + share * values.take(low + 1, axis)
    return np.asarray(result, dtype=np.float64)


def product_s(
    m: Floats, k: int, n: int, device: DeviceSpec, efficiency: Efficiency, gemm: str = "layer"
) -> Floats:
    """Seconds of [m, k] x [k, n] for each m, by one of GEMMS."""
    efficiency = efficiency.in_layer if gemm == "layer" else efficiency
    seconds = gemm_s(m, k, n, device, efficiency)
    table = table_for(device) if gemm == "table" else None
    return seconds if table is None else seconds * table.ratios(m, k, n)


def product_rows_s(
    m: Floats, k: Floats, n: Floats, device: DeviceSpec, efficiency: Efficiency, gemm: str = "layer"
) -> Floats:
    """The same for rows that differ in all three."""
    efficiency = efficiency.in_layer if gemm == "layer" else efficiency
    seconds = gemm_rows_s(m, k, n, device, efficiency)
    table = table_for(device) if gemm == "table" else None
    return seconds if table is None else seconds * table.row_ratios(m, k, n)


def table_for(device: DeviceSpec) -> GemmTable | None:
    """The shipped table that names this device."""
    return next((table for table in gemm_tables() if device.name in table.devices), None)


@lru_cache(maxsize=1)
def gemm_tables() -> tuple[GemmTable, ...]:
    """All shipped tables, read once."""
    return tuple(_read(path) for path in sorted(TABLES.glob("*-gemm.json")))


def _read(path: Path) -> GemmTable:
    data = json.loads(path.read_text(encoding="ascii"))
    m, n, k = (np.array(data[name], dtype=np.float64) for name in ("m", "n", "k"))
    ratio = np.array(data["ratio_permille"], dtype=np.float64) / 1000
    texts = {name: data[name] for name in ("source", "date", "licence", "error")}
    return GemmTable(name=path.stem, devices=tuple(data["devices"]), ratio=ratio, m=m, n=n, k=k, **texts)
