"""Rows keep what they were given, in as few bytes as their ranges need, and refuse what does not fit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.core.rows import ITERATION_COLUMNS, WHOLE, WORK_COLUMNS, Recorder, work_row
from sim.core.work import Chunk, LayerChunk, Work

LARGEST = {"B": 2**8 - 1, "H": 2**16 - 1, "I": 2**32 - 1, "Q": 2**53}
"""Of each kind; beyond 2**53 a double, which is what a row reads back as, has gaps."""

chunks = st.lists(st.builds(Chunk, st.integers(1, 10**6), st.integers(0, 10**6)), max_size=3).map(tuple)
rectangles = st.lists(
    st.builds(LayerChunk, st.integers(1, 200), st.integers(1, 10**5), st.integers(0, 10**6)), max_size=3
).map(tuple)


def test_every_column_holds_its_largest_value_and_times_are_exact() -> None:
    largest = [LARGEST[WHOLE[name]] if name in WHOLE else math.pi * 1e5 for name in ITERATION_COLUMNS]
    recorder = Recorder()
    recorder.iterations.append(largest)
    recorder.iterations.append([0] * len(largest))
    columns = recorder.iterations.arrays()
    assert [columns[name].tolist() for name in ITERATION_COLUMNS] == [[value, 0] for value in largest]


@pytest.mark.parametrize("name", list(WHOLE))
@pytest.mark.parametrize("value", [-1, "above", 0.5])
def test_a_value_outside_a_columns_range_is_refused_by_name(name: str, value: float | str) -> None:
    recorder = Recorder()
    row = dict.fromkeys(ITERATION_COLUMNS, 0)
    row[name] = 256 ** {"B": 1, "H": 2, "I": 4, "Q": 8}[WHOLE[name]] if value == "above" else value
    with pytest.raises(ValueError, match=f"column {name} must hold a whole number of 0.."):
        recorder.iterations.append(list(row.values()))
    assert len(recorder.iterations) == 0


@settings(max_examples=100)
@given(prefill=chunks, forward=chunks, backward=rectangles, recompute=chunks)
def test_a_works_row_has_the_sums_of_its_chunks(
    prefill: tuple, forward: tuple, backward: tuple, recompute: tuple
) -> None:
    work = Work(prefill, forward=forward, backward=backward, recompute=recompute)
    row = dict(zip(WORK_COLUMNS, work_row(work), strict=True))
    for name in ("prefill", "forward", "backward", "recompute"):
        assert row[f"{name}_pairs"] == sum(c.attention_pairs for c in getattr(work, name))
    for name in ("prefill_tokens", "forward_tokens", "recompute_tokens", "backward_layer_tokens"):
        assert row[name] == getattr(work, name)
    assert row["backward_layers"] == sum(c.layers for c in backward)
    assert (row["prefill_chunks"], row["forward_windows"]) == (len(prefill), len(forward))
