"""Fit the roofline's constants to measured operators, and say what they are worth elsewhere.

    coserve profile curves DATA_FOLDER

Each family of operators (GEMM, prefill, decode, one-kernel all-reduce, NCCL, short kernels) has its own
few constants of `sim.cost.efficiency`, fitted by Levenberg-Marquardt on the logarithms of both constants
and times, robust against outliers. The table has three errors for each: in sample, of shapes that were
left out (a model's shapes at a time: for GEMM all rows of one n, for attention all of one number of heads)
and of this device left out: its datasheet, and constants that have seen other devices only (`profiles.held_out`),
without and with its own LATENCIES and KERNELS. The last column is of constants that both devices share
(all but these), fitted to both: what is left when one formula has to explain two architectures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiles.measured import read_measured
from profiles.predict import predicted_s, relative_errors
from profiles.rows import Measured
from sim.core.specs import DeviceSpec
from sim.cost.efficiency import SHARES, Efficiency
from sim.cost.elementwise import SHORT

Floats = NDArray[np.float64]

FILES = {"a100_80gb": "kernels/a100_sxm", "h200": "kernels/h200_sxm"}
"""Devices whose kernels were measured alone -> how their files' names begin."""
ROWS = 4000
"""Rows of a fit; more change no digit that matters."""
SOFT = 0.08
"""Relative error from which a row pulls less than its square."""
FOLDS = 4
LATENCIES = ("nccl_fixed_s", "allreduce_eager_s")
"""Two times of a device's host and links that no datasheet has."""
KERNELS = (
    "attention_exponentials",
    "attention_tile_s",
    "decode_smoothness",
    "decode_split_s",
    "decode_each_split_s",
    "decode_sequence_s",
)
"""Properties of a generation of FlashAttention. What these and LATENCIES are worth is shown apart: with them a
device held out is no longer unseen. Each generation was measured on one of the table's devices."""
LIMITS = {"decode_sm_bandwidth": 10.0}
"""Beyond it a constant no longer matters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Constants that are fitted together, and the rows that they are fitted to."""

    name: str
    prefixes: tuple[str, ...]
    """Of kinds or operators in `Measured`."""
    constants: tuple[str, ...]
    group: str
    """Column whose values are left out together."""


FAMILIES = (
    Family(
        name="gemm",
        prefixes=("gemm",),
        constants=(
            "gemm_flops",
            "gemm_l2_bandwidth",
            "gemm_read_bandwidth",
            "gemm_write_bandwidth",
            "gemm_smoothness",
            "gemm_tile_steps",
            "gemm_split_k_s",
            "gemm_fixed_s",
        ),
        group="n",
    ),
    Family(
        name="context attention",
        prefixes=("context attention",),
        constants=(
            "attention_exponentials",
            "attention_wide_head",
            "attention_tile_s",
            "attention_tail",
            "attention_clock_bytes",
            "attention_split_s",
            "attention_fixed_s",
            "cache_write_clocks",
        ),
        group="heads",
    ),
    Family(
        name="generation attention",
        prefixes=("generation attention",),
        constants=(
            "decode_bandwidth",
            "decode_sm_bandwidth",
            "decode_tile_s",
            "decode_head64",
            "decode_head256",
            "decode_smoothness",
            "decode_split_s",
            "decode_each_split_s",
            "decode_regroup_s",
            "decode_query",
            "decode_sequence_s",
            "decode_fixed_s",
        ),
        group="heads",
    ),
    Family(
        name="nccl",
        prefixes=("nccl",),
        constants=(
            "nccl_fixed_s",
            "nccl_hop_s",
            "nccl_low_latency",
            "nccl_simple",
            "nccl_bandwidth",
            "nccl_few_devices",
            "nccl_switch",
            "nccl_all_gather",
            "nccl_reduce_scatter",
            "nccl_alltoall",
            "nccl_alltoall_low_latency",
            "nccl_alltoall_simple_s",
        ),
        group="bytes",
    ),
    Family(
        name="all-reduce",
        prefixes=("all-reduce vllm",),
        constants=(
            "allreduce_fixed_s",
            "allreduce_hop_s",
            "allreduce_one_shot",
            "allreduce_two_shot",
            "allreduce_two_shot_s",
            "allreduce_eager_s",
        ),
        group="bytes",
    ),
    Family(
        name="product",
        prefixes=("product",),
        constants=(
            "layer_flops",
            "layer_l2_bandwidth",
            "layer_read_bandwidth",
            "layer_write_bandwidth",
            "layer_smoothness",
            "layer_tile_steps",
            "layer_split_k_s",
            "layer_fixed_s",
        ),
        group="tp",
    ),
    *(
        Family(
            name=kind,
            prefixes=(kind,),
            constants=(f"{kind}_clock_bytes", f"{kind}_missed", f"{kind}_fixed_s"),
            group="tp",
        )
        for kind in SHORT
    ),
)


