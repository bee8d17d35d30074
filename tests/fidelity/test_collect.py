"""What is timed is what the design says, a profile grows where it stopped, and the loop of programs closes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import profiles.collect
from engine.assemble import TrainingJob
from engine.bench import main as bench
from engine.design import Point, Space, design
from engine.lora import new_adapter
from engine.optimizer import OptimizerSettings
from engine.rig import Rig
from engine.room import limits_and_plans
from profiles.collect import Timing
from profiles.collected import points_line
from profiles.fidelity import main as fidelity
from profiles.program import main as program
from profiles.schema import COLUMNS, MORE_COLUMNS, contradiction, read_profile, write_profile
from sim.core.plan import Limits
from sim.core.specs import LoraSpec
from sim.native import ROOT, sources
from tests.engine.tiny import CONFIGS, adapter_of, tiny_model

ORDERS = ("layer_major", "window_major")
LIMITS = Limits(kv_tokens=2048, block_tokens=8, max_sequences=6, max_tokens=40, max_sequence_tokens=200)


def space(limits: Limits = LIMITS, orders: tuple[str, ...] = ORDERS, overlap: bool = False) -> Space:
    return Space(
        limits=limits,
        layers=3,
        sample_tokens=48,
        window_tokens=24,
        orders=orders,
        adapters=2,
        overlap=overlap,
    )


def kind(p: Point) -> tuple[bool, ...]:
    parts = (p.decodes, p.prefill, p.forward, p.backward, p.step, p.adapters, p.overlap)
    return tuple(bool(part) for part in parts)


def test_any_beginning_of_the_design_covers_all_that_comes_later() -> None:
    points = list(islice(design(space(overlap=True)), 2000))
    assert points == list(islice(design(space(overlap=True)), 2000))
    alone = {kind(p) for p in points[:60] if sum(kind(p)) == 1}
    assert len(alone) == 5, "decodes, prefill, windows, backward and steps, each by itself"
    assert {p.job for p in points[:20]} == {0, 1} and any(p.overlap for p in points[:20])
    first, later = points[:100], points[100:]
    for size in (
        lambda p: p.decodes,
        lambda p: p.context,
        lambda p: sum(c.tokens for c in p.prefill),
        lambda p: p.forward.tokens if p.forward else 0,
        lambda p: p.backward.layer_tokens if p.backward else 0,
    ):
        assert max(map(size, later)) <= max(map(size, first)), "the corners come first"
    assert not any(p.overlap for p in islice(design(space()), 500))
    assert not any(p.forward or p.backward or p.step for p in islice(design(space(orders=())), 200))


def test_where_one_sequence_runs_at_a_time_no_prompt_is_beside_a_decode() -> None:
    points = list(islice(design(space(replace(LIMITS, max_sequences=1))), 500))
    assert any(p.decodes for p in points) and any(p.prefill for p in points)
    assert not any(p.decodes and p.prefill for p in points)


def rig_of(limits: Limits, orders: tuple[str, ...] = ORDERS) -> Rig:
    shape = CONFIGS["llama"].shape
    jobs = [
        TrainingJob(
            id=order,
            samples=(),
            max_sample_tokens=48,
            adapter=new_adapter(LoraSpec(rank=2), shape, torch.float32, "cpu", 0),
            optimizer=OptimizerSettings(schedule="constant"),
            order=order,
            memory="stash" if order == "layer_major" else "recompute",
        )
        for order in orders
    ]
    adapters = {f"adapter_{n}": adapter_of("llama", 2, ["down_proj"], seed=n) for n in range(2)}
    return Rig(tiny_model("llama"), limits, jobs, adapters)


@pytest.mark.parametrize("order", [(), ("window_major",), ORDERS])
@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        Limits(kv_tokens=240, block_tokens=16, max_sequences=2, max_tokens=2, max_sequence_tokens=120),
        Limits(kv_tokens=64, block_tokens=64, max_sequences=1, max_tokens=9, max_sequence_tokens=64),
    ],
)
def test_the_engine_does_what_the_design_says(limits: Limits, order: tuple[str, ...]) -> None:
    """Counts of the work that was timed, as the loop's own accounts have them; nothing is left behind."""
    rig = rig_of(limits, order)
    free = rig.engine.tables.free
    for n, point in enumerate(islice(design(rig.space), 45)):
        timed = rig.time(point, repeats=1, ahead=n % 3 == 0, warm_ups=0)
        work = timed.work
        assert work.decode_count == point.decodes
        assert work.decode_context_tokens == point.decodes * point.context
        assert work.prefill == point.prefill
        assert work.sampled_tokens == point.decodes + (len(point.prefill) if point.ends else 0)
        assert work.forward == (() if point.forward is None else (point.forward,))
        assert work.backward_layer_tokens == (point.backward.layer_tokens if point.backward else 0)
        if point.job == 1 or order == ("window_major",):
            assert work.recompute_tokens * rig.space.layers == work.backward_layer_tokens
        assert bool(work.optimizer_params) == point.step and work.adapters == point.adapters
        assert (
            (timed.seconds > 0).all() and (timed.host_s >= 0).all() and (timed.host_s < timed.seconds).all()
        )
        assert rig.engine.tables.free == free and not rig.engine._live
    assert all(np.isfinite(record.loss) for record in rig.engine.steps)


