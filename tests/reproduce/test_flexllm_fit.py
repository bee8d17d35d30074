"""The published engine's profile: its constants come out of the data, and it says what was measured."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from profiles import flexllm_fit, vllm_eager_fit
from profiles.flexllm_fit import (
    CONTEXTS,
    FREE,
    Measured,
    corrected,
    fit,
    least_squares,
    modelled_s,
    read_all,
    read_steps,
)
from sim.core.work import Chunk, LayerChunk, Work
from sim.cost.flexllm import LaunchBound

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("COSERVE_DATA", ROOT.parent / "shared" / "data")) / "flexllm"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="published measurements are not here")


def _pairs(rows: list[Measured]) -> list[tuple[float, Measured]]:
    """The shipped profile's seconds beside each row."""
    return list(zip(modelled_s(LaunchBound(), rows), rows, strict=True))


@pytest.fixture
def small_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few samples stand for all, so that a fit takes a second."""
    monkeypatch.setattr(flexllm_fit, "sample_lengths", lambda count=6: [900, 2000, 3100, 4800, 7000])


@needs_data
def test_shipped_constants_reproduce_the_step_profile() -> None:
    steps = read_steps(DATA / flexllm_fit.STEPS)
    errors = [abs(s / row.seconds - 1) for s, row in _pairs(steps)]
    assert len(steps) > 20
    assert np.median(errors) < 0.05
    backward = [e for e, row in zip(errors, steps, strict=True) if row.work.backward]
    assert len(backward) == 7
    assert max(backward) < 0.09


@needs_data
def test_means_under_load_are_met() -> None:
    loads = [row for row in read_all(DATA) if row.kind == "tpot_mean"]
    errors = [abs(s / row.seconds - 1) for s, row in _pairs(loads)]
    assert len(loads) == 10
    # The fixed point does not know bursts; simulated runs are nearer (test_reproduce).
    assert max(errors) < 0.10


@needs_data
def test_a_model_left_out_is_predicted(small_fit: None) -> None:
    rows = read_all(DATA)
    left = [row for row in rows if row.model == "14B" and row.kind == "tpot_mean"]
    kept = fit([row for row in rows if row.model != "14B"])
    errors = [s / row.seconds - 1 for s, row in zip(modelled_s(kept, left), left, strict=True)]
    assert np.mean(np.abs(errors)) < 0.15


@needs_data
def test_shipped_constants_are_what_the_fit_finds() -> None:
    """One more round from them leads back to them, but for what a 99th percentile differs between rounds."""
    rows = corrected(read_all(DATA), LaunchBound())
    found = fit(rows)
    for name in FREE:
        assert getattr(found, name) == pytest.approx(getattr(LaunchBound(), name), rel=0.25), name
    assert found.window_bandwidth == LaunchBound().window_bandwidth


def test_a_folder_without_the_measurements_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flexllm_fit.main(["--data", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m profiles.flexllm_fit: error: ") and flexllm_fit.STEPS in line


def test_the_fit_finds_the_constants_that_made_its_rows() -> None:
    truth = LaunchBound(host_s=4e-3, launch_s=0.5e-3, backward_layer_s=3e-3)
    works = [
        Work(decode_count=8, decode_context_tokens=512, sampled_tokens=8),
        Work(forward=(Chunk(8, 0),)),
        Work(decode_count=8, sampled_tokens=8, backward=(LayerChunk(1, 64, 0),), overlap=True),
        Work(decode_count=8, sampled_tokens=8, backward=(LayerChunk(40, 64, 0),), overlap=True),
    ]
    rows = []
    for model in ("8B", "70B"):
        cost = truth.build(CONTEXTS[model])
        rows += [
            Measured(
                model=model, kind="step", label="", seconds=cost.iteration_s(work), work=work, sigma=1e-4
            )
            for work in works
        ]
    found = fit(rows, LaunchBound(), ("host_s", "launch_s", "backward_layer_s"))
    assert found.host_s == pytest.approx(truth.host_s, rel=0.01)
    assert found.launch_s == pytest.approx(truth.launch_s, rel=0.01)
    assert found.backward_layer_s == pytest.approx(truth.backward_layer_s, rel=0.01)
    assert set(FREE) <= set(LaunchBound.__slots__)


def test_least_squares_finds_the_minimum_of_a_bent_valley() -> None:
    found = least_squares(lambda x: np.array([1 - x[0], 10 * (x[1] - x[0] ** 2)]), np.array([-1.0, 1.0]), 200)
    assert found == pytest.approx([1, 1], abs=1e-2)


@pytest.mark.parametrize("rate_rps", [4, 8])
def test_the_serving_baseline_keeps_the_published_pace(rate_rps: int) -> None:
    simulated_ms = vllm_eager_fit.tpot_ms(rate_rps, vllm_eager_fit.shipped())
    assert simulated_ms == pytest.approx(vllm_eager_fit.PUBLISHED_MS[rate_rps], rel=0.05)


def test_each_layer_of_a_backward_adds_the_same_beside_a_decode() -> None:
    cost = LaunchBound().build(CONTEXTS["70B"])

    def seconds(layers: int) -> float:
        back = (LayerChunk(layers, 1024, 0),)
        return cost.iteration_s(Work(decode_count=8, sampled_tokens=8, backward=back, overlap=True))

    assert seconds(64) - seconds(32) == pytest.approx(32 * (seconds(2) - seconds(1)), rel=1e-6)


def test_two_devices_of_a_board_reduce_more_slowly_than_four() -> None:
    part = {}
    for tp in (2, 4):
        context = replace(CONTEXTS["14B"], tp=tp)
        part[tp] = LaunchBound().build(context).parts(Work(decode_count=8, sampled_tokens=8))["collective"]
    # 2 (tp - 1) / tp bytes over (tp - 1) thirds of the links.
    assert part[2] == pytest.approx(2 * part[4])


@pytest.mark.parametrize(
    ("name", "value"),
    [("pass_flops", 0.0), ("pass_flops", 1.2), ("host_s", -1.0), ("overlap_contention", 1.5)],
)
def test_impossible_constants_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        LaunchBound(**{name: value})
