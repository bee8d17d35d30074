"""A machine whose costs are known: a profile of it, and runs of the engine on its clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import engine.bench
import engine.pipelines
from profiles.named import model_named
from profiles.schema import Profile, Provenance, read_profile, write_profile
from sim.core.rows import WORK_COLUMNS, work_row
from sim.core.work import Work
from sim.cost.curves import ChunkCost, Curves, DecodeCost
from sim.cost.flat import row_parts
from sim.cost.iteration import IterationCost
from sim.cost.noisy import NoisyCost
from sim.cost.sampled import designed_works
from tests.engine.virtual import VirtualClock

SPREAD = 0.02
HOST_S = 1e-3
PROVENANCE = Provenance(
    device="cpu", model="tiny", tp=1, source="a test", date="2026-11-21", how="computed", licence="none",
    versions="none",
)  # fmt: skip
SHORT = ["workload.duration_s=6", "run.drain_s=4", "peak_s=0", "job.sample_tokens=64"]


def line(each_s: float, start_s: float = 0.0) -> list[float]:
    return [0.0, *(start_s + each_s * n for n in range(1, 1025))]


def truth() -> IterationCost:
    """Iterations of 5 to 50 ms: finetuning is slow enough to be cut into slices."""
    curves = Curves(
        token_s=line(8e-5, 4e-3),
        collective_s=None,
        sampled_s=line(2e-4),
        loss_s=line(2e-4),
        recompute_s=line(1e-4),
        backward_layer_s=line(1.5e-4),
        backward_collective_s=None,
        prefill=ChunkCost(5e-4, 0.0, 2e-6),
        forward=ChunkCost(5e-4, 0.0, 4e-6),
        recompute=ChunkCost(0.0, 0.0, 4e-6),
        backward=ChunkCost(2e-4, 0.0, 1e-6),
        decode=DecodeCost(5e-4, 1e-4, 1.5e-5),
        lora_fixed_s=5e-4,
        lora_token_s=2e-5,
        adapter_s=1e-4,
        optimizer_param_s=5e-8,
        host_s=HOST_S,
        overlap_contention=1.0,
    )
    return IterationCost(curves)


@pytest.fixture(scope="session")
def profile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The known machine, measured with noise."""
    model, cost = model_named("tiny"), truth()
    works = [w for w in designed_works(model, 77824, 500, 3) if small(w)]
    flat, index = np.unique(np.array([work_row(w) for w in works], dtype=float), axis=0, return_index=True)
    noise = np.exp(SPREAD * np.random.default_rng(1).standard_normal(len(index)))
    seconds = np.array([cost.iteration_s(works[i]) for i in index]) * noise
    columns = {name: flat[:, i] for i, name in enumerate(WORK_COLUMNS)}
    columns |= {f"seconds_p{p}": seconds * np.exp(z * SPREAD) for p, z in ((20, -0.84), (50, 0), (80, 0.84))}
    columns |= {"point": np.arange(len(seconds)) * 1.0, "repeats": np.full(len(seconds), 9.0)}
    columns |= {"host_s": np.full(len(seconds), HOST_S), "ahead_s": seconds - HOST_S}
    path = tmp_path_factory.mktemp("known") / "known.parquet"
    write_profile(path, columns, PROVENANCE)
    return path


def small(work: Work) -> bool:
    chunks = (*work.prefill, *work.forward, *work.recompute)
    return not work.overlap and all(c.tokens <= 512 for c in (*chunks, *work.backward))


@pytest.fixture
def doubled(profile_file: Path, tmp_path: Path) -> Callable[[tuple[str, ...]], Path]:
    """The profile with some parts of every row twice as long."""

    def make(parts: tuple[str, ...]) -> Path:
        profile: Profile = read_profile(profile_file)
        own = row_parts(truth().curves, profile.work)
        more = sum(own[part] for part in parts)
        columns = dict(profile.columns)
        for name in ("seconds_p20", "seconds_p50", "seconds_p80", "ahead_s"):
            columns[name] = columns[name] + more
        path = tmp_path / "doubled.parquet"
        write_profile(path, columns, PROVENANCE)
        return path

    return make


class Bench:
    """`coserve bench` on the known machine's clock."""

    def __init__(self, profile_file: Path) -> None:
        self.profile_file = profile_file

    def run(self, folder: Path, *overrides: str, spread: float = SPREAD) -> Path:
        def clock() -> VirtualClock:
            return VirtualClock(NoisyCost(truth(), spread, (0, 7)) if spread else truth())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.pipelines, "WallClock", clock)
            arguments = [*SHORT, f"predictor={self.profile_file}", f"hydra.run.dir={folder}", *overrides]
            assert engine.bench.main(arguments) == 0
        return folder


@pytest.fixture(scope="session")
def bench(profile_file: Path) -> Bench:
    return Bench(profile_file)


@pytest.fixture(scope="session")
def run_folder(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with noise of its own."""
    return bench.run(
        tmp_path_factory.mktemp("runs") / "run", "workload.rate_rps=6", "workload.adapters.count=2"
    )