SMALL = ["limits.max_sequences=6", "limits.kv_tokens=2048", "job.sample_tokens=64"]


def collect(path: Path, *overrides: str) -> int:
    return program(["collect", f"out={path}", "repeats=3", *SMALL, *overrides])


def test_collect_fit_bench_fidelity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One loop of programs on this machine, whatever its times are."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.parquet"
    assert collect(path, "points=70") == 0
    profile = read_profile(path)
    assert list(profile.columns) == [*COLUMNS, *MORE_COLUMNS] and contradiction(profile.columns) is None
    said = f"points: 70 of 70 of the design, {len(profile.seconds)} measured; left out "
    assert said in capsys.readouterr().out
    about, of = profile.collected, profile.provenance
    assert about is not None and of is not None
    assert (of.device, of.model, about["passed"], about["dtype"]) == ("cpu", "tiny", 70, "float32")
    left_out = about["left_out"]
    assert left_out["same"] > 0 and sum(left_out.values()) + len(profile.seconds) == 70
    assert about["model"]["layers"] == 4 and about["versions"]["torch"] == str(torch.__version__)
    for command in (["fit", str(path)], ["show", str(path)]):
        assert program(command) == 0
    out = capsys.readouterr().out
    assert "cross-validated" in out and "model.layers 4" in out and "{" not in out

    run, out = tmp_path / "run", tmp_path / "out"
    settings = ["workload.duration_s=2", "peak_s=0", "limits.max_sequences=6", "job.sample_tokens=64"]
    assert bench([f"predictor={path}", f"hydra.run.dir={run}", *settings]) == 0
    assert fidelity([str(run), f"profile={path}", f"out={out}", "seeds=2"]) == 0
    plans = pd.read_parquet(out / "plans.parquet")
    assert plans["replayed"].tolist() == [1.0]
    assert {"measured", "predicted", "predicted_low"} <= set(pd.read_parquet(out / "metrics.parquet"))
    rows = pd.read_parquet(out / "iterations.parquet")
    assert (rows["predicted_s"] > 0).all() and (rows["measured_s"] > 0).all()


