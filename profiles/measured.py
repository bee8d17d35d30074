"""Measured operators: the public files' columns, recognised and checked.

A file is recognised by its columns alone. Times are milliseconds, but microseconds in a card's profile
(`profiles.card`); `Measured` has seconds. Rows of other precisions than half are left out with a warning.
Sizes of collectives are elements in aiconfigurator's files (a half-precision all-reduce of n takes as long as
an int8 one of 2 n) and bytes in vidur's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.core.specs import ModelShape
from sim.cost.collective import OPERATIONS
from sim.cost.elementwise import whole_blocks

Floats = NDArray[np.float64]

PRECISION_COLUMNS = ("gemm_dtype", "attn_dtype", "kv_cache_dtype", "allreduce_dtype", "dtype", "quant_mode")
HALF = ("bfloat16", "float16", "half", "fp16", "bf16", "auto")

VIDUR_OPERATORS = {
    "attn_pre_proj": "product",
    "attn_post_proj": "product",
    "mlp_up_proj": "product",
    "mlp_down_proj": "product",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "add": "add",
    "mlp_act": "activation",
    "attn_rope": "rotary",
    "emb": "embedding",
}
"""Column of vidur's operator profiles -> kind of operator; a product is a GEMM of a running layer."""
PRODUCTS = 4
"""Of a layer."""
VIDUR_SHAPE = (
    "n_head",
    "n_kv_head",
    "n_embd",
    "n_expanded_embd",
    "vocab_size",
    "num_tokens",
    "num_tensor_parallel_workers",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Rows of one operator."""

    file: str
    operator: str
    """Shown in tables; `kind` is the formula that predicts it."""
    kind: str
    columns: dict[str, Floats]
    """Shape by name, each of shape (rows,)."""
    seconds: Floats
    rows: NDArray[np.int64]
    """Row of each in the file, from 1, without the header."""

    def where(self, keep: NDArray[np.bool_]) -> Measured:
        return Measured(
            file=self.file,
            operator=self.operator,
            kind=self.kind,
            columns={name: values[keep] for name, values in self.columns.items()},
            seconds=self.seconds[keep],
            rows=self.rows[keep],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One kind of public file."""

    name: str
    keys: tuple[str, ...]
    """Columns that tell one row from another; numbers unless in `texts`."""
    seconds: tuple[str, ...]
    """Columns of times, milliseconds."""
    read: Callable[[str, pd.DataFrame], list[Measured]]
    texts: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    mark: frozenset[str] = frozenset()
    """Columns that no other layout has: a file with them and without others misses a column."""
    repeats: Callable[[pd.DataFrame], pd.Series[bool]] | None = None
    """Rows that may be there more than once; None: none may."""


def read_measured(path: Path, model: ModelShape | None = None, tp: int = 1) -> list[Measured]:
    """The operators of a public file; ValueError in one line for a file that is not one or is broken. Only a
    card's profile needs the model, whose shapes on one of `tp` devices it does not name."""
    from profiles.card import is_card, read_card

    frame = read_frame(path)
    if is_card(list(frame.columns)):
        return read_card(str(path), frame, model, tp)
    frame = _half(str(path), frame)
    if {"isl", "step"} <= set(frame) and (frame["isl"] == 1).all() and not (frame["step"] == 0).all():
        frame = frame.drop(columns="isl")  # decodes, with a column for the one token of each
    layout = recognise(str(path), list(frame.columns))
    _check(str(path), frame, layout)
    return layout.read(str(path), frame)


def read_frame(path: Path) -> pd.DataFrame:
    """A CSV or Parquet file; ValueError naming it when it cannot be read or is empty."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise ValueError(
            f"{path}: not a readable CSV or Parquet file: {str(error).splitlines()[0]}"
        ) from None
    if not len(frame):
        raise ValueError(f"{path}: has no rows")
    return frame.rename(columns=lambda name: str(name).strip())


def has_operators(columns: Sequence[str]) -> bool:
    """Whether a file with these columns is one that `read_measured` takes."""
    from profiles.card import is_card

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
    near = [name for name, absent in missing.items() if len(absent) == fewest]
    absent = " or ".join(dict.fromkeys(missing[name][0] for name in near))
    wanted = "; ".join(f"needed for {name}: {', '.join(needed[name])}" for name in near)
    raise ValueError(f"{file}: row 0 (header): column {absent} is missing; {wanted}")


def _half(file: str, frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of half precision, where a column says it."""
    for name in PRECISION_COLUMNS:
        if name not in frame:
            continue
        half = frame[name].astype(str).str.lower().isin(HALF)
        if not half.any():
            found = ", ".join(map(str, sorted(frame[name].astype(str).unique())[:4]))
            raise ValueError(f"{file}: {name} is {found} in every row; allowed: {', '.join(HALF)}")
        if not half.all():
            warnings.warn(f"{file}: {int((~half).sum())} rows of another {name} left out", stacklevel=2)
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
    _check_repeats(file, frame, layout)
    if {"num_heads", "num_key_value_heads"} <= set(frame):
        wrong = (frame["num_heads"] % frame["num_key_value_heads"] != 0).to_numpy()
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(
                f"{file}: row {frame.index[row] + 1}: num_key_value_heads is "
                f"{frame['num_key_value_heads'].iloc[row]}; "
                f"allowed: at most num_heads, and a divisor of them, {frame['num_heads'].iloc[row]}"
            )


def check_numbers(
    file: str,
    frame: pd.DataFrame,
    names: Sequence[str],
    times: Collection[str],
    positive: Collection[str],
) -> None:
    """ValueError for the first value that is no number, a time not above 0, or a size below 0 (or 1)."""
    for name in names:
        values = pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64)
        # A time is above 0, a size at least 0 (a window of 0 is none), and both are numbers.
        least = math.ulp(0.0) if name in times else 1.0 if name in positive else 0.0
        bad = ~np.isfinite(values) | (values < least)
        if bad.any():
            row = int(np.argmax(bad))
            allowed = "above 0" if name in times else f"at least {least:.0f}"
            raise ValueError(
                f"{file}: row {frame.index[row] + 1}: {name} is {frame[name].iloc[row]}; "
                f"allowed: a number {allowed}"
            )


