"""Measured rows against what is predicted for a device: the errors of every operator.

    coserve profile check FILE device=a100_80gb [model=llama_3_1_8b] [tp=1] [gemm=layer|table|curve]
                          [cost=roofline] [unit=ms|us|s] [bound_median=8] [bound_p90=20]

FILE has the columns of a public kernel file (`profiles.measured`) or of a profile (`profiles.schema`). With
a model, the operators of its own shapes have lines of their own. Without `gemm=`, the products of an operator
profile are those of a running layer, and those of a kernel file are alone, corrected. Bounds are per cent, on
every line that FILE has rows for; above one the exit code is 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from profiles.fit import by_regime
from profiles.measured import read_measured, whole_layer
from profiles.named import card_named
from profiles.predict import predicted_s
from profiles.rows import Measured, read_frame
from profiles.schema import is_profile, read_profile
from profiles.table_file import TableFile
from sim.core.specs import DeviceSpec, LoraSpec, ModelShape
from sim.cost.architectures import measured_on
from sim.cost.context import CostBuilder, CostContext
from sim.cost.flat import row_seconds
from sim.cost.gemm_table import table_for
from sim.cost.iteration import IterationCost
from sim.cost.roofline import Roofline

Floats = NDArray[np.float64]

COSTS = ("roofline", "table")
CONSTANTS = {
    "product": ("layer_",),
    "attention": ("attention_", "decode_"),
    "mixed": ("attention_", "decode_"),
    "nccl": ("nccl_",),
    "all-reduce": ("allreduce_",),
    "iteration": ("layer_", "attention_", "decode_", "norm_"),
}
"""First word of a kind of operator -> beginnings of the constants that predict it; of others, the word itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckLine:
    """Errors of one operator or regime: absolute and relative, and the worst row in words."""

    name: str
    rows: int
    median: float
    p90: float
    worst: float
    bias: float
    """Median of predicted over measured, minus 1."""
    worst_row: str


def check_file(
    path: Path,
    device: DeviceSpec,
    model: ModelShape | None,
    tp: int,
    cost: str = "roofline",
    gemm: str | None = None,
    changed: bool = False,
    unit: str | None = None,
) -> list[CheckLine]:
    """One line per operator or regime; ValueError for a broken file, or a profile without a model. Warns when the
    constants come from another card, or its datasheet's numbers were `changed`, and when the times look like another
    unit's."""
    if model is not None:
        _check_tp(path, model, tp)
    frame = read_frame(path)
    if is_profile(list(frame.columns)):
        if model is None:
            raise ValueError(f"{path}: a profile of whole iterations needs model=NAME")
        lines = _check_profile(path, device, model, tp, cost)
        if cost == "roofline":
            _warn(borrowed(path, device, ("iteration",), changed))
        return lines
    if cost != "roofline":
        raise ValueError(f"{path}: has operators, which cost={cost} does not know; allowed: cost=roofline")
    operators = read_measured(path, model, tp, unit)
    _warn(_another_card(path, frame, device))
    _warn(_in_sample(path, operators, device, gemm))
    _warn(borrowed(path, device, {measured.kind for measured in operators}, changed))
    lines, ratios = [], []
    for measured in operators:
        seconds = predicted_s(measured, device, gemm=gemm or ("table" if measured.kind == "gemm" else None))
        ratios.append(measured.seconds / seconds)
        lines.append(_line(measured, seconds))
        own = own_shapes(measured, model, tp) if model is not None else None
        if model is not None and own is not None and own.any() and not own.all():
            lines.append(_line(replace(measured.where(own), operator=f"  of {model.name}"), seconds[own]))
    _warn(_another_unit(path, np.concatenate(ratios)))
    return lines + _whole_layer(operators, device, gemm)


def _another_card(path: Path, frame: pd.DataFrame, device: DeviceSpec) -> str | None:
    """In one line, that rows say to be of cards that are known by another name."""
    said = frame["device"].dropna().astype(str).unique().tolist() if "device" in frame else []
    others = [text for text in said if card_named(text) not in (None, device.name)]
    return f"{path}: rows of {', '.join(others)} are judged as {device.name}" if others else None


def _in_sample(path: Path, operators: Sequence[Measured], device: DeviceSpec, gemm: str | None) -> str | None:
    """In one line, that products lie on the grid of the corrections that predict them."""
    table = table_for(device)
    products = [measured.columns for measured in operators if measured.kind == "gemm"]
    if table is None or not products or gemm not in (None, "table"):
        return None
    nodes = {"m": table.m, "n": table.n, "k": table.k}
    on = [np.logical_and.reduce([np.isin(c[name], nodes[name]) for name in nodes]) for c in products]
    rows = np.concatenate(on)
    if not rows.any():
        return None
    return (
        f"{path}: in sample: {rows.sum():,} of {len(rows):,} products have the shapes that the corrections of "
        f"profiles/tables/{table.name}.json were fitted to rows of; its errors: {table.error}"
    )


