"""Rows of whole iterations -> a monotone cost table, its cross-validated error, and what was not measured.

    coserve profile fit FILE [device=NAME model=NAME tp=N]

The fit is `sim.cost.table.Table`. What no row contains comes from the roofline of the same device and
model, times the factor by which the measured forward pass is slower than the roofline's:

    backward    dX = dY W^T has the FLOPs of the forward's GEMMs, attention 2.5 times the forward's
    windows     a finetuning window is a prefill chunk; its loss is lm_head forward and back
    the rest    recomputed windows, LoRA, optimizer

Rows that have backward layers, windows, ... replace the derived terms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiles.schema import Profile
from sim.cost.context import CostContext
from sim.cost.flat import row_seconds
from sim.cost.roofline import Roofline
from sim.cost.table import Table, timed_table

Floats = NDArray[np.float64]

FOLDS = 5
LEAST_ROWS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A table that covers every kind of work, and which kinds it took from the roofline."""

    table: Table
    derived: tuple[str, ...]
    factor: float
    """Measured forward pass over the roofline's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegimeError:
    """Relative errors, absolute but for the bias, of rows that the fit did not see."""

    regime: str
    rows: int
    median: float
    p90: float
    worst: float
    bias: float
    """Median of predicted over measured, minus 1."""
    worst_row: int
    """From 1."""


KINDS = {
    "prefill": "prefill_tokens",
    "decode": "decode_count",
    "windows": "forward_tokens",
    "backward": "backward_layer_tokens",
    "recompute": "recompute_tokens",
    "adapters": "adapters",
    "optimizer": "optimizer_params",
}
"""Kinds of work -> the column that says whether a row has any."""


def fit(profile: Profile, context: CostContext | None = None) -> Fitted:
    """Fit all rows; with a context the kinds of work that they lack are derived from its roofline.

    ValueError when there are too few rows or neither prefill nor decodes among them.
    """
    work = profile.work
    missing = tuple(kind for kind, name in KINDS.items() if not work[name].any())
    if len(profile.seconds) < LEAST_ROWS:
        raise ValueError(
            f"{profile.file}: row {len(profile.seconds)} is the last; "
            f"allowed: at least {LEAST_ROWS} rows to fit"
        )
    if {"prefill", "decode"} <= set(missing):
        raise ValueError(
            f"{profile.file}: no row has prefill_tokens or decode_count; allowed: some of either"
        )
    table = table_of(profile, 0 if context is None else context.lookahead)
    if context is None or not missing:
        return Fitted(table=table, derived=(), factor=1.0)
    return _completed(table, missing, context)


def table_of(profile: Profile, lookahead: int = 0) -> Table:
    """A table of all rows, with host time as it was measured where it was: `sim.cost.table.timed_table`."""
    c = profile.columns
    if "host_s" not in c:
        return Table.fit(profile.work, profile.seconds)
    return timed_table(profile.work, profile.seconds, c["host_s"], c["ahead_s"], lookahead)


def hides(profile: Profile) -> bool:
    """Whether a table with lookahead is fitted to times that a lookahead has shortened already."""
    return "ahead_s" in profile.columns and bool(np.isfinite(profile.columns["ahead_s"]).any())


def cross_validated(profile: Profile) -> list[RegimeError]:
    """Each row predicted by a fit to the other four fifths, by regime and over all."""
    order = np.random.default_rng(0).permutation(len(profile.seconds))
    predicted = np.zeros(len(order))
    for fold in range(FOLDS):
        out = np.zeros(len(order), dtype=bool)
        out[order[fold::FOLDS]] = True
        rest = replace(profile, columns={name: values[~out] for name, values in profile.columns.items()})
        work = {name: values[out] for name, values in profile.work.items()}
        predicted[out] = row_seconds(table_of(rest).curves, work)
    return by_regime(profile, predicted)


def by_regime(profile: Profile, predicted: Floats) -> list[RegimeError]:
    """Errors of `predicted` seconds against the median ones."""
    errors = predicted / profile.seconds - 1.0
    names = regimes(profile.columns)
    result = [_error("all", errors, np.ones(len(errors), dtype=bool))]
    result += [_error(name, errors, names == name) for name in sorted(set(names.tolist()))]
    return result


def regimes(columns: dict[str, Floats]) -> NDArray[np.str_]:
    """What each row does, e.g. 'decode+prefill' or 'decode+backward overlap'."""
    result = []
    for i in range(len(columns["overlap"])):
        kinds = [kind for kind, name in KINDS.items() if kind != "adapters" and columns[name][i] > 0]
        overlap = " overlap" if columns["overlap"][i] else ""
        result.append(("+".join(sorted(kinds)) or "nothing") + overlap)
    return np.array(result)


def _error(regime: str, errors: Floats, keep: NDArray[np.bool_]) -> RegimeError:
    own = np.abs(errors[keep])
    worst = int(np.argmax(np.where(keep, np.abs(errors), -1.0)))
    return RegimeError(
        regime=regime,
        rows=len(own),
        median=float(np.median(own)),
        p90=float(np.quantile(own, 0.9)),
        worst=float(abs(errors[worst])),
        bias=float(np.median(errors[keep])),
        worst_row=worst + 1,
    )


def _completed(table: Table, missing: tuple[str, ...], context: CostContext) -> Fitted:
    ours = table.curves
    theirs = Roofline(max_tokens=max(8192, len(ours.token_s) - 1)).curves(context)
    length = len(theirs.token_s)
    factor = _factor(ours.token_s, theirs.token_s, table.ranges)
    lists = ("token_s", "sampled_s", "loss_s", "recompute_s", "backward_layer_s")
    changes: dict[str, Any] = {name: _extended(getattr(ours, name), length) for name in lists}
    times = {name: [factor * s for s in getattr(theirs, name)] for name in lists}
    if "prefill" in missing:
        changes["prefill"] = theirs.prefill.times(factor)
    if "decode" in missing:
        changes["decode"] = type(theirs.decode)(*(factor * s for s in theirs.decode))
    if "windows" in missing:
        changes |= {"forward": changes.get("prefill", ours.prefill), "loss_s": times["loss_s"]}
    if "recompute" in missing:
        changes |= {"recompute": changes.get("forward", ours.forward), "recompute_s": times["recompute_s"]}
    if "backward" in missing:
        changes |= {
            "backward": theirs.backward.times(factor),
            "backward_layer_s": times["backward_layer_s"],
        }
    if {"adapters", "windows"} <= set(missing):
        for name in ("lora_fixed_s", "lora_token_s", "adapter_s"):
            changes[name] = factor * getattr(theirs, name)
    if "optimizer" in missing:
        changes["optimizer_param_s"] = theirs.optimizer_param_s
    curves = replace(ours, **changes)
    return Fitted(table=Table(curves=curves, ranges=table.ranges), derived=missing, factor=factor)


def _factor(ours: list[float], theirs: list[float], ranges: dict[str, tuple[float, float]]) -> float:
    """Measured over roofline at the largest measured pass: there neither host nor launches count."""
    most = int(ranges["prefill_tokens"][1] + ranges["decode_count"][1])
    tokens = max(1, min(most, len(ours) - 1))
    return ours[tokens] / theirs[tokens] if ours[tokens] > 0 else 1.0


def _extended(values: list[float], length: int) -> list[float]:
    """`values` to `length` entries, by the slope of the last half."""
    start = len(values) // 2
    slope = (values[-1] - values[start]) / max(1, len(values) - 1 - start)
    more = [values[-1] + slope * (i + 1) for i in range(length - len(values))]
    return [*values, *more][:length]
