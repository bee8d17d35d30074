"""Flat rows cost what their work costs, part by part; a saved model answers as the one that was saved."""

from __future__ import annotations

import json

import numpy as np
import pytest

from profiles.named import device_named, model_named
from sim.core.rows import WORK_COLUMNS, work_row
from sim.core.specs import LoraSpec
from sim.core.work import Chunk, Work
from sim.cost.context import CostContext
from sim.cost.fitted import FittedCost
from sim.cost.flat import row_parts, row_seconds
from sim.cost.iteration import IterationCost
from sim.cost.roofline import Roofline
from sim.cost.sampled import Sampled, designed_works
from sim.cost.saved import from_plain, to_plain
from sim.cost.table import Table, timed_table


@pytest.fixture(scope="module")
def context() -> CostContext:
    model = model_named("llama_3_1_8b")
    return CostContext(device=device_named("a100_80gb"), model=model, tp=1, lora=LoraSpec(), seed=0)


@pytest.fixture(scope="module")
def works(context: CostContext) -> list[Work]:
    """Designed, and all finetuning among them beside inference once more, behind an optimizer step."""
    params = context.lora.params(context.model)
    designed = designed_works(context.model, params, 400, 11)
    tuned = [work for work in designed if work.forward or work.backward]
    return [*designed, *(work._replace(optimizer_params=params, overlap=True) for work in tuned)]


@pytest.fixture(scope="module")
def fitted(context: CostContext) -> FittedCost:
    return Sampled(of=Roofline()).build(context)


def flat(works: list[Work]) -> dict[str, np.ndarray]:
    rows = np.array([work_row(work) for work in works], dtype=np.float64)
    return {name: rows[:, i] for i, name in enumerate(WORK_COLUMNS)}


def test_parts_of_flat_rows_are_those_of_their_works(fitted: FittedCost, works: list[Work]) -> None:
    """Rectangles of several lengths are taken to be as long as their mean."""
    parts = row_parts(fitted.curves, flat(works))
    parts["adapters"] = parts["adapters"] + parts.pop("adapters_forward")
    for n, work in enumerate(works):
        own = fitted.parts(work)
        assert set(own) == set(parts)
        unlike = len({chunk.tokens for chunk in work.backward}) > 1
        for name, seconds in own.items():
            rel = 0.15 if unlike and name in ("backward", "overlap_saving") else 1e-9
            assert parts[name][n] == pytest.approx(seconds, rel=rel, abs=1e-12), (name, work)
        rel = 0.1 if unlike else 1e-9
        assert row_seconds(fitted.curves, flat([work])) == pytest.approx(fitted.iteration_s(work), rel=rel)
    np.testing.assert_allclose(row_seconds(fitted.curves, flat(works)), sum(parts.values()))


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_saved_model_answers_exactly_as_before(
    lookahead: int, fitted: FittedCost, works: list[Work]
) -> None:
    cost = IterationCost(fitted.curves, lookahead)
    again = from_plain(json.loads(json.dumps(to_plain(cost))))
    assert again.curves == cost.curves and again.lookahead == lookahead
    for work in works:
        assert again.iteration_s(work) == cost.iteration_s(work)
        budget_s = 2 * cost.iteration_s(work)
        answers = [model.largest_prefill(work, 100, 900, budget_s) for model in (again, cost)]
        assert answers[0] == answers[1]


def test_host_time_that_was_measured_apart_is_the_constant_term(
    works: list[Work], context: CostContext
) -> None:
    """Not fitted: the same rows with another host time give another split of the same sum."""
    alone = [work for work in works if not work.overlap]
    truth = Roofline().build(context)
    seconds = np.array([truth.iteration_s(work) for work in alone])
    for host_s in (0.0, 1e-4, 5e-4):
        table = Table.fit(flat(alone), seconds, host_s=host_s)
        assert table.curves.host_s == host_s
        assert np.median(np.abs(row_seconds(table.curves, flat(alone)) / seconds - 1)) < 0.05
    decode = Work(prefill=(Chunk(64, 0),), sampled_tokens=1)
    assert Table.fit(flat(alone), seconds, host_s=1e-4).model().parts(decode)["host"] == pytest.approx(1e-4)


def test_a_lookahead_is_fitted_to_times_that_it_has_shortened(
    works: list[Work], context: CostContext
) -> None:
    """Rows that could not be measured with one launched ahead take what the device works, and no less."""
    alone = [work for work in works if not work.overlap]
    columns, truth = flat(alone), Roofline().build(context)
    seconds = np.array([truth.iteration_s(work) for work in alone])
    host_s = np.full(len(seconds), 4e-4)
    ahead_s = seconds - 3e-4
    ahead_s[columns["optimizer_params"] > 0] = np.nan
    now, ahead = (timed_table(columns, seconds, host_s, ahead_s, lookahead) for lookahead in (0, 1))
    assert now.curves.host_s == pytest.approx(4e-4) and ahead.curves.host_s == pytest.approx(1e-4)
    step = Work(optimizer_params=context.lora.params(context.model))
    parts = [table.model().parts(step)["optimizer"] for table in (now, ahead)]
    assert parts[1] == pytest.approx(parts[0], rel=0.05) and parts[0] > 0
    with_steps = columns["optimizer_params"] > 0
    assert with_steps.any()
    for rows in (with_steps, ~with_steps):
        work = {name: values[rows] for name, values in columns.items()}
        assert np.median(row_seconds(ahead.curves, work) / (seconds[rows] - 3e-4)) == pytest.approx(
            1, abs=0.03
        )
