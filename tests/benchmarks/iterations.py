"""How fast the simulator is: one table of what, number and target.

    python tests/benchmarks/iterations.py            # every row, about five minutes
    python tests/benchmarks/iterations.py --quick    # without the large runs and the grid, half a minute

The row of the Azure conversation lengths needs that trace (`coserve fetch azure_conv`); without it the row
says so. Loops are timed in seconds of the processor, three times, and the fastest counts: other work on the
machine only adds. Imports, processes and the grid are timed by the clock.

What guided the work are counts, which do not vary where seconds vary by a factor of two on a shared machine:
machine instructions of the loop alone (valgrind's callgrind, switched on round `simulate_cluster`) and bytecode
instructions by function (`sys.settrace`). Sampling profilers put the time where it can be interrupted, and
cProfile's overhead goes to the small functions. `digests.py` beside this file says whether all rows of all
policies are still the same to the last bit.

What they showed for co-serving (Llama-3.1-8B, 2 req/s, 21 sequences on average; Python 3.11.7 built without
profile-guided optimisation), per iteration, before and after the last round of changes:

    bytecode instructions               3,470     2,550
    machine instructions              233,000   149,000    inference only: 83,000 and 66,000
    seconds, both in turns          1.45 to 1.50 : 1       inference only: 1.43 : 1

A bytecode costs about 65 machine instructions whatever it does, so what counts is their number; more expensive
are only calls of Python functions (300 more), NamedTuples (700 to make, 90 for each field unpacked, against 10 of
a plain tuple), `max` and `min` (600), properties and `__len__` written in Python (500 to 900) and products of an
integer and a float (four times those of two floats). What was gained:

- The inverse questions of the cost model formed the whole sum for each of their 3 to 4 candidates. Now all that
  is known comes off the budget first, and the sum itself decides only within rounding (`sim.cost.inverse`). They
  return the seconds of their answer, so that the prediction asks no more, and the plan needs no Work.
- A layer's backward from a sample's start is a list, since whole layers and the rest of one are most of it.
- A slice is checked and carried out by one function, `after`, that says where its job stands next.
- The SimPy driver moves the clock without an event when no other is due.
- A row of whole numbers in 1, 2 and 4 bytes packs twice as fast as one of doubles, and takes 127 bytes, not 208.
- With one serving pipeline there is nothing to route, and the routers that predict cost 10 us per arrival.

Where 149,000 instructions go now: plan 42,000 (of them the search and its sums 30,000), apply and commit 50,000
(10,000 of them the legality check, 12,000 the row), the world's seconds 14,000, view 8,000, the rest in loop,
driver and arrivals. Garbage collection is not measurable (0.2 %). Tried without gain: lists of attention seconds
by tokens instead of the formula in floats, and a search started from the last two answers.

No further half is left in Python. Of 2,480 bytecodes no function has more than 7 %. What an unchanged batch lets
one advance instead of recompute is small already, since the state keeps counts and sums: the seconds of inference
(56 bytecodes each for plan and world), the blocks of the coming decode (30), deadlines (30), legality without
slices (54). The searches evaluate 2.7 candidates where 2 are needed for certainty, which is 2 % more. World and
predictor are different curves, so neither's seconds serve the other. A CPython built with profile-guided
optimisation takes 133,000 instructions for the 145,000 of one without.

`make native` (`sim.native`) has mypyc translate the modules of the loop as they stand. Per iteration, and in seconds
of the processor, both in turns, on a machine that other work kept busy:

    machine instructions               145,800    65,100    inference only: 67,500 and 45,300
    iterations per second               34,500   101,700    inference only: 115,900 and 184,100
    from source : machine code       2.86 to 2.99 : 1       inference only: 1.44 to 1.63 : 1

All digests are equal. For it the sums of pairs in a row got one type, and classes with subclasses are translated
with them. The loop and the driver as well would be 3.5 % less. A class that `sim.checked` builds from a config
cannot be, its signature is gone.

Memory of half a million requests was 1.22 GiB with metrics and Parquet. 0.25 of it were two assemblies with views
of eight million drawn requests, 0.05 the deadlines of ended requests, which no heap let go, the rest copies of
columns; serving alone now takes 0.87, co-serving with its two bounds 0.95.

An import that finds no bytecode of `sim` (a first start, or PYTHONDONTWRITEBYTECODE) takes 1.3 times as many
instructions. Of those of one that does, Hydra, numpy and SimPy are four fifths.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from sim.assemble import CONFIGS, Assembly, assemble
from sim.cluster import simulate_cluster
from sim.core import state
from sim.core.loop import Horizon
from sim.core.request import Request
from sim.core.rows import Recorder
from sim.simulate import run_assembly
from sim.workload.files import data_dir

Row = tuple[str, str, str]
"""What, number, target."""

TWO_RPS = ["policy=coserving", "cluster=single", "workload=poisson", "workload.rate_rps=2"]
"""Co-serving Llama-3.1-8B on an A100, lengths like ShareGPT's, long finetuning samples."""
AZURE = [
    "policy=inference_only", "cluster=single", "finetune=none", "cluster.limits.max_tokens=2048",
    "workload=poisson", "workload/lengths=from_trace", "workload.rate_rps=6.45",
    "workload.duration_s=100000", "workload.max_requests=10000",
]  # fmt: skip
# Memory goes to the rows of iterations, 127 bytes each: the slower the arrivals, the more of them per request.
# `coserve simulate` also runs the two bounds, so co-serving needs what serving alone needs, and its own plans.
MANY = [
    "policy=inference_only", "cluster=single", "finetune=none", "cluster.limits.max_tokens=2048",
    "workload=poisson", "workload.rate_rps=8", "workload.duration_s=1000000", "workload.max_requests=500000",
]  # fmt: skip
MANY_COSERVING = [
    "policy=coserving", "cluster=single", "cluster.limits.max_tokens=2048", "workload=poisson",
    "workload.rate_rps=8", "workload.duration_s=62500",
]  # fmt: skip
GRID = [
    "policy=coserving,coserving_slack,coserving_static,inference_only,spatial,spatial_limited,"
    "temporal,temporal_dynamic,temporal_limited",
    "model=llama_3_1_8b,qwen2_5_14b,qwen2_5_32b", "workload.rate_rps=1,2,3,4,5",
    "cluster=single", "workload=poisson", "workload.duration_s=600", "hydra.launcher.workers=2",
]  # fmt: skip


