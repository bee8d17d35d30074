"""Lengths have the facts that were stated: quantiles, means after clipping, bounds, joint pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sim.workload.lengths import Fixed, FromTrace, Independent, Lognormal
from sim.workload.streams import stream

N = 200_000


def draw(length: Lognormal, n: int = N) -> np.ndarray:
    return length.draw(n, stream(5, "prompt_tokens"))


@pytest.mark.parametrize(
    "quantiles", [{"p50": 100, "p90": 700}, {"p10": 20, "p99": 3000}, {"p25": 60, "p75": 60.5}]
)
def test_two_quantiles_are_met(quantiles: dict[str, float]) -> None:
    tokens = draw(Lognormal(quantiles=quantiles, max_tokens=10**6))
    for name, value in quantiles.items():
        share = int(name[1:]) / 100
        # P(X <= quantile) has standard error sqrt(p (1 - p) / n); half a token is lost to rounding.
        low, high = (tokens < value - 0.5).mean(), (tokens <= value + 0.5).mean()
        margin = 4 * math.sqrt(share * (1 - share) / N)
        assert low - margin <= share <= high + margin


def test_more_quantiles_are_met_by_least_squares() -> None:
    on_a_line = {
        f"p{p}": math.exp(4 + 0.8 * z) for p, z in ((50, 0.0), (90, 1.2815515655), (99, 2.3263478740))
    }
    fitted = Lognormal(quantiles=on_a_line, max_tokens=10**6)
    assert fitted.mu == pytest.approx(4, abs=1e-8)
    assert fitted.sigma == pytest.approx(0.8, abs=1e-8)


@pytest.mark.parametrize(
    ("quantile", "mean", "most"),
    [
        ({"p50": 35}, 240, 4096),
        ({"p90": 543}, 260, 2048),
        ({"p50": 3100}, 3650, 8192),
        ({"p10": 30}, 200, 900),
    ],
)
def test_mean_after_clipping_and_quantile_are_met(quantile: dict[str, float], mean: float, most: int) -> None:
    fitted = Lognormal(quantiles=quantile, mean_tokens=mean, max_tokens=most)
    assert fitted.clipped_mean(fitted.mu, fitted.sigma) == pytest.approx(mean, rel=1e-9)
    tokens = draw(fitted)
    # Rounding shifts the mean by far less than 0.1 tokens; lengths below 1 are clipped before it.
    assert abs(tokens.mean() - mean) < 4 * tokens.std() / math.sqrt(N) + 0.1
    name, value = next(iter(quantile.items()))
    assert np.quantile(tokens, int(name[1:]) / 100) == pytest.approx(value, rel=0.03)
    assert tokens.min() >= 1
    assert tokens.max() <= most


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"quantiles": {"p50": 10}}, "two or more"),
        ({"quantiles": {"p50": 10, "p90": 20}, "mean_tokens": 12}, "two or more, or one when mean"),
        ({"quantiles": {"p50": 20, "p90": 10}}, "must not decrease"),
        ({"quantiles": {"median": 20, "p90": 10}}, "named p1..p99, got 'median'"),
        ({"quantiles": {"p0": 20, "p90": 10}}, "named p1..p99, got 'p0'"),
        ({"quantiles": {"p50": -1, "p90": 10}}, "p50 must be a number above 0"),
        ({"quantiles": {"p50": "x", "p90": 10}}, "p50 must be a number above 0 and at most .*, got 'x'"),
        ({"quantiles": {"p50": 1e308}, "mean_tokens": 12}, "p50 must be a number above 0 and at most"),
        ({"quantiles": {"p90": 761}, "mean_tokens": 100}, "must be those of a lognormal"),
        ({"quantiles": {"p50": 1, "p90": 2}, "min_tokens": 0}, "min_tokens must be"),
        ({"quantiles": {"p50": 1, "p90": 2}, "min_tokens": 2000}, "max_tokens must be"),
        ({"quantiles": {"p50": 1, "p90": 2}, "max_tokens": 10**400}, "max_tokens must be .* at most"),
    ],
)
def test_impossible_facts_are_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Lognormal(**({"max_tokens": 1000} | arguments))


def test_fixed_and_independent() -> None:
    lengths = Independent(
        prompt=Fixed(tokens=3), output=Lognormal(quantiles={"p50": 9, "p90": 20}, max_tokens=50)
    )
    prompt, output = lengths.draw(1000, stream(0, "p"), stream(0, "o"))
    assert set(prompt.tolist()) == {3}
    assert np.array_equal(output, lengths.output.draw(1000, stream(0, "o")))


def test_pairs_from_a_file_stay_together(tmp_path: Path) -> None:
    pairs = [[10, 100], [20, 200], [30, 300]]
    (tmp_path / "lengths.json").write_text(json.dumps(pairs))
    lengths = FromTrace(file=str(tmp_path / "lengths.json"))
    prompt, output = lengths.draw(3000, stream(0, "p"), stream(0, "o"))
    assert np.array_equal(output, prompt * 10)
    assert (np.abs(np.bincount(prompt)[[10, 20, 30]] - 1000) < 4 * math.sqrt(3000 * 2 / 9)).all()
    short = FromTrace(file=str(tmp_path / "lengths.json"), max_total_tokens=220)
    assert set(short.draw(100, stream(0, "p"), stream(0, "o"))[0].tolist()) == {10, 20}
    with pytest.raises(ValueError, match="no row has at most 5 tokens"):
        FromTrace(file=str(tmp_path / "lengths.json"), max_total_tokens=5)
    with pytest.raises(ValueError, match="did you mean 'azure"):
        FromTrace(file="x", format="azur")
