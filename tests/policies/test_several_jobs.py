"""What jobs get beside one another, and the versions that they publish."""

from __future__ import annotations

import pytest

from sim.core.finetune import Backward, Forward
from sim.core.loop import Horizon
from sim.core.plan import Plan, View
from sim.core.work import Chunk, LayerChunk, Work
from sim.policies.slices import add_slices
from tests.policies.scenes import BUSY, ROOMY, long_requests
from tests.support import LAYERS, build_policy, job_of, limits_of, requests_of, run


def test_slices_of_several_jobs_each_follow_from_where_their_own_job_stands() -> None:
    plain = job_of(100, id="plain")
    again = job_of(50, id="again", order="window_major", memory="recompute")
    plain.advance(Forward("plain", 40))
    again.advance(Forward("again", 50))
    again.advance(Backward("again", 30 * LAYERS))
    slices = (
        Forward("plain", 20),
        Backward("again", 10 * LAYERS),
        Forward("plain", 40),
        Backward("plain", 130),
        Backward("again", 5 * LAYERS),
    )
    decodes = Work(decode_count=3, decode_context_tokens=70, sampled_tokens=3)
    assert add_slices(decodes, (plain.view(), again.view()), slices) == decodes._replace(
        forward=(Chunk(20, 40), Chunk(40, 60)),
        backward=(
            LayerChunk(LAYERS, 10, 10),
            LayerChunk(1, 100, 0),
            LayerChunk(1, 30, 70),
            LayerChunk(LAYERS, 5, 5),
        ),
        recompute=(Chunk(10, 10), Chunk(5, 5)),
    )


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("coserving", 3000),
        ("coserving_slack", 3000),
        ("coserving_static", 100),
        ("temporal", 100),
        ("spatial", 3000),
        ("finetune_only", 100),
    ],
)
def test_two_jobs_share_the_work_by_weight(name: str, length: int) -> None:
    """Samples longer than an iteration's budget where there is one: a job gets at most one an iteration."""
    heavy, light = job_of(length, id="heavy", weight=3.0), job_of(length, id="light", weight=1.0)
    horizon = Horizon(duration_s=120.0 if length == 3000 else 20.0, drain_s=0.0)
    requests = [] if name == "finetune_only" else long_requests()
    result = run(build_policy(name), requests, jobs=[heavy, light], limits=ROOMY, horizon=horizon)
    steps, names = result.table("steps"), result.recorder.jobs.names
    trained = {name: steps["tokens"][steps["job"] == code].sum() for code, name in enumerate(names)}
    assert trained["heavy"] / trained["light"] == pytest.approx(3.0, rel=0.05)


def test_a_job_that_starts_late_gets_half_from_then_on() -> None:
    early, late = job_of(100, id="early"), job_of(100, id="late", start_s=10.0)
    result = run(build_policy("coserving"), long_requests(), jobs=[early, late], limits=ROOMY, horizon=BUSY)
    steps, names = result.table("steps"), result.recorder.jobs.names
    after = steps["end_s"] > 10.0
    own = {name: steps["tokens"][after & (steps["job"] == code)].sum() for code, name in enumerate(names)}
    assert own["early"] == pytest.approx(own["late"], rel=0.05)


@pytest.mark.parametrize("order", ["layer_major", "window_major"])
def test_finite_data_ends_with_a_partial_accumulation(order: str) -> None:
    job = job_of([10, 20, 30, 40, 50], accumulation=2, order=order)
    result = run(build_policy("coserving"), jobs=[job])
    steps = result.table("steps")
    assert steps["samples"].tolist() == [2, 2, 1] and steps["tokens"].tolist() == [30, 70, 50]
    assert job.finished


def test_running_requests_keep_the_adapter_version_that_they_started_with() -> None:
    """Also when a step is published meanwhile, and after a preemption."""
    versions: dict[int, set[int]] = {}

    class Watching:
        serves = True
        inner = build_policy("coserving")

        def plan(self, view: View) -> Plan:
            state = view.victims.__self__  # type: ignore[attr-defined]
            for sequence in state.running.values():
                versions.setdefault(sequence.id, set()).add(sequence.adapter_version)
            return self.inner.plan(view)

    requests = requests_of(60, rate_rps=20, prompt_tokens=60, output_tokens=60, adapters=("job",))
    result = run(
        Watching(),
        requests,
        jobs=[job_of(60)],
        limits=limits_of(kv_tokens=700),
        horizon=Horizon(duration_s=9.0),
    )
    assert result.table("requests")["preemptions"].sum() > 3
    assert all(len(seen) == 1 for seen in versions.values())
    assert len(set.union(*versions.values())) > 3
