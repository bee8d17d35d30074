"""Layouts of aiconfigurator's kernel files. Sizes of its collectives are elements: a half-precision all-reduce of n
takes as long as an int8 one of 2 n."""

from __future__ import annotations

import numpy as np
import pandas as pd

from profiles.rows import Floats, Layout, Measured, floats, measured_rows, some_of
from sim.cost.collective import OPERATIONS

COLLECTIVE_BYTES = {
    **dict.fromkeys(("half", "float16", "fp16", "bfloat16", "bf16"), 2.0),
    **dict.fromkeys(("float", "float32", "fp32"), 4.0),
    **dict.fromkeys(("int8", "uint8", "fp8", "float8"), 1.0),
}
"""Of an element, by the name of its type."""


def as_written(frame: pd.DataFrame) -> pd.DataFrame:
    """Variants of a column, as the other collectors write it."""
    if {"isl", "step"} <= set(frame) and (frame["isl"] == 1).all() and not (frame["step"] == 0).all():
        frame = frame.drop(columns="isl")  # decodes, with a column for the one token of each
    if "window_size" in frame:
        frame = frame.assign(window_size=frame["window_size"].replace(-1, 0))  # both are none
    if "allreduce_dtype" in frame and "backend" not in frame:
        name = next((n for n in ("implementation", "kernel_source", "framework") if n in frame), None)
        frame = frame.assign(backend="unnamed" if name is None else frame[name].astype(str))
    return frame


def _gemm(file: str, frame: pd.DataFrame) -> list[Measured]:
    columns = {name: floats(frame, name) for name in ("m", "n", "k")}
    return [measured_rows(file, frame, "gemm", "gemm", columns, "latency")]


def _attention(
    file: str, frame: pd.DataFrame, operator: str, tokens: Floats, context: Floats
) -> list[Measured]:
    columns = {
        "batch": floats(frame, "batch_size"),
        "tokens": tokens,
        "context": context,
        "heads": floats(frame, "num_heads"),
        "kv_heads": floats(frame, "num_key_value_heads"),
        "head_dim": floats(frame, "head_dim", 128.0),
        "window": floats(frame, "window_size", 0.0),
    }
    return [measured_rows(file, frame, operator, "attention", columns, "latency")]


def _context(file: str, frame: pd.DataFrame) -> list[Measured]:
    tokens = floats(frame, "isl")
    return _attention(file, frame, "context attention", tokens, np.zeros_like(tokens))


def _generation(file: str, frame: pd.DataFrame) -> list[Measured]:
    # A step is the tokens in the cache before this one; with its own key it sees step + 1.
    step = floats(frame, "step")
    return _attention(file, frame, "generation attention", np.ones_like(step), step)


def _nccl(file: str, frame: pd.DataFrame) -> list[Measured]:
    known = some_of(file, some_of(file, frame, "nccl_dtype", COLLECTIVE_BYTES), "op_name", OPERATIONS)
    result = []
    for name, part in known.groupby("op_name", sort=True):
        size = floats(part, "message_size") * part["nccl_dtype"].map(COLLECTIVE_BYTES).to_numpy(np.float64)
        columns = {"bytes": size, "devices": floats(part, "num_gpus")}
        result.append(measured_rows(file, part, f"nccl {name}", f"nccl {name}", columns, "latency"))
    return result


def _custom(file: str, frame: pd.DataFrame) -> list[Measured]:
    if "op_name" in frame:
        frame = some_of(file, frame, "op_name", ("all_reduce",))  # and not one fused with a norm
    result = []
    for name, part in frame.groupby("backend", sort=True):
        columns = {"bytes": 2.0 * floats(part, "message_size"), "devices": floats(part, "num_gpus")}
        kind = "all-reduce eager" if "eager" in str(name) else "all-reduce graph"
        result.append(measured_rows(file, part, f"all-reduce {name}", kind, columns, "latency"))
    return result


def _written_twice(frame: pd.DataFrame) -> pd.Series[bool]:
    """Both of aiconfigurator's loops, over grouped and over plain heads, write these."""
    return frame["num_heads"] == frame["num_key_value_heads"]


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
)
