"""What a launcher decides is decided once for tensors that look the same, and anew for all others."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.kernels.jit import MOST_LAYOUTS, by_layout
from engine.kernels.norm_backward import norm_backward_launch
from engine.kernels.paged_attention import attention_launches
from engine.kernels.swiglu_backward import swiglu_backward_launch

X = torch.zeros(4, 6)
UNLIKE: dict[str, tuple[Any, ...]] = {
    "shape": (torch.zeros(5, 6), 1, 0.5),
    "strides": (torch.zeros(6, 4).T, 1, 0.5),
    "type": (X.half(), 1, 0.5),
    "device": (X.to("meta"), 1, 0.5),
    "whole number": (X, 2, 0.5),
    "float": (X, 1, 0.25),
    "float that is whole": (X, 1.0, 0.5),
    "truth value": (X, True, 0.5),
    "float of another width": (X, 1, np.float32(0.5)),
}


class Recorded:
    """A function that remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> int:
        self.calls.append(args)
        return len(self.calls)


@pytest.mark.parametrize("unlike", UNLIKE)
def test_what_looks_the_same_is_decided_once(unlike: str) -> None:
    recorded = Recorded()
    decide = by_layout(recorded)
    for same in (X, torch.ones(4, 6), torch.zeros(8, 6)[2:6]):
        assert decide(same, 1, 0.5) == 1
    assert decide(*UNLIKE[unlike]) == 2
    assert decide(X, 1, 0.5) == 1
    assert len(recorded.calls) == 2


def test_what_is_remembered_is_bounded_and_can_be_forgotten() -> None:
    decide: Any = by_layout(Recorded())
    for n in range(MOST_LAYOUTS + 1):
        decide(X, n)
    assert decide(X, MOST_LAYOUTS) == MOST_LAYOUTS + 1
    assert decide(X, 0) == MOST_LAYOUTS + 2
    decide.cache_clear()
    assert decide(X, 0) == MOST_LAYOUTS + 3


def test_what_does_not_fit_is_refused_each_time_and_what_fits_has_its_own_tensors() -> None:
    out = torch.empty(4, 12)
    for _ in range(2):
        with pytest.raises(ValueError, match="d_active must have shape"):
            swiglu_backward_launch(X[:3], X, X, out)
    first, second = (swiglu_backward_launch(d, X, X, out) for d in (X, X + 1))
    assert first.args[1:] == second.args[1:]
    assert second.args[0] is not first.args[0]
    assert torch.equal(second.args[0], X + 1)


def test_what_is_written_is_looked_at_too() -> None:
    """A kernel that was found for results of one type would write those of another over half their rows, or twice."""
    x, weight = torch.zeros(4, 16), torch.ones(16)
    pages, numbers = torch.zeros(2, 16, 2, 16), torch.zeros(3, dtype=torch.int32)
    batch = (torch.zeros(4, 2, 16), pages, pages, numbers[:2].view(1, 2), numbers[:2], numbers[:1])
    launchers: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], object]]] = {
        "out": ((4, 32), lambda out: swiglu_backward_launch(x, x, x, out)),
        "dx": ((4, 16), lambda dx: norm_backward_launch(x, x, weight, dx, 1e-5)),
        "lse": ((4, 2), lambda lse: attention_launches(
            *batch, torch.zeros(4, 2, 16), lse, scale=1.0, max_keys=16, decodes=0, splits=None
        )),
    }  # fmt: skip
    for name, (shape, launch) in launchers.items():
        launch(torch.zeros(shape))
        for wrong, says in (
            (torch.zeros(shape).half(), "be of type torch.float32, got torch.float16"),
            (torch.zeros(shape[::-1]).T, "be contiguous"),
            (torch.zeros(1, *shape), "have shape"),
        ):
            with pytest.raises(ValueError, match=f"{name} must {says}"):
                launch(wrong)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="launching needs triton")
def test_what_is_launched_again_is_what_triton_would_look_up() -> None:
    """In a process of its own: there Triton launches for a driver that only notes what it is given."""
    program = Path(__file__).with_name("known_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, program],
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" launches\n")


def test_a_benchmark_without_a_repetition_is_refused() -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "launching.py"
    done = subprocess.run(
        [sys.executable, str(script), "--repetitions", "0"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("error: --repetitions must be at least 1, got 0")
