"""Seconds of flat rows of work (`WORK_COLUMNS`) by parts, many rows at once.

What `IterationCost.parts` says of one `Work`, for the rows that tables and run folders hold. A row has the
sums of its chunks and rectangles only: they are taken to be as long as their mean, and recomputed windows to be one.
For prompts that is exact where curves are linear, as fitted ones of attention are, and for windows and rectangles where
there is one: what they read of keys is not among the sums, nor how long each rectangle is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sim.cost.curves import ChunkCost, Curves

Floats = NDArray[np.float64]

FINETUNING = (
    "forward_windows",
    "forward_tokens",
    "forward_pairs",
    "backward_layers",
    "backward_layer_tokens",
    "backward_pairs",
    "recompute_tokens",
    "recompute_pairs",
)
"""Columns of windows and backward slices, which may run on a second stream."""


def row_parts(curves: Curves, columns: Mapping[str, Floats]) -> dict[str, Floats]:
    """Part -> seconds of shape (rows,), which add up to `row_seconds`.

    Named as in `IterationCost.parts`, but that the adapters of windows, which every window has, are apart.
    """
    beside = np.asarray(columns["overlap"], dtype=bool)
    inference, finetuning = streams(columns)
    parts = _device_parts(curves, columns)
    if beside.any():
        own, other = _device_parts(curves, inference), _device_parts(curves, finetuning)
        apart = own["forward_pass"] + other["forward_pass"]
        parts["forward_pass"] = np.where(beside, apart, parts["forward_pass"])
        shorter = np.minimum(sum(own.values()), sum(other.values()))
        saving = (curves.overlap_contention - 1.0) * shorter
        parts["overlap_saving"] = np.where(beside, saving, 0.0)
    else:
        parts["overlap_saving"] = np.zeros(len(beside))
    parts["host"] = np.full(len(beside), curves.host_s)
    return parts


def row_seconds(curves: Curves, columns: Mapping[str, Floats]) -> Floats:
    """Seconds of flat rows (every name of WORK_COLUMNS, each of shape (rows,)) by fitted curves."""
    return np.asarray(sum(row_parts(curves, columns).values()), dtype=np.float64)


def device_seconds(curves: Curves, columns: Mapping[str, Floats]) -> Floats:
    """Without the host, and all on one stream."""
    return np.asarray(sum(_device_parts(curves, columns).values()), dtype=np.float64)


def streams(columns: Mapping[str, Floats]) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """The rows' inference alone, and their windows and backward alone: optimizer steps come before both."""
    others = (*FINETUNING, "optimizer_params")
    inference = {name: np.asarray(0.0 * v if name in others else v) for name, v in columns.items()}
    finetuning = {name: np.asarray(v if name in FINETUNING else 0.0 * v) for name, v in columns.items()}
    return inference, finetuning


def _device_parts(c: Curves, row: Mapping[str, Floats]) -> dict[str, Floats]:
    tokens = row["prefill_tokens"] + row["decode_count"]
    windows, layers, layer_tokens = (
        row["forward_tokens"],
        row["backward_layers"],
        row["backward_layer_tokens"],
    )
    each = np.divide(layer_tokens, layers, out=np.zeros_like(layers), where=layers > 0)
    again = row["recompute_tokens"]
    decodes = c.decode.fixed_s * (row["decode_count"] > 0) + row["decode_count"] * c.decode.sequence_s
    lora = c.lora_fixed_s + c.lora_token_s * tokens + c.adapter_s * row["adapters"]
    return {
        "forward_pass": _at(c.token_s, tokens + windows),
        "attention_prefill": _chunks(
            c.prefill,
            row["prefill_chunks"],
            row["prefill_tokens"],
            row["prefill_pairs"],
            row["prefill_context_tokens"] + row["prefill_tokens"],
        ),
        "attention_decode": decodes + row["decode_context_tokens"] * c.decode.context_s,
        "attention_forward": _alike(c.forward, row["forward_windows"], windows, row["forward_pairs"]),
        "logits": _at(c.sampled_s, row["sampled_tokens"]),
        "loss": _at(c.loss_s, windows),
        "backward": c.backward_start_s * (layer_tokens > 0)
        + layers * _at(c.backward_layer_s, each)
        + _alike(c.backward, layers, layer_tokens, row["backward_pairs"]),
        "recompute": _at(c.recompute_s, again)
        + _alike(c.recompute, (again > 0).astype(np.float64), again, row["recompute_pairs"]),
        "optimizer": row["optimizer_params"] * c.optimizer_param_s,
        "adapters": lora * (row["adapters"] > 0),
        "adapters_forward": _windows_lora_s(c, windows),
    }


def _windows_lora_s(c: Curves, windows: Floats) -> Floats:
    per_token_s = c.lora_token_s if c.window_lora_token_s is None else c.window_lora_token_s
    seconds: Floats = (c.lora_fixed_s + per_token_s * windows) * (windows > 0)
    return seconds if c.window_collective_s is None else seconds + _at(c.window_collective_s, windows)


def keys_of_alike(count: Floats, tokens: Floats, pairs: Floats) -> Floats:
    """Keys that chunks as long as their mean attend to: one of n tokens after c has n (c + (n + 1) / 2) pairs, and
    c + n keys."""
    each = np.divide(tokens, count, out=np.zeros_like(pairs), where=tokens > 0)
    behind = np.divide(pairs, tokens, out=np.zeros_like(pairs), where=tokens > 0)
    keys: Floats = count * (behind + (each - 1) / 2)
    return keys


def _alike(cost: ChunkCost, count: Floats, tokens: Floats, pairs: Floats) -> Floats:
    return _chunks(cost, count, tokens, pairs, keys_of_alike(count, tokens, pairs))


def _chunks(cost: ChunkCost, count: Floats, tokens: Floats, pairs: Floats, keys: Floats) -> Floats:
    compute_s = tokens * cost.token_s + pairs * cost.pair_s
    reading_s = keys * cost.read_s
    shorter_s = cost.unhidden * np.minimum(compute_s, reading_s)
    seconds: Floats = (count * cost.fixed_s + np.maximum(compute_s, reading_s) + shorter_s) * (tokens > 0)
    return seconds


def _at(values: list[float], tokens: Floats) -> Floats:
    """Entries, between two the line through them, and so beyond the last."""
    table = np.asarray(values)
    low = np.minimum(tokens.astype(np.int64), len(values) - 2)
    found: Floats = table[low] + (tokens - low) * (table[low + 1] - table[low])
    return found