def _check_repeats(file: str, frame: pd.DataFrame, layout: Layout) -> None:
    # Whatever else a file says of a row (kernel, library, card, run) tells it from another of its shape.
    first = (*layout.texts, *layout.keys)
    names = [
        *first,
        *(n for n in frame if n not in (*first, *layout.seconds) and not str(n).startswith("Unnamed")),
    ]
    if layout.repeats is None:
        again = frame.duplicated(names)
    else:
        free = layout.repeats(frame)
        again = (frame.duplicated(names) & ~free) | (frame.duplicated() & ~free)
    if again.any():
        row = int(np.argmax(again.to_numpy()))
        same = (frame[names] == frame[names].iloc[row]).all(axis=1).to_numpy()
        before = int(np.argmax(same))
        what = ", ".join(f"{n} {frame[n].iloc[row]}" for n in names[:6])
        raise ValueError(
            f"{file}: row {frame.index[row] + 1}: the same as row {frame.index[before] + 1} ({what}); "
            "allowed: one row per shape"
        )


def _floats(frame: pd.DataFrame, name: str, default: float | None = None) -> Floats:
    if name not in frame:
        assert default is not None
        return np.full(len(frame), default)
    return frame[name].to_numpy(dtype=np.float64)


def _measured(
    file: str, frame: pd.DataFrame, operator: str, kind: str, columns: dict[str, Any], time: str
) -> Measured:
    rows = frame.index.to_numpy(dtype=np.int64) + 1
    seconds = _floats(frame, time) / 1e3
    return Measured(file=file, operator=operator, kind=kind, columns=columns, seconds=seconds, rows=rows)


def _gemm(file: str, frame: pd.DataFrame) -> list[Measured]:
    columns = {name: _floats(frame, name) for name in ("m", "n", "k")}
    return [_measured(file, frame, "gemm", "gemm", columns, "latency")]


def _attention(
    file: str, frame: pd.DataFrame, operator: str, tokens: Floats, context: Floats
) -> list[Measured]:
    columns = {
        "batch": _floats(frame, "batch_size"),
        "tokens": tokens,
        "context": context,
        "heads": _floats(frame, "num_heads"),
        "kv_heads": _floats(frame, "num_key_value_heads"),
        "head_dim": _floats(frame, "head_dim", 128.0),
        "window": _floats(frame, "window_size", 0.0),
    }
    return [_measured(file, frame, operator, "attention", columns, "latency")]


