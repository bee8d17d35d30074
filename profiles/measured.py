"""Measured operators: the public files' columns, recognised and checked.

A file is recognised by its columns alone. Times are milliseconds, but microseconds in a card's profile
(`profiles.card`); `Measured` has seconds. What a row says that is not predicted (other precisions than half, other
collectives, other nodes) is left out with a warning, as is a row of vidur's without a time. A shape that was measured
again has both rows; a row that is there twice to the last digit is refused, or left out of a vidur profile, whose own
reader drops it. Sizes of collectives are elements in aiconfigurator's files (a half-precision all-reduce of n takes
as long as an int8 one of 2 n) and bytes in vidur's.
"""

from __future__ import annotations

import gzip
import math
import warnings
import zlib
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
COLLECTIVE_BYTES = {
    **dict.fromkeys(("half", "float16", "fp16", "bfloat16", "bf16"), 2.0),
    **dict.fromkeys(("float", "float32", "fp32"), 4.0),
    **dict.fromkeys(("int8", "uint8", "fp8", "float8"), 1.0),
}
"""Of an element, by the name of its type."""
UNITS = {"ms": 1e-3, "us": 1e-6, "s": 1.0}
"""Of times, in seconds."""
MOST_MISSING = 2
"""Columns that a file may miss to be taken for a broken one of a kind."""
MEASURED_TOO = ("power", "power_limit")
"""Columns that are results and not what a row is of."""

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
SECOND_NORM = "post_attention_layernorm"
"""A layer without it has attention and MLP side by side."""
VIDUR_ATTENTION = ("n_embd", "n_q_head", "n_kv_head", "num_tensor_parallel_workers")
"""Columns of vidur's attention profiles; the next ones are what a row computes."""
VIDUR_BATCH = ("batch_size", "prefill_chunk_size", "kv_cache_size")
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
    several: bool = False
    """Whether each shape is measured several times as a matter of course."""
    twice: Callable[[pd.DataFrame], pd.Series[bool]] | None = None
    """Rows that are written twice as a matter of course; None: none is."""


def read_measured(
    path: Path, model: ModelShape | None = None, tp: int = 1, unit: str | None = None
) -> list[Measured]:
    """The operators of a public file; ValueError in one line for a file that is not one or is broken. Only a
    card's profile needs the model, whose shapes on one of `tp` devices it does not name. `unit`: one of UNITS, if
    the times are not in their layout's."""
    from profiles.card import is_card, read_card

    frame = read_frame(path)
    card = is_card(list(frame.columns))
    if card:
        operators = read_card(str(path), frame, model, tp)
    else:
        frame = _as_written(_half(str(path), frame))
        layout = recognise(str(path), list(frame.columns))
        _check(str(path), frame, layout)
        operators = layout.read(str(path), _once(str(path), frame, layout))
    if unit is None:
        return operators
    factor = UNITS[unit] / UNITS["us" if card else "ms"]
    return [replace(measured, seconds=factor * measured.seconds) for measured in operators]


def read_frame(path: Path) -> pd.DataFrame:
    """A CSV or Parquet file; ValueError naming it when it cannot be read or is empty. A CSV file with semicolons has
    decimal commas."""
    if path.is_dir():
        files = sorted(found.name for found in path.iterdir() if found.suffix in (".csv", ".parquet", ".txt"))
        raise ValueError(
            f"{path}: is a folder; give a file" + (f": there are {', '.join(files)}" if files else "")
        )
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: not a readable CSV or Parquet file: {str(error).splitlines()[0]}"
        ) from None
    if not len(frame):
        raise ValueError(f"{path}: has no rows")
    return frame.rename(columns=lambda name: str(name).strip())


def _read_csv(path: Path) -> pd.DataFrame:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        header = file.readline()
    if header.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS in place of the data, which `git lfs pull` fetches")
    separator = next((sep for sep in (",", ";", "\t") if sep.encode() in header), ",")
    decimal = "," if separator == ";" else "."
    return pd.read_csv(path, encoding="utf-8-sig", sep=separator, decimal=decimal)


