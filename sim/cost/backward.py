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

Seconds = Callable[[float, float], float]
"""(backward seconds, recompute seconds) of the whole work -> seconds of the iteration."""


def largest_backward(cost: IterationCost, work: Work, job: JobView, budget_s: float) -> int:
    """Most layer-tokens of `job`'s backward that continue from where it stands."""
    left = job.backward_left
    length, done = job.sample_tokens, job.backward_layer_tokens
    if left <= 0:
        return 0
    if length > cost.known_tokens:
        cost._reach(length)
    backward_s, recompute_s, seconds = _question(cost, work)
    if not work.backward:
        backward_s = cost.curves.backward_start_s
    if job.order == "window_major":
        return _windows(cost, seconds, budget_s, backward_s, recompute_s, job)
    fitted = 0
    into_layer = done % length
    if into_layer:
        rest = length - into_layer
        fitted = _part(cost, seconds, budget_s, backward_s, recompute_s, rest, rest)
        left -= rest
        if fitted < rest or left == 0:
            return fitted
        backward_s += cost.rectangle_s(1, rest, 0)
    layer_s = cost.rectangle_s(1, length, 0)
    whole = _whole(seconds, budget_s, backward_s, recompute_s, layer_s, left // length)
    fitted += whole * length
    if whole * length == left:
        return fitted
    if whole:
        backward_s += whole * layer_s
    return fitted + _part(cost, seconds, budget_s, backward_s, recompute_s, length - 1, length)


def _question(cost: IterationCost, work: Work) -> tuple[float, float, Seconds]:
    """Backward and recompute seconds that `work` has already, and the iteration as their function."""
    tokens, prefill, rest, lora_token, windows, forward, backward, recompute, optimizer = cost._terms(work)
    inference_s = prefill + rest + lora_token * tokens
    window_s = forward + cost._window_s[windows]
    host_s = cost._host_s
    inference_s = cost._token_s[tokens + (0 if work.overlap else windows)] + inference_s
    pass_s, kappa, lookahead = cost._token_s[windows], cost._kappa, cost.lookahead

    def fused(b: float, r: float) -> float:
        gpu_s = inference_s + (window_s + ((b + r) + optimizer))
        if lookahead:
            return gpu_s if gpu_s > host_s else host_s
        return gpu_s + host_s

    def overlapped(b: float, r: float) -> float:
        y = pass_s + (window_s + ((b + r) + optimizer))
        gpu_s = inference_s + kappa * y if inference_s > y else y + kappa * inference_s
        if lookahead:
            return gpu_s if gpu_s > host_s else host_s
        return gpu_s + host_s

    return backward, recompute, overlapped if work.overlap else fused


def _whole(seconds: Seconds, budget_s: float, b: float, r: float, layer_s: float, most: int) -> int:
    """Largest number of whole layers (0..most): a division, checked on both sides.

    Only where the division was wrong (overlapping streams, where a second of backward costs less than
    a second) does it go on with a bisection.
    """
    guess = (budget_s - seconds(b, r)) / layer_s
    n = 0 if not guess > 0 else most if guess >= most else int(guess)
    low, high, check_next = 0, most + 1, True
    while low + 1 < high:
        n = min(max(n, low + 1), high - 1)
        if seconds(b + n * layer_s, r) <= budget_s:
            low = n
            n = n + 1 if check_next else (low + high) >> 1
            check_next = False
        else:
            high = n
            n = n - 1 if check_next else (low + high) >> 1
            check_next = False
    return low


def _part(
    cost: IterationCost, seconds: Seconds, budget_s: float, b: float, r: float, most: int, right: int
) -> int:
    """Largest rectangle (0..most tokens) of one layer whose right end is at token `right`."""
    fixed_s, each_s, pair_s, read_s = cost._backward
    list_s = cost._backward_s
    reading_s = read_s * right
    room_s, excess_s, step, side = budget_s - seconds(b, r), 0.0, 0, 0
    low, high, n = 0, most + 1, most
    while low + 1 < high:
        compute_s = n * each_s + pair_s * (n * (right - n + (n + 1) * 0.5))
        more_s = list_s[n] + (fixed_s + (compute_s if compute_s > reading_s else reading_s))
        over_s = seconds(b + more_s, r) - budget_s
        if over_s <= 0.0:
            low, room_s = n, -over_s
            if side > 0:
                excess_s *= 0.5
            side = 1
        else:
            high, excess_s = n, over_s
            if side < 0:
                room_s *= 0.5
            side = -1
        step += 1
        span_s = room_s + excess_s
        if step & 3 and 0.0 < span_s < inf:
            n = min(max(low + int((high - low) * room_s / span_s), low + 1), high - 1)
        else:
            n = (low + high) >> 1
    return low


def _windows(cost: IterationCost, seconds: Seconds, budget_s: float, b: float, r: float, job: JobView) -> int:
    """Layer-tokens of the widest window at the right end, through all layers."""
    layers = job.layers
    right = job.sample_tokens - job.backward_layer_tokens // layers
    again = job.memory == "recompute"
    low, high, n = 0, right + 1, right
    while low + 1 < high:
        context = right - n
        recompute_s = r + cost.recompute_window_s(n, context) if again else r
        if seconds(b + cost.rectangle_s(layers, n, context), recompute_s) <= budget_s:
            low = n
        else:
            high = n
        n = (low + high) >> 1
    return low * layers