Rows = tuple[DeviceSpec, Efficiency, Sequence[Measured]]
"""A device, the constants to begin with, and its rows of one family."""


def rows_of(family: Family, measured: Sequence[Measured]) -> list[Measured]:
    """The parts of `measured` that `family` is fitted to."""
    names = family.prefixes
    return [m for m in measured if m.operator.startswith(names) or m.kind in names]


def fit_family(
    family: Family, measured: Sequence[Measured], device: DeviceSpec, start: Efficiency
) -> Efficiency:
    """`start` with the family's constants fitted to `measured`."""
    return fit_shared(family.constants, [(device, start, measured)])[0]


def fit_shared(names: Sequence[str], devices: Sequence[Rows]) -> list[Efficiency]:
    """Each device's start with `names` fitted to all devices' rows together, so that these are the same."""
    parts = [thin(measured) for _, _, measured in devices]
    logs = np.log(np.concatenate([m.seconds for own in parts for m in own]))

    def residuals(x: Floats) -> Floats:
        times = [
            predicted_s(m, device, _with(start, names, x))
            for (device, start, _), own in zip(devices, parts, strict=True)
            for m in own
        ]
        return np.asarray(np.log(np.concatenate(times)) - logs, dtype=np.float64)

    first = np.mean([np.log([getattr(start, name) for name in names]) for _, start, _ in devices], axis=0)
    upper = upper_of(names)
    found = levenberg(residuals, np.minimum(first, upper), upper)
    return [_with(start, names, found) for _, start, _ in devices]


def cross_validated(
    family: Family, measured: Sequence[Measured], device: DeviceSpec, start: Efficiency
) -> Floats:
    """Errors of every row in turn, predicted by constants fitted without its group."""
    errors = [np.empty_like(m.seconds) for m in measured]
    for fold in range(FOLDS):
        inside = [m.where(_fold(m, family) != fold) for m in measured]
        fitted = fit_family(family, [m for m in inside if len(m.seconds)], device, start)
        for m, own in zip(measured, errors, strict=True):
            outside = _fold(m, family) == fold
            if outside.any():
                left_out = m.where(outside)
                own[outside] = relative_errors(left_out, predicted_s(left_out, device, fitted))
    return np.concatenate(errors)


def _fold(measured: Measured, family: Family) -> NDArray[np.int64]:
    """Fold of each row: groups in turn, so that each fold has small and large ones."""
    _, index = np.unique(measured.columns[family.group], return_inverse=True)
    return index % FOLDS


def errors_of(measured: Sequence[Measured], device: DeviceSpec, efficiency: Efficiency) -> Floats:
    parts = [relative_errors(m, predicted_s(m, device, efficiency)) for m in measured]
    return np.concatenate(parts)


