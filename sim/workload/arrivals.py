"""Arrival processes: when requests come, drawn for a window [0, duration_s).

Each has a `rate_rps` and is stationary from the first second: gaps of a bursty process seen from an
arbitrary instant are not gaps seen from an arrival, so the first one is drawn from its own law. With
the same generator a longer window begins with the arrivals of a shorter one, but for those of a bin of exact counts
that the shorter one cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sim.workload.checks import check_choice, check_number
from sim.workload.table import Floats


class ArrivalProcess(Protocol):
    """When requests come."""

    @property
    def rate_rps(self) -> float:
        """Mean rate."""
        ...

    def times_s(self, duration_s: float, rng: np.random.Generator) -> Floats:
        """Sorted arrival times in [0, duration_s), shape (arrivals,); there may be none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Independent arrivals: exponential gaps, CV 1."""

    rate_rps: float

    def __post_init__(self) -> None:
        check_number("workload.rate_rps", self.rate_rps, above=0)

    def times_s(self, duration_s: float, rng: np.random.Generator) -> Floats:
        return _renewal(duration_s, 1 / self.rate_rps, 1.0, rng)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma:
    """Gamma-distributed gaps with mean 1/rate_rps and coefficient of variation `cv`.

    Bursty above 1, more regular than Poisson below.
    """

    rate_rps: float
    cv: float

    def __post_init__(self) -> None:
        check_number("workload.rate_rps", self.rate_rps, above=0)
        check_number("workload.arrivals.cv", self.cv, at_least=1e-3, at_most=1e3)

    def times_s(self, duration_s: float, rng: np.random.Generator) -> Floats:
        return _renewal(duration_s, 1 / self.rate_rps, self.cv, rng)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """One arrival every 1/rate_rps seconds, the first at 0."""

    rate_rps: float

    def __post_init__(self) -> None:
        check_number("workload.rate_rps", self.rate_rps, above=0)

    def times_s(self, duration_s: float, rng: np.random.Generator) -> Floats:
        times_s = np.arange(np.ceil(duration_s * self.rate_rps)) / self.rate_rps
        return times_s[times_s < duration_s]


MOST_BINS = 10_000_000
"""Of a run, in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Binned:
    """Piecewise constant rates: bin i has rates[i], scaled so that one pass has the mean `rate_rps`.

    Beyond the last bin the shape starts again. `counts` says how many arrive in a bin: `poisson` draws
    the number, `exact` takes the integral of the rate, rounded so that the running total is never off
    by more than half a request. Within a bin arrivals are uniform either way.
    """

    rate_rps: float
    rates: Sequence[float]
    bin_s: float
    counts: str = "poisson"

    def __post_init__(self) -> None:
        check_number("workload.rate_rps", self.rate_rps, above=0)
        check_number("workload.arrivals.bin_s", self.bin_s, above=0)
        check_choice("workload.arrivals.counts", self.counts, ("poisson", "exact"))
        object.__setattr__(self, "rates", tuple(self.rates))
        for i, rate in enumerate(self.rates):
            check_number(f"workload.arrivals.rates[{i}]", rate, at_least=0)
        if not sum(self.rates) > 0:
            raise ValueError(f"workload.arrivals.rates must have a rate above 0, got {list(self.rates)}")

    def times_s(self, duration_s: float, rng: np.random.Generator) -> Floats:
        edges_s, total = self._integral(duration_s)
        if self.counts == "poisson":
            # Unit-rate arrivals, seen through the inverse of the integrated rate.
            times_s = np.interp(_renewal(float(total[-1]), 1.0, 1.0, rng), total, edges_s)
        else:
            counts = np.diff(np.floor(total + 0.5)).astype(np.int64)
            starts_s = np.repeat(edges_s[:-1], counts)
            times_s = starts_s + np.repeat(np.diff(edges_s), counts) * rng.random(len(starts_s))
            times_s.sort()
        return times_s[times_s < duration_s]

    def _integral(self, duration_s: float) -> tuple[Floats, Floats]:
        """Bin edges up to duration_s, and the expected arrivals before each; shape (bins + 1,)."""
        if not duration_s / self.bin_s <= MOST_BINS:
            raise ValueError(
                f"workload.arrivals.bin_s must leave at most {MOST_BINS:,} bins in workload.duration_s "
                f"{duration_s:g}, got {self.bin_s:g}"
            )
        bins = int(np.ceil(duration_s / self.bin_s))
        rates = np.resize(np.array(self.rates) * (self.rate_rps / np.mean(self.rates)), bins)
        edges_s = np.append(np.arange(bins) * self.bin_s, duration_s)
        return edges_s, np.append(0.0, np.cumsum(rates * np.diff(edges_s)))


def _renewal(duration_s: float, mean_s: float, cv: float, rng: np.random.Generator) -> Floats:
    """Arrivals of a stationary renewal process with gamma gaps.

    Its first gap follows the equilibrium law: a uniform part of a length-biased gap, and a length-biased
    Gamma(k) is Gamma(k + 1). The mean number of arrivals is then duration / mean gap exactly (Cox,
    Renewal Theory, 1962, sections 2.2 and 5.1).
    """
    shape = 1 / cv**2
    scale_s = mean_s / shape
    last_s = rng.random() * rng.gamma(shape + 1, scale_s)
    blocks = [np.array([last_s])]
    while last_s < duration_s:
        # A fixed block keeps what a longer window begins with the same.
        block = last_s + np.cumsum(rng.gamma(shape, scale_s, 4096))
        blocks.append(block)
        last_s = block[-1]
    times_s = np.concatenate(blocks)
    return times_s[times_s < duration_s]