class AtOnce:
    """So many equal requests at time 0, too long to end: a constant number of running sequences."""

    def __init__(self, count: int) -> None:
        self._requests = [Request(i, 0.0, 64, 100_000) for i in range(count)]

    def next_s(self) -> float | None:
        return 0.0 if self._requests else None

    def due(self, now_s: float) -> list[Request]:
        due, self._requests = self._requests, []
        return due

    def ended(self, request_id: int, now_s: float) -> None:
        raise AssertionError("a request ended")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="leave out the large runs and the grid")
    parser.add_argument("--azure", action="store_true", help="the run of that trace, for a row of its own")
    options = parser.parse_args()
    if options.azure:
        run_assembly(_assembled(AZURE))
        return
    table = Table("what", "number", "target")
    for row in _rows(options.quick):
        table.add_row(*row)
        print(": ".join(row[:2]), file=sys.stderr)
    Console(width=110).print(table)


def _rows(quick: bool) -> Iterator[Row]:
    seconds, iterations = _fastest(lambda: _assembled([*TWO_RPS, "workload.duration_s=1200"]))
    how = "from source" if str(state.__file__).endswith(".py") else "machine code"
    yield f"co-serving, iterations per second, {how}", f"{iterations / seconds:,.0f}", ">= 50,000"
    yield from _running_rows()
    yield "import sim.cluster", f"{_import_s('sim.cluster'):.2f} s", "< 0.3 s"
    yield "import sim.simulate, the whole program", f"{_import_s('sim.simulate'):.2f} s", "< 0.3 s"
    yield from _azure_rows()
    if quick:
        return
    for policy, overrides in (("inference_only", MANY), ("coserving", MANY_COSERVING)):
        wall_s, requests, gib = _simulated(overrides)
        what = f"{policy}, {requests:,} requests at 8 req/s, peak memory of it all ({wall_s:.0f} s)"
        yield what, f"{gib:.2f} GiB", "< 1 GiB"
    yield "9 systems x 3 models x 5 rates x 10 minutes, 2 processes", f"{_grid_s():.0f} s", "< 90 s"


