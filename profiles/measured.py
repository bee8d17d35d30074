"""Measured operators: the public files' columns, recognised and checked.

A file is recognised by its columns alone. Times are milliseconds, but microseconds in a card's profile
(`profiles.card`); `Measured` has seconds. What a row says that is not predicted (other precisions than half, other
collectives, other nodes) is left out with a warning, as is a row of vidur's without a time. A shape that was measured
again has both rows; a row that is there twice to the last digit is refused, or left out of a vidur profile, whose own
reader drops it. The layouts are in `profiles.aiconfigurator` and `profiles.vidur`.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import pandas as pd

from profiles import aiconfigurator, vidur
from profiles.card import is_card, read_card
from profiles.rows import Floats, Layout, Measured, check_numbers, left_out, read_frame
from sim.core.specs import ModelShape

LAYOUTS = (*aiconfigurator.LAYOUTS, *vidur.LAYOUTS)
PRECISION_COLUMNS = ("gemm_dtype", "attn_dtype", "kv_cache_dtype", "allreduce_dtype", "dtype", "quant_mode")
HALF = ("bfloat16", "float16", "half", "fp16", "bf16", "auto")
UNITS = {"ms": 1e-3, "us": 1e-6, "s": 1.0}
"""Of times, in seconds."""
MOST_MISSING = 2
"""Columns that a file may miss to be taken for a broken one of a kind."""
LONGEST_HEADER = 100
"""Letters of it in a message."""
COMMON = ("latency", "batch_size", "num_tokens")
"""Columns that say nothing of a file's kind."""
MEASURED_TOO = ("power", "power_limit")
"""Columns that are results and not what a row is of."""
PRODUCTS = 4
"""Of a layer."""
POSITIVE = frozenset(
    {
        "m", "n", "k", "batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "num_gpus",
        "message_size", "num_workers", "devices_per_node", "size", *vidur.SHAPE, *vidur.ATTENTION,
    }
)  # fmt: skip


def read_measured(
    path: Path, model: ModelShape | None = None, tp: int = 1, unit: str | None = None
) -> list[Measured]:
    """The operators of a public file; ValueError in one line for a file that is not one or is broken. Only a
    card's profile needs the model, whose shapes on one of `tp` devices it does not name. `unit`: one of UNITS, if
    the times are not in their layout's."""
    frame = read_frame(path)
    card = is_card(list(frame.columns))
    if card:
        operators = read_card(str(path), frame, model, tp)
    else:
        frame = aiconfigurator.as_written(_half(str(path), frame))
        layout = recognise(str(path), list(frame.columns))
        _check(str(path), frame, layout)
        operators = layout.read(str(path), _once(str(path), frame, layout))
    if unit is None:
        return operators
    factor = UNITS[unit] / UNITS["us" if card else "ms"]
    return [replace(measured, seconds=factor * measured.seconds) for measured in operators]


def has_operators(columns: Sequence[str]) -> bool:
    """Whether a file with these columns is one that `read_measured` takes."""
    return is_card(columns) or any(_fits(layout, columns) for layout in LAYOUTS)


def _fits(layout: Layout, columns: Sequence[str]) -> bool:
    return set(layout.keys) | set(layout.texts) | set(layout.seconds) <= set(columns)


def recognise(file: str, columns: Sequence[str]) -> Layout:
    """The layout whose columns are all there; else ValueError with what is missing from the nearest."""
    for layout in LAYOUTS:
        if _fits(layout, columns):
            return layout
    needed = {lay.name: (*lay.texts, *lay.keys, *lay.seconds) for lay in LAYOUTS}
    marked = [lay for lay in LAYOUTS if lay.mark & set(columns)] or list(LAYOUTS)
    missing = {lay.name: [n for n in needed[lay.name] if n not in columns] for lay in marked}
    fewest = min(map(len, missing.values()))
    if fewest > MOST_MISSING:
        nearest = max(needed, key=lambda name: len(set(needed[name]) & set(columns)) / len(needed[name]))
        shared = set(needed[nearest]) & (set(columns) - set(COMMON))
        hint = f"; the nearest, {nearest}, has {', '.join(needed[nearest])}" if shared else ""
        found = textwrap.shorten(", ".join(columns), LONGEST_HEADER, placeholder=" ...")
        raise ValueError(
            f"{file}: row 0 (header): no kind that is known has the columns {found}{hint}; profiles/README.md has "
            "the kinds"
        )
    near = [name for name, absent in missing.items() if len(absent) == fewest]
    absent = " or ".join(dict.fromkeys(missing[name][0] for name in near))
    wanted = "; ".join(f"needed for {name}: {', '.join(needed[name])}" for name in near)
    raise ValueError(f"{file}: row 0 (header): column {absent} is missing; {wanted}")


