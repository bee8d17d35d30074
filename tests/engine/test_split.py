"""Two pipelines on one device: each gets its share of the device's time, and no more when the other idles."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from engine.assemble import TrainingJob, assemble_engine
from engine.launching import Launching
from engine.optimizer import OptimizerSettings
from engine.pipelines import Setting, Split, share_of
from engine.split import Gate
from engine.text import passes, random_samples
from sim.core.loop import Horizon, PolicyError, run_loop
from sim.core.plan import LATER, Plan, View
from sim.core.request import Request
from sim.core.rows import Outcome, Recorder
from sim.core.specs import DeviceSpec
from sim.core.state import PipelineState
from sim.policies.separate import Separate
from sim.workload.workload import Workload
from tests.engine.test_graphs import Counting
from tests.engine.tiny import VOCAB, adapter_of, tiny_model
from tests.engine.virtual import VirtualClock
from tests.support import SLOS, LinearCost, ListArrivals, build_policy, limits_of

WORLD = LinearCost(forward_s=2.0**-11, backward_s=2.0**-12, context_s=2.0**-16, optimizer_s=2.0**-24)
DEVICE = DeviceSpec(
    name="cpu",
    peak_flops=1e9,
    memory_bandwidth_bytes_s=1e9,
    memory_bytes=1e9,
    link_bandwidth_bytes_s=1e9,
    sms=1,
    source="none",
)
DURATION_S = 3.0


def workload_of(requests: list[Request]) -> Workload:
    return Workload(
        name="list", duration_s=DURATION_S, table=None, arrivals=lambda: ListArrivals(iter(requests))
    )


def busy(count: int, gap_s: float) -> list[Request]:
    return [Request(n, gap_s * n, 8 + n % 20, 4 + n % 12, "chat") for n in range(count)]


def split_of(share: float, lookahead: int = 0, launching: Launching = Launching()) -> Split:  # noqa: B008
    model = tiny_model("llama")
    job = TrainingJob(
        id="job",
        samples=passes(random_samples(4, 40, VOCAB), 0),
        max_sample_tokens=40,
        adapter=adapter_of("llama", 2, ["down_proj"]),
        optimizer=OptimizerSettings(schedule="constant"),
        accumulation=2,
    )
    setting = Setting(
        model=model,
        limits=limits_of(lookahead=lookahead),
        jobs=[job],
        adapters={},
        slos=SLOS,
        device=DEVICE,
        seed=0,
        assemble=partial(assemble_engine, launching=launching),
    )
    serving, training = (
        build_policy(name, predictor=WORLD) for name in ("inference_only", "temporal_limited")
    )
    return Split(setting, serving, training, share, lambda: VirtualClock(WORLD))


def run(split: Split, requests: list[Request], drain_s: float = 0.0) -> tuple[Recorder, dict[str, Any]]:
    recorder = split.run(workload_of(requests), Horizon(duration_s=DURATION_S, drain_s=drain_s))
    return recorder, recorder.iterations.arrays()


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_busy_pipelines_get_their_share_of_the_device(share: float, lookahead: int) -> None:
    split = split_of(share, lookahead)
    _, rows = run(split, busy(800, 0.004))
    serving, training = split.used_s
    assert serving / (serving + training) == pytest.approx(share, abs=0.03)
    assert serving + training == pytest.approx(DURATION_S, rel=0.05), "and leave nothing of it unused"
    seconds = np.bincount(rows["pipeline"].astype(int), rows["end_s"] - rows["start_s"])
    assert seconds == pytest.approx([serving, training]), "rows say the same"


def test_only_the_pipeline_that_serves_captures_iterations() -> None:
    counting = Counting()
    split = split_of(0.5, launching=Launching(captures=counting))
    server, trainer = (pipeline._graphs for pipeline in (split._server, split.trainer))
    assert server is not None and trainer is not None
    assert counting.captured == len(server._captured) > 0
    _, rows = run(split, busy(40, 0.02))
    assert counting.replayed > 0 and not trainer._captured
    assert set(rows["pipeline"]) == {0, 1}


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_an_idle_pipeline_hands_nothing_over(share: float) -> None:
    split = split_of(share)
    _, rows = run(split, [])
    longest_s = float((rows["end_s"] - rows["start_s"]).max())
    assert set(rows["pipeline"]) == {1}
    assert split.used_s[1] == pytest.approx((1 - share) * DURATION_S, abs=longest_s)


def test_requests_are_all_served_one_iteration_runs_at_a_time_and_each_pipeline_has_its_rows() -> None:
    split, requests = split_of(0.5), busy(40, 0.05)
    recorder, rows = run(split, requests, drain_s=20.0)
    done = recorder.requests.arrays()
    assert (done["outcome"] == Outcome.FINISHED).all() and len(done["outcome"]) == len(requests)
    assert (done["generated_tokens"] == done["output_tokens"]).all()
    assert (rows["start_s"][1:] >= rows["end_s"][:-1]).all(), "one device"
    trains = rows["forward_tokens"] + rows["backward_layer_tokens"] + rows["optimizer_params"] > 0
    assert (trains == (rows["pipeline"] == 1)).all()
    steps = recorder.steps.arrays()
    assert len(steps["end_s"]) > 3 and set(steps["pipeline"]) == {1}
    assert len(split.facts) == 2


def test_what_a_run_leaves_unfinished_does_not_meet_the_next_one() -> None:
    """The warm-up ends in the middle of things; the run after it serves as if it were the first."""
    split, requests = split_of(0.5), busy(800, 0.004)
    first, _ = run(split, requests)
    assert (first.requests.arrays()["outcome"] == Outcome.UNFINISHED).any()
    again, _ = run(split, busy(10, 0.1), drain_s=20.0)
    assert (again.requests.arrays()["outcome"] == Outcome.FINISHED).all()
    fresh, _ = run(split_of(0.5), busy(10, 0.1), drain_s=20.0)
    wanted, got = (r.requests.arrays()["generated_tokens"] for r in (fresh, again))
    assert np.array_equal(wanted, got)


@pytest.mark.parametrize(("given", "share"), [(0.25, 0.25), (0.5, 0.5), (0.6, 0.6), (0.99, 0.99)])
def test_a_share_is_what_the_policy_assigns(given: float, share: float) -> None:
    policy, found = share_of(Separate(inference_share=given))
    assert policy.serves and not policy.finetunes
    assert found == pytest.approx(share)


def test_a_share_of_no_whole_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="share of at most 100 equal parts"):
        share_of(Separate(inference_share=0.12345))


def test_a_policy_that_is_stuck_is_so_in_a_split_as_well() -> None:
    """A shut gate plans nothing and is not stuck; a policy that is asked and plans nothing is."""
    gate = Gate(build_policy("inference_only"))
    view: Any = PipelineState(limits=limits_of(), slos=SLOS, recorder=Recorder()).view(0.0)
    assert gate.plan(view) is LATER
    gate.open = True
    assert gate.plan(view) is not LATER and not gate.open


def test_what_a_gated_policy_raises_is_told_with_its_own_name() -> None:
    class Broken:
        serves = finetunes = True

        def plan(self, view: View) -> Plan:
            raise RuntimeError("not today")

    gate = Gate(Broken())
    gate.open = True
    state = PipelineState(limits=limits_of(), slos=SLOS, recorder=Recorder())
    with pytest.raises(PolicyError, match=r"^policy Broken at 0\.000000 s: RuntimeError: not today$") as told:
        next(run_loop(state, gate, ListArrivals([Request(0, 0.0, 4, 3)]), Horizon()))
    assert told.value.policy_file == __file__
