"""The inverse of the backward: how much of a job's backward fits a budget.

Backward is additive over layers, so whole layers are found by division and only a partial one by
search, as in `sim.cost.iteration`. Every candidate is judged by the sum that `IterationCost.iteration_s`
would form for it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

from sim.core.finetune import JobView
from sim.core.work import Work

if TYPE_CHECKING:
    from sim.cost.iteration import IterationCost

Over = Callable[[float, float], float]
"""(backward seconds, recompute seconds) of the whole work -> seconds of the iteration over the budget."""


def largest_backward(cost: IterationCost, work: Work, job: JobView, budget_s: float) -> int:
    """Most layer-tokens of `job`'s backward that continue from where it stands."""
    _, layers, order, _, _, length, _, done, step_due = job
    left = 0 if step_due else length * layers - done
    if left <= 0 or (cost.lookahead and cost._host_s > budget_s):
        return 0
    if length >= len(cost._token_s):
        cost._reach(length)
    b, r, over = _question(cost, work, budget_s)
    if not work.backward:
        b = cost.curves.backward_start_s
    if order == "window_major":
        return _windows(cost, over, b, r, job)
    fitted = 0
    into_layer = done % length
    if into_layer:
        rest = length - into_layer
        rest_s = cost.rectangle_s(1, rest, 0)
        excess_s = over(b + rest_s, r)
        if excess_s > 0.0:
            return _part(cost, over, b, r, rest, rest - 1, rest_s - excess_s, excess_s)
        fitted = rest
        left -= rest
        if left == 0:
            return fitted
        b += rest_s
    layer_s = cost.rectangle_s(1, length, 0)
    room_s = -over(b, r)
    whole = _whole(over, b, r, room_s, layer_s, left // length)
    fitted += whole * length
    if whole * length == left:
        return fitted
    if whole:
        b += whole * layer_s
        room_s -= whole * layer_s
    return fitted + _part(cost, over, b, r, length, length - 1, room_s, layer_s - room_s)


def _question(cost: IterationCost, work: Work, budget_s: float) -> tuple[float, float, Over]:
    """Backward and recompute seconds that `work` has already, and the iteration as their function."""
    tokens, prefill, rest, lora_token, windows, forward, b, r, optimizer = cost._terms(work)
    inference_s = prefill + rest + lora_token * tokens
    window_s = forward + cost._window_s[windows]
    host_s = 0.0 if cost.lookahead else cost._host_s
    if not work.overlap:
        inference_s = cost._token_s[tokens + windows] + inference_s
        return b, r, lambda b, r: (inference_s + (window_s + ((b + r) + optimizer)) + host_s) - budget_s
    inference_s = cost._token_s[tokens] + inference_s
    pass_s, kappa = cost._token_s[windows], cost._kappa

    def overlapped(b: float, r: float) -> float:
        y = pass_s + (window_s + ((b + r) + optimizer))
        gpu_s = inference_s + kappa * y if inference_s > y else y + kappa * inference_s
        return (gpu_s + host_s) - budget_s

    return b, r, overlapped


def _whole(over: Over, b: float, r: float, room_s: float, layer_s: float, most: int) -> int:
    """Largest number of whole layers (0..most): a division, checked on both sides.

    Only where the division was wrong (overlapping streams, where a second of backward costs less than
    a second) does it go on with a bisection.
    """
    guess = room_s / layer_s
    n = 0 if not guess > 0 else most if guess >= most else int(guess)
    low, high, check_next = 0, most + 1, True
    while low + 1 < high:
        n = low + 1 if n <= low else high - 1 if n >= high else n
        if over(b + n * layer_s, r) <= 0.0:
            low = n
            n = n + 1 if check_next else (low + high) >> 1
            check_next = False
        else:
            high = n
            n = n - 1 if check_next else (low + high) >> 1
            check_next = False
    return low


def _part(
    cost: IterationCost,
    over: Over,
    b: float,
    r: float,
    right: int,
    most: int,
    room_s: float,
    excess_s: float,
) -> int:
    """Largest rectangle (0..most tokens) of one layer whose right end is at token `right`.

    About `room_s` are left without it and `excess_s` missing with `most` + 1 tokens: where the search
    starts depends on them, its answer does not.
    """
    fixed_s, each_s, pair_s, read_s, unhidden = cost._backward
    list_s = cost._backward_s
    reading_s = read_s * right
    low, high, step = 0, most + 1, 0
    n = int(high * room_s / (room_s + excess_s)) if 0.0 < room_s < inf and excess_s > 0.0 else 1
    n = max(1, min(n, most))
    while low + 1 < high:
        compute_s = n * each_s + pair_s * (n * (right - n + (n + 1) * 0.5))
        more_s = list_s[n] + (
            fixed_s
            + (
                compute_s + unhidden * reading_s
                if compute_s > reading_s
                else reading_s + unhidden * compute_s
            )
        )
        over_s = over(b + more_s, r)
        if over_s <= 0.0:
            low = n
        else:
            high = n
        if step == 0:
            slope_s = list_s[n] - list_s[n - 1] + each_s + pair_s * (right - n)
        step += 1
        if step & 3 and -slope_s * (high - low) < over_s < slope_s * (high - low):
            n -= int(over_s / slope_s)
            n += (n == low) - (n == high)
        else:
            n = (low + high) >> 1
    return low


def _windows(cost: IterationCost, over: Over, b: float, r: float, job: JobView) -> int:
    """Layer-tokens of the widest window at the right end, through all layers."""
    layers = job.layers
    right = job.sample_tokens - job.backward_layer_tokens // layers
    again = job.memory == "recompute"
    low, high, n = 0, right + 1, right
    while low + 1 < high:
        context = right - n
        recompute_s = r + cost.recompute_window_s(n, context) if again else r
        if over(b + cost.rectangle_s(layers, n, context), recompute_s) <= 0.0:
            low = n
        else:
            high = n
        n = (low + high) >> 1
    return low * layers