def test_a_profile_goes_on_where_it_stopped_and_refuses_another_engines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.parquet"
    assert collect(path, "points=12") == 0
    first = read_profile(path).columns
    assert collect(path, "points=20") == 0
    second = read_profile(path)
    assert second.collected is not None and second.collected["passed"] == 20
    kept = np.isin(second.columns["point"], first["point"])
    assert 0 < kept.sum() <= len(first["point"]) < len(kept)
    assert second.columns["point"].max() < 20 and (np.diff(second.columns["point"]) > 0).all()
    capsys.readouterr()
    before = path.read_bytes()
    for override, words in (
        ("job.sample_tokens=32", "was collected with job sample_tokens 64, this is sample_tokens 32;"),
        ("adapters=2", "was collected with adapters 4, this is 2"),
        ("limits.max_tokens=64", "was collected with limits max_tokens 128, this is max_tokens 64;"),
    ):
        assert collect(path, "points=30", override) == 2
        error = capsys.readouterr().err
        assert words in error and "restart=true begins anew" in error and error.count("\n") == 1
    assert path.read_bytes() == before
    for override, words in (
        ("model.tp=2", "model.tp must be 1, got 2"),
        ("model.dtype_bytes=8", "model.dtype_bytes must be 2 (bfloat16) or 4 (float32), got 8"),
        ("out=own.csv", "out must be a file that ends in .parquet, got 'own.csv'"),
        ("job.order=sideways", "job.order must be one of layer_major, window_major, got 'sideways'"),
        ("job.lora.rank=0", " job.lora.rank must be at least 1, got 0"),
        ("+job.more=1", " job has no key 'more'; did you mean 'order'?"),
        ("+run.more=1", " run.more changes nothing here: run is read by coserve bench alone"),
        (
            "+measure_s.more=1",
            " measure_s.more changes nothing here: measure_s is read by coserve bench alone",
        ),
        (
            "job.accumulation=2",
            " job.accumulation changes nothing here: job.accumulation is read by coserve bench",
        ),
        ("memory_utilization=0.5", " memory_utilization changes nothing here: limits.kv_tokens is "),
        ("job.lora.targets=[q]", " job.lora.targets must be among q_proj, "),
        ("+weights.more=1", " weights must be text, got {'more': 1}"),
        ("seconds=1e-9 restart=true", "seconds must allow a point, 1e-09 gave none"),
    ):
        assert collect(path, "points=30", *override.split()) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert path.read_bytes() == before
    assert program(["collect", "repeats=2"]) == 2
    assert "repeats must be from 3 to" in capsys.readouterr().err


def test_a_profile_keeps_the_room_that_it_began_with_where_memory_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`limits.kv_tokens: null`: other memory is free at the second call, and the rig is as large as at the first."""
    path, free, rooms = tmp_path / "own.parquet", iter((2048, 4096)), []

    def limits_of(model: Any, device: Any, given: Any, *more: Any) -> Any:
        if given.kv_tokens is None:
            given = replace(given, kv_tokens=next(free))
        return limits_and_plans(model, device, given, *more)

    def watched(model: Any, limits: Limits, *more: Any) -> Rig:
        rooms.append(limits.kv_tokens)
        return Rig(model, limits, *more)

    monkeypatch.setattr(profiles.collect, "limits_and_plans", limits_of)
    monkeypatch.setattr(profiles.collect, "Rig", watched)
    for points in (6, 9):
        assert collect(path, f"points={points}", "limits.kv_tokens=null") == 0
        found = read_profile(path).collected
        assert found is not None and (found["passed"], found["limits"]["kv_tokens"]) == (points, 2048)
    assert rooms == [2048, 2048]
    capsys.readouterr()
    assert collect(path, "points=12", "limits.kv_tokens=4096") == 2
    assert "was collected with limits kv_tokens 2048, this is kv_tokens 4096;" in capsys.readouterr().err


def test_a_profile_goes_on_after_a_commit_that_leaves_what_is_timed_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, manifest = tmp_path / "own.parquet", profiles.collect.make_manifest
    assert collect(path, "points=8") == 0
    later = lambda **about: {**manifest(**about), "commit": "0" * 40, "dirty": True}  # noqa: E731
    monkeypatch.setattr(profiles.collect, "make_manifest", later)
    assert collect(path, "points=12") == 0
    found = read_profile(path).collected
    assert found is not None and (found["passed"], found["commit"]) == (12, "0" * 40)
    capsys.readouterr()
    timed = sources(ROOT, [profiles.collect.TIMED])
    assert {"engine/kernels/paged_attention.py", "engine/engine.py", "sim/core/state.py"} <= set(timed)
    assert not {"engine/bench.py", "profiles/collect.py"} & set(timed)
    monkeypatch.setattr(profiles.collect, "TIMED", "engine/bench.py")
    assert collect(path, "points=14") == 2
    error = capsys.readouterr().err
    assert "before code that is timed was changed; restart=true begins anew, out=FILE keeps both" in error
    assert error.count("\n") == 1
    assert collect(path, "points=6", "restart=true") == 0
    found = read_profile(path).collected
    assert found is not None and found["passed"] == 6


def test_the_default_file_lies_among_the_tables_and_that_of_another_machine_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profiles.collect, "TABLES", tmp_path / "tables")
    monkeypatch.chdir(tmp_path)
    arguments = ["collect", "repeats=3", "points=6", *SMALL]
    assert program(arguments) == 0
    path = tmp_path / "tables" / "cpu-tiny.parquet"
    assert [found.name for found in tmp_path.rglob("*") if found.is_file()] == [path.name]
    shipped = read_profile(path)
    columns = {name: shipped.columns[name] for name in COLUMNS}
    assert shipped.provenance is not None and shipped.collected is not None
    capsys.readouterr()
    for collected, words in (
        (None, "was not collected with this program; out=FILE keeps it"),
        ({**shipped.collected, "hardware": "another"}, "with hardware another, this is"),
        ({**shipped.collected, "model": {**shipped.collected["model"], "layers": 5}}, "with model layers 5"),
    ):
        write_profile(path, columns, shipped.provenance, collected)
        before = path.read_bytes()
        for overrides in ([], ["restart=true"]):
            assert program([*arguments, *overrides]) == 2
            error = capsys.readouterr().err
            assert words in error and "out=FILE keeps" in error and error.count("\n") == 1, error
            assert "restart" not in error and path.read_bytes() == before


def test_a_profile_that_was_interrupted_is_sound_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disturbed points are timed again when they are seen, not at the end, which may never come."""
    path, calls = tmp_path / "own.parquet", itertools.count(1)
    undisturbed = Timing.row

    def row(timing: Timing, point: Point, index: int) -> dict[str, float] | None:
        call = next(calls)
        if call == 30:
            raise KeyboardInterrupt
        found = undisturbed(timing, point, index)
        assert found is not None
        slow = 100.0 if call % 2 else 1.0
        return {name: value * (slow if "seconds" in name else 1.0) for name, value in found.items()}

    monkeypatch.setattr(Timing, "row", row)
    assert collect(path, "points=60") != 0
    before = read_profile(path)
    assert before.collected is not None and 5 < before.collected["passed"] < 29, "some were timed again"
    monkeypatch.setattr(Timing, "row", undisturbed)
    assert collect(path, "points=30") == 0
    after = read_profile(path)
    assert after.collected is not None and after.collected["passed"] == 30


