"""What happens to the tests of a worker whose GPU is gone for its process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
import torch
from tests.engine.conftest import pytest_runtest_logfinish

torch.cuda.lost = False
torch.cuda.is_initialized = lambda: True

def synchronize():
    if torch.cuda.lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.synchronize = synchronize
"""
TESTS = """
import pytest
import torch

@pytest.mark.parametrize("n", range(12))
def test_uses_the_gpu(n):
    assert not torch.cuda.lost
    torch.cuda.lost = n == 4
"""


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="workers are those of pytest-xdist")
def test_only_the_test_that_loses_the_gpu_fails(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_gpu.py").write_text(TESTS)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-n", "1", "."],
        cwd=tmp_path,
        env=inherited | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "an illegal memory access was encountered" in done.stdout + done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1 and "test_uses_the_gpu[4]" in failed[0]
    assert "1 failed, 12 passed" in done.stdout
