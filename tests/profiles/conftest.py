"""Where the public measurements are, and a measured profile of a model that is known."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from profiles.named import device_named, model_named
from profiles.schema import Provenance, write_profile
from sim.core.rows import WORK_COLUMNS, work_row
from sim.core.specs import LoraSpec
from sim.cost.context import CostContext
from sim.cost.iteration import IterationCost
from sim.cost.roofline import Roofline
from sim.cost.sampled import designed_works

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data() -> Path:
    folder = Path(os.environ.get("COSERVE_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "kernels").is_dir():
        pytest.skip(f"no public kernel measurements under {folder}")
    return folder


@pytest.fixture(scope="session")
def context() -> CostContext:
    model = model_named("llama_3_1_8b")
    return CostContext(device=device_named("a100_80gb"), model=model, tp=1, lora=LoraSpec(), seed=0)


@pytest.fixture(scope="session")
def truth(context: CostContext) -> IterationCost:
    return Roofline().build(context)


@pytest.fixture(scope="session")
def provenance() -> Provenance:
    return Provenance(
        device="a100_80gb", model="llama_3_1_8b", tp=1, source="a test", date="2026-11-01",
        how="computed", licence="none", versions="none",
    )  # fmt: skip


@pytest.fixture(scope="session")
def columns(context: CostContext, truth: IterationCost) -> dict[str, np.ndarray]:
    """400 works of every kind with 2 % noise."""
    works = designed_works(context.model, context.lora.params(context.model), 400, 5)
    flat, index = np.unique(np.array([work_row(w) for w in works], dtype=float), axis=0, return_index=True)
    noise = np.exp(0.02 * np.random.default_rng(1).standard_normal(len(index)))
    seconds = np.array([truth.iteration_s(works[i]) for i in index]) * noise
    times = {"seconds_p20": 0.99 * seconds, "seconds_p50": seconds, "seconds_p80": 1.01 * seconds}
    return {name: flat[:, i] for i, name in enumerate(WORK_COLUMNS)} | times


@pytest.fixture
def profile_file(tmp_path: Path, columns: dict[str, np.ndarray], provenance: Provenance) -> Path:
    path = tmp_path / "profile.parquet"
    write_profile(path, columns, provenance)
    return path