def _another_unit(path: Path, ratios: Floats) -> str | None:
    """In one line, that the times, which are `ratios` of the predicted ones, are nearly all off by about a thousand."""
    least, middle, most = np.quantile(ratios, (0.1, 0.5, 0.9)).tolist()
    if least > 100 and most < 10_000:
        way = "unit=us takes them as microseconds"
    elif 1 / most > 100 and 1 / least < 10_000:
        way = "unit=s takes them as seconds, unit=ms as milliseconds"
    else:
        return None
    return f"{path}: the times are {middle:.2g} of the predicted ones; {way}"


def _warn(text: str | None) -> None:
    if text is not None:
        warnings.warn(text, stacklevel=3)


def borrowed(path: Path, device: DeviceSpec, kinds: Collection[str], changed: bool) -> str | None:
    """In one line, which cards the constants behind operators of `kinds` were measured on; None when all were on this
    one alone, with the numbers of its file (not `changed`)."""
    found: dict[str, list[str]] = {}
    own = False
    for kind in sorted(kinds):
        for prefix in CONSTANTS.get(kind.partition(" ")[0], (f"{kind}_",)):
            card = measured_on(device, prefix)
            own = own or device.name in card.partition(",")[0].split(" and ")
            if changed or card != device.name:
                found.setdefault(card, []).append(prefix.rstrip("_"))
    if not found:
        return None
    cards = "; ".join(f"{card} ({', '.join(dict.fromkeys(names))})" for card, names in found.items())
    what = f"{device.name} with other numbers" if changed else device.name
    part, rest = ("only in part", "the rest ") if own and not changed else ("not", "")
    return f"{path}: {part} fitted to measurements of {what}, {rest}an extrapolation: constants measured on {cards}"


def _check_tp(path: Path, model: ModelShape, tp: int) -> None:
    try:
        model.check_tp(tp)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def above(lines: Sequence[CheckLine], bound_median: float | None, bound_p90: float | None) -> list[str]:
    """What exceeds its bound (per cent), in words."""
    found = []
    for line in lines:
        for name, value, bound in (("median", line.median, bound_median), ("p90", line.p90, bound_p90)):
            if bound is not None and 100 * value > bound:
                found.append(f"{line.name.strip()}: {name} {100 * value:.1f} % is above {bound:g} %")
    return found


def own_shapes(measured: Measured, model: ModelShape, tp: int) -> NDArray[np.bool_] | None:
    """Rows with a product or heads of this model on one of `tp` devices; None for other operators."""
    c = measured.columns
    kv_heads = max(1, model.kv_heads // tp)
    if measured.kind == "attention":
        own = (c["heads"] == model.heads // tp) & (c["kv_heads"] == kv_heads)
        return np.asarray(own & (c["head_dim"] == model.head_dim) & (c["window"] == 0))
    if measured.operator != "gemm":
        return None
    query, ffn = model.q_dim // tp, model.ffn // tp
    shapes = (
        (model.hidden, query + 2 * kv_heads * model.head_dim),
        (query, model.hidden),
        (model.hidden, 2 * ffn),
        (ffn, model.hidden),
    )
    rows = [(c["k"] == k) & (c["n"] == n) for k, n in shapes]
    return np.asarray(np.logical_or.reduce(rows))


def _whole_layer(operators: list[Measured], device: DeviceSpec, gemm: str | None) -> list[CheckLine]:
    seconds = [predicted_s(m, device, gemm=gemm) for m in operators]
    whole = whole_layer(operators, seconds)
    return [] if whole is None else [_line(*whole)]


def _line(measured: Measured, seconds: Floats) -> CheckLine:
    signed = seconds / measured.seconds - 1.0
    errors = np.abs(signed)
    worst = int(np.argmax(errors))
    shape = ", ".join(f"{name} {values[worst]:g}" for name, values in measured.columns.items())
    return CheckLine(
        name=measured.operator,
        rows=len(errors),
        median=float(np.median(errors)),
        p90=float(np.quantile(errors, 0.9)),
        worst=float(errors[worst]),
        bias=float(np.median(signed)),
        worst_row=f"row {measured.rows[worst]}: {shape}: measured {1e6 * measured.seconds[worst]:.1f} us, "
        f"predicted {1e6 * seconds[worst]:.1f} us",
    )


def _check_profile(path: Path, device: DeviceSpec, model: ModelShape, tp: int, cost: str) -> list[CheckLine]:
    profile = read_profile(path)
    of = profile.provenance
    if of is not None and (of.device, of.model, of.tp) != (device.name, model.name, tp):
        raise ValueError(f"{path}: measured for {of.model} on {of.tp} x {of.device}; ask for that")
    context = CostContext(device=device, model=model, tp=tp, lora=LoraSpec(), seed=0)
    builder: CostBuilder = Roofline() if cost == "roofline" else TableFile()
    built = builder.build(context)
    assert isinstance(built, IterationCost)
    seconds = row_seconds(built.curves, profile.work)
    return [
        CheckLine(
            name=e.regime,
            rows=e.rows,
            median=e.median,
            p90=e.p90,
            worst=e.worst,
            bias=e.bias,
            worst_row=f"row {e.worst_row}: measured {1e3 * profile.seconds[e.worst_row - 1]:.3f} ms, "
            f"predicted {1e3 * seconds[e.worst_row - 1]:.3f} ms",
        )
        for e in by_regime(profile, seconds)
    ]
