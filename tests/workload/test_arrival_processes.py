"""Every generator has the mean and the CV that were asked for, within sampling error.

Tolerances are 4 standard errors; seeds are fixed. Over T seconds a renewal process with gaps of mean m
and coefficient of variation c counts T/m arrivals with variance c^2 T/m (Cox, Renewal Theory, 1962). The
standard error of a gamma sample's CV is taken from the spread over independent blocks.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

from sim.workload.arrivals import ArrivalProcess, Binned, Constant, Gamma, Poisson
from sim.workload.config import Synthetic
from sim.workload.lengths import Fixed, Independent, Lognormal
from sim.workload.mix import AdapterMix, SloMix
from sim.workload.streams import stream

RATE_RPS, DURATION_S = 5.0, 20_000.0
SHAPE = (0.0, 1.0, 5.0, 2.0)


def times(process: ArrivalProcess, duration_s: float = DURATION_S, seed: int = 3) -> np.ndarray:
    return process.times_s(duration_s, stream(seed, "arrivals"))


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.0, 4.0])
def test_gamma_has_the_rate_and_cv_asked_for(cv: float) -> None:
    arrival_s = times(Gamma(rate_rps=RATE_RPS, cv=cv))
    expected = RATE_RPS * DURATION_S
    assert abs(len(arrival_s) - expected) < 4 * cv * math.sqrt(expected)
    gaps_s = np.diff(arrival_s)
    blocks = np.array_split(gaps_s, 50)
    errors = [b.std() / b.mean() for b in blocks]
    standard_error = np.std(errors) / math.sqrt(50)
    assert abs(gaps_s.std() / gaps_s.mean() - cv) < 5 * standard_error + 0.002 * cv


def test_poisson_has_the_rate_and_cv_1_and_independent_counts() -> None:
    arrival_s = times(Poisson(rate_rps=RATE_RPS))
    expected = RATE_RPS * DURATION_S
    assert abs(len(arrival_s) - expected) < 4 * math.sqrt(expected)
    gaps_s = np.diff(arrival_s)
    # The sample CV of n exponential gaps has standard error 1 / sqrt(n).
    assert abs(gaps_s.std() / gaps_s.mean() - 1) < 4 / math.sqrt(len(gaps_s))
    counts = np.histogram(arrival_s, int(DURATION_S), (0, DURATION_S))[0]
    # Index of dispersion of Poisson counts: 1, with standard error sqrt(2 / n).
    assert abs(counts.var() / counts.mean() - 1) < 4 * math.sqrt(2 / len(counts))


@pytest.mark.parametrize("cv", [0.3, 3.0])
def test_short_windows_have_the_rate_too(cv: float) -> None:
    """Without the equilibrium law of the first gap, (cv^2 - 1) / 2 = 4 more than 10 arrivals would come
    on average at cv 3."""
    counts = [len(times(Gamma(rate_rps=1.0, cv=cv), 10.0, seed)) for seed in range(4000)]
    assert abs(np.mean(counts) - 10) < 4 * np.std(counts) / math.sqrt(4000)


def test_constant_spacing_is_exact() -> None:
    arrival_s = times(Constant(rate_rps=4.0), 10.0)
    assert np.array_equal(arrival_s, np.arange(40) / 4)


@pytest.mark.parametrize("counts", ["poisson", "exact"])
def test_binned_follows_its_shape_at_the_rate_asked_for(counts: str) -> None:
    process = Binned(rate_rps=RATE_RPS, rates=SHAPE, bin_s=5.0, counts=counts)
    arrival_s = times(process)
    per_bin = np.histogram(arrival_s, 4000, (0, DURATION_S))[0].reshape(-1, 4)
    expected = np.array(SHAPE) / np.mean(SHAPE) * RATE_RPS * 5
    if counts == "exact":
        assert len(arrival_s) == RATE_RPS * DURATION_S
        assert np.abs(per_bin - expected).max() <= 1
    else:
        assert abs(len(arrival_s) - RATE_RPS * DURATION_S) < 4 * math.sqrt(RATE_RPS * DURATION_S)
        assert (np.abs(per_bin.mean(0) - expected) <= 4 * np.sqrt(expected / len(per_bin))).all()
        busy = per_bin[:, 2]
        assert abs(busy.var() / busy.mean() - 1) < 4 * math.sqrt(2 / len(busy))
    assert per_bin[:, 0].sum() == 0


def test_exact_counts_never_drift_by_more_than_half_a_request() -> None:
    process = Binned(rate_rps=0.77, rates=(0.3, 1.7, 0.9), bin_s=3.0, counts="exact")
    arrival_s = times(process, 100.0)
    for i, edge_s in enumerate(np.arange(3.0, 100.0, 3.0), start=1):
        due = sum([(0.3, 1.7, 0.9)[k % 3] for k in range(i)]) * 3 * 0.77 / (2.9 / 3)
        assert abs((arrival_s < edge_s).sum() - due) <= 0.5 + 1e-9


ALL = [
    Poisson(rate_rps=2.0),
    Gamma(rate_rps=2.0, cv=3.0),
    Constant(rate_rps=2.0),
    Binned(rate_rps=2.0, rates=SHAPE, bin_s=7.0),
    Binned(rate_rps=2.0, rates=SHAPE, bin_s=7.0, counts="exact"),
]


@pytest.mark.parametrize("process", ALL, ids=lambda p: type(p).__name__)
def test_times_are_sorted_within_the_window_and_repeatable(process: ArrivalProcess) -> None:
    arrival_s = times(process, 500.0)
    assert (np.diff(arrival_s) >= 0).all()
    assert arrival_s[0] >= 0
    assert arrival_s[-1] < 500.0
    assert np.array_equal(arrival_s, times(process, 500.0))
    if not isinstance(process, Constant):
        assert not np.array_equal(arrival_s[:50], times(process, 500.0, seed=4)[:50])


@pytest.mark.parametrize("process", ALL[:4], ids=lambda p: type(p).__name__)
def test_a_longer_window_begins_with_the_shorter(process: ArrivalProcess) -> None:
    short, long = times(process, 490.0), times(process, 9_800.0)
    np.testing.assert_allclose(long[: len(short)], short, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Poisson(rate_rps=0), "rate_rps must be a number above 0, got 0"),
        (lambda: Poisson(rate_rps="fast"), "got 'fast'"),
        (lambda: Poisson(rate_rps=float("nan")), "got nan"),
        (lambda: Gamma(rate_rps=1.0, cv=-1), "cv must be"),
        (lambda: Binned(rate_rps=1.0, rates=[1, -1], bin_s=1), r"rates\[1\] must be a number at least 0"),
        (lambda: Binned(rate_rps=1.0, rates=[0], bin_s=1), "a rate above 0"),
        (lambda: Binned(rate_rps=1.0, rates=[], bin_s=1), "a rate above 0"),
        (lambda: Binned(rate_rps=1.0, rates=[1], bin_s=1, counts="exakt"), "did you mean 'exact'"),
    ],
)
def test_impossible_processes_are_refused(make: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()  # type: ignore[operator]


def synthetic(**more: object) -> Synthetic:
    lengths = Independent(prompt=Fixed(tokens=5), output=Fixed(tokens=6))
    base = {
        "name": "s",
        "arrivals": Poisson(rate_rps=3.0),
        "rate_rps": 3.0,
        "lengths": lengths,
        "duration_s": 300.0,
    }
    return Synthetic(**(base | more))


def test_streams_are_independent_of_each_other() -> None:
    """Changing lengths, adapters or SLO shares moves nothing else."""
    spread = Lognormal(quantiles={"p50": 50, "p90": 300}, max_tokens=4096)
    base = synthetic(lengths=Independent(prompt=spread, output=spread)).build(0, ["a"]).table
    other_prompts = Independent(prompt=Fixed(tokens=1), output=spread)
    changed = synthetic(lengths=other_prompts, adapters=AdapterMix(count=4), slo_mix={"a": 1, "b": 3})
    table = changed.build(0, ["a", "b"]).table
    assert base is not None
    assert table is not None
    assert np.array_equal(base.arrival_s, table.arrival_s)
    assert np.array_equal(base.output_tokens, table.output_tokens)
    assert not np.array_equal(base.prompt_tokens, base.output_tokens)
    faster = (
        synthetic(lengths=other_prompts, arrivals=Poisson(rate_rps=9.0), rate_rps=9.0).build(0, ["a"]).table
    )
    assert faster is not None
    assert np.array_equal(faster.output_tokens[: len(base)], base.output_tokens)
    assert not np.array_equal(synthetic().build(1, ["a"]).table.arrival_s[:50], base.arrival_s[:50])


def test_streams_of_different_purposes_and_indices_differ_and_seed_0_is_a_seed() -> None:
    draws = [stream(*key).random() for key in ((0, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (1, "a"))]
    assert len(set(draws)) == 5
    assert stream(0, "a").random() == draws[0]
    for bad in (-1, 1.5, None, True):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            stream(bad, "a")  # type: ignore[arg-type]


def test_adapters_are_drawn_by_zipf_and_base_share() -> None:
    mix = AdapterMix(count=3, zipf=1.0, base_share=0.4)
    n = 40_000
    codes = mix.draw(n, stream(0, "adapter"))
    shares = np.array([0.4, *(0.6 * np.array([6, 3, 2]) / 11)])
    assert (np.abs(np.bincount(codes) / n - shares) < 4 * np.sqrt(shares * (1 - shares) / n)).all()
    assert mix.names == ("", "adapter_0", "adapter_1", "adapter_2")
    assert AdapterMix().draw(5, stream(0, "adapter")).tolist() == [0] * 5


def test_slo_classes_are_drawn_by_share() -> None:
    n = 40_000
    codes = SloMix.of({"b": 3, "a": 1}, ["a", "b", "c"]).draw(n, stream(0, "slo"))
    assert abs((codes == 1).mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / n)
    assert codes.max() == 1
    assert SloMix.of(None, ["a", "b"]).shares == (0.5, 0.5)
    for mix, says in (
        ({"bb": 1}, "did you mean 'b'"),
        ({"a": -1}, "slo_mix.a must be"),
        ({"a": 0}, "share above 0"),
    ):
        with pytest.raises(ValueError, match=says):
            SloMix.of(mix, ["a", "b"])


def test_a_synthetic_workload_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match="set that one alone"):
        synthetic(rate_rps=4.0)
    with pytest.raises(ValueError, match="duration_s must be a number above 0, got 'long'"):
        synthetic(duration_s="long")
    with pytest.raises(ValueError, match=r"no request arrives at workload.rate_rps 3"):
        synthetic(duration_s=1e-6).build(0, ["a"])
    assert len(synthetic(max_requests=10).build(0, ["a"]).table) == 10


def test_the_modules_are_light() -> None:
    """pandas is imported only where a file is read."""
    import subprocess
    import sys

    code = (
        "import sys, sim.workload.config, sim.workload.finetune, sim.fetch, sim.workload.readers.lengths;"
        "print([m for m in ('pandas', 'pyarrow', 'torch', 'hydra', 'simpy') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