def thin(measured: Sequence[Measured]) -> list[Measured]:
    """ROWS rows of all parts together at most."""
    result = []
    for part in measured:
        count = len(part.seconds)
        keep = np.zeros(count, dtype=bool)
        keep[np.random.default_rng(0).permutation(count)[: ROWS // len(measured)]] = True
        result.append(part.where(keep))
    return result


def upper_of(names: Sequence[str]) -> Floats:
    """Logarithms of the constants' upper bounds."""
    return np.log([1.0 if name in SHARES else LIMITS.get(name, np.inf) for name in names])


def _with(start: Efficiency, names: Sequence[str], logs: Floats) -> Efficiency:
    changes: dict[str, Any] = dict(zip(names, np.exp(logs).tolist(), strict=True))
    return replace(start, **changes)


def levenberg(
    residuals: Any, x: Floats, upper: Floats, weights: Floats | float = 1.0, steps: int = 40
) -> Floats:
    """Least soft-L1 squares, each times its weight, by damped Gauss-Newton steps with numeric derivatives,
    x <= upper."""
    damping, change = 1e-2, 1e-3
    r = residuals(x)
    loss = (weights * _soft(r)).sum()
    for _ in range(steps):
        columns = [(residuals(np.minimum(x + change * unit, upper)) - r) for unit in np.eye(len(x))]
        at_bound = x >= upper
        jacobian = np.column_stack(columns) / change
        jacobian[:, at_bound] = (
            np.column_stack(
                [(r - residuals(x - change * unit)) / change for unit in np.eye(len(x))[at_bound]]
            )
            if at_bound.any()
            else jacobian[:, at_bound]
        )
        weight = weights / np.sqrt(1.0 + (r / SOFT) ** 2)
        normal = jacobian.T @ (jacobian * weight[:, None])
        slope = jacobian.T @ (r * weight)
        for _ in range(8):
            lift = damping * (np.diag(normal) + 1e-9 * np.trace(normal))
            step = np.clip(np.linalg.solve(normal + np.diag(lift), -slope), -0.7, 0.7)
            trial = np.minimum(x + step, upper)
            r_trial = residuals(trial)
            trial_loss = (weights * _soft(r_trial)).sum()
            if trial_loss < loss:
                break
            damping *= 4
        else:
            break
        gain = (loss - trial_loss) / loss
        x, r, loss, damping = trial, r_trial, trial_loss, max(damping / 5, 1e-9)
        if gain < 1e-6:
            break
    return x


def _soft(r: Floats) -> Floats:
    result: Floats = 2 * SOFT**2 * (np.sqrt(1 + (r / SOFT) ** 2) - 1)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the error table; errors are absolute and relative, NaN where nothing could be held out."""

    device: str
    operator: str
    rows: int
    errors: dict[str, tuple[float, float]]
    """How -> median and 90th percentile."""


def quantiles(errors: Floats) -> tuple[float, float]:
    size = np.abs(errors)
    return float(np.median(size)), float(np.quantile(size, 0.9))


def operators_in(folder: Path, prefix: str) -> list[Measured]:
    """All operators of the public files in `folder` whose names begin with `prefix`; ValueError if there are none."""
    paths = sorted(folder.glob(f"{prefix}*.csv"))
    if not paths:
        raise ValueError(
            f"{folder / prefix}*.csv: no such files; allowed: a folder with the public kernel files"
        )
    return [m for path in paths for m in read_measured(path)]


def fitted(
    measured: Sequence[Measured], device: DeviceSpec, start: Efficiency, families: Sequence[Family] = FAMILIES
) -> Efficiency:
    """`start` with the constants of every family that has rows."""
    for family in families:
        own = rows_of(family, measured)
        if own:
            start = fit_family(family, own, device, start)
    return start


def told(other: Efficiency, own: Efficiency) -> Efficiency:
    """`other` with the LATENCIES and KERNELS of `own`."""
    return replace(other, **{name: getattr(own, name) for name in (*LATENCIES, *KERNELS)})


def shared(devices: Sequence[Rows], families: Sequence[Family] = FAMILIES) -> list[Efficiency]:
    """Constants of each device when all but LATENCIES and KERNELS are the same for all of them."""
    constants = [start for _, start, _ in devices]
    for family in families:
        names = [name for name in family.constants if name not in (*LATENCIES, *KERNELS)]
        own = [
            (device, start, rows_of(family, measured))
            for start, (device, _, measured) in zip(constants, devices, strict=True)
        ]
        if all(rows for _, _, rows in own):
            constants = fit_shared(names, own)
    return constants


def table(
    device: DeviceSpec,
    measured: Sequence[Measured],
    start: Efficiency,
    other: Efficiency,
    one_set: Efficiency,
    families: Sequence[Family] = FAMILIES,
) -> Iterator[Line]:
    """Errors on one device's rows: in sample, held out by shape, with constants of `other` devices, and with
    those that both have in common."""
    for family in families:
        own = rows_of(family, measured)
        if not own:
            continue
        inside = fit_family(family, own, device, start)
        found = {
            "in sample": errors_of(own, device, inside),
            "shapes held out": cross_validated(family, own, device, start),
            "device held out": errors_of(own, device, other),
            "kernels, latency given": errors_of(own, device, told(other, inside)),
            "one set for both": errors_of(own, device, one_set),
        }
        yield _line(device, family.name, found)
        if family.name == "all-reduce":
            graph = np.concatenate([np.full(len(m.seconds), m.kind.endswith("graph")) for m in own])
            yield _line(device, "all-reduce in a graph", {how: e[graph] for how, e in found.items()})


def _line(device: DeviceSpec, operator: str, found: dict[str, Floats]) -> Line:
    rows = len(next(iter(found.values())))
    errors = {how: quantiles(values) for how, values in found.items()}
    return Line(device=device.name, operator=operator, rows=rows, errors=errors)
