"""How fast the simulator is: one table of what, number and target.

    python tests/benchmarks/iterations.py            # every row, three to four minutes
    python tests/benchmarks/iterations.py --quick    # without the large run and the grid, half a minute

The row of the Azure conversation lengths needs that trace (`coserve fetch azure_conv`); without it the row
says so. Loops are timed in seconds of the processor, three times, and the fastest counts: other work on the
machine only adds. Imports, processes and the grid are timed by the clock.

The measure that guided the work is bytecode instructions per iteration, counted with `sys.settrace`: it does
not vary, while seconds vary by a factor of two on a shared machine. Sampling profilers put the time where it
can be interrupted, and cProfile's overhead goes to the small functions.

What it showed for co-serving (Llama-3.1-8B, 2 req/s, 21 sequences on average; Python 3.11.7 on 2 shared
cores of an AMD EPYC virtual machine, Python built without profile-guided optimisation; a build with it does
41,000 iterations per second where this one does 37,000), stage by stage in microseconds:

    before  35 = plan 14.9, apply 7.3, commit 4.2, world 2.2, view 1.7, arrivals 0.5, loop and SimPy 4
    after   27 = plan 11.5, apply 5.6, commit 2.9, world 2.0, view 1.3, arrivals 0.4, loop and SimPy 3

- The inverse questions of the cost model took half of `plan`: each search began at the largest slice and
  needed 5 evaluations for a window and 6 for a part of a layer. From the previous answer, or from the two
  ends that are known, and by Newton's method they take 3.1 and 3.5.
- A NamedTuple's constructor is a Python function: 180 ns for ten fields where `tuple.__new__` takes 100. Six
  are made per iteration.
- A row of 26 numbers took 1.0 us value by value, packed into bytes it takes 0.35.
- The rest was calls: one job and one slice, the common case, went through loops and dictionaries for many.

Left, in instructions of 3,300 per iteration: 530 in the terms of the cost model (asked three times: by the
search, for the prediction, by the world), 470 in the two searches, 280 in apply and commit themselves, 280 in
checking and advancing the job, 270 in loop, driver and SimPy. Garbage collection is not measurable, and
neither are cache misses: arrays instead of lists of floats changed nothing.
"""

from __future__ import annotations

import argparse
import resource
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
# Memory goes to the rows of iterations, 208 bytes each: a busier pipeline needs fewer for as many requests.
MANY = [
    "policy=inference_only", "cluster=single", "finetune=none", "cluster.limits.max_tokens=2048",
    "workload=poisson", "workload.rate_rps=16", "workload.duration_s=1000000", "workload.max_requests=500000",
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
    parser.add_argument("--quick", action="store_true", help="leave out the large run and the grid")
    parser.add_argument("--run", choices=["azure", "many"], help="one run in this process, for its own rows")
    options = parser.parse_args()
    if options.run:
        recorder = run_assembly(_assembled(AZURE if options.run == "azure" else MANY))
        print(len(recorder.requests), _peak_gib())
        return
    table = Table("what", "number", "target")
    for row in _rows(options.quick):
        table.add_row(*row)
        print(": ".join(row[:2]), file=sys.stderr)
    Console(width=110).print(table)


def _rows(quick: bool) -> Iterator[Row]:
    seconds, iterations = _fastest(lambda: _assembled([*TWO_RPS, "workload.duration_s=1200"]))
    yield "co-serving, iterations per second", f"{iterations / seconds:,.0f}", ">= 50,000"
    yield from _running_rows()
    yield "import sim.cluster", f"{_import_s('sim.cluster'):.2f} s", "< 0.3 s"
    yield "import sim.simulate, the whole program", f"{_import_s('sim.simulate'):.2f} s", "< 0.3 s"
    yield from _azure_rows()
    if quick:
        return
    wall_s, printed = _process(__file__, "--run", "many")
    requests, gib = printed.split()
    what = f"{int(requests):,} requests at 16 req/s, peak memory ({wall_s:.0f} s)"
    yield what, f"{float(gib):.2f} GiB", "< 1 GiB"
    yield "9 systems x 3 models x 5 rates x 10 minutes, 2 processes", f"{_grid_s():.0f} s", "< 90 s"


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
    wall_s = min(_process(__file__, "--run", "azure")[0] for _ in range(3))
    yield f"{what}, as a process", f"{wall_s:.2f} s", "< 2 s"


def _assembled(overrides: list[str]) -> Assembly:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return assemble(compose("config", overrides))


def _constant(policy: str, duration_s: float) -> Assembly:
    """Room for all, and a budget that leaves time for finetuning beside 256 decodes."""
    more = ["policy.budget_s=0.1"] if policy == "coserving" else ["finetune=none"]
    assembly = _assembled([*TWO_RPS, f"policy={policy}", *more, "cluster.limits.kv_tokens=10000000"])
    return replace(assembly, horizon=Horizon(duration_s=duration_s, drain_s=0.0))


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
    """Seconds of an import in a fresh interpreter, the fastest of five."""
    program = (
        f"import sys, time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t);"
        "assert 'torch' not in sys.modules"
    )
    return min(float(_process("-c", program)[1]) for _ in range(5))


def _process(*arguments: str) -> tuple[float, str]:
    """(wall seconds, what it printed) of a fresh Python."""
    started_s = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - started_s, done.stdout


def _peak_gib() -> float:
    """Peak resident memory of this process; the kernel counts in KiB, on macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


if __name__ == "__main__":
    main()
