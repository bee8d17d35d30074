"""Which part of a profile is wrong: recorded iterations against the parts that it predicts for them.

    measured_i = sum_j  s_j  part_ij        s_j = 1 where the profile is right

Parts that rise and fall together cannot be told apart by a fit of all factors at once, which would set one at
4 and its neighbour at 0. So a factor stays 1 unless the iterations demand otherwise: one after the other the
part is freed that lowers the mean relative error most (absolute, not squared: an engine has hiccups), until the
best of them lowers it no more than chance would (Schwarz's criterion for errors of a Laplace distribution). One
of the candidates is all other parts together: a machine that is slower than it was is not thirteen errors.
Intervals are bootstrapped over blocks of iterations, since neighbours are alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.cost.nnls import nnls

Floats = NDArray[np.float64]

PARTS = {
    "forward pass": ("forward_pass", "collective"),
    "decode attention": ("attention_decode",),
    "prefill attention": ("attention_prefill",),
    "logits and sampling": ("logits",),
    "window forward": ("attention_forward", "loss", "adapters_forward"),
    "backward": ("backward",),
    "recomputed windows": ("recompute",),
    "optimizer": ("optimizer",),
    "LoRA": ("adapters",),
    "overlap of streams": ("overlap_saving",),
    "host": ("host",),
}
"""What a person would look at -> the parts of `row_parts` in it."""

OTHERS = "all other parts"
OFF = 1.2
"""A factor further from 1, with all of its interval, is an error of the profile."""
LEAST_SHARE = 0.01
"""Of the time: parts below it are not looked at."""
LEAST_GAIN = 10.0
"""Twice the gain in log likelihood that frees a part, above Schwarz's log n."""
LEAST_CUT = 0.08
"""Share of the mean error that a factor must take away: iterations are not independent of each other."""
RIVAL = 1.05
"""Mean error over that of the best part, up to which another part may be meant as well."""
MOST_ROWS = 4000
BOOTSTRAPS = 100
BLOCK = 4
ROUNDS, ROUNDS_AGAIN = 50, 12


class Finding(NamedTuple):
    """One part of the profile against what was measured."""

    part: str
    share: float
    """Of the predicted time of the iterations, by the profile."""
    freed: bool
    """The iterations cannot be explained without a factor of its own."""
    factor: float
    """Measured over what the profile says; NaN where there is too little of the part to tell."""
    low: float
    high: float
    """The middle 90 % of the bootstrap."""
    rivals: tuple[str, ...] = ()
    """Of a freed part: others that explain the iterations nearly as well."""
    common: bool = False
    """Of a part that is not freed: all other parts have a factor in common, which is its factor too."""

    @property
    def off(self) -> bool:
        return self.freed and (self.low > OFF or self.high < 1 / OFF)

    def line(self) -> str:
        if np.isnan(self.factor):
            return f"{self.part}: too little of it to tell"
        if not self.freed:
            return f"{self.part}: {self._not_freed()}"
        text = f"{self.part}: measured {self.factor:.2f}x of what the profile says"
        text += f" ({self.low:.2f}-{self.high:.2f})" + ("  <- off" if self.off else "")
        if self.off and self.part == "host":
            text += ", as where other work keeps the processor busy"
        return text + (f", unless it is {' or '.join(self.rivals)}" if self.rivals else "")

    def _not_freed(self) -> str:
        """What is known of a part that needs no factor of its own: not that it is right."""
        own, interval = f"a factor of its own would be {self.factor:.2f}", f"{self.low:.2f}-{self.high:.2f}"
        hardly = f"{own} ({interval}), and explain the runs hardly better"
        if self.common:
            return f"as {OTHERS}; {hardly}"
        if self.low >= 1 / OFF and self.high <= OFF:
            return f"within {OFF:g}x ({own}, {interval})"
        if self.low > OFF or self.high < 1 / OFF:
            return f"not shown to be off; {hardly}"
        return f"the runs do not say whether it is off by more than {OFF:g}x ({own}, {interval})"


def grouped(parts: Mapping[str, Floats]) -> dict[str, Floats]:
    """Seconds of `row_parts` under the names of PARTS, without those that are nowhere."""
    known = {name for names in PARTS.values() for name in names}
    assert set(parts) <= known, set(parts) - known
    sums = {part: sum(parts[name] for name in names if name in parts) for part, names in PARTS.items()}
    return {part: np.asarray(s) for part, s in sums.items() if np.any(s)}


