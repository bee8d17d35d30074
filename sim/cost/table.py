"""A cost model fitted to rows of flat work (`WORK_COLUMNS`) and seconds.

    seconds = host + C_pass(T + F) + C_logits(sampled) + C_loss(F) + C_recompute(R)
              + linear terms of attention, decodes, backward, adapters and optimizer

The C are piecewise linear and never decrease: they are sums of ramps between log-spaced knots with
non-negative coefficients, fitted by non-negative least squares of the relative error. Attention is
linear per axis: decodes in the sum of contexts, prompts and windows in chunks, query-key pairs and keys, whose
reading few tokens after a long context wait for. The rectangles of a backward are seen as their sums: layers,
layer-tokens and pairs.

Host time is the constant term: given where it was measured apart, else fitted. It is what the rows' own loop
did not hide, so a table stands for loops with the lookahead that its rows were measured with.
Rows with `overlap` do not enter the fit of the terms; they give the contention of two streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sim.core.rows import WORK_COLUMNS
from sim.cost.curves import ChunkCost, Curves, DecodeCost
from sim.cost.fitted import FittedCost
from sim.cost.flat import device_seconds, keys_of_alike, streams
from sim.cost.nnls import nnls

Floats = NDArray[np.float64]

KNOTS = (0, 1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
COARSE_KNOTS = (0, 1, 64, 256, 1024, 4096, 8192)
"""For logits, loss and recomputed windows, which are nearly straight."""
LINEAR = (
    "host",
    "prefill_chunks",
    "prefill_keys",
    "prefill_pairs",
    "any_decode",
    "decode_count",
    "decode_context_tokens",
    "forward_windows",
    "forward_keys",
    "forward_pairs",
    "any_backward",
    "backward_layers",
    "backward_layer_tokens",
    "backward_pairs",
    "recompute_pairs",
    "any_lora",
    "lora_tokens",
    "adapters",
    "optimizer_params",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What the rows said: curves, and the range in which they said it."""

    curves: Curves
    ranges: dict[str, tuple[float, float]]

    @classmethod
    def fit(
        cls,
        columns: dict[str, Floats],
        seconds: Floats,
        host_s: float | None = None,
    ) -> Table:
        """Fit rows: `columns` has every name of WORK_COLUMNS, each of shape (rows,), like `seconds`.

        Where no row has `overlap`, nothing hides. `host_s`, where it was measured apart, is the constant term;
        None fits that too. ValueError for missing columns, unequal lengths, values that are not finite, or
        seconds that are not positive.
        """
        rows = _checked(columns, seconds)
        alone = rows["overlap"] == 0
        if not alone.any():
            raise ValueError("cost table: needs rows without overlap to fit")
        fitted = {name: values[alone] for name, values in rows.items()}
        terms, blocks = _design(fitted)
        target = np.ones(int(alone.sum()))
        if host_s is not None:
            terms[:, LINEAR.index("host")] = 0.0
            target -= np.minimum(host_s / seconds[alone], 1.0)
        x = nnls(terms / seconds[alone, None], target)
        if host_s is not None:
            x[LINEAR.index("host")] = host_s
        curves = _curves(x, blocks, overlap_contention=1.0)
        if not alone.all():
            beside = {name: values[~alone] for name, values in rows.items()}
            curves = _curves(x, blocks, _contention(curves, beside, seconds[~alone]))
        ranges = {name: (float(v.min()), float(v.max())) for name, v in rows.items()}
        return cls(curves=curves, ranges=ranges)

    def model(self, lookahead: int = 0) -> FittedCost:
        return FittedCost(self.curves, self.ranges, lookahead)


def timed_table(
    columns: dict[str, Floats], seconds: Floats, host_s: Floats, ahead_s: Floats, lookahead: int
) -> Table:
    """A table of rows whose host time was measured apart, for loops that plan `lookahead` iterations ahead.

    `seconds` are those of an iteration on its own, `host_s` the part of them in which the device did not
    work, `ahead_s` (NaN where not measured) the seconds with another launched before it ends. What a
    lookahead hides is then hidden in the rows, and the table's own model needs none: `model(0)`. A row that
    was not measured so takes what its device works, and the host time that the others show.
    """
    if not lookahead or np.isnan(ahead_s).all():
        return Table.fit(columns, seconds, host_s=float(np.median(host_s)))
    device_s = seconds - host_s
    shown_s = float(np.nanmedian(np.maximum(0.0, ahead_s - device_s)))
    return Table.fit(columns, np.where(np.isnan(ahead_s), device_s + shown_s, ahead_s), host_s=shown_s)


def _checked(columns: dict[str, Floats], seconds: Floats) -> dict[str, Floats]:
    missing = [name for name in WORK_COLUMNS if name not in columns]
    if missing:
        raise ValueError(f"cost table: column {missing[0]} is missing; needed: {', '.join(WORK_COLUMNS)}")
    rows = {name: np.asarray(columns[name], dtype=np.float64) for name in WORK_COLUMNS}
    for name, values in {**rows, "seconds": seconds}.items():
        if values.shape != seconds.shape or values.ndim != 1:
            raise ValueError(f"cost table: column {name} must have shape {seconds.shape}, got {values.shape}")
        least = values.min(initial=np.inf)
        if not np.isfinite(values).all() or least < 0 or (name == "seconds" and not least > 0):
            row = int(np.argmin(np.where(np.isfinite(values), values, -np.inf)))
            raise ValueError(f"cost table: row {row}, column {name}: {values[row]} is not allowed")
    return rows


