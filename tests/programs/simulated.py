"""`coserve simulate` with little traffic, for tests of what it does and says."""

from __future__ import annotations

from pathlib import Path

from sim.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = ("workload=poisson", "workload.rate_rps=4", "workload.duration_s=20")
LATE = "arrival_s,prompt_tokens,output_tokens\n5,10,5\n1,20,5\n3,30,5\n"
"""A trace that is not sorted."""


def simulate(*argv: str, folder: str = "out") -> Path:
    assert main(["simulate", *SHORT, *argv, f"hydra.run.dir={folder}"]) == 0
    return Path(folder)