def _context(file: str, frame: pd.DataFrame) -> list[Measured]:
    tokens = _floats(frame, "isl")
    return _attention(file, frame, "context attention", tokens, np.zeros_like(tokens))


def _generation(file: str, frame: pd.DataFrame) -> list[Measured]:
    # A step is the tokens in the cache before this one; with its own key it sees step + 1.
    step = _floats(frame, "step")
    return _attention(file, frame, "generation attention", np.ones_like(step), step)


def _nccl(file: str, frame: pd.DataFrame) -> list[Measured]:
    element_bytes = {"half": 2.0, "bfloat16": 2.0, "float": 4.0, "int8": 1.0, "fp8": 1.0}
    unknown = ~frame["nccl_dtype"].isin(element_bytes)
    if unknown.any():
        row = int(np.argmax(unknown.to_numpy()))
        raise ValueError(
            f"{file}: row {row + 1}: nccl_dtype is {frame['nccl_dtype'].iloc[row]}; "
            f"allowed: {', '.join(element_bytes)}"
        )
    known = frame["op_name"].isin(OPERATIONS)
    if not known.any():
        raise ValueError(
            f"{file}: op_name is {frame['op_name'].iloc[0]}; allowed: some of {', '.join(OPERATIONS)}"
        )
    if not known.all():
        others = ", ".join(map(str, frame["op_name"][~known].unique()[:4]))
        warnings.warn(f"{file}: {int((~known).sum())} rows of {others} left out", stacklevel=2)
    result = []
    for name, part in frame[known].groupby("op_name", sort=True):
        size = _floats(part, "message_size") * part["nccl_dtype"].map(element_bytes).to_numpy(np.float64)
        columns = {"bytes": size, "devices": _floats(part, "num_gpus")}
        result.append(_measured(file, part, f"nccl {name}", f"nccl {name}", columns, "latency"))
    return result


def _custom(file: str, frame: pd.DataFrame) -> list[Measured]:
    result = []
    for name, part in frame.groupby("backend", sort=True):
        columns = {"bytes": 2.0 * _floats(part, "message_size"), "devices": _floats(part, "num_gpus")}
        kind = "all-reduce eager" if "eager" in str(name) else "all-reduce graph"
        result.append(_measured(file, part, f"all-reduce {name}", kind, columns, "latency"))
    return result


def _vidur_network(file: str, frame: pd.DataFrame) -> list[Measured]:
    """Workers in one node; across nodes is another link."""
    part = frame[(frame["num_workers"] <= frame["devices_per_node"]) & (frame["collective"] == "all_reduce")]
    if not len(part):
        raise ValueError(
            f"{file}: row 1: collective is {frame['collective'].iloc[0]}, num_workers "
            f"{frame['num_workers'].iloc[0]} and devices_per_node {frame['devices_per_node'].iloc[0]}; "
            "allowed: some row of all_reduce inside one node"
        )
    columns = {"bytes": _floats(part, "size"), "devices": _floats(part, "num_workers")}
    return [_measured(file, part, "all-reduce", "nccl all_reduce", columns, "time_stats.all_reduce.median")]


def _vidur(file: str, frame: pd.DataFrame) -> list[Measured]:
    shape = {name: _floats(frame, name) for name in VIDUR_SHAPE}
    tp, hidden, tokens = shape["num_tensor_parallel_workers"], shape["n_embd"], shape["num_tokens"]
    _check_tp(file, shape)
    head_dim = hidden / shape["n_head"]
    query = shape["n_head"] * head_dim / tp
    kv = np.maximum(1.0, shape["n_kv_head"] / tp) * head_dim
    ffn = shape["n_expanded_embd"] / tp
    gated = np.full(len(frame), 2.0)
    if "use_gated_mlp" in frame:
        gated = np.where(frame["use_gated_mlp"].astype(str).str.lower().isin(("true", "1", "1.0")), 2.0, 1.0)
    products = {
        "attn_pre_proj": (hidden, query + 2 * kv),
        "attn_post_proj": (query, hidden),
        "mlp_up_proj": (hidden, gated * ffn),
        "mlp_down_proj": (ffn, hidden),
    }
    values = {
        "input_layernorm": 2 * hidden,
        "post_attention_layernorm": 2 * hidden,
        "add": 3 * hidden,
        "mlp_act": (gated + 1) * whole_blocks(ffn),
        "attn_rope": 2 * (query + kv),
        "emb": 2 * hidden,
    }
    result = []
    for name, kind in VIDUR_OPERATORS.items():
        time = f"time_stats.{name}.median"
        # A model without this operator has no column, or an empty one.
        if time not in frame or frame[time].isna().all():
            continue
        check_numbers(file, frame, (time,), (time,), ())
        if kind == "product":
            k, n = products[name]
            columns = {"m": tokens, "n": n, "k": k, "tp": tp}
        else:
            columns = {"m": tokens, "values": values[name], "tp": tp}
        result.append(_measured(file, frame, name, kind, columns, time))
    if not result:
        known = ", ".join(f"time_stats.{name}.median" for name in VIDUR_OPERATORS)
        raise ValueError(f"{file}: row 0 (header): no column with times; allowed: some of {known}")
    return result