def diagnose(parts: Mapping[str, Floats], measured_s: Floats, seed: int = 0) -> list[Finding]:
    """A finding for each of `grouped` parts, seconds of shape (rows,), the largest share first; before them one
    for OTHERS where they have a factor in common. Of more than MOST_ROWS, so many drawn blocks are looked at."""
    random = np.random.default_rng(seed)
    if len(measured_s) > MOST_ROWS:
        kept = np.unique(_blocks(len(measured_s), random, MOST_ROWS))
        parts, measured_s = {name: s[kept] for name, s in parts.items()}, measured_s[kept]
    problem = _Problem(parts, measured_s)
    freed = _freed(problem)
    draws = [_blocks(problem.rows, random, problem.rows) for _ in range(BOOTSTRAPS)]
    findings = []
    for name in [OTHERS, *sorted(parts, key=lambda name: -problem.share(name))]:
        if name == OTHERS and name not in freed:
            continue
        share, numbers = problem.share(name, freed), (np.nan,) * 3
        if share >= LEAST_SHARE:
            # A part that keeps the common factor is shown with what its own would be.
            numbers = problem.interval(name, [*freed, *([] if name in freed else [name])], draws)
        common = OTHERS in freed and name not in freed
        findings.append(Finding(name, share, name in freed, *numbers, freed.get(name, ()), common))
    return findings


class _Problem:
    """Rows of parts and times, relative to the times."""

    def __init__(self, parts: Mapping[str, Floats], measured_s: Floats) -> None:
        self.rows = len(measured_s)
        self._columns = {name: seconds / measured_s for name, seconds in parts.items()}
        self._seconds = {name: float(np.abs(seconds).sum()) for name, seconds in parts.items()}

    def candidates(self) -> list[str]:
        return [OTHERS, *(name for name in self._columns if self.share(name) >= LEAST_SHARE)]

    def share(self, name: str, freed: Collection[str] = ()) -> float:
        total = sum(self._seconds.values())
        if name == OTHERS:
            return sum(s for other, s in self._seconds.items() if other not in freed) / total
        return self._seconds[name] / total

    def loss(self, freed: Sequence[str]) -> float:
        """Mean relative error with the best factors of `freed`."""
        a, b = self._system(freed)
        return float(np.abs(a @ _factors(a, b, ROUNDS) - b).mean())

    def demands(self, loss: float, better: float) -> bool:
        """Whether so much less error is worth another factor."""
        gain = 2 * self.rows * math.log(loss / better)
        return better < (1 - LEAST_CUT) * loss and gain > math.log(self.rows) + LEAST_GAIN

    def interval(
        self, name: str, freed: Sequence[str], draws: Sequence[NDArray[np.int64]]
    ) -> tuple[float, float, float]:
        """The factor of `name`, and the middle 90 % of it in the draws."""
        a, b = self._system(freed)
        n = list(freed).index(name)
        found = _factors(a, b, ROUNDS)
        again = [_factors(a[k], b[k], ROUNDS_AGAIN, found)[n] for k in draws]
        low, high = np.quantile(again, (0.05, 0.95))
        return float(found[n]), float(low), float(high)

    def _system(self, freed: Sequence[str]) -> tuple[Floats, Floats]:
        """Columns of `freed`, and what they must add up to."""
        rest = sum((c for name, c in self._columns.items() if name not in freed), np.zeros(self.rows))
        columns = [rest if name == OTHERS else self._columns[name] for name in freed]
        fixed = np.zeros(self.rows) if OTHERS in freed else rest
        return np.column_stack([*columns, np.zeros((self.rows, 0))]), np.ones(self.rows) - fixed


def _freed(problem: _Problem) -> dict[str, tuple[str, ...]]:
    """Parts whose factor cannot be 1, the one that explains most first, each with its rivals.

    All other parts together come before a single one that explains as much; if one of those freed later
    makes an earlier one needless, that is 1 again.
    """
    freed: dict[str, tuple[str, ...]] = {}
    loss = problem.loss([])
    while left := [name for name in problem.candidates() if name not in freed]:
        losses = {name: problem.loss([*freed, name]) for name in left}
        best = min(losses, key=lambda name: losses[name])
        if not problem.demands(loss, losses[best]):
            break
        if losses.get(OTHERS, math.inf) < RIVAL * losses[best]:
            best = OTHERS
        freed[best] = tuple(n for n in left if n != best and losses[n] < RIVAL * losses[best])
        loss = losses[best]
    for name in [*freed]:
        rest = [other for other in freed if other != name]
        if not problem.demands(problem.loss(rest), problem.loss([*freed])):
            del freed[name]
    return freed


def _factors(a: Floats, b: Floats, rounds: int, start: Floats | None = None) -> Floats:
    """min sum |a s - b| over s >= 0, by least squares with weights 1 / |residual|, time and again."""
    factors = np.ones(a.shape[1]) if start is None else start
    for _ in range(rounds if a.shape[1] else 0):
        weight = 1 / np.sqrt(np.maximum(np.abs(a @ factors - b), 1e-4))
        before, factors = factors, nnls(a * weight[:, None], b * weight)
        if np.abs(factors - before).max() < 1e-4:
            break
    return factors


def _blocks(count: int, random: np.random.Generator, rows: int) -> NDArray[np.int64]:
    """`rows` of the numbers below `count`, drawn as blocks of neighbours."""
    size = min(BLOCK, count)
    starts = random.integers(0, count - size + 1, -(-rows // size))
    return np.concatenate([np.arange(s, s + size) for s in starts])[:rows]
