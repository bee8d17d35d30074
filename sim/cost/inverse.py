"""How an inverse question is both cheap and exact: the seconds that a budget leaves, and the search in them.

The answer must be exact in floating point: with it the work fits the budget, with one token more it does not,
by the very sum that `iteration_s` forms. To search by that sum would form all of it for every candidate. So
all that is known is taken off the budget first, and the seconds that a candidate adds are compared with the
seconds left. Such a comparison can err by rounding alone: where either side of the answer comes closer to what
is left than rounding reaches, and only there, the sum itself settles it. Every term is monotone in the count
asked for, and rounded addition keeps that.

The search is Newton's, since seconds are nearly linear in tokens, within a bracket that decides. A step that
would leave the bracket and every fourth one are bisections, since a pass's seconds are a staircase in places.
With a start near the answer that is 3 evaluations where bisection alone takes 12.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

Coefficients = tuple[float, float, float, float, float]
"""The fields of a `ChunkCost`."""

ROUNDING = 1e-9
"""Relative error of a sum of a dozen seconds, generously: it is about 1e-15."""


def left_beside(gpu_s: float, beside_s: float, contention: float, tolerance_s: float) -> tuple[float, float]:
    """What `gpu_s` seconds, which may be wrong by `tolerance_s`, leave to a stream beside another of `beside_s`,
    when both together take the longer plus `contention` times the shorter; and how wrong that may be."""
    if contention:
        as_longer_s = gpu_s - contention * beside_s
        if as_longer_s >= beside_s:
            return as_longer_s, tolerance_s
        return (gpu_s - beside_s) / contention, tolerance_s / contention
    # A shorter stream costs nothing: all of it fits with the longer one, or none.
    if abs(gpu_s - beside_s) <= tolerance_s:
        return gpu_s, inf
    return (gpu_s if gpu_s > beside_s else -inf), tolerance_s


def next_tokens(n: int, over_s: float, slope_s: float, low: int, high: int, step: int) -> int:
    """The candidate after `n`, which is one of `low` and `high` and `over_s` too long."""
    if -slope_s < over_s < slope_s and step & 3:
        return n + 1 if n == low else n - 1
    if step & 3 and abs(over_s) < slope_s * (high - low):
        n -= int(over_s / slope_s)
        if low < n < high:
            return n
        return low + 1 if n <= low else high - 1
    return (low + high) >> 1


def largest_chunk(
    chunk: Coefficients,
    context: int,
    pass_s: list[float],
    passes: int,
    more_s: list[float],
    more: int,
    start: int,
    most: int,
    left_s: float,
    tolerance_s: float,
) -> tuple[int, float, bool]:
    """The most tokens n (0..most) after `context` cached ones for which

        pass_s[passes + n] + more_s[more + n] + attention

    is at most `left_s`; the seconds of that attention; and whether n is certain, with comparisons that may be
    wrong by `tolerance_s`. The search begins at `start`: only its length depends on it.
    """
    fixed_s, each_s, pair_s, read_s, unhidden = chunk
    cached = context + 0.0
    low, low_s, low_over_s, high, high_over_s = 0, 0.0, -inf, most + 1, inf
    if most < 1:
        return 0, 0.0, True
    n, step, slope_s = (start if start < most else most), 0, 0.0
    while True:
        # In floats throughout: a product with an integer takes as long as four of floats.
        tokens = n + 0.0
        compute_s = tokens * each_s + pair_s * (tokens * (cached + (tokens + 1.0) * 0.5))
        reading_s = read_s * (cached + tokens)
        n_s = fixed_s + (
            compute_s + unhidden * reading_s if compute_s > reading_s else reading_s + unhidden * compute_s
        )
        over_s = pass_s[passes + n] + more_s[more + n] + n_s - left_s
        if over_s <= 0.0:
            low, low_s, low_over_s = n, n_s, over_s
        else:
            high, high_over_s = n, over_s
        if high - low == 1:
            return low, low_s, low_over_s < -tolerance_s and high_over_s > tolerance_s
        if step == 0:
            slope_s = pass_s[passes + n] - pass_s[passes + n - 1] + more_s[more + n] - more_s[more + n - 1]
            slope_s += each_s + pair_s * (cached + tokens)
        step += 1
        n = next_tokens(n, over_s, slope_s, low, high, step)


def settled(n: int, unit: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest multiple of `unit` (0..most) that fits, searched for one by one from `n`."""
    while n > 0 and not fits(n):
        n -= unit
    while n + unit <= most and fits(n + unit):
        n += unit
    return n
