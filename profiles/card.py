"""Measured operators of one card and model: the files that `coserve validate` takes (`sim.vllm.profile`).

They say layers, tokens and contexts but no shapes, which are the model's on one of `tp` devices; times are
microseconds. `meta.yaml` beside them, or above the folder tpN of a degree, says which model and degree. An attention
file has chunks after a context, decodes, and both in one kernel: the only public rows of the last. Later profilers
write `prefill_key` in place of the context (`sim.vllm.profile`), the kernel's name as `layer` and the queries of a
decode as `decode_q_len`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from profiles.rows import Measured, check_numbers, left_out
from sim.core.specs import ModelShape
from sim.cost.attention import local_kv_heads
from sim.cost.elementwise import whole_blocks
from sim.vllm.text import text_of

Floats = NDArray[np.float64]

DENSE = ("layer", "tokens", "time_us")
HEADS = ("layer", "sequences", "time_us")
ATTENTION = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
KEYED_ATTENTION = ("prefill_chunk", "prefill_key", "n_decode", "kv_decode", "time_us")
LAYOUTS = (DENSE, HEADS, ATTENTION, KEYED_ATTENTION)
STEMS = ("dense", "per_sequence", "attention")
ONCE_A_PASS = ("embedding", "final_layernorm")


def is_card(columns: Sequence[str]) -> bool:
    return any(set(layout) <= set(columns) for layout in LAYOUTS)


def named_beside(path: Path) -> tuple[str | None, int | None]:
    """Model and tensor-parallel degree of the card's profile that `path` is a file of, as far as its folder says."""
    if path.stem not in STEMS:
        return None, None
    degree = re.fullmatch(r"tp(\d+)", path.parent.name)
    meta_path = (path.parent.parent if degree else path.parent) / "meta.yaml"
    try:
        meta = yaml.safe_load(text_of(meta_path)) if meta_path.is_file() else None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{meta_path} is not YAML: {str(error).splitlines()[0]}") from None
    meta = meta if isinstance(meta, dict) else {}
    degrees = meta.get("tp_degrees")
    only = degrees[0] if isinstance(degrees, list) and len(degrees) == 1 else None
    if not (only is None or (type(only) is int and only > 0)):
        raise ValueError(f"{meta_path}: tp_degrees must be a list of whole numbers from 1, got {degrees!r}")
    model = meta.get("model")
    return (None if model is None else str(model)), (int(degree[1]) if degree else only)


def read_card(file: str, frame: pd.DataFrame, model: ModelShape | None, tp: int) -> list[Measured]:
    """ValueError in one line without a model, for a broken row, or when no operator is known."""
    if model is None:
        raise ValueError(f"{file}: a card's operator profile names no shapes; it needs model=NAME")
    numbers = [name for name in frame if name in {*DENSE, *HEADS, *ATTENTION, *KEYED_ATTENTION} - {"layer"}]
    check_numbers(file, frame, numbers, ("time_us",), ("tokens", "sequences"))
    if "prefill_chunk" in frame:
        return _attention(file, _one_kernel(file, frame), model, tp)
    operators = _operators(file, frame, model, tp)
    if not operators:
        known = sorted({*_products(model, tp), *_short(model, tp), "lm_head"})
        raise ValueError(f"{file}: no layer in it is known; known: {', '.join(known)}")
    return operators


