"""Nothing is lost and nothing is made up: every policy on random workloads against a slow second state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sim.core.loop import Done, Horizon, run_loop
from sim.core.plan import Limits
from sim.core.request import Request
from sim.core.rows import Outcome, Recorder
from sim.core.state import PipelineState
from tests.reference import Referee, Reference, ReferenceJob
from tests.support import (
    FINETUNING,
    POLICIES,
    SERVING,
    SLOS,
    Answer,
    LinearCost,
    ListArrivals,
    Run,
    build_policy,
    drive,
    job_of,
    token_times,
)

COST = LinearCost(context_s=2.0**-20, adapter_s=2.0**-12)
ORDERS = [("layer_major", "stash"), ("window_major", "stash"), ("window_major", "recompute")]


class Scenario:
    """A random run of one policy with its referee, done when constructed."""

    def __init__(
        self,
        name: str,
        requests: list[Request],
        limits: Limits,
        jobs: list[tuple[list[int], int, tuple[str, str], float]],
        *,
        horizon: Horizon | None = None,
        answer: Callable[[Reference, int], Answer] | None = None,
    ) -> None:
        made = [
            (job_of(lengths, id=f"j{i}", accumulation=g, order=o[0], memory=o[1], start_s=start_s), lengths)
            for i, (lengths, g, o, start_s) in enumerate(jobs)
        ]
        self.reference = reference = Reference(limits, SLOS, [ReferenceJob(*m) for m in made])
        self.jobs = [job for job, _ in made]
        recorder = Recorder()
        state = PipelineState(limits=limits, slos=SLOS, recorder=recorder, jobs=self.jobs)

        class Arrivals(ListArrivals):
            def due(self, now_s: float) -> list[Request]:
                found = list(super().due(now_s))
                for request in found:
                    reference.arrive(request)
                return found

        referee = Referee(build_policy(name, predictor=COST), state, reference)
        loop = run_loop(state, referee, Arrivals(requests), horizon or Horizon())
        done: Callable[[Done], None] = reference.done
        log = drive(
            loop,
            lambda _, work: COST.iteration_s(work),
            answer=None if answer is None else lambda index: answer(reference, index),
            on_execute=referee.on_execute,
            on_done=done,
        )
        self.run = Run(state, recorder, log)
        self.requests = requests

    def check(self) -> None:
        self.check_requests()
        self.check_tokens()
        self.check_finetuning()

    def check_requests(self) -> None:
        """arrived = finished + rejected + aborted + unfinished, each as the reference says."""
        outcomes = self.run.outcomes()
        assert len(self.run.recorder.requests) == len(outcomes) == self.run.state.arrived
        assert set(outcomes) == set(self.reference.items)
        for id, item in self.reference.items.items():
            assert outcomes[id] == (Outcome.UNFINISHED if item.outcome is None else item.outcome)

    def check_tokens(self) -> None:
        """Token times, first, last and count of every request, token by token."""
        times = token_times(self.run.recorder)
        for id, item in self.reference.items.items():
            row = self.run.request(id)
            own = times.get(id, [])
            assert own == item.token_s
            assert all(a < b for a, b in itertools.pairwise(own))
            assert row["generated_tokens"] == len(own)
            assert row["preemptions"] == item.preemptions
            first = own[0] if own else math.nan
            assert row["first_token_s"] == pytest.approx(first, nan_ok=True, rel=0)
            if item.outcome == Outcome.FINISHED:
                assert row["last_token_s"] == own[-1]
            if item.scheduled_s is not None and item.outcome != Outcome.ABORTED:
                assert row["scheduled_s"] == item.scheduled_s

    def check_finetuning(self) -> None:
        """Steps and trained tokens are those of the samples, each once and in order."""
        steps = self.run.table("steps")
        for code, name in enumerate(self.run.recorder.jobs.names):
            own = steps["job"] == code
            reference = self.reference.jobs[name]
            assert steps["step"][own].tolist() == list(range(1, len(reference.steps) + 1))
            assert steps["tokens"][own].tolist() == [sum(s) for s in reference.steps]
            assert steps["samples"][own].tolist() == [len(s) for s in reference.steps]
            samples = int(steps["samples"][own].sum())
            assert steps["tokens"][own].sum() == sum(reference.lengths[:samples])

    def check_drained(self) -> None:
        """Everything ended: no block is held, no request is left, all data is trained."""
        state = self.run.state
        assert state.kv.free == state.kv.total
        assert state.unfinished == 0 and state.decode_count == 0 and state.decode_context_tokens == 0
        assert state.outstanding_tokens == 0
        assert Outcome.UNFINISHED not in self.run.outcomes().values()

    def check_work(self) -> None:
        """Tokens computed are those of the prompts, the outputs and what preemption threw away."""
        rows = self.run.table("iterations")
        assert rows["sampled_tokens"].sum() == sum(len(i.token_s) for i in self.reference.items.values())
        assert rows["sampled_tokens"].sum() == self.run.table("requests")["generated_tokens"].sum()
        computed = rows["prefill_tokens"].sum() + rows["decode_count"].sum()
        kept = sum(i.known - 1 for i in self.reference.items.values() if i.token_s)
        assert computed >= kept
        if rows["preempted"].sum() == 0:
            assert computed == kept
        assert (rows["kv_blocks_used"] <= self.run.state.kv.total).all()


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    block = draw(st.sampled_from([1, 4, 16]))
    sequences = draw(st.integers(1, 8))
    return Limits(
        kv_tokens=draw(st.integers(4 * block, 160)) if draw(st.booleans()) else 4096,
        block_tokens=block,
        max_sequences=sequences,
        max_tokens=draw(st.integers(sequences, sequences + 64)),
        max_sequence_tokens=draw(st.integers(8, 256)),
        admission=draw(st.sampled_from(["fcfs", "deadline", "shortest"])),
        lookahead=draw(st.sampled_from([0, 1])),
    )


@st.composite
def arrivals(draw: st.DrawFn) -> list[Request]:
    """Up to 10 requests; gaps are often zero, so that stamps coincide."""
    count = draw(st.integers(0, 10))
    now_s, found = 0.0, []
    for id in range(count):
        now_s += draw(st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.125, 2.0]))
        found.append(
            Request(
                id,
                now_s,
                draw(st.integers(1, 60)),
                draw(st.integers(1, 24)),
                draw(st.sampled_from(sorted(SLOS))),
                draw(st.sampled_from([None, "j0", "other"])),
            )
        )
    return found


finite_jobs = st.lists(
    st.tuples(
        st.lists(st.integers(1, 40), min_size=1, max_size=5),
        st.integers(1, 3),
        st.sampled_from(ORDERS),
        st.sampled_from([0.0, 0.3]),
    ),
    max_size=2,
)
many = settings(
    max_examples=30,
    phases=[Phase.generate],  # examples are small, and shrinking one takes minutes
)


@pytest.mark.parametrize("name", SERVING)
@many
@given(requests=arrivals(), limits=limits(), jobs=finite_jobs)
def test_a_drained_run_conserves_requests_tokens_blocks_and_samples(
    name: str, requests: list[Request], limits: Limits, jobs: list
) -> None:
    horizon = Horizon() if name in FINETUNING else Horizon(duration_s=1000.0)
    scenario = Scenario(name, requests, limits, jobs, horizon=horizon)
    scenario.check()
    scenario.check_drained()
    scenario.check_work()
    if name in FINETUNING:
        assert all(job.finished for job in scenario.jobs)
        assert all(sum(j.lengths) == sum(map(sum, j.steps)) for j in scenario.reference.jobs.values())
        assert scenario.reference.versions == {j.spec.id: j.steps for j in scenario.jobs if j.steps}
        assert scenario.run.state.adapter_versions == scenario.reference.versions


@pytest.mark.parametrize("name", list(POLICIES))
@many
@given(
    requests=arrivals(),
    limits=limits(),
    jobs=finite_jobs,
    duration_s=st.sampled_from([0.05, 0.3]),
    drain_s=st.sampled_from([0.0, 0.2]),
)
def test_a_run_cut_by_its_horizon_conserves_as_well(
    name: str, requests: list[Request], limits: Limits, jobs: list, duration_s: float, drain_s: float
) -> None:
    due = [r for r in requests if r.arrival_s <= duration_s]
    scenario = Scenario(name, due, limits, jobs, horizon=Horizon(duration_s=duration_s, drain_s=drain_s))
    scenario.check()
    assert scenario.run.state.arrived == len(due)


@pytest.mark.parametrize("name", SERVING)
@many
@given(requests=arrivals(), limits=limits(), jobs=finite_jobs, data=st.data())
def test_stop_tokens_and_aborts_at_any_iteration_conserve(
    name: str, requests: list[Request], limits: Limits, jobs: list, data: st.DataObject
) -> None:
    """`ended` names any request that the iteration gave a token, `aborted` any at all, also those gone."""
    draws = data.draw(
        st.lists(st.tuples(st.sampled_from(["", "end", "abort"]), st.integers(0, 9)), max_size=20)
    )

    def answer(reference: Reference, index: int) -> Answer:
        kind, id = draws[index] if index < len(draws) else ("", 0)
        if kind == "abort":
            return Answer(aborted=(id,))
        item = reference.items.get(id)
        sampled = item is not None and item.outcome is None and id in reference.flights[0].sampled
        return Answer(ended=(id,)) if kind == "end" and sampled else Answer()

    horizon = Horizon() if name in FINETUNING else Horizon(duration_s=1000.0)
    scenario = Scenario(name, requests, limits, jobs, horizon=horizon, answer=answer)
    scenario.check()
    scenario.check_drained()
