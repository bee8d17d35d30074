"""Make the shipped GEMM corrections from measured rows.

    python -m profiles.gemm_tables DATA_FOLDER

A node is the ratio of measured to curve at its m, n and k. The curve is the device file's at the time of
writing: write the tables again after changing a constant of it.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from profiles.curves import quantiles
from profiles.measured import read_measured
from profiles.named import device_named
from profiles.rows import Measured
from sim.core.specs import DeviceSpec
from sim.cost.efficiency import Efficiency
from sim.cost.gemm import gemm_rows_s
from sim.cost.gemm_table import TABLES, GemmTable
from sim.errors import message, report

Floats = NDArray[np.float64]

M_NODES = (1, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
SOURCES = {
    "a100_80gb": (
        "a100_sxm_gemm_vllm_0.14.0_gemm_perf.csv",
        ("a100_80gb", "a100_40gb"),
        "A100-SXM4-80GB, vLLM 0.14.0",
    ),
    "h200": ("h200_sxm_gemm_vllm_0.24.0_gemm_perf.csv", ("h200", "h100"), "H200, vLLM 0.24.0"),
}


def grid(measured: Measured, device: DeviceSpec) -> GemmTable:
    """Corrections at every measured n and k and at M_NODES; 1 where nothing was measured."""
    c = measured.columns
    ratio = measured.seconds / gemm_rows_s(c["m"], c["k"], c["n"], device, Efficiency.of(device))
    nodes = np.array(M_NODES, dtype=np.float64), np.unique(c["n"]), np.unique(c["k"])
    values = np.ones([len(axis) for axis in nodes])
    there = np.isin(c["m"], nodes[0])
    places = [np.searchsorted(axis, c[name][there]) for axis, name in zip(nodes, "mnk", strict=True)]
    values[tuple(places)] = ratio[there]
    return GemmTable(
        name=device.name, devices=(device.name,), source="", date="", licence="", error="",
        m=nodes[0], n=nodes[1], k=nodes[2], ratio=values,
    )  # fmt: skip


def errors(table: GemmTable, measured: Measured, device: DeviceSpec) -> Floats:
    c = measured.columns
    curve = gemm_rows_s(c["m"], c["k"], c["n"], device, Efficiency.of(device))
    result: Floats = curve * table.row_ratios(c["m"], c["k"], c["n"]) / measured.seconds - 1
    return result


def held_out(measured: Measured, device: DeviceSpec) -> Floats:
    """Errors of rows whose n, or whose k, the table did not see (every fourth value, in turn)."""
    found = []
    for axis in ("n", "k"):
        values, index = np.unique(measured.columns[axis], return_inverse=True)
        for fold in range(4):
            out = (index % 4 == fold) & (index > 0) & (index < len(values) - 1)
            found.append(errors(grid(measured.where(~out), device), measured.where(out), device))
    return np.concatenate(found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m profiles.gemm_tables", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", type=Path, metavar="DATA_FOLDER")
    folder = parser.parse_args(argv).folder
    try:
        rows = {name: read_measured(folder / "kernels" / file)[0] for name, (file, _, _) in SOURCES.items()}
    except (ValueError, OSError) as error:
        return report(parser.prog, error, message(error))
    for name, (file, devices, what) in SOURCES.items():
        device, measured = device_named(name), rows[name]
        table = grid(measured, device)
        texts = [
            f"{how} {100 * a:.1f} % median, {100 * b:.1f} % p90"
            for how, (a, b) in (
                ("in sample", quantiles(errors(table, measured, device))),
                ("n or k held out", quantiles(held_out(measured, device))),
            )
        ]
        data = {
            "devices": devices,
            "source": f"fitted to {file} of ai-dynamo/aiconfigurator 095f58a ({what})",
            "date": "2026-11",
            "licence": "Apache-2.0",
            "error": "; ".join(texts),
            **{axis: getattr(table, axis).astype(int).tolist() for axis in ("m", "n", "k")},
            "ratio_permille": np.round(1000 * table.ratio).astype(int).tolist(),
        }
        path = TABLES / f"{name}-gemm.json"
        path.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="ascii")
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB; {data['error']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