def _as_written(frame: pd.DataFrame) -> pd.DataFrame:
    """aiconfigurator's variants of a column, as its other collectors write it."""
    if {"isl", "step"} <= set(frame) and (frame["isl"] == 1).all() and not (frame["step"] == 0).all():
        frame = frame.drop(columns="isl")  # decodes, with a column for the one token of each
    if "window_size" in frame:
        frame = frame.assign(window_size=frame["window_size"].replace(-1, 0))  # both are none
    if "allreduce_dtype" in frame and "backend" not in frame:
        name = next((n for n in ("implementation", "kernel_source", "framework") if n in frame), None)
        frame = frame.assign(backend="unnamed" if name is None else frame[name].astype(str))
    return frame


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
    if fewest > MOST_MISSING:
        kinds = "; ".join(f"{name}: {', '.join(names)}" for name, names in needed.items() if names)
        raise ValueError(
            f"{file}: row 0 (header): {', '.join(columns)}: of no kind that is known; known are {kinds}"
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
        half = frame[name].astype(str).str.lower().str.removeprefix("torch.").isin(HALF)
        if not half.any():
            found = ", ".join(map(str, sorted(frame[name].astype(str).unique())[:4]))
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


def left_out(file: str, rows: int, what: str) -> None:
    """Warn of them."""
    warnings.warn(f"{file}: {rows} row{'s' * (rows > 1)} {what} left out", stacklevel=3)


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


def _some(file: str, frame: pd.DataFrame, name: str, known: Collection[str]) -> pd.DataFrame:
    """The rows whose `name` is known; ValueError when none is."""
    keep = frame[name].isin(known)
    if not keep.any():
        raise ValueError(f"{file}: {name} is {frame[name].iloc[0]}; allowed: some of {', '.join(known)}")
    if not keep.all():
        others = ", ".join(map(str, frame[name][~keep].unique()[:4]))
        left_out(file, int((~keep).sum()), f"of {name} {others}")
    return frame[keep]


def _nccl(file: str, frame: pd.DataFrame) -> list[Measured]:
    known = _some(file, _some(file, frame, "nccl_dtype", COLLECTIVE_BYTES), "op_name", OPERATIONS)
    result = []
    for name, part in known.groupby("op_name", sort=True):
        size = _floats(part, "message_size") * part["nccl_dtype"].map(COLLECTIVE_BYTES).to_numpy(np.float64)
        columns = {"bytes": size, "devices": _floats(part, "num_gpus")}
        result.append(_measured(file, part, f"nccl {name}", f"nccl {name}", columns, "latency"))
    return result


def _custom(file: str, frame: pd.DataFrame) -> list[Measured]:
    if "op_name" in frame:
        frame = _some(file, frame, "op_name", ("all_reduce",))  # and not one fused with a norm
    result = []
    for name, part in frame.groupby("backend", sort=True):
        columns = {"bytes": 2.0 * _floats(part, "message_size"), "devices": _floats(part, "num_gpus")}
        kind = "all-reduce eager" if "eager" in str(name) else "all-reduce graph"
        result.append(_measured(file, part, f"all-reduce {name}", kind, columns, "latency"))
    return result


def _in_one_node(file: str, frame: pd.DataFrame, collective: str) -> pd.DataFrame:
    """Workers in one node; across nodes is another link."""
    frame = _some(file, frame, "collective", (collective,))
    inside = frame["num_workers"] <= frame["devices_per_node"]
    if not inside.any():
        raise ValueError(
            f"{file}: row {frame.index[0] + 1}: collective is {collective}, num_workers "
            f"{frame['num_workers'].iloc[0]} and devices_per_node {frame['devices_per_node'].iloc[0]}; "
            f"allowed: some row of {collective} inside one node"
        )
    if not inside.all():
        left_out(file, int((~inside).sum()), "across nodes")
    return frame[inside]


def _vidur_network(file: str, frame: pd.DataFrame) -> list[Measured]:
    part = _in_one_node(file, frame, "all_reduce")
    columns = {"bytes": _floats(part, "size"), "devices": _floats(part, "num_workers")}
    return [_measured(file, part, "all-reduce", "nccl all_reduce", columns, "time_stats.all_reduce.median")]


def _vidur_send(file: str, frame: pd.DataFrame) -> list[Measured]:
    """One device to another: half of what an all-to-all of two exchanges, by the same sends."""
    part = _in_one_node(file, frame, "send_recv")
    size = _floats(part, "size")
    columns = {"bytes": 2.0 * size, "devices": np.full_like(size, 2.0)}
    return [
        _measured(file, part, "send and receive", "nccl alltoall", columns, "time_stats.send_recv.median")
    ]


def _vidur_attention(file: str, frame: pd.DataFrame) -> list[Measured]:
    """A chunk of one sequence after what is cached of it, or decodes that are equally long. The time of writing the
    cache, which is a column of its own and may be missing, is added."""
    tp, heads, kv = (frame[n] for n in ("num_tensor_parallel_workers", "n_q_head", "n_kv_head"))
    _check_degrees(file, frame, tp, {"n_q_head": heads}, kv)
    chunk = frame["prefill_chunk_size"] > 0
    fresh = frame["kv_cache_size"] == 0
    kinds = {
        "context attention": (chunk & fresh, "attn_prefill"),
        "context attention after a context": (chunk & ~fresh, "attn_prefill"),
        "generation attention": (~chunk, "attn_decode"),
    }
    result = []
    for name, (rows, operator) in kinds.items():
        times = [n for n in (f"time_stats.{operator}.median", "time_stats.attn.median") if n in frame]
        part = _timed(file, frame[rows], times[:1]) if times else frame[:0]
        if not len(part):
            continue
        saved = "time_stats.attn_kv_cache_save.median"
        save = pd.to_numeric(part[saved]) if saved in part else pd.Series(np.nan, part.index)
        one = np.ones(len(part))
        columns = {
            "batch": _floats(part, "batch_size"),
            "tokens": np.maximum(_floats(part, "prefill_chunk_size"), 1.0),
            "context": _floats(part, "kv_cache_size"),
            "heads": (heads / tp)[part.index].to_numpy(np.float64),
            "kv_heads": np.maximum(1.0, (kv / tp)[part.index].to_numpy(np.float64)),
            "head_dim": (frame["n_embd"] / heads)[part.index].to_numpy(np.float64),
            "window": 0.0 * one,
            "written": (save > 0).to_numpy(np.float64),
        }
        timed = part.assign(**{times[0]: part[times[0]] + save.fillna(0.0)})
        result.append(_measured(file, timed, name, "attention", columns, times[0]))
    if not result:
        raise ValueError(
            f"{file}: no row has a time; needed: time_stats.attn_prefill.median of chunks, or "
            "time_stats.attn_decode.median of decodes"
        )
    return result


def _timed(file: str, frame: pd.DataFrame, times: Sequence[str]) -> pd.DataFrame:
    """The rows that have all `times`."""
    empty = frame[list(times)].isna().any(axis=1)
    if empty.any():
        left_out(file, int(empty.sum()), "without a time")
    frame = frame[~empty]
    check_numbers(file, frame, times, times, ())
    return frame


def _vidur(file: str, frame: pd.DataFrame) -> list[Measured]:
    times = {name: f"time_stats.{name}.median" for name in VIDUR_OPERATORS}
    # A model without an operator has no column for it, or an empty one.
    times = {name: time for name, time in times.items() if time in frame and not frame[time].isna().all()}
    if not times:
        known = ", ".join(f"time_stats.{name}.median" for name in VIDUR_OPERATORS)
        raise ValueError(f"{file}: row 0 (header): no column with times; allowed: some of {known}")
    frame = _timed(file, frame, list(times.values()))
    tp, kv = frame["num_tensor_parallel_workers"], frame["n_kv_head"]
    _check_degrees(file, frame, tp, {n: frame[n] for n in ("n_head", "n_expanded_embd")}, kv)
    columns = _vidur_columns(
        {name: _floats(frame, name) for name in VIDUR_SHAPE}, _gated(frame), SECOND_NORM in times
    )
    return [
        _measured(file, frame, name, VIDUR_OPERATORS[name], columns[name], time)
        for name, time in times.items()
    ]


def _gated(frame: pd.DataFrame) -> Floats:
    """Products of the MLP's input: 2 with a gate, which a file that says nothing has."""
    if "use_gated_mlp" not in frame:
        return np.full(len(frame), 2.0)
    text = frame["use_gated_mlp"].astype(str).str.lower()
    return np.where(text.isin(("true", "1", "1.0")), 2.0, 1.0)


def _vidur_columns(shape: dict[str, Floats], gated: Floats, in_turn: bool) -> dict[str, dict[str, Floats]]:
    """Shapes by operator. Not `in_turn`: attention and MLP run on the same input, and one addition of two kernels adds
    both to it (Phi, Falcon)."""
    tp, hidden, tokens = (shape[n] for n in ("num_tensor_parallel_workers", "n_embd", "num_tokens"))
    head_dim = hidden / shape["n_head"]
    query = shape["n_head"] * head_dim / tp
    kv = np.maximum(1.0, shape["n_kv_head"] / tp) * head_dim
    ffn = shape["n_expanded_embd"] / tp
    products = {
        "attn_pre_proj": (hidden, query + 2 * kv),
        "attn_post_proj": (query, hidden),
        "mlp_up_proj": (hidden, gated * ffn),
        "mlp_down_proj": (ffn, hidden),
    }
    values = {
        "input_layernorm": 2 * hidden,
        "post_attention_layernorm": 2 * hidden,
        "add": (3 if in_turn else 6) * hidden,
        "mlp_act": (gated + 1) * whole_blocks(ffn),
        "attn_rope": 2 * (query + kv),
        "emb": 2 * hidden,
    }
    found = {name: {"m": tokens, "n": n, "k": k, "tp": tp} for name, (k, n) in products.items()}
    return found | {name: {"m": tokens, "values": count, "tp": tp} for name, count in values.items()}


def whole_layer(operators: Sequence[Measured], seconds: Sequence[Floats]) -> tuple[Measured, Floats] | None:
    """All operators of a layer in an operator profile, added up: as measured, and `seconds` of each. The
    embedding is not in it, additions are there twice where attention and MLP follow each other. None for other files,
    and for one without all products."""
    in_turn = any(measured.operator == SECOND_NORM for measured in operators)
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


def _written_twice(frame: pd.DataFrame) -> pd.Series[bool]:
    """Both of aiconfigurator's loops, over grouped and over plain heads, write these."""
    return frame["num_heads"] == frame["num_key_value_heads"]


def _check_degrees(
    file: str, frame: pd.DataFrame, tp: pd.Series[Any], split: dict[str, pd.Series[Any]], kv: pd.Series[Any]
) -> None:
    """ValueError for the first row whose degree does not divide what it splits; key-value heads may be replicated."""
    wrong = (kv % tp != 0) & (tp % kv != 0)
    for sizes in split.values():
        wrong |= sizes % tp != 0
    if wrong.any():
        row = int(np.argmax(wrong.to_numpy()))
        sizes_text = ", ".join(f"{name} {values.iloc[row]:.0f}" for name, values in split.items())
        raise ValueError(
            f"{file}: row {frame.index[row] + 1}: num_tensor_parallel_workers is {tp.iloc[row]:.0f}; allowed: a "
            f"divisor of {sizes_text} and n_kv_head {kv.iloc[row]:.0f}"
        )


POSITIVE = frozenset(
    {
        "m", "n", "k", "batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "num_gpus",
        "message_size", "num_workers", "devices_per_node", "size", *VIDUR_SHAPE, *VIDUR_ATTENTION,
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
        twice=_written_twice,
    ),
    Layout(
        name="generation attention",
        keys=("batch_size", "step", "num_heads", "num_key_value_heads"),
        seconds=("latency",),
        optional=("head_dim", "window_size"),
        read=_generation,
        mark=frozenset({"step"}),
        twice=_written_twice,
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
        several=True,
    ),
    Layout(
        name="send and receive profile",
        keys=("num_workers", "devices_per_node", "size"),
        texts=("collective",),
        seconds=("time_stats.send_recv.median",),
        read=_vidur_send,
        mark=frozenset({"collective", "time_stats.send_recv.median"}),
        several=True,
    ),
    Layout(
        name="attention profile",
        keys=(*VIDUR_ATTENTION, *VIDUR_BATCH),
        seconds=(),
        read=_vidur_attention,
        mark=frozenset({"n_q_head", "prefill_chunk_size", "kv_cache_size"}),
        several=True,
    ),
    Layout(
        name="operator profile",
        keys=VIDUR_SHAPE,
        seconds=(),
        read=_vidur,
        mark=frozenset({"n_embd", "num_tensor_parallel_workers"}),
        several=True,
    ),
)
