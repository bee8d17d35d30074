"""Operations on request tables keep order and counts, and hit the rate that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.workload.table import COLUMNS, RequestTable, window_s

LAWS = settings(max_examples=60)


def table_of(arrival_s: list[float], duration_s: float | None = None, **more: object) -> RequestTable:
    times_s = np.sort(np.array(arrival_s, np.float64))
    ids = np.arange(1, len(times_s) + 1)
    if duration_s is None:
        duration_s = window_s(times_s)
    return RequestTable(
        duration_s=duration_s, arrival_s=times_s, prompt_tokens=ids, output_tokens=ids[::-1].copy(), **more
    )


def cv(table: RequestTable) -> float:
    """Coefficient of variation of the gaps."""
    gaps = np.diff(table.arrival_s)
    return float(gaps.std() / gaps.mean())


tables = st.lists(st.floats(0, 1e4, allow_subnormal=False), min_size=2, max_size=60).map(table_of)


@LAWS
@given(tables, st.floats(0.01, 0.99))
def test_slices_put_together_are_the_whole(table: RequestTable, share: float) -> None:
    cut_s = share * table.duration_s
    low = int((table.arrival_s < cut_s).sum())
    if not 0 < low < len(table):
        with pytest.raises(ValueError, match="no request arrives in"):
            table.slice(0, cut_s) if low == 0 else table.slice(cut_s)
        return
    first, second = table.slice(0, cut_s), table.slice(cut_s)
    assert np.array_equal(np.append(first.prompt_tokens, second.prompt_tokens), table.prompt_tokens)
    assert first.duration_s + second.duration_s == pytest.approx(table.duration_s)
    np.testing.assert_allclose(
        np.append(first.arrival_s, second.arrival_s + cut_s), table.arrival_s, atol=1e-8
    )


@LAWS
@given(tables, st.floats(0.01, 1000))
def test_at_rate_hits_the_rate_and_keeps_order_counts_and_cv(table: RequestTable, rate_rps: float) -> None:
    stretched = table.at_rate(rate_rps)
    assert stretched.rate_rps == pytest.approx(rate_rps, rel=1e-12)
    assert np.array_equal(stretched.prompt_tokens, table.prompt_tokens)
    if np.diff(table.arrival_s).mean() > 1e-3:
        assert cv(stretched) == pytest.approx(cv(table), rel=1e-6)


@LAWS
@given(tables, st.integers(1, 70))
def test_filter_keeps_exactly_the_short_ones_at_their_times(table: RequestTable, most: int) -> None:
    kept = table.filter(max_prompt_tokens=most)
    keep = table.prompt_tokens <= most
    assert np.array_equal(kept.arrival_s, table.arrival_s[keep])
    assert kept.duration_s == table.duration_s
    assert len(kept.notes) == (0 if keep.all() else 1)


def test_filter_counts_prompt_and_output_together() -> None:
    table = RequestTable(
        duration_s=3,
        arrival_s=np.arange(3),
        prompt_tokens=np.array([5, 1, 9]),
        output_tokens=np.array([5, 1, 2]),
    )
    assert table.filter(max_total_tokens=10).prompt_tokens.tolist() == [5, 1]
    with pytest.raises(ValueError, match="there are no requests as short"):
        table.filter(max_prompt_tokens=1, max_total_tokens=1)


@LAWS
@given(tables, st.integers(1, 4))
def test_copies_follow_at_the_traces_own_rate(table: RequestTable, copies: int) -> None:
    repeated = table.repeat(copies)
    assert len(repeated) == copies * len(table)
    assert repeated.rate_rps == pytest.approx(table.rate_rps)
    assert np.array_equal(repeated.prompt_tokens, np.tile(table.prompt_tokens, copies))


@LAWS
@given(tables, st.integers(1, 70))
def test_head_is_a_prefix(table: RequestTable, count: int) -> None:
    head = table.head(count)
    assert len(head) == min(count, len(table))
    assert np.array_equal(head.arrival_s, table.arrival_s[:count])


def test_the_window_of_a_trace_makes_its_rate_the_reciprocal_of_the_mean_gap() -> None:
    table = table_of([0.0, 1.0, 3.0])
    assert table.rate_rps == pytest.approx(1 / 1.5)
    assert table_of([0.0]).duration_s == 1.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arrival_s": [0.0, -1.0]}, "at least 0"),
        ({"arrival_s": [0.0, float("nan")]}, "got nan for request 1"),
        ({"arrival_s": [0.0, 10.0]}, "below duration_s 10"),
        ({"arrival_s": [2.0, 1.0]}, "does at request 1"),
        ({"prompt_tokens": [1, 0]}, "prompt_tokens must be at least 1, got 0 for request 1"),
        ({"output_tokens": [0, 1]}, "output_tokens must be at least 1, got 0 for request 0"),
        ({"prompt_tokens": [1]}, "shape"),
        ({"slo": [0, 1]}, "slo codes"),
        ({"adapter": [0, -1]}, "adapter codes"),
        ({"adapter_names": ("a",)}, "base model"),
        ({"duration_s": float("inf")}, "duration_s"),
        ({"arrival_s": [], "prompt_tokens": [], "output_tokens": []}, "no requests"),
    ],
)
def test_a_table_that_breaks_a_rule_is_refused(change: dict[str, object], says: str) -> None:
    good = {"duration_s": 10.0, "arrival_s": [0.0, 1.0], "prompt_tokens": [1, 2], "output_tokens": [1, 2]}
    columns = {k: np.array(v) if isinstance(v, list) else v for k, v in (good | change).items()}
    with pytest.raises(ValueError, match=says):
        RequestTable(**columns)


def test_columns_cannot_be_written_and_the_callers_array_still_can() -> None:
    arrival_s = np.array([0.0, 1.0])
    table = RequestTable(
        duration_s=2, arrival_s=arrival_s, prompt_tokens=np.ones(2), output_tokens=np.ones(2)
    )
    with pytest.raises(ValueError, match="read-only"):
        table.arrival_s[0] = 1.0
    arrival_s[0] = 0.5


def test_half_a_million_requests_take_30_bytes_each() -> None:
    count = 500_000
    ones = np.ones(count, np.int64)
    table = RequestTable(duration_s=count, arrival_s=np.arange(count), prompt_tokens=ones, output_tokens=ones)
    assert sum(getattr(table, column).nbytes for column in COLUMNS) == 30 * count
