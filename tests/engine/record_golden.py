"""Record real `coserve bench` runs as golden logs: what the loop was told, and what it decided.

    python -m tests.engine.record_golden

Writes `tests/engine/golden/NAME.json.gz` for each of RUNS. A log holds everything that decides, so that
`test_golden_log` needs no clock, no model and no torch: limits, requests, job, policy and the predictor's curves;
the times that the engine's clock gave; and every plan. Record anew when a policy or the loop is meant to
decide differently, and look at what has changed.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from collections.abc import Generator
from dataclasses import asdict, replace
from typing import Any

from engine import bench
from engine.driver import Driver
from sim.core.loop import Command, Done, Execute, Sleep
from sim.cost.curves import LISTS, Curves
from sim.cost.fitted import FittedCost
from sim.results import read_run
from tests.engine.golden_log import FOLDER, plan_row

KNOWN_TOKENS = 512
"""More than any pass of these runs; the curves are cut there to keep the file small."""
COMMON = [
    "workload.duration_s=4",
    "workload.rate_rps=30",
    "limits.kv_tokens=320",
    "limits.max_sequences=8",
    "limits.max_tokens=64",
    "job.sample_tokens=256",
    "job.accumulation=2",
]
RUNS = {
    "coserving": ["policy=coserving", "policy.budget_s=0.015"],
    "coserving_slack_lookahead": ["policy=coserving_slack", "policy.budget_s=0.015", "limits.lookahead=1"],
}


def main() -> int:
    """Record every run; prints what is in each."""
    FOLDER.mkdir(exist_ok=True)
    for name, overrides in RUNS.items():
        log = record([*COMMON, *overrides])
        path = FOLDER / f"{name}.json.gz"
        # Without a time in its header the same log gives the same file.
        path.write_bytes(gzip.compress(json.dumps(log).encode(), mtime=0))
        preempted = sum(len(plan[2]) for plan in log["plans"])
        print(f"{path}: {len(log['plans'])} plans, {preempted} preemptions, {path.stat().st_size} bytes")
    return 0


def record(overrides: list[str]) -> dict[str, Any]:
    """Run `coserve bench` and return its golden log."""
    log: dict[str, Any] = {"plans": [], "replies": []}
    measure, run, driver = bench.measure, bench._run, bench.Driver

    def measured(*given: Any) -> FittedCost:
        found = measure(*given)
        log["curves"] = asdict(_cut(found.curves))
        return FittedCost(_cut(found.curves), found.ranges, found.lookahead)

    def noted(engine: Any, jobs: Any, policy: Any, limits: Any, *rest: Any) -> Any:
        log["job"], log["limits"] = asdict(jobs[0].spec), asdict(limits)
        return run(engine, jobs, policy, limits, *rest)

    class Recording(Driver):
        def run(self, loop: Generator[Command, Done, None]) -> None:
            super().run(_recorded(loop, log))

    bench.measure, bench._run, bench.Driver = measured, noted, Recording  # type: ignore[misc, assignment]
    try:
        with tempfile.TemporaryDirectory() as folder:
            code = bench.main([*overrides, f"hydra.run.dir={folder}"])
            assert code == 0
            _take_run(folder, log)
    finally:
        bench.measure, bench._run, bench.Driver = measure, run, driver  # type: ignore[misc]
    return log


def _recorded(loop: Generator[Command, Done, None], log: dict[str, Any]) -> Generator[Command, Done, None]:
    """The same loop; its plans and the answers to its waits and sleeps are kept."""
    reply: Any = None
    while True:
        try:
            command = loop.send(reply)
        except StopIteration:
            return
        reply = yield command
        if type(command) is Execute:
            log["plans"].append(plan_row(command.plan))
        else:
            log["replies"].append([type(command) is Sleep, *reply])


def _take_run(folder: str, log: dict[str, Any]) -> None:
    """The requests and the parts of the config that decide."""
    run = read_run(folder)
    columns = ["request", "arrival_s", "prompt_tokens", "output_tokens", "slo", "adapter"]
    requests = run.table("requests").sort_values("request")
    log["requests"] = requests[columns].astype({"slo": str, "adapter": str}).values.tolist()
    log["policy"], log["slo"] = run.config["policy"], run.config["slo"]
    log["horizon_s"] = [run.config["workload"]["duration_s"], run.config["run"]["drain_s"]]
    log["sample_tokens"] = run.config["job"]["sample_tokens"]


def _cut(curves: Curves) -> Curves:
    lists = {name: getattr(curves, name) for name in LISTS}
    return replace(curves, **{n: None if v is None else v[: KNOWN_TOKENS + 1] for n, v in lists.items()})


if __name__ == "__main__":
    sys.exit(main())
