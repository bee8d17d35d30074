"""A cost model fitted to rows of flat work (`WORK_COLUMNS`) and seconds.

    seconds = host + C_pass(T + F) + C_logits(sampled) + C_loss(F) + C_recompute(R)
              + layers C_backward(layer-tokens / layers)
              + linear terms of attention, decodes, adapters and optimizer

The C are piecewise linear and never decrease: they are sums of ramps between log-spaced knots with
non-negative coefficients, fitted by non-negative least squares of the relative error. Attention is
linear per axis: decodes in the sum of contexts, chunks of any kind in their number, query-key pairs and keys, whose
reading few tokens after a long context wait for. A window that runs again has the attention of its first run. The
rectangles of a backward are seen as their sums, layers, layer-tokens and pairs: as if all had their mean length.

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
"""For logits, loss, recomputed windows and the backward of a layer, which are nearly straight."""
ROWS = 5
"""That a ramp needs: fewer are mostly noise."""
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
    "backward_keys",
    "backward_pairs",
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
    windows, again = rows["forward_tokens"], rows["recompute_tokens"]
    layers, layer_tokens = rows["backward_layers"], rows["backward_layer_tokens"]
    each = np.divide(layer_tokens, layers, out=np.zeros_like(layers), where=layers > 0)
    uses, once = rows["adapters"] > 0, np.ones_like(windows)
    axes = {
        "pass": (once, inference + windows, KNOTS),
        "logits": (once, rows["sampled_tokens"], COARSE_KNOTS),
        "loss": (once, windows, COARSE_KNOTS),
        "recompute": (once, again, COARSE_KNOTS),
        "backward": (layers, each, COARSE_KNOTS),
    }
    linear = {
        **rows,
        "host": once,
        "prefill_keys": rows["prefill_context_tokens"] + rows["prefill_tokens"],
        "forward_keys": keys_of_alike(rows["forward_windows"], windows, rows["forward_pairs"])
        + keys_of_alike((again > 0).astype(np.float64), again, rows["recompute_pairs"]),
        "forward_pairs": rows["forward_pairs"] + rows["recompute_pairs"],
        "any_decode": rows["decode_count"] > 0,
        "any_backward": layer_tokens > 0,
        "backward_keys": keys_of_alike(layers, layer_tokens, rows["backward_pairs"]),
        "any_lora": uses * 1.0 + (windows > 0),
        "lora_tokens": uses * inference + windows,
    }
    blocks, parts = {}, [np.column_stack([linear[name] for name in LINEAR])]
    for name, (times, tokens, knots) in axes.items():
        blocks[name] = kept = _kept(knots, tokens)
        parts.append(np.column_stack([times * _ramp(tokens, a, b) for a, b in pairwise(kept)]))
    return np.concatenate(parts, axis=1).astype(np.float64), blocks


def _kept(knots: tuple[int, ...], tokens: Floats) -> tuple[int, ...]:
    """The knots that the rows can tell apart; the curve ends where the rows do. What lies beyond goes on like its
    last ramp, so that one reaches over half of the tokens at least."""
    last = int(tokens.max())
    kept = list(knots[:2])
    for knot in knots[2:]:
        own = np.count_nonzero((tokens > kept[-1]) & (tokens <= knot))
        if own >= ROWS and 2 * knot <= last:
            kept.append(knot)
    return (*kept, last) if last > 1 else (0, 1)


def _ramp(tokens: Floats, start: float, end: float) -> Floats:
    return np.clip((tokens - start) / (end - start), 0.0, 1.0)


def _curves(x: Floats, blocks: dict[str, tuple[int, ...]], overlap_contention: float) -> Curves:
    c = dict(zip(LINEAR, x[: len(LINEAR)].tolist(), strict=True))
    known = max(2, *(blocks[name][-1] for name in ("pass", "recompute", "backward")))
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
        backward_layer_s=lists["backward"],
        backward_collective_s=None,
        backward_start_s=c["any_backward"],
        prefill=ChunkCost(c["prefill_chunks"], 0.0, c["prefill_pairs"], c["prefill_keys"], unhidden=1.0),
        forward=ChunkCost(c["forward_windows"], 0.0, c["forward_pairs"], c["forward_keys"], unhidden=1.0),
        recompute=ChunkCost(0.0, 0.0, c["forward_pairs"], c["forward_keys"], unhidden=1.0),
        backward=ChunkCost(0.0, 0.0, c["backward_pairs"], c["backward_keys"], unhidden=1.0),
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
