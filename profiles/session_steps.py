"""What a session on a GPU measures: its steps, in order, with the time that each may take."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

PROFILE = "profile.parquet"
LEAST_S = 20.0
"""With less time than this left no step is started."""
WORKERS = 8
"""Tests side by side: most of their time goes into compiling kernels, on one core each."""
COSERVE = (sys.executable, "-m", "sim.cli")
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
OPTIONS = ("-W", "default", "-o", "faulthandler_timeout=60")
"""Warnings that come on a GPU alone are shown and fail no test; a test that hangs shows where before it is ended."""
WAYS = ("coserving_slack", "coserving", "temporal_limited", "inference_only")
SPLITS = ("separate_25", "separate_50", "separate_75")
SWEPT = ("workload.rate_rps=5,20", f"policy={','.join((*WAYS, *SPLITS))}")
"""What of gpu_paper and gpu_splits fits half an hour."""
SHORT = ("workload.duration_s=3", "run.drain_s=3", "run.warm_up_s=0.5", "measure_s=3", "peak_s=4")
"""A sweep without a GPU shows that it works; its numbers say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    least_s: float = LEAST_S
    """With less time left it waits for another call, and the next step begins."""
    after: tuple[str, ...] = ()
    """Steps that it reads the results of: it waits until they have ended, and runs again when they went on."""
    goes_on: bool = False
    """Cut short, it goes on where it was; another one begins anew, or has failed if the limit was its own."""
    gpu: bool = False
    """Without a GPU it is left out."""


def steps_of(folder: Path, device: str, model: str) -> list[Step]:
    """The session's steps: what others rest on first, then what is most worth knowing.

    On an H200 with Llama-3.1-8B all but the last should take half an hour: tests 2 minutes, reference 5, profile
    4, bench 14, kernels 2.
    """
    place = (f"device={device}", f"model={model}")
    seconds = {"profile": 20, "reference": 20} if device == "cpu" else {"profile": 180, "reference": 100}
    profile = folder / PROFILE

    def sweep(folder_name: str, seed: int) -> tuple[str, ...]:
        where = f"hydra.sweep.dir={folder / 'runs' / folder_name}"
        short = SHORT if device == "cpu" else ()
        given = (*place, f"seed={seed}", where, "run.resume=true", *SWEPT, *short)
        return (*COSERVE, "bench", "experiment=gpu_paper", *given)

    steps = [
        Step(
            name="tests",
            command=(
                *PYTEST,
                *OPTIONS,
                *_side_by_side(),
                "-q",
                "-m",
                "gpu",
                "--tb=short",
                "--maxfail=25",
                "tests/engine",
            ),
            limit_s=300,
            least_s=120,
            gpu=True,
        ),
        Step(
            name="reference",
            command=(
                *COSERVE,
                "reference",
                *place,
                f"seconds={seconds['reference']}",
                f"out={folder / 'reference'}",
            ),
            limit_s=420,
            least_s=300,
        ),
        Step(
            name="profile",
            command=(
                *COSERVE,
                "profile",
                "collect",
                *place,
                "job/lora=down_proj",
                f"seconds={seconds['profile']}",
                f"out={profile}",
            ),
            limit_s=360,
            least_s=240,
            goes_on=True,
        ),
        Step(name="bench", command=sweep("gpu_paper", 0), limit_s=1100, least_s=100, goes_on=True),
        Step(
            name="kernels",
            command=(sys.executable, "tests/benchmarks/kernels.py", str(folder / "kernels")),
            limit_s=240,
            least_s=120,
            gpu=True,
        ),
        Step(
            name="fidelity",
            command=(
                *COSERVE,
                "fidelity",
                str(folder / "runs" / "gpu_paper"),
                f"profile={profile}",
                f"out={folder / 'fidelity'}",
            ),
            limit_s=300,
            least_s=60,
            after=("profile", "bench"),
        ),
        Step(name="more", command=sweep("gpu_more", 1), limit_s=1100, least_s=100, goes_on=True),
    ]
    return [replace(step, least_s=LEAST_S) for step in steps] if device == "cpu" else steps


def _side_by_side() -> tuple[str, ...]:
    """Where pytest-xdist is there. With two threads' worth of cores for each test."""
    if importlib.util.find_spec("xdist") is None:
        return ()
    return ("-n", str(max(1, min(WORKERS, (os.cpu_count() or 1) // 2))))
