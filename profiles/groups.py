"""Errors on groups of rows that the constants were fitted without: what a file of another model or size will see.

    python -m profiles.groups DATA_FOLDER

A group is all rows of one value (an n, a number of heads, a batch), of one range of sizes, or of one model's shapes
on 1 to 8 devices. Of a model's matrices every n and every k is left out, also where other models share it. Each
line is the median group, the worst one, and how many are beyond 8 / 20 %.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from profiles.curves import (
    FAMILIES,
    FILES,
    Family,
    errors_of,
    fit_family,
    operators_in,
    quantiles,
    rows_of,
)
from profiles.gemm_tables import errors as corrected_errors
from profiles.gemm_tables import grid
from profiles.named import device_named
from profiles.rows import Measured
from sim.core.specs import DeviceSpec
from sim.cost.efficiency import Efficiency
from sim.errors import message, report

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

OPERATORS = ("gemm", "context attention", "generation attention", "nccl")
RANGES = (1, 2, 9, 17, 33, 65, 129, 257, 513, 1025, 2049, 4097, 8193, 16385)
OCTAVES = tuple(2**i for i in range(6, 32, 3))
AIM = (0.08, 0.20)
DEGREES = (1, 2, 4, 8)
MODELS = {
    "llama-2-7b": (4096, 32, 32, 128, 11008),
    "llama-3.2-1b": (2048, 32, 8, 64, 8192),
    "llama-3.2-3b": (3072, 24, 8, 128, 8192),
    "llama-3-8b": (4096, 32, 8, 128, 14336),
    "llama-3-70b": (8192, 64, 8, 128, 28672),
    "qwen2.5-7b": (3584, 28, 4, 128, 18944),
    "qwen2.5-14b": (5120, 40, 8, 128, 13824),
    "qwen2.5-32b": (5120, 40, 8, 128, 27648),
    "qwen2.5-72b": (8192, 64, 8, 128, 29568),
}
"""Width, heads, key-value heads, head size and MLP's width, from each one's config.json."""


def by_column(operator: str, columns: Mapping[str, Floats]) -> dict[str, Floats]:
    """What is left out -> the group of every row, NaN for none."""
    c = columns
    if operator == "gemm":
        return {
            "an n": c["n"],
            "a k": c["k"],
            "a range of m": _range(c["m"], RANGES),
            "odd m": np.where(c["m"] % 2 == 1, 1.0, np.nan),
        }
    if operator == "nccl":
        return {"devices": c["devices"], "three octaves of bytes": _range(c["bytes"], OCTAVES)}
    length = c["tokens"] if operator == "context attention" else c["context"] + 1
    return {
        "heads per key-value head": c["heads"] / c["kv_heads"],
        "head size": c["head_dim"],
        "window": c["window"],
        "a range of lengths": _range(length, RANGES),
        "batch": c["batch"],
    }


def _range(values: Floats, starts: Sequence[int]) -> Floats:
    """The start of the range that each value lies in."""
    edges = np.array(starts, dtype=np.float64)
    result: Floats = edges[np.clip(np.searchsorted(edges, values, side="right") - 1, 0, None)]
    return result


def of_model(operator: str, model: str, columns: Mapping[str, Floats]) -> tuple[Mask, Mask]:
    """Rows of a model's shapes, and rows to leave out for it."""
    width, heads, kv_heads, size, ffn = MODELS[model]
    own = np.zeros(len(next(iter(columns.values()))), dtype=bool)
    out = own.copy()
    for tp in DEGREES:
        query, kv = heads * size // tp, max(1, kv_heads // tp) * size
        if operator != "gemm":
            c = columns
            alike = (c["heads"] == heads // tp) & (c["kv_heads"] == kv // size) & (c["head_dim"] == size)
            own |= alike & (c["window"] == 0)
            out |= own
            continue
        for k, n in ((width, query + 2 * kv), (query, width), (width, 2 * ffn // tp), (ffn // tp, width)):
            own |= (columns["k"] == k) & (columns["n"] == n)
            out |= (columns["k"] == k) | (columns["n"] == n)
    return own, out


def held_out(
    family: Family,
    measured: Sequence[Measured],
    device: DeviceSpec,
    seen: Sequence[Mask],
    unseen: Sequence[Mask],
) -> Floats:
    """Errors of the `unseen` rows by constants that were fitted to the `seen` ones."""
    inside = [m.where(rows) for m, rows in zip(measured, seen, strict=True) if rows.any()]
    outside = [m.where(rows) for m, rows in zip(measured, unseen, strict=True) if rows.any()]
    return errors_of(outside, device, fit_family(family, inside, device, Efficiency.of(device)))


def lines(device: DeviceSpec, measured: Sequence[Measured]) -> Iterator[tuple[str, str, dict[str, Floats]]]:
    """Operator, what is left out, and the errors of each group."""
    for family in (family for family in FAMILIES if family.name in OPERATORS):
        own = rows_of(family, measured)
        groups = [by_column(family.name, m.columns) for m in own]
        for what in groups[0]:
            every = np.concatenate([group[what] for group in groups])
            values = np.unique(every[~np.isnan(every)])
            if not (every == values[0]).all():
                masks = {f"{v:g}": [group[what] == v for group in groups] for v in values}
                yield (
                    family.name,
                    what,
                    {
                        name: held_out(family, own, device, [~mask for mask in unseen], unseen)
                        for name, unseen in masks.items()
                    },
                )
        if family.name == "nccl":
            continue
        models = {name: of_model(family.name, name, own[0].columns) for name in MODELS}
        models = {name: masks for name, masks in models.items() if masks[0].any()}
        found = {name: held_out(family, own, device, [~o], [m]) for name, (m, o) in models.items()}
        yield family.name, "a model", found
        if family.name == "gemm":
            tables = {name: grid(own[0].where(~out), device) for name, (_, out) in models.items()}
            found = {n: corrected_errors(tables[n], own[0].where(m), device) for n, (m, _) in models.items()}
            yield "gemm, corrected", "a model", found


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m profiles.groups", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DATA_FOLDER")
    folder = parser.parse_args(argv).folder
    try:
        rows = {
            name: operators_in((folder / prefix).parent, (folder / prefix).name)
            for name, prefix in FILES.items()
        }
    except (ValueError, OSError) as error:
        return report(parser.prog, error, message(error))
    print(
        f"{'device':<10} {'operator':<22} {'left out':<26} {'groups':>6} {'median':>14}  worst, beyond the aim"
    )
    for name, measured in rows.items():
        for operator, what, found in lines(device_named(name), measured):
            each = {group: quantiles(errors) for group, errors in found.items()}
            middle = [100 * float(np.median([q[i] for q in each.values()])) for i in (0, 1)]
            worst = max(each, key=lambda group: sum(e / aim for e, aim in zip(each[group], AIM, strict=True)))
            beyond = sum(any(e > aim for e, aim in zip(q, AIM, strict=True)) for q in each.values())
            a, b = (100 * e for e in each[worst])
            text = f"{middle[0]:.1f} / {middle[1]:.1f} %"
            print(
                f"{name:<10} {operator:<22} {what:<26} {len(each):>6} {text:>14}  "
                f"{worst}: {a:.1f} / {b:.1f} %, {beyond}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
