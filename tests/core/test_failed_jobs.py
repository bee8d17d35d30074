"""A job whose step fails is given up; everything else goes on, and the run still replays from its rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sim.core.finetune import Job, Step
from sim.core.loop import Done, Execute, Horizon, Sleep, run_loop
from sim.core.plan import Plan
from sim.core.rows import Outcome, Recorder
from sim.core.state import PipelineState
from sim.metrics import summarize
from tests.support import (
    FINETUNING,
    POLICIES,
    SLOS,
    Answer,
    LinearCost,
    ListArrivals,
    build_policy,
    drive,
    job_of,
    limits_of,
    requests_of,
)


class Failing:
    """A run in which job "bad" fails at its second step."""

    def __init__(self, name: str, lookahead: int, jobs: list[Job]) -> None:
        self.recorder = Recorder()
        self.state, loop = self.fresh(name, lookahead, jobs, self.recorder)
        executed: list[Plan] = []
        self.failed_at: int | None = None
        """Index of the iteration whose step failed."""

        def answer(index: int) -> Answer:
            steps = sum(Step("bad") in plan.finetune for plan in executed[: index + 1])
            if steps == 2 and self.failed_at is None and Step("bad") in executed[index].finetune:
                self.failed_at = index
                return Answer(failed=("bad",))
            return Answer()

        world = LinearCost()
        self.log = drive(
            loop,
            lambda _, work: world.iteration_s(work),
            answer=answer,
            on_execute=lambda command, _: executed.append(command.plan),
        )

    @staticmethod
    def fresh(name: str, lookahead: int, jobs: list[Job], recorder: Recorder):  # type: ignore[no-untyped-def]
        limits = limits_of(lookahead=lookahead, kv_tokens=600)
        state = PipelineState(limits=limits, slos=SLOS, recorder=recorder, jobs=jobs)
        serves = POLICIES[name].serves
        requests = (
            requests_of(30, rate_rps=25, prompt_tokens=(5, 200), slo="chat", adapters=(None, "bad"))
            if serves
            else []
        )
        horizon = Horizon(duration_s=3.0, drain_s=9.0)
        return state, run_loop(state, build_policy(name), ListArrivals(requests), horizon)


def two_jobs() -> list[Job]:
    return [job_of(20, id="bad", accumulation=1), job_of(30, id="good", accumulation=1)]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("name", FINETUNING)
def test_no_policy_sees_a_failed_job_and_the_rest_goes_on(name: str, lookahead: int) -> None:
    run = Failing(name, lookahead, two_jobs())
    assert run.failed_at is not None
    after = run.log.plans[run.failed_at + 1 + lookahead :]
    assert not any(piece.job == "bad" for plan in after for piece in plan.finetune)
    assert any(piece.job == "good" for plan in after for piece in plan.finetune)
    rows = run.recorder.requests.arrays()
    assert (rows["outcome"] == Outcome.FINISHED).all()
    assert len(rows["outcome"]) == (30 if POLICIES[name].serves else 0)
    assert run.state.kv.free == run.state.kv.total

    steps, names = run.recorder.steps.arrays(), run.recorder.jobs.names
    bad = steps["job"] == names.index("bad")
    assert steps["step"][bad].tolist() == [1, 2]
    assert steps["failed"][bad].tolist() == [0, 1] and not steps["failed"][~bad].any()
    assert run.state.adapter_versions["bad"] == 1
    assert (steps["end_s"][~bad] > steps["end_s"][bad][1]).any()
    summary = summarize(run.recorder, slos=SLOS, duration_s=3.0)
    assert summary["jobs_failed"] == 1
    counted = (steps["end_s"] <= 3.0) & (steps["failed"] == 0)
    assert summary["finetune_tok_s"] == pytest.approx(steps["tokens"][counted].sum() / 3.0)


def test_a_job_that_was_given_up_is_in_no_later_run() -> None:
    """As a bench goes on with the jobs of its warm-up."""
    jobs, later = two_jobs(), Recorder()
    Failing("finetune_only", 0, jobs)
    _, loop = Failing.fresh("finetune_only", 0, jobs, later)
    drive(loop, lambda _, work: LinearCost().iteration_s(work))
    assert later.jobs.names == ["good"] and len(later.steps) > 0


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("name", FINETUNING)
def test_the_rows_of_a_run_with_a_failure_replay_it(name: str, lookahead: int) -> None:
    run = Failing(name, lookahead, two_jobs())
    again = Recorder()
    _, loop = Failing.fresh(name, lookahead, two_jobs(), again)
    steps, names = run.recorder.steps.arrays(), run.recorder.jobs.names
    lost = np.flatnonzero(steps["failed"])
    failed_at = {steps["end_s"][n]: (names[int(steps["job"][n])],) for n in lost}
    ends = run.recorder.iterations.arrays()["end_s"].tolist()
    assert replay(loop, ends, lambda end_s: failed_at.get(end_s, ())) == run.log.plans
    assert again.steps.data == run.recorder.steps.data
    assert again.requests.data.tobytes() == run.recorder.requests.data.tobytes()


def replay(loop, end_s: list[float], failed: Callable[[float], tuple[str, ...]]) -> list[Plan]:  # type: ignore[no-untyped-def]
    plans, ends, reply = [], iter(end_s), None
    while True:
        try:
            command = loop.send(reply)
        except StopIteration:
            return plans
        if isinstance(command, Execute):
            plans.append(command.plan)
            reply = Done(0.0)
        elif isinstance(command, Sleep):
            reply = Done(command.until_s)
        else:
            now_s = next(ends)
            reply = Done(now_s, failed=failed(now_s))


@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_last_job_that_fails_leaves_a_pipeline_that_ends(lookahead: int) -> None:
    """Its data are endless: without the failure the loop would not end either."""
    recorder = Recorder()
    job = job_of(20, id="bad", accumulation=1)
    limits = limits_of(lookahead=lookahead)
    state = PipelineState(limits=limits, slos=SLOS, recorder=recorder, jobs=[job])
    loop = run_loop(state, build_policy("finetune_only"), ListArrivals([]), Horizon())
    executed: list[Plan] = []

    def answer(index: int) -> Answer:
        steps = sum(Step("bad") in plan.finetune for plan in executed[: index + 1])
        return Answer(failed=("bad",) if steps == 3 and Step("bad") in executed[index].finetune else ())

    log = drive(
        loop,
        lambda _, work: LinearCost().iteration_s(work),
        answer=answer,
        on_execute=lambda command, _: executed.append(command.plan),
    )
    assert not state.jobs.active and state.jobs.views == ()
    assert recorder.steps.arrays()["failed"].tolist() == [0, 0, 1]
    assert len(log.end_s) == len(log.plans)
