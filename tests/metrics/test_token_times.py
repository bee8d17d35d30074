"""What is counted with multiplicities is what a list of all values would say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.token_times import weighted_percentiles


@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 9)), max_size=30),
    st.lists(st.floats(0, 100), min_size=1, max_size=4),
)
def test_a_weighted_percentile_is_that_of_the_repeated_values(
    pairs: list[tuple[float, int]], percents: list[float]
) -> None:
    values = np.array([v for v, _ in pairs], dtype=np.float64)
    weights = np.array([w for _, w in pairs], dtype=np.int64)
    listed = np.repeat(values, weights)
    want = np.percentile(listed, percents) if listed.size else [math.nan] * len(percents)
    assert weighted_percentiles(values, weights, percents) == pytest.approx(
        list(want), rel=1e-9, abs=1e-9, nan_ok=True
    )
