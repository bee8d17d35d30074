"""Lengths of requests and samples: fixed, lognormal fitted to stated facts, or drawn from a trace.

A lognormal is fitted *after* clipping: its stated mean is the mean of what is drawn, although nothing
is longer than `max_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import NormalDist
from typing import Protocol

import numpy as np

from sim.workload.checks import check_choice, check_number, check_whole
from sim.workload.files import check_file
from sim.workload.readers.columns import MAX_TOKENS
from sim.workload.table import Ints

Rng = np.random.Generator
NORMAL = NormalDist()


class Length(Protocol):
    """A distribution of one length."""

    def draw(self, count: int, rng: Rng) -> Ints:
        """`count` lengths of at least 1 token, shape (count,)."""
        ...


class Lengths(Protocol):
    """A distribution of prompt and output lengths."""

    def draw(self, count: int, prompt_rng: Rng, output_rng: Rng) -> tuple[Ints, Ints]:
        """`count` prompts and outputs of at least 1 token, each of shape (count,)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Always the same length."""

    tokens: int

    def __post_init__(self) -> None:
        check_whole("tokens", self.tokens, at_least=1, at_most=MAX_TOKENS)

    def draw(self, count: int, rng: Rng) -> Ints:
        return np.full(count, self.tokens, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lognormal:
    """Lognormal, clipped to min_tokens..max_tokens and rounded.

    Fitted to `quantiles` alone (names p1..p99; two are met exactly, more by least squares of the
    logarithms) or to `mean_tokens` of the clipped lengths and one quantile; where two spreads would do,
    the smaller. ValueError when no lognormal has such a mean.
    """

    quantiles: Mapping[str, float]
    mean_tokens: float | None = None
    min_tokens: int = 1
    max_tokens: int
    mu: float = field(init=False)
    """Mean of the logarithm."""
    sigma: float = field(init=False)
    """Standard deviation of the logarithm."""

    def __post_init__(self) -> None:
        check_whole("min_tokens", self.min_tokens, at_least=1)
        check_whole("max_tokens", self.max_tokens, at_least=self.min_tokens, at_most=MAX_TOKENS)
        points = sorted((_standard_score(name), value) for name, value in self.quantiles.items())
        for name, value in self.quantiles.items():
            check_number(f"quantiles.{name}", value, above=0, at_most=MAX_TOKENS)
        if any(low > high for (_, low), (_, high) in pairwise(points)):
            raise ValueError(f"quantiles must not decrease, got {dict(self.quantiles)}")
        if len(points) < 2 if self.mean_tokens is None else len(points) != 1:
            raise ValueError(
                "quantiles must hold two or more, or one when mean_tokens is given; "
                f"got {dict(self.quantiles)} and mean_tokens {self.mean_tokens}"
            )
        mu, sigma = self._fit_quantiles(points) if self.mean_tokens is None else self._fit_mean(*points[0])
        object.__setattr__(self, "mu", mu)
        object.__setattr__(self, "sigma", sigma)

    def draw(self, count: int, rng: Rng) -> Ints:
        with np.errstate(over="ignore"):  # what is longer than all floats is clipped like the rest
            tokens = np.exp(self.mu + self.sigma * rng.standard_normal(count))
        clipped: Ints = np.rint(np.clip(tokens, self.min_tokens, self.max_tokens)).astype(np.int64)
        return clipped

    def clipped_mean(self, mu: float, sigma: float) -> float:
        """E[clip(X, a, b)] = a P(X < a) + b P(X > b) + E[X; a <= X <= b], the last in closed form."""
        low, high = self.min_tokens, self.max_tokens
        if sigma == 0:
            return min(max(math.exp(mu), low), high)
        below, above = (math.log(low) - mu) / sigma, (math.log(high) - mu) / sigma
        inside = math.exp(mu + sigma**2 / 2) * (NORMAL.cdf(above - sigma) - NORMAL.cdf(below - sigma))
        return low * NORMAL.cdf(below) + high * (1 - NORMAL.cdf(above)) + inside

    def _fit_quantiles(self, points: list[tuple[float, float]]) -> tuple[float, float]:
        score, log = np.array([z for z, _ in points]), np.log([value for _, value in points])
        sigma = float(np.cov(score, log, bias=True)[0, 1] / score.var())
        return float(log.mean() - sigma * score.mean()), sigma

    def _fit_mean(self, score: float, value: float) -> tuple[float, float]:
        mean = self.mean_tokens
        check_number("mean_tokens", mean, above=0)
        assert mean is not None

        def excess(sigma: float) -> float:
            return self.clipped_mean(math.log(value) - score * sigma, sigma) - mean

        sigmas = [i / 100 for i in range(601)]
        for low, high in pairwise(sigmas):
            if excess(low) * excess(high) <= 0:
                break
        else:
            raise ValueError(
                f"quantiles and mean_tokens must be those of a lognormal within {self.min_tokens}..{self.max_tokens} "
                f"tokens, got {dict(self.quantiles)} and {mean:g}"
            )
        sign = math.copysign(1, excess(high) - excess(low))
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sign * excess(middle) < 0 else (low, middle)
        return math.log(value) - score * low, low


@dataclass(frozen=True, slots=True, kw_only=True)
class Independent:
    """Prompt and output lengths that say nothing about each other."""

    prompt: Length
    output: Length

    def draw(self, count: int, prompt_rng: Rng, output_rng: Rng) -> tuple[Ints, Ints]:
        return self.prompt.draw(count, prompt_rng), self.output.draw(count, output_rng)


@dataclass(frozen=True, slots=True, kw_only=True)
class FromTrace:
    """Pairs of prompt and output drawn together, with replacement, from a file.

    `format` is one of the readers: azure, burstgpt, mooncake, csv, or sharegpt for lengths alone.
    """

    file: str
    format: str = "sharegpt"
    max_total_tokens: int | None = None
    """Longer pairs are not drawn."""
    pairs: Ints = field(init=False, repr=False, compare=False)
    """Shape (rows, 2)."""

    def __post_init__(self) -> None:
        from sim.workload.readers.lengths import FORMATS, read_lengths

        check_choice("format", self.format, FORMATS)
        check_file("file", self.file)
        pairs = read_lengths(self.file, self.format)
        if self.max_total_tokens is not None:
            check_whole("max_total_tokens", self.max_total_tokens, at_least=2)
            pairs = pairs[pairs.sum(axis=1) <= self.max_total_tokens]
            if len(pairs) == 0:
                raise ValueError(f"{self.file}: no row has at most {self.max_total_tokens} tokens")
        object.__setattr__(self, "pairs", pairs)

    def draw(self, count: int, prompt_rng: Rng, output_rng: Rng) -> tuple[Ints, Ints]:
        rows = self.pairs[prompt_rng.integers(len(self.pairs), size=count)]
        return rows[:, 0], rows[:, 1]


def _standard_score(name: str) -> float:
    """Standard normal quantile of 'p90', 'p99.9', ..."""
    text = str(name)
    try:
        share = float(text.removeprefix("p")) / 100
    except ValueError:
        share = math.nan
    if not (text.startswith("p") and 0 < share < 1):
        raise ValueError(f"quantiles must be named p1..p99, got {name!r}")
    return NORMAL.inv_cdf(share)