def test_a_point_that_breaks_off_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that cannot be launched for one shape: the call ends with the reason, the next goes on behind it."""
    path, timed = tmp_path / "own.parquet", Timing.row

    def row(timing: Timing, point: Point, index: int) -> dict[str, float] | None:
        if index == 7:
            raise RuntimeError("out of resource")
        return timed(timing, point, index)

    monkeypatch.setattr(Timing, "row", row)
    assert collect(path, "points=12") != 0
    assert "out of resource" in capsys.readouterr().err
    assert collect(path, "points=12") == 0
    found = read_profile(path)
    assert found.collected is not None and found.collected["passed"] == 12
    left_out = found.collected["left_out"]
    assert left_out["broken"] == 1 and sum(left_out.values()) + len(found.seconds) == 12
    assert "1 broken off" in capsys.readouterr().out
    assert 7 not in found.columns["point"] and found.columns["point"].max() > 7


def test_what_became_of_the_points_is_said_in_one_line() -> None:
    left_out = {"same": 6, "too_large": 1, "disturbed": 2, "broken": 0}
    whole = points_line({"passed": 60, "left_out": left_out}, 51, 60)
    assert whole == (
        "points: 60 of 60 of the design, 51 measured; left out 6 of the same work as another, "
        "1 too large for the memory, 2 in contradiction to others each time"
    )
    short = points_line({"passed": 40}, 37, 60)
    assert short == (
        "points: 40 of 60 of the design, 37 measured; left out 3 for reasons that the file does not say; "
        "the same command goes on"
    )
    assert points_line({"passed": 5, "left_out": {}}, 5, 3) == "points: 5 of 5 of the design, 5 measured"


def test_samples_need_not_fill_their_last_block() -> None:
    """A rig warms up a job with all that its blocks hold, here more than any request is long."""
    model = tiny_model("llama")
    limits = Limits(kv_tokens=512, block_tokens=16, max_sequences=4, max_tokens=32, max_sequence_tokens=32)
    job = TrainingJob(
        id="job",
        samples=(),
        max_sample_tokens=40,
        adapter=new_adapter(LoraSpec(rank=2), model.config.shape, model.compute, "cpu", 0),
        optimizer=OptimizerSettings(schedule="constant"),
    )
    assert Rig(model, limits, [job]).engine.trainers["job"].max_tokens == 48
