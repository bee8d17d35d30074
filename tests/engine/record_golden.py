"""Record real benches as golden logs: what the loop was told, and what it decided.

    python -m tests.engine.record_golden            # tests/engine/golden/NAME.json.gz for each of RUNS
    python -m tests.engine.record_golden FOLDER

A log holds everything that decides, so that `golden_log` needs no clock, no model and no torch: limits,
requests, job, policy and the predictor's curves; the times that the engine's clock gave; and every plan. Record
anew when a policy or the loop is meant to decide differently, and look at what has changed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from engine.bench_jobs import FIRST
from engine.bench_loaded import load_bench
from engine.bench_spec import spec_of
from engine.driver import Driver, EngineArrivals, WallClock
from engine.parallel import ALONE
from engine.replica import Replica
from sim.core.loop import run_loop
from sim.core.rows import Recorder
from sim.core.state import PipelineState
from sim.cost.curves import LISTS, Curves
from sim.cost.fitted import FittedCost
from sim.policy_node import policy_of
from tests.engine.composed import bench_config
from tests.engine.golden_log import FOLDER, recorded, write_log

KNOWN_TOKENS = 512
"""More than any pass of these runs; the curves are cut there to keep the file small."""
COMMON = [
    "peak_s=0",
    "workload.duration_s=4",
    "workload.rate_rps=30",
    "limits.kv_tokens=320",
    "limits.max_sequences=8",
    "limits.max_tokens=64",
    "job.sample_tokens=256",
    "job.accumulation=2",
    "slo.classes.default.ttft_s=10",  # so that nobody is late, for whom finetuning would give way
    "slo.classes.default.tpot_s=1",
]
RUNS = {
    "coserving": ["policy=coserving", "policy.budget_s=0.015"],
    "coserving_slack_lookahead": ["policy=coserving_slack", "policy.budget_s=0.015", "limits.lookahead=1"],
}


def main(argv: Sequence[str]) -> int:
    """Record every run; prints what is in each."""
    folder = Path(argv[0]) if argv else FOLDER
    folder.mkdir(exist_ok=True)
    for name, overrides in RUNS.items():
        log = record([*COMMON, *overrides])
        path = folder / f"{name}.json.gz"
        write_log(path, log)
        preempted = sum(len(plan[2]) for plan in log["plans"])
        print(f"{path}: {len(log['plans'])} plans, {preempted} preemptions, {path.stat().st_size} bytes")
    return 0


def record(overrides: Sequence[str]) -> dict[str, Any]:
    """Serve and finetune on the wall clock as `coserve bench` does, and return the golden log of it."""
    spec = spec_of(bench_config(*overrides))
    loaded = load_bench(spec, Replica(ALONE, torch.device(spec.place)))
    setting = loaded.setting()
    limits, slos = setting.limits, setting.slos
    curves = _cut(loaded.measured().predictor.curves)
    policy = policy_of(spec.policy, FittedCost(curves, {}, limits.lookahead), slos)
    engine, jobs = setting.engine(limits, trains=True)
    log: dict[str, Any] = {
        "curves": asdict(curves),
        "job": asdict(jobs[0].spec),
        "limits": asdict(limits),
        "requests": [
            [*request[:5], request.adapter or ""]
            for request in spec.workload.arrivals().due(spec.horizon.duration_s)
        ],
        "policy": spec.config["policy"],
        "slo": spec.config["slo"],
        "horizon_s": [spec.horizon.duration_s, spec.horizon.drain_s],
        "sample_tokens": spec.jobs[FIRST].sample_tokens,
    }
    state = PipelineState(limits=limits, slos=slos, recorder=Recorder(), jobs=jobs)
    arrivals = EngineArrivals(spec.workload.arrivals(), engine, setting.prompt)
    loop = run_loop(state, policy, arrivals, spec.horizon)
    Driver(engine, WallClock()).run(recorded(loop, log))
    return log


def _cut(curves: Curves) -> Curves:
    lists = {name: getattr(curves, name) for name in LISTS}
    return replace(curves, **{n: None if v is None else v[: KNOWN_TOKENS + 1] for n, v in lists.items()})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
