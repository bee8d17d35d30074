"""Golden logs: keep what a loop was told and decided, and let the shared loop decide it again."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sim.core.finetune import Job, JobSpec
from sim.core.loop import Command, Done, Execute, Horizon, Sleep, run_loop
from sim.core.plan import Limits, Plan
from sim.core.request import Request
from sim.core.rows import Outcome, Recorder
from sim.core.state import PipelineState
from sim.cost.curves import ChunkCost, Curves, DecodeCost
from sim.cost.fitted import FittedCost
from sim.policy_node import policy_of
from sim.settings import slos_of
from tests.support import ListArrivals

Loop = Generator[Command, Done, None]
FOLDER = Path(__file__).parent / "golden"
CHUNKS = ("prefill", "forward", "recompute", "backward")


def read_log(path: Path) -> dict[str, Any]:
    log: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return log


def write_log(path: Path, log: dict[str, Any]) -> None:
    # Without a time in its header the same log gives the same file.
    path.write_bytes(gzip.compress(json.dumps(log).encode(), mtime=0))


def plan_row(plan: Plan) -> list[Any]:
    """A plan in JSON's own types, without the policy's memory."""
    slices = [[type(piece).__name__, *piece] for piece in plan.finetune]
    prefills, preempted = [list(chunk) for chunk in plan.prefills], list(plan.preempted)
    return [plan.decode, prefills, preempted, slices, plan.overlap, plan.predicted_s]


def decide_again(log: dict[str, Any]) -> tuple[list[list[Any]], Recorder]:
    """The plans that the loop makes now when it is told the recorded times, and its rows."""
    limits, recorder = Limits(**log["limits"]), Recorder()
    slos = slos_of(OmegaConf.create({"slo": log["slo"]}))
    predictor = FittedCost(_curves(log["curves"]), {}, limits.lookahead)
    policy = policy_of({k: v for k, v in log["policy"].items() if k != "name"}, predictor, slos)
    job = Job(JobSpec(**log["job"]), itertools.repeat(log["sample_tokens"]))
    state = PipelineState(limits=limits, slos=slos, recorder=recorder, jobs=[job])
    arrivals = ListArrivals(Request(*row[:5], row[5] or None) for row in log["requests"])
    duration_s, drain_s = log["horizon_s"]
    loop = run_loop(state, policy, arrivals, Horizon(duration_s=duration_s, drain_s=drain_s))
    return answered(loop, log["replies"]), recorder


def recorded(loop: Loop, log: dict[str, Any]) -> Loop:
    """The same loop; its plans and the answers to its waits and sleeps are kept in `log`."""
    log["plans"], log["replies"] = [], []
    reply: Any = None
    while True:
        try:
            command = loop.send(reply)
        except StopIteration:
            return
        reply = yield command
        if isinstance(command, Execute):
            log["plans"].append(plan_row(command.plan))
        else:
            log["replies"].append([isinstance(command, Sleep), *reply])


def answered(loop: Loop, replies: Iterable[list[Any]]) -> list[list[Any]]:
    """The plans of a loop that is told what was recorded."""
    plans, replies, reply = [], iter(replies), None
    while True:
        try:
            command = loop.send(reply)  # type: ignore[arg-type]
        except StopIteration:
            assert next(replies, None) is None, "the recorded run went on"
            return plans
        if isinstance(command, Execute):
            plans.append(plan_row(command.plan))
            reply = Done(0.0)
            continue
        slept, now_s, *ends = next(replies)
        assert slept == isinstance(command, Sleep), (
            f"after {len(plans)} plans the recorded loop did otherwise"
        )
        reply = Done(now_s, *map(tuple, ends))


def assert_decided_again(log: dict[str, Any]) -> None:
    """The loop makes the recorded plans, one by one, and every request finishes."""
    plans, recorder = decide_again(log)
    for index, (now, then) in enumerate(zip(plans, log["plans"], strict=True)):
        where = f"plan {index}; tests/engine/record_golden.py tells how to record anew"
        assert now[:-1] == then[:-1], where
        # Seconds may be added up in another order.
        assert now[-1] == pytest.approx(then[-1], rel=1e-12), where
    rows = recorder.requests.arrays()
    assert (rows["outcome"] == Outcome.FINISHED).all() and len(rows["outcome"]) == len(log["requests"])


def _curves(node: dict[str, Any]) -> Curves:
    named = {name: ChunkCost(*node[name]) for name in CHUNKS}
    return Curves(**{**node, **named, "decode": DecodeCost(*node["decode"])})
