"""Layouts of vidur's profiles: operators of a layer, attention, collectives. Sizes of its collectives are bytes; a row
without a time is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from profiles.rows import Floats, Layout, Measured, check_numbers, floats, left_out, measured_rows, some_of
from sim.cost.elementwise import whole_blocks

OPERATORS = {
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
"""Column of operator profiles -> kind of operator; a product is a GEMM of a running layer."""
SECOND_NORM = "post_attention_layernorm"
"""A layer without it has attention and MLP side by side."""
ATTENTION = ("n_embd", "n_q_head", "n_kv_head", "num_tensor_parallel_workers")
"""Columns of attention profiles; the next ones are what a row computes."""
BATCH = ("batch_size", "prefill_chunk_size", "kv_cache_size")
SHAPE = (
    "n_head",
    "n_kv_head",
    "n_embd",
    "n_expanded_embd",
    "vocab_size",
    "num_tokens",
    "num_tensor_parallel_workers",
)


def _in_one_node(file: str, frame: pd.DataFrame, collective: str) -> pd.DataFrame:
    """Workers in one node; across nodes is another link."""
    frame = some_of(file, frame, "collective", (collective,))
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


def _network(file: str, frame: pd.DataFrame) -> list[Measured]:
    part = _in_one_node(file, frame, "all_reduce")
    columns = {"bytes": floats(part, "size"), "devices": floats(part, "num_workers")}
    return [
        measured_rows(file, part, "all-reduce", "nccl all_reduce", columns, "time_stats.all_reduce.median")
    ]


def _send(file: str, frame: pd.DataFrame) -> list[Measured]:
    """One device to another: half of what an all-to-all of two exchanges, by the same sends."""
    part = _in_one_node(file, frame, "send_recv")
    size = floats(part, "size")
    columns = {"bytes": 2.0 * size, "devices": np.full_like(size, 2.0)}
    return [
        measured_rows(file, part, "send and receive", "nccl alltoall", columns, "time_stats.send_recv.median")
    ]


def _attention(file: str, frame: pd.DataFrame) -> list[Measured]:
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
            "batch": floats(part, "batch_size"),
            "tokens": np.maximum(floats(part, "prefill_chunk_size"), 1.0),
            "context": floats(part, "kv_cache_size"),
            "heads": (heads / tp)[part.index].to_numpy(np.float64),
            "kv_heads": np.maximum(1.0, (kv / tp)[part.index].to_numpy(np.float64)),
            "head_dim": (frame["n_embd"] / heads)[part.index].to_numpy(np.float64),
            "window": 0.0 * one,
            "written": (save > 0).to_numpy(np.float64),
        }
        timed = part.assign(**{times[0]: part[times[0]] + save.fillna(0.0)})
        result.append(measured_rows(file, timed, name, "attention", columns, times[0]))
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


def _operators(file: str, frame: pd.DataFrame) -> list[Measured]:
    times = {name: f"time_stats.{name}.median" for name in OPERATORS}
    # A model without an operator has no column for it, or an empty one.
    times = {name: time for name, time in times.items() if time in frame and not frame[time].isna().all()}
    if not times:
        known = ", ".join(f"time_stats.{name}.median" for name in OPERATORS)
        raise ValueError(f"{file}: row 0 (header): no column with times; allowed: some of {known}")
    frame = _timed(file, frame, list(times.values()))
    tp, kv = frame["num_tensor_parallel_workers"], frame["n_kv_head"]
    _check_degrees(file, frame, tp, {n: frame[n] for n in ("n_head", "n_expanded_embd")}, kv)
    columns = _columns({name: floats(frame, name) for name in SHAPE}, _gated(frame), SECOND_NORM in times)
    return [
        measured_rows(file, frame, name, OPERATORS[name], columns[name], time) for name, time in times.items()
    ]


def _gated(frame: pd.DataFrame) -> Floats:
    """Products of the MLP's input: 2 with a gate, which a file that says nothing has."""
    if "use_gated_mlp" not in frame:
        return np.full(len(frame), 2.0)
    text = frame["use_gated_mlp"].astype(str).str.lower()
    return np.where(text.isin(("true", "1", "1.0")), 2.0, 1.0)


def _columns(shape: dict[str, Floats], gated: Floats, in_turn: bool) -> dict[str, dict[str, Floats]]:
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


LAYOUTS = (
    Layout(
        name="all-reduce profile",
        keys=("num_workers", "devices_per_node", "size"),
        texts=("collective",),
        seconds=("time_stats.all_reduce.median",),
        read=_network,
        mark=frozenset({"collective", "time_stats.all_reduce.median"}),
        several=True,
    ),
    Layout(
        name="send and receive profile",
        keys=("num_workers", "devices_per_node", "size"),
        texts=("collective",),
        seconds=("time_stats.send_recv.median",),
        read=_send,
        mark=frozenset({"collective", "time_stats.send_recv.median"}),
        several=True,
    ),
    Layout(
        name="attention profile",
        keys=(*ATTENTION, *BATCH),
        seconds=(),
        read=_attention,
        mark=frozenset({"n_q_head", "prefill_chunk_size", "kv_cache_size"}),
        several=True,
    ),
    Layout(
        name="operator profile",
        keys=SHAPE,
        seconds=(),
        read=_operators,
        mark=frozenset({"n_embd", "num_tensor_parallel_workers"}),
        several=True,
    ),
)