def _one_kernel(file: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of attention itself, with one query per decode; ValueError when there are none."""
    for name, value in (("layer", "attention"), ("decode_q_len", 1)):
        if name in frame:
            keep = frame[name] == value
            if not keep.any():
                raise ValueError(f"{file}: {name} is {frame[name].iloc[0]} in every row; allowed: {value}")
            if not keep.all():
                left_out(file, int((~keep).sum()), f"of another {name}")
            frame = frame[keep]
    if "kv_prefill" in frame:
        return frame
    # The keys that a query sees on average are the context and half of the chunk; fewer are several sequences.
    context = frame["prefill_key"] - frame["prefill_chunk"] / 2
    several = context < -0.5
    if several.any():
        left_out(file, int(several.sum()), "of several prompts in one kernel")
    return frame.assign(kv_prefill=context.round().clip(lower=0))[~several]


def _products(model: ModelShape, tp: int) -> dict[str, tuple[int, int]]:
    kv = 2 * local_kv_heads(model, tp) * model.head_dim
    query, ffn = model.q_dim // tp, model.ffn // tp
    return {
        "qkv_proj": (model.hidden, query + kv),
        "o_proj": (query, model.hidden),
        "gate_up_proj": (model.hidden, 2 * ffn),
        "down_proj": (ffn, model.hidden),
        "lm_head": (model.hidden, -(-model.vocab // tp)),
    }


def _short(model: ModelShape, tp: int) -> dict[str, tuple[str, int]]:
    """Layer -> kind, and values read and written per token; norms have the residual with them."""
    rotated = model.q_dim // tp + local_kv_heads(model, tp) * model.head_dim
    return {
        "layernorm": ("norm", 4 * model.hidden),
        "final_layernorm": ("norm", 4 * model.hidden),
        "rotary_emb": ("rotary", 2 * rotated),
        "act_fn": ("activation", 3 * int(whole_blocks(model.ffn // tp))),
        "embedding": ("embedding", 2 * model.hidden),
    }


def _operators(file: str, frame: pd.DataFrame, model: ModelShape, tp: int) -> list[Measured]:
    count = "tokens" if "tokens" in frame else "sequences"
    products, short = _products(model, tp), _short(model, tp)
    result, others = [], []
    for name, part in frame.groupby("layer", sort=True):
        m = part[count].to_numpy(np.float64)
        if name in products:
            k, n = (np.full_like(m, float(size)) for size in products[str(name)])
            kind, columns = "product", {"m": m, "n": n, "k": k}
        elif name in short:
            kind, values = short[str(name)]
            columns = {"m": m, "values": np.full_like(m, float(values))}
        else:
            others.append(str(name))
            continue
        if count == "tokens" and name not in ONCE_A_PASS:
            columns["tp"] = np.full_like(m, float(tp))
        result.append(_measured(file, part, str(name), kind, columns))
    if others and result:
        warnings.warn(f"{file}: rows of {', '.join(others)} left out", stacklevel=2)
    return result


def _attention(file: str, frame: pd.DataFrame, model: ModelShape, tp: int) -> list[Measured]:
    chunk, decodes = (frame[name] > 0 for name in ("prefill_chunk", "n_decode"))
    if not (chunk | decodes).all():
        row = int(np.argmin((chunk | decodes).to_numpy()))
        raise ValueError(f"{file}: row {row + 1}: prefill_chunk and n_decode are 0; allowed: one above 0")
    fresh = frame["kv_prefill"] == 0
    kinds = {
        "context attention": chunk & ~decodes & fresh,
        "context attention after a context": chunk & ~decodes & ~fresh,
        "generation attention": ~chunk & decodes,
        "both in one kernel": chunk & decodes,
    }
    result = []
    for name, rows in kinds.items():
        part = frame[rows]
        if not len(part):
            continue
        one = np.ones(len(part))
        columns = {
            "batch": one,
            "tokens": part["prefill_chunk"].to_numpy(np.float64),
            "context": part["kv_prefill"].to_numpy(np.float64),
            "decodes": part["n_decode"].to_numpy(np.float64),
            "decode_context": part["kv_decode"].to_numpy(np.float64),
            "heads": model.heads / tp * one,
            "kv_heads": local_kv_heads(model, tp) * one,
            "head_dim": model.head_dim * one,
            "window": 0 * one,
        }
        kind = "attention"
        if name == "generation attention":
            columns |= {"batch": columns["decodes"], "tokens": one, "context": columns["decode_context"]}
        elif name == "both in one kernel":
            kind = "mixed attention"
        result.append(_measured(file, part, name, kind, columns))
    return result


def _measured(
    file: str, part: pd.DataFrame, operator: str, kind: str, columns: dict[str, Floats]
) -> Measured:
    return Measured(
        file=file,
        operator=operator,
        kind=kind,
        columns=columns,
        seconds=part["time_us"].to_numpy(np.float64) * 1e-6,
        rows=part.index.to_numpy(dtype=np.int64) + 1,
    )
