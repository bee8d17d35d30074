"""The inverse of the backward: how much of a job's backward fits into the seconds that are left.

Backward is additive over layers, so whole layers are found by division and only a partial one by search, as in
`sim.cost.inverse`.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from sim.core.finetune import JobView
from sim.cost.inverse import next_tokens

if TYPE_CHECKING:
    from sim.cost.iteration import IterationCost

Slice = tuple[int, float, float, bool]
"""Layer-tokens, backward and recompute seconds of the whole work with them, and whether that is certain."""


def largest_slice(
    cost: IterationCost, job: JobView, b: float, r: float, left_s: float, tolerance_s: float
) -> Slice:
    """The largest next slice of `job`'s backward that takes at most `left_s`, in a work that has `b` seconds of
    backward and `r` of recompute already. Comparisons may be wrong by `tolerance_s`."""
    _, layers, order, _, _, length, _, done, step_due = job
    if step_due or done == length * layers:
        return 0, b, r, True
    if order == "window_major":
        return _window(cost, job, b, r, left_s, tolerance_s)
    fitted = 0
    into_layer = done % length
    if into_layer:
        rest = length - into_layer
        rest_s = cost._layer_s[rest]
        if rest_s > left_s:
            n, part_s, certain = _part(cost, rest, rest_s, left_s, tolerance_s)
            return n, b + part_s, r, certain
        fitted = rest
        b += rest_s
        left_s -= rest_s
    layer_s = cost._layer_s[length]
    layers -= (done + fitted) // length
    whole = layers if layers * layer_s <= left_s else int(left_s / layer_s) if left_s > 0.0 else 0
    if whole:
        fitted += whole * length
        b += whole * layer_s
        left_s -= whole * layer_s
    if whole == layers:
        return fitted, b, r, left_s > tolerance_s
    n, part_s, certain = _part(cost, length, layer_s, left_s, tolerance_s)
    return fitted + n, b + part_s, r, certain


def _part(
    cost: IterationCost, right: int, most_s: float, left_s: float, tolerance_s: float
) -> tuple[int, float, bool]:
    """The largest rectangle of one layer, below `right` tokens, that ends at token `right`: its tokens, its
    seconds, and whether that is certain. All `right` tokens take `most_s`."""
    if right < 2 or left_s <= 0.0:
        return 0, 0.0, abs(left_s) > tolerance_s and abs(most_s - left_s) > tolerance_s
    fixed_s, each_s, pair_s, read_s, unhidden = cost._backward
    list_s = cost._backward_s
    end, reading_s = right + 0.0, read_s * right
    low, low_s, high, high_s, step = 0, 0.0, right, most_s, 0
    n, slope_s = _start(end, most_s - fixed_s, left_s - fixed_s, pair_s)
    while True:
        tokens = n + 0.0
        compute_s = tokens * each_s + pair_s * (tokens * ((end - tokens) + (tokens + 1.0) * 0.5))
        n_s = list_s[n] + (
            fixed_s
            + (
                compute_s + unhidden * reading_s
                if compute_s > reading_s
                else reading_s + unhidden * compute_s
            )
        )
        if n_s <= left_s:
            low, low_s = n, n_s
        else:
            high, high_s = n, n_s
        if high - low == 1:
            return low, low_s, left_s - low_s > tolerance_s and high_s - left_s > tolerance_s
        step += 1
        n = next_tokens(n, n_s - left_s, slope_s, low, high, step)


def _start(end: float, most_s: float, left_s: float, pair_s: float) -> tuple[int, float]:
    """Where to search first, and the seconds of a token there: at the share of the tokens that has the share of
    the seconds, and from there by Newton's step, since attention is concave in tokens that end at `end`."""
    if not 0.0 < left_s < most_s:
        return 1, most_s / end
    half_s, mean_s = 0.5 * pair_s, most_s / end
    tokens = left_s / mean_s
    slope_s = mean_s + half_s * (end - tokens - tokens)
    n = int(tokens - half_s * tokens * (end - tokens) / slope_s)
    return (n if 0 < n < end else 1), slope_s


def _window(
    cost: IterationCost, job: JobView, b: float, r: float, left_s: float, tolerance_s: float
) -> Slice:
    """The widest window at the right end, through all layers."""
    layers = job.layers
    right = job.sample_tokens - job.backward_layer_tokens // layers
    again = job.memory == "recompute"
    low, low_s, high, high_s, found = 0, -inf, right + 1, inf, (b, r)
    n = right
    while high - low > 1:
        backward_s = cost.rectangle_s(layers, n, right - n)
        recompute_s = cost.recompute_window_s(n, right - n) if again else 0.0
        over_s = backward_s + recompute_s - left_s
        if over_s <= 0.0:
            low, low_s, found = n, over_s, (b + backward_s, r + recompute_s)
        else:
            high, high_s = n, over_s
        n = (low + high) >> 1
    return low * layers, *found, low_s < -tolerance_s and high_s > tolerance_s