def _simulated(overrides: list[str]) -> tuple[float, int, float]:
    """Wall seconds, requests and peak memory in GiB of `coserve simulate`: metrics, Parquet, bounds, figure."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sim.cli", "simulate", *overrides, f"hydra.run.dir={folder}"]
        started_s = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - started_s
        assert status == 0, f"{' '.join(command)} failed"
        requests = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))["requests"]
    # The kernel counts in KiB, on macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return wall_s, requests, usage.ru_maxrss * unit / 2**30


def _grid_s() -> float:
    """Wall seconds of the grid as a sweep that writes all its run folders."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sim.cli", "simulate", "-m", *GRID, f"hydra.sweep.dir={folder}"]
        started_s = time.perf_counter()
        # Not checked by its exit code, which is also about a figure: one cannot show all of these runs.
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall_s = time.perf_counter() - started_s
        runs = len(list(Path(folder).rglob("summary.json")))
    assert runs == 135, f"{runs} runs of 135 were written"
    return wall_s


def _running_rows() -> Iterator[Row]:
    for policy in ("inference_only", "coserving"):
        each_s = []
        for running in (8, 256):
            # The difference of two lengths: prefills and first uses are in both.
            short, long = (
                _fastest(partial(_constant, policy, duration_s), partial(AtOnce, running))
                for duration_s in (20.0, 140.0)
            )
            each_s.append((long[0] - short[0]) / (long[1] - short[1]))
        change = each_s[1] / each_s[0] - 1
        numbers = f"{each_s[0] * 1e6:.1f} and {each_s[1] * 1e6:.1f} us, {change:+.0%}"
        yield f"{policy}, an iteration of 8 and of 256 sequences", numbers, "< +30 %"


def _azure_rows() -> Iterator[Row]:
    what = "Azure conversation lengths, 10,000 requests"
    if not (data_dir() / "azure" / "AzureLLMInferenceTrace_conv.csv").exists():
        yield what, "no trace in COSERVE_DATA", "< 1.0 s"
        return
    seconds, iterations = _fastest(lambda: _assembled(AZURE))
    yield f"{what}: {iterations:,} iterations", f"{seconds:.2f} s", "< 1.0 s"
    wall_s = min(_process(__file__, "--azure")[0] for _ in range(3))
    yield f"{what}, as a process", f"{wall_s:.2f} s", "< 2 s"


def _assembled(overrides: list[str]) -> Assembly:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return assemble(compose("config", overrides))


def _constant(policy: str, duration_s: float) -> Assembly:
    """Room for all, and a budget that leaves time for finetuning beside 256 decodes."""
    more = ["policy.budget_s=0.1"] if policy == "coserving" else ["finetune=none"]
    assembly = _assembled([*TWO_RPS, f"policy={policy}", *more])
    (spec,) = assembly.pipelines
    roomy = replace(spec, limits=replace(spec.limits, kv_tokens=10_000_000))
    return replace(assembly, pipelines=(roomy,), horizon=Horizon(duration_s=duration_s, drain_s=0.0))


def _fastest(
    fresh: Callable[[], Assembly], arrivals: Callable[[], AtOnce] | None = None
) -> tuple[float, int]:
    """(processor seconds of the loop, iterations) of the fastest of three runs of equal assemblies."""
    results = []
    for _ in range(3):
        assembly, recorder = fresh(), Recorder()
        source = assembly.workload.arrivals() if arrivals is None else arrivals()
        started_s = time.process_time()
        simulate_cluster(
            pipelines=assembly.pipelines,
            arrivals=source,
            router=assembly.router,
            slos=assembly.slos,
            horizon=assembly.horizon,
            recorder=recorder,
        )
        results.append((time.process_time() - started_s, len(recorder.iterations)))
    return min(results)


def _import_s(module: str) -> float:
    """Seconds of an import in a fresh interpreter, the fastest of six: bytecode is cached, as from the second
    start on, also where the environment says not to write it beside the sources."""
    program = (
        f"import sys, time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t);"
        "assert 'torch' not in sys.modules"
    )
    with tempfile.TemporaryDirectory() as caches:
        cached = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": caches}
        return min(float(_process("-c", program, **cached)[1]) for _ in range(6))


def _process(*arguments: str, **environment: str) -> tuple[float, str]:
    """(wall seconds, what it printed) of a fresh Python."""
    started_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    return time.perf_counter() - started_s, done.stdout


if __name__ == "__main__":
    main()