def _half(file: str, frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of half precision, where a column says it."""
    for name in PRECISION_COLUMNS:
        if name not in frame:
            continue
        told = frame[name].astype(object).fillna("nothing").astype(str)
        half = told.str.lower().str.removeprefix("torch.").isin(HALF)
        if not half.any():
            found = ", ".join(sorted(told.unique())[:4])
            raise ValueError(f"{file}: {name} is {found} in every row; allowed: {', '.join(HALF)}")
        if not half.all():
            left_out(file, int((~half).sum()), f"of another {name}")
        frame = frame[half]
    return frame


def _check(file: str, frame: pd.DataFrame, layout: Layout) -> None:
    sizes = (*layout.keys, *(n for n in layout.optional if n in frame))
    check_numbers(file, frame, (*sizes, *layout.seconds), layout.seconds, POSITIVE)
    for name in sizes:
        broken = (pd.to_numeric(frame[name]) % 1 != 0).to_numpy()
        if broken.any():
            row = int(np.argmax(broken))
            raise ValueError(
                f"{file}: row {frame.index[row] + 1}: {name} is {frame[name].iloc[row]}; allowed: a whole number"
            )
    if {"num_heads", "num_key_value_heads"} <= set(frame):
        wrong = (frame["num_heads"] % frame["num_key_value_heads"] != 0).to_numpy()
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(
                f"{file}: row {frame.index[row] + 1}: num_key_value_heads is "
                f"{frame['num_key_value_heads'].iloc[row]}; "
                f"allowed: at most num_heads, and a divisor of them, {frame['num_heads'].iloc[row]}"
            )


def _once(file: str, frame: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """`frame` without rows that are there twice to the last digit, which only vidur's files may have; a shape whose
    time differs was measured again."""
    told = [n for n in frame if not str(n).startswith("Unnamed")]
    expected = layout.twice(frame) if layout.twice is not None else pd.Series(False, frame.index)
    copies = frame.duplicated(told) & ~expected
    if copies.any() and not layout.several:
        row = int(np.argmax(copies.to_numpy()))
        before = int(np.argmax((frame[told] == frame[told].iloc[row]).all(axis=1).to_numpy()))
        shape = ", ".join(f"{n} {frame[n].iloc[row]}" for n in (*layout.texts, *layout.keys)[:6])
        raise ValueError(
            f"{file}: row {frame.index[row] + 1}: the same as row {frame.index[before] + 1} ({shape}); "
            "allowed: one row per shape and time"
        )
    if copies.any():
        left_out(file, int(copies.sum()), "there twice")
        frame = frame[~copies]
    # Whatever else a file says of a row (kernel, library, card, run) tells it from another of its shape.
    again = frame.duplicated([n for n in told if n not in (*layout.seconds, *MEASURED_TOO)]) & ~expected
    if again.any() and not layout.several:
        warnings.warn(f"{file}: {int(again.sum())} rows measure a shape again; all count", stacklevel=2)
    return frame


def whole_layer(operators: Sequence[Measured], seconds: Sequence[Floats]) -> tuple[Measured, Floats] | None:
    """All operators of a layer in an operator profile, added up: as measured, and `seconds` of each. The
    embedding is not in it, additions are there twice where attention and MLP follow each other. None for other files,
    and for one without all products."""
    in_turn = any(measured.operator == vidur.SECOND_NORM for measured in operators)
    times = {"add": 2.0 if in_turn else 1.0, "emb": 0.0, "layernorm": 2.0}
    own = [(m, s, times.get(m.operator, 1.0)) for m, s in zip(operators, seconds, strict=True)]
    layer = [item for item in own if "tp" in item[0].columns and item[2]]
    if sum(measured.kind == "product" for measured, _, _ in layer) < PRODUCTS:
        return None
    tokens = layer[0][0].columns["m"]
    if not all(np.array_equal(m.columns["m"], tokens) for m, _, _ in layer):
        layer = _at_common_tokens(layer)
        if not len(layer[0][1]):
            return None
    first = layer[0][0]
    shape = {"tokens": first.columns["m"], "tp": first.columns["tp"]}
    measured_s = np.sum([count * m.seconds for m, _, count in layer], axis=0)
    whole = replace(first, operator="whole layer", columns=shape, seconds=measured_s)
    return whole, np.sum([count * s for _, s, count in layer], axis=0)


def _at_common_tokens(layer: list[tuple[Measured, Floats, float]]) -> list[tuple[Measured, Floats, float]]:
    """Rows of tokens that every operator has, in rising order; each has them once."""
    common = reduce(np.intersect1d, [m.columns["m"] for m, _, _ in layer])
    result = []
    for measured, seconds, count in layer:
        order = np.argsort(measured.columns["m"])
        order = order[np.isin(measured.columns["m"][order], common)]
        columns = {name: values[order] for name, values in measured.columns.items()}
        kept = replace(measured, columns=columns, seconds=measured.seconds[order], rows=measured.rows[order])
        result.append((kept, seconds[order], count))
    return result
