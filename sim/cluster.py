"""Several pipelines behind a router, in one SimPy environment.

Requests are routed when some pipeline plans, not by a process of their own: the state of the pipelines
changes only then, so routing all arrivals up to that moment first is the same as routing each at its time,
and the order at equal times is fixed: arrivals, then pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import simpy

from sim.core.arrivals import Arrivals
from sim.core.cost import CostModel, Predictor
from sim.core.finetune import Job
from sim.core.loop import Horizon, run_loop
from sim.core.plan import Limits, Policy
from sim.core.request import Request, Slo
from sim.core.rows import Outcome, Recorder
from sim.core.state import PipelineState
from sim.pipeline import Clock, SimulatedPipeline
from sim.routing import LEAST_CHUNK_TOKENS, Incoming, Load, Router


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSpec:
    """One pipeline of the cluster; they need not be alike."""

    policy: Policy
    world: CostModel
    predictor: Predictor
    limits: Limits
    jobs: tuple[Job, ...] = ()


class _Inbox:
    """The arrivals of one serving pipeline."""

    def __init__(self, dispatcher: Dispatcher, load: Load) -> None:
        self._dispatcher = dispatcher
        self._requests: list[Request] = []
        self.load = load

    def put(self, request: Request) -> None:
        self._requests.append(request)
        self.load.add(request.prompt_tokens)

    def next_s(self) -> float | None:
        return self._dispatcher.next_s

    def due(self, now_s: float) -> Seq[Request]:
        dispatcher = self._dispatcher
        if dispatcher.next_s is not None and dispatcher.next_s <= now_s:
            dispatcher.route(now_s)
        if not self._requests:
            return ()
        requests, self._requests = self._requests, []
        self.load.clear()
        return requests

    def ended(self, request_id: int, now_s: float) -> None:
        self._dispatcher.ended(request_id, now_s)


class NoArrivals:
    """For a pipeline that does not serve. Implements `Arrivals`."""

    def next_s(self) -> float | None:
        return None

    def due(self, now_s: float) -> Seq[Request]:
        return ()

    def ended(self, request_id: int, now_s: float) -> None:
        raise AssertionError("a pipeline that does not serve has no requests")


class Dispatcher:
    """Routes the arrivals of one source to the serving pipelines' inboxes."""

    def __init__(self, arrivals: Arrivals, router: Router, slos: Mapping[str, Slo]) -> None:
        self._arrivals = arrivals
        self._router = router
        self._slos = slos
        self._inboxes: list[_Inbox] = []
        self._loads: list[Load] = []
        self.next_s = arrivals.next_s()
        """Time of the next arrival that is not routed yet, as `Arrivals.next_s`."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when an end has moved `next_s`, also to None, so that sleeping pipelines look again."""

    def inbox(self, load: Load) -> Arrivals:
        inbox = _Inbox(self, load)
        self._inboxes.append(inbox)
        self._loads.append(load)
        return inbox

    def route(self, now_s: float) -> None:
        for request in self._arrivals.due(now_s):
            if len(self._inboxes) == 1:
                self._inboxes[0].put(request)
                continue
            incoming = Incoming(
                request.prompt_tokens, self._slos[request.slo], request.adapter, request.arrival_s
            )
            self._inboxes[self._router.choose(incoming, self._loads)].put(request)
        self.next_s = self._arrivals.next_s()

    def ended(self, request_id: int, now_s: float) -> None:
        self._arrivals.ended(request_id, now_s)
        before, self.next_s = self.next_s, self._arrivals.next_s()
        if self.next_s != before:
            self.on_change()


def simulate_cluster(
    *,
    pipelines: Seq[PipelineSpec],
    arrivals: Arrivals,
    router: Router,
    slos: Mapping[str, Slo],
    horizon: Horizon,
    recorder: Recorder,
    on_progress: Callable[[float], None] | None = None,
) -> None:
    """Run the cluster to its horizon; everything that happened is in `recorder` afterwards.

    `on_progress` is called with the simulated time about a hundred times; the horizon must be finite then.
    """
    env = Clock()
    dispatcher = Dispatcher(arrivals, router, slos)
    running = [
        _start(env, index, spec, dispatcher, slos, horizon, recorder) for index, spec in enumerate(pipelines)
    ]

    def wake_all() -> None:
        for pipeline in running:
            pipeline.wake()

    dispatcher.on_change = wake_all
    if on_progress is not None:
        env.process(_report(env, horizon.duration_s / 100, on_progress, running))
    env.run(until=env.all_of([pipeline.process for pipeline in running]))
    if not any(spec.policy.serves for spec in pipelines):
        _reject_all(arrivals.due(horizon.duration_s), recorder)


def _start(
    env: Clock,
    index: int,
    spec: PipelineSpec,
    dispatcher: Dispatcher,
    slos: Mapping[str, Slo],
    horizon: Horizon,
    recorder: Recorder,
) -> SimulatedPipeline:
    state = PipelineState(limits=spec.limits, slos=slos, recorder=recorder, jobs=spec.jobs, pipeline=index)
    serves = spec.policy.serves
    least = getattr(spec.policy, "min_chunk_tokens", LEAST_CHUNK_TOKENS)
    inbox = dispatcher.inbox(Load(state, spec.predictor, least)) if serves else NoArrivals()
    return SimulatedPipeline(env, run_loop(state, spec.policy, inbox, horizon), spec.world)


def _report(
    env: simpy.Environment,
    every_s: float,
    on_progress: Callable[[float], None],
    running: list[SimulatedPipeline],
) -> Generator[simpy.Event, object, None]:
    while any(pipeline.process.is_alive for pipeline in running):
        on_progress(env.now)
        yield env.timeout(every_s)


def _reject_all(requests: Iterable[Request], recorder: Recorder) -> None:
    """No pipeline serves: what arrived is counted as rejected, on no pipeline (-1)."""
    for request in requests:
        recorder.add_request(request, -1, Outcome.REJECTED)
