from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import engine.kernels.hopper
from engine.kernels.paged_attention import paged_attention, paged_attention_triton

pages = torch.randn(2, 16, 2, 64)
index = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1]).int(), torch.tensor([3]).int()
batch = torch.randn(1, 4, 64), pages, pages, *index
out, lse = paged_attention(*batch, scale=0.1, max_keys=16)
assert out.isfinite().all() and lse.isfinite().all()
try:
    paged_attention_triton(*batch, scale=0.1, max_keys=16)
except RuntimeError as error:
    assert "triton" in str(error)
else:
    raise AssertionError("a kernel ran without triton")
"""


def test_the_references_need_no_triton_and_kernels_say_that_they_do() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