def whole_layer(operators: Sequence[Measured], seconds: Sequence[Floats]) -> tuple[Measured, Floats] | None:
    """All operators of a layer in an operator profile, added up: as measured, and `seconds` of each. The
    embedding is not in it, additions are there twice. None for other files, and for one without all products."""
    times = {"add": 2.0, "emb": 0.0, "layernorm": 2.0}
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


def _check_tp(file: str, shape: dict[str, Floats]) -> None:
    tp, heads, kv = (shape[n] for n in ("num_tensor_parallel_workers", "n_head", "n_kv_head"))
    wrong = (heads % tp != 0) | ((kv % tp != 0) & (tp % kv != 0)) | (shape["n_expanded_embd"] % tp != 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{file}: row {row + 1}: num_tensor_parallel_workers is {tp[row]:.0f}; allowed: a divisor of "
            f"n_head {heads[row]:.0f}, n_kv_head {kv[row]:.0f} and n_expanded_embd "
            f"{shape['n_expanded_embd'][row]:.0f}"
        )


def _written_twice(frame: pd.DataFrame) -> pd.Series[bool]:
    """Both of aiconfigurator's loops, over grouped and over plain heads, write these."""
    return frame["num_heads"] == frame["num_key_value_heads"]


def _different_times(frame: pd.DataFrame) -> pd.Series[bool]:
    """Vidur measures a shape several times; only a whole row twice is a mistake."""
    return ~frame.drop(columns=[c for c in frame if str(c).startswith("Unnamed")]).duplicated()


POSITIVE = frozenset(
    {
        "m", "n", "k", "batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "num_gpus",
        "message_size", "num_workers", "devices_per_node", "size", *VIDUR_SHAPE,
    }
)  # fmt: skip

LAYOUTS = (
    Layout(
        name="gemm",
        keys=("m", "n", "k"),
        seconds=("latency",),
        read=_gemm,
        mark=frozenset({"m", "n", "k"}),
    ),
    Layout(
        name="context attention",
        keys=("batch_size", "isl", "num_heads", "num_key_value_heads"),
        seconds=("latency",),
        optional=("head_dim", "window_size"),
        read=_context,
        mark=frozenset({"isl"}),
        repeats=_written_twice,
    ),
    Layout(
        name="generation attention",
        keys=("batch_size", "step", "num_heads", "num_key_value_heads"),
        seconds=("latency",),
        optional=("head_dim", "window_size"),
        read=_generation,
        mark=frozenset({"step"}),
    ),
    Layout(
        name="NCCL",
        keys=("num_gpus", "message_size"),
        texts=("op_name", "nccl_dtype"),
        seconds=("latency",),
        read=_nccl,
        mark=frozenset({"nccl_dtype", "op_name"}),
    ),
    Layout(
        name="custom all-reduce",
        keys=("num_gpus", "message_size"),
        texts=("backend",),
        seconds=("latency",),
        read=_custom,
        mark=frozenset({"backend"}),
    ),
    Layout(
        name="all-reduce profile",
        keys=("num_workers", "devices_per_node", "size"),
        texts=("collective",),
        seconds=("time_stats.all_reduce.median",),
        read=_vidur_network,
        mark=frozenset({"collective", "time_stats.all_reduce.median"}),
        repeats=_different_times,
    ),
    Layout(
        name="operator profile",
        keys=VIDUR_SHAPE,
        seconds=(),
        read=_vidur,
        mark=frozenset({"n_embd", "num_tensor_parallel_workers"}),
        repeats=_different_times,
    ),
)