def _design(rows: dict[str, Floats]) -> tuple[Floats, dict[str, tuple[int, ...]]]:
    """Matrix of terms (rows, coefficients), and the knots of each curve in column order."""
    inference = rows["prefill_tokens"] + rows["decode_count"]
    windows = rows["forward_tokens"]
    uses = rows["adapters"] > 0
    axes = {
        "pass": (inference + windows, KNOTS),
        "logits": (rows["sampled_tokens"], COARSE_KNOTS),
        "loss": (windows, COARSE_KNOTS),
        "recompute": (rows["recompute_tokens"], COARSE_KNOTS),
    }
    linear = {
        **rows,
        "host": np.ones_like(windows),
        "prefill_keys": rows["prefill_context_tokens"] + rows["prefill_tokens"],
        "forward_keys": keys_of_alike(rows["forward_windows"], windows, rows["forward_pairs"]),
        "any_decode": rows["decode_count"] > 0,
        "any_backward": rows["backward_layer_tokens"] > 0,
        "any_lora": uses * 1.0 + (windows > 0),
        "lora_tokens": uses * inference + windows,
    }
    blocks, parts = {}, [np.column_stack([linear[name] for name in LINEAR])]
    for name, (tokens, knots) in axes.items():
        # A knot beyond the data has an all-zero ramp; the curve then ends where the data does.
        last = float(tokens.max())
        kept = (*[k for k in knots if k < last], int(last)) if last else (0, 1)
        blocks[name] = kept
        parts.append(np.column_stack([_ramp(tokens, a, b) for a, b in pairwise(kept)]))
    return np.concatenate(parts, axis=1).astype(np.float64), blocks


def _ramp(tokens: Floats, start: float, end: float) -> Floats:
    return np.clip((tokens - start) / (end - start), 0.0, 1.0)


def _curves(x: Floats, blocks: dict[str, tuple[int, ...]], overlap_contention: float) -> Curves:
    c = dict(zip(LINEAR, x[: len(LINEAR)].tolist(), strict=True))
    known = max(blocks["pass"][-1], blocks["recompute"][-1], 2)
    lists, column = {}, len(LINEAR)
    for name, knots in blocks.items():
        heights = np.concatenate([[0.0], np.cumsum(x[column : column + len(knots) - 1])])
        lists[name] = _interpolated(knots, heights, known)
        column += len(knots) - 1
    return Curves(
        token_s=lists["pass"],
        collective_s=None,
        sampled_s=lists["logits"],
        loss_s=lists["loss"],
        recompute_s=lists["recompute"],
        backward_layer_s=[c["backward_layer_tokens"] * n for n in range(known + 1)],
        backward_collective_s=None,
        backward_start_s=c["any_backward"],
        prefill=ChunkCost(c["prefill_chunks"], 0.0, c["prefill_pairs"], c["prefill_keys"], unhidden=1.0),
        forward=ChunkCost(c["forward_windows"], 0.0, c["forward_pairs"], c["forward_keys"], unhidden=1.0),
        recompute=ChunkCost(0.0, 0.0, c["recompute_pairs"], 0.0),
        backward=ChunkCost(c["backward_layers"], 0.0, c["backward_pairs"], 0.0),
        decode=DecodeCost(c["any_decode"], c["decode_count"], c["decode_context_tokens"]),
        lora_fixed_s=c["any_lora"],
        lora_token_s=c["lora_tokens"],
        adapter_s=c["adapters"],
        optimizer_param_s=c["optimizer_params"],
        host_s=c["host"],
        overlap_contention=overlap_contention,
    )


def _interpolated(knots: tuple[int, ...], heights: Floats, known: int) -> list[float]:
    """Entries 0..known; beyond the last knot by the slope of the last two."""
    tokens = np.arange(known + 1, dtype=np.float64)
    values = np.interp(tokens, knots, heights)
    if len(knots) > 1:
        slope = (heights[-1] - heights[-2]) / (knots[-1] - knots[-2])
        values += np.maximum(tokens - knots[-1], 0.0) * slope
    return [0.0, *np.maximum.accumulate(values[1:]).tolist()]


def _contention(curves: Curves, rows: dict[str, Floats], seconds: Floats) -> float:
    """The share of the shorter stream that does not hide, by least squares of the relative error, in 0..1."""
    x, y = (device_seconds(curves, stream) for stream in streams(rows))
    before_s = curves.host_s + curves.optimizer_param_s * rows["optimizer_params"]
    share = np.minimum(x, y) / seconds
    norm = float(share @ share)
    if not norm > 0:
        return curves.overlap_contention
    moment = float(share @ ((seconds - before_s - np.maximum(x, y)) / seconds))
    return min(1.0, max(0.0, moment / norm))
