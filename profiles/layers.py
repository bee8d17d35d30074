"""How far layers of the public operator profiles, and their operators, are from constants that have not seen them.

    coserve profile curves DATA_FOLDER

They are judged as shipped, with constants fitted to the other tensor-parallel degrees of its own file, and
with constants that `profiles.held_out` finds in the other device's file alone: another model too. Products and
short kernels are both refitted, so nothing of the rows judged is left in the last two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from profiles.curves import FAMILIES, Line, errors_of, fitted, quantiles, rows_of
from profiles.held_out import Source, unseen
from profiles.measured import read_measured, whole_layer
from profiles.named import device_named
from profiles.predict import predicted_s, relative_errors
from profiles.rows import Measured
from sim.core.specs import DeviceSpec
from sim.cost.efficiency import Efficiency

Floats = NDArray[np.float64]

FILES = {"a100_80gb": "a100-Meta-Llama-3-8B-mlp.csv", "h100": "h100-Llama-2-7b-hf-mlp.csv"}
IN_LAYER = tuple(family for family in FAMILIES if family.group == "tp")


Errors = dict[str, Floats]
"""`whole layer`, or the name of a family of IN_LAYER -> relative errors, one per row."""


def errors_in_layer(operators: Sequence[Measured], device: DeviceSpec, efficiency: Efficiency) -> Errors:
    """Of a file's whole layer and of each family of its operators."""
    whole = whole_layer(operators, [predicted_s(m, device, efficiency) for m in operators])
    assert whole is not None
    families = {family.name: errors_of(rows_of(family, operators), device, efficiency) for family in IN_LAYER}
    return {"whole layer": relative_errors(*whole), **families}


def degrees_held_out(operators: Sequence[Measured], device: DeviceSpec) -> Errors:
    """Each tensor-parallel degree by constants that were fitted to the others."""
    start, found = Efficiency.of(device), []
    for degree in np.unique(operators[0].columns["tp"]):
        unseen = [m.where(m.columns["tp"] == degree) for m in operators]
        seen = [m.where(m.columns["tp"] != degree) for m in operators]
        found.append(errors_in_layer(unseen, device, fitted(seen, device, start, IN_LAYER)))
    return {name: np.concatenate([errors[name] for errors in found]) for name in found[0]}


def layer_table(folder: Path) -> list[Line]:
    """One line per file under `folder` and what is judged of it; empty when a file is missing."""
    paths = {name: folder / file for name, file in FILES.items()}
    if not all(path.is_file() for path in paths.values()):
        return []
    rows = {name: read_measured(path) for name, path in paths.items()}
    devices = {name: device_named(name) for name in rows}
    lines = []
    for name, other in zip(FILES, reversed(FILES), strict=True):
        device, own = devices[name], rows[name]
        borrowed = unseen(device, [Source(device=devices[other], measured=rows[other])], IN_LAYER)
        ways = {
            "as shipped": errors_in_layer(own, device, Efficiency.of(device)),
            "degrees held out": degrees_held_out(own, device),
            "device held out": errors_in_layer(own, device, borrowed),
        }
        for what, errors in ways["as shipped"].items():
            found = {how: quantiles(each[what]) for how, each in ways.items()}
            lines.append(Line(device=name, operator=what, rows=len(errors), errors=found))
    return lines
