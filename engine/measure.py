"""A predictor for the machine at hand: a few seconds of drawn work, timed, and a table fitted to it.

The work is drawn by a policy that the shared loop runs, so it is timed exactly where and how it is timed
later. Its plans are meant to be unlike each other, not to be good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np

from engine.assemble import TrainingJob, assemble_engine
from engine.driver import Driver, EngineArrivals, GivenArrivals, WallClock
from engine.engine import Engine
from engine.model import Model
from engine.sampling import Sampling
from sim.core.finetune import Backward, Forward, Slice, Step
from sim.core.loop import Horizon, run_loop
from sim.core.plan import Limits, Plan, Policy, View
from sim.core.request import Request, Slo
from sim.core.rows import WORK_COLUMNS, Recorder
from sim.core.state import PipelineState
from sim.cost.table import FittedCost, Table

WARM_UP_ITERATIONS = 8
"""Left out: the first pays for what is loaded and allocated once."""
LEAST_ROWS = 60


def measure(model: Model, limits: Limits, job: TrainingJob, seconds: float, seed: int) -> FittedCost:
    """Run drawn work for `seconds` and fit its times. `job` is used up; its adapter is thrown away.

    Raises ValueError when the time was too short for enough iterations.
    """
    engine, jobs = assemble_engine(model, limits, [job])
    recorder = Recorder()
    state = PipelineState(limits=limits, slos={"default": Slo()}, recorder=recorder, jobs=jobs)
    vocab, random = model.config.shape.vocab, np.random.default_rng((seed, 1))
    source = EngineArrivals(
        _Endless(limits, seed),
        engine,
        lambda request: (random.integers(0, vocab, request.prompt_tokens).tolist(), Sampling()),
    )
    loop = run_loop(state, _Drawn(seed), source, Horizon(duration_s=seconds, drain_s=0.0))
    Driver(engine, WallClock()).run(loop)
    rows = {name: column[WARM_UP_ITERATIONS:] for name, column in recorder.iterations.arrays().items()}
    taken_s = rows["end_s"] - rows["start_s"]
    if len(taken_s) < LEAST_ROWS:
        raise ValueError(f"measure_s must allow {LEAST_ROWS} iterations, {seconds} gave {len(taken_s)}")
    columns = {name: np.ascontiguousarray(rows[name]) for name in WORK_COLUMNS}
    return Table.fit(columns, taken_s).model(limits.lookahead)


def finetune_peak_tok_s(
    model: Model,
    limits: Limits,
    job: TrainingJob,
    policy: Policy,
    seconds: float,
    assemble: Callable[..., tuple[Engine, list[Job]]] = assemble_engine,
) -> float:
    """Trained tokens per second of `job` alone under `policy`, between its first and its last optimizer step.

    Raises ValueError when the time was too short for two steps.
    """
    least = replace(limits, kv_tokens=limits.block_tokens)
    engine, jobs = assemble(model, least, [job])
    recorder = Recorder()
    state = PipelineState(limits=least, slos={}, recorder=recorder, jobs=jobs)
    loop = run_loop(state, policy, GivenArrivals(), Horizon(duration_s=seconds, drain_s=0.0))
    Driver(engine, WallClock()).run(loop)
    steps = recorder.steps.arrays()
    if len(steps["end_s"]) < 2:
        raise ValueError(f"peak_s must allow 2 optimizer steps, {seconds} gave {len(steps['end_s'])}")
    return float(steps["tokens"][1:].sum() / (steps["end_s"][-1] - steps["end_s"][0]))


class _Endless:
    """As many requests as may run at once, each short enough that none is ever preempted."""

    def __init__(self, limits: Limits, seed: int) -> None:
        self._random = np.random.default_rng((seed, 2))
        blocks = limits.kv_tokens // limits.block_tokens // limits.max_sequences
        self._longest = min(limits.max_sequence_tokens, max(1, blocks) * limits.block_tokens) - 2
        self._missing = limits.max_sequences
        self._next_id = 0

    def next_s(self) -> float | None:
        return 0.0 if self._missing else math.inf

    def due(self, now_s: float) -> Seq[Request]:
        requests = []
        for _ in range(self._missing):
            prompt = int(self._random.integers(1, max(2, self._longest)))
            output = int(self._random.integers(1, max(2, min(64, self._longest - prompt + 2))))
            requests.append(Request(self._next_id, now_s, prompt, output))
            self._next_id += 1
        self._missing = 0
        return requests

    def ended(self, request_id: int, now_s: float) -> None:
        self._missing += 1


class _Drawn:
    """Plans of every kind and size, one unlike the next."""

    serves = True
    finetunes = True

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng((seed, 3))

    def plan(self, view: View) -> Plan:
        draw = self._random.random
        decode = view.decode_count > 0 and draw() < 0.7
        prefills = self._prefills(view) if draw() < 0.5 else ()
        finetune = self._slice(view) if draw() < 0.6 or not (decode or prefills) else ()
        if not (decode or prefills or finetune):
            return Plan(decode=view.decode_count > 0, prefills=self._prefills(view))
        return Plan(decode=decode, prefills=prefills, finetune=finetune)

    def _prefills(self, view: View) -> tuple[tuple[int, int], ...]:
        """One chunk, of an admitted sequence first."""
        left = view.limits.max_tokens - view.decode_count
        free = (view.free_blocks - view.growth_blocks) * view.limits.block_tokens
        first = next(iter(view.prefilling), None)
        if first is None and len(view.waiting) and view.running < view.limits.max_sequences:
            first = view.waiting.first()
        most = 0 if first is None else min(first.remaining_tokens, left, free)
        return () if first is None or most < 1 else ((first.id, self._size(most)),)

    def _slice(self, view: View) -> tuple[Slice, ...]:
        for job in view.jobs:
            if job.step_due:
                return (Step(job.id),)
            if job.forward_left:
                return (Forward(job.id, self._size(job.forward_left)),)
            unit = job.layers if job.order == "window_major" else 1
            return (Backward(job.id, unit * self._size(job.backward_left // unit)),)
        return ()

    def _size(self, most: int) -> int:
        """1..most; large ones often, since they are what has to be right."""
        return max(1, math.ceil(most * math.pow(self._random.random(), 1.5)))
