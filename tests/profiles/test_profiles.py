"""Whole-iteration profiles: what goes in comes out, what was not measured is derived, what is checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from profiles.fit import cross_validated, fit, regimes
from profiles.program import main
from profiles.schema import COLUMNS, Profile, Provenance, read_profile, write_profile
from profiles.table_file import TableFile
from sim.core.rows import WORK_COLUMNS
from sim.core.work import Chunk, LayerChunk, Work
from sim.cost.context import CostContext
from sim.cost.flat import row_seconds
from sim.cost.iteration import IterationCost

DECODE = Work(decode_count=48, decode_context_tokens=48 * 900, sampled_tokens=48)


def test_a_profile_is_read_as_it_was_written(
    profile_file: Path, columns: dict[str, np.ndarray], provenance: Provenance
) -> None:
    profile = read_profile(profile_file)
    assert profile.provenance == provenance
    for name in COLUMNS:
        np.testing.assert_array_equal(profile.columns[name], columns[name])


def test_a_fit_predicts_works_that_it_did_not_see(
    profile_file: Path, context: CostContext, truth: IterationCost
) -> None:
    model = TableFile(path=str(profile_file)).build(context)
    for tokens in (64, 300, 1500):
        work = DECODE._replace(prefill=(Chunk(tokens, 0),))
        assert model.iteration_s(work) == pytest.approx(truth.iteration_s(work), rel=0.12)
    least, most = model.region["decode_count"]
    assert least <= DECODE.decode_count <= most < 5000


def test_rows_by_curves_are_iterations(profile_file: Path, context: CostContext) -> None:
    """The flat form of a work costs what the work itself costs, where it has one chunk at most."""
    profile = read_profile(profile_file)
    model = TableFile(path=str(profile_file)).build(context)
    work = {name: profile.columns[name] for name in WORK_COLUMNS}
    flat = {name: np.array([0.0]) for name in WORK_COLUMNS}
    flat |= {"decode_count": np.array([48.0]), "decode_context_tokens": np.array([48 * 900.0])}
    flat |= {"sampled_tokens": np.array([48.0])}
    assert row_seconds(model.curves, flat)[0] == pytest.approx(model.iteration_s(DECODE))
    assert np.median(np.abs(row_seconds(model.curves, work) / profile.seconds - 1)) < 0.04


def test_cross_validation_names_each_regime_and_its_rows(profile_file: Path) -> None:
    profile = read_profile(profile_file)
    lines = cross_validated(profile)
    assert lines[0].regime == "all" and lines[0].rows == len(profile.seconds)
    assert sum(line.rows for line in lines[1:]) == lines[0].rows
    assert lines[0].median < 0.06
    for line in lines:
        assert line.median <= line.p90 <= line.worst
        assert line.regime in ("all", regimes(profile.columns)[line.worst_row - 1])


def served_only(profile: Profile) -> Profile:
    """The rows of an engine that only serves."""
    c = profile.columns
    keep = (c["forward_tokens"] + c["backward_layer_tokens"] + c["optimizer_params"]) == 0
    return replace(profile, columns={name: values[keep] for name, values in c.items()})


def test_backward_windows_and_optimizer_are_derived_when_they_were_not_measured(
    profile_file: Path, context: CostContext, truth: IterationCost
) -> None:
    served = served_only(read_profile(profile_file))
    done = fit(served, context)
    assert {"backward", "windows", "optimizer", "recompute"} <= set(done.derived)
    assert done.factor == pytest.approx(1, abs=0.1)
    model = done.table.model()
    for work in (
        DECODE._replace(backward=(LayerChunk(4, 1024, 0),)),
        DECODE._replace(forward=(Chunk(512, 0),)),
        DECODE._replace(optimizer_params=context.lora.params(context.model)),
    ):
        ours = model.iteration_s(work) - model.iteration_s(DECODE)
        theirs = truth.iteration_s(work) - truth.iteration_s(DECODE)
        assert ours == pytest.approx(theirs, rel=0.2)
    assert fit(served).derived == ()


def test_a_slower_engine_has_a_slower_derived_backward(profile_file: Path, context: CostContext) -> None:
    served = served_only(read_profile(profile_file))
    twice = {n: 2 * v if n.startswith("seconds") else v for n, v in served.columns.items()}
    fast, slow = fit(served, context), fit(replace(served, columns=twice), context)
    assert slow.factor == pytest.approx(2 * fast.factor, rel=0.01)
    layer = slow.table.curves.backward_layer_s[2048] / fast.table.curves.backward_layer_s[2048]
    assert layer == pytest.approx(2, rel=0.01)


def test_measured_backward_rows_replace_the_derived_ones(profile_file: Path, context: CostContext) -> None:
    profile = read_profile(profile_file)
    slow = {name: values.copy() for name, values in profile.columns.items()}
    own = slow["backward_layer_tokens"] > 0
    for name in ("seconds_p20", "seconds_p50", "seconds_p80"):
        slow[name][own] += 1e-6 * slow["backward_layer_tokens"][own]
    done = fit(replace(profile, columns=slow), context)
    assert "backward" not in done.derived
    before = fit(profile, context).table.curves.backward_layer_s[1000]
    assert done.table.curves.backward_layer_s[1000] - before == pytest.approx(1e-3, rel=0.2)


def test_a_predictor_that_saw_fewer_rows_is_not_the_world(profile_file: Path, context: CostContext) -> None:
    world = TableFile(path=str(profile_file)).build(context)
    predictor = TableFile(path=str(profile_file), share=0.4, seed=1).build(context)
    assert predictor.iteration_s(DECODE) != world.iteration_s(DECODE)
    assert predictor.iteration_s(DECODE) == pytest.approx(world.iteration_s(DECODE), rel=0.2)
    with pytest.raises(ValueError, match="share must be in"):
        TableFile(share=0.0)


def test_a_missing_table_says_which_exist_and_how_to_get_one(context: CostContext) -> None:
    with pytest.raises(ValueError, match=r"a100_80gb-llama_3_1_8b.*shipped.*collect.*cost=roofline"):
        TableFile().build(context)


def test_programs_print_tables_and_bounds_decide_the_exit_code(
    profile_file: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(profile_file)]) == 0
    assert "5-fold cross-validated" in capsys.readouterr().out
    target = ["device=a100_80gb", "model=llama_3_1_8b"]
    assert main(["check", str(profile_file), *target, "bound_median=8", "bound_p90=35"]) == 0
    gemm = str(next((data / "kernels").glob("a100_sxm_gemm*")))
    assert main(["check", gemm, *target, "bound_median=8", "bound_p90=20"]) == 0
    out = capsys.readouterr().out
    assert "of llama_3_1_8b" in out and "measured" in out and "row " in out
    assert main(["check", gemm, *target, "--bound-median=0.001", "--bound-p90=1"]) == 1
    assert "gemm: p90" in capsys.readouterr().err
    for arguments in (["show"], ["show", str(profile_file)], ["show", gemm]):
        assert main(arguments) == 0
    assert "Apache-2.0" in capsys.readouterr().out


def test_a_predicted_profile_has_no_error(
    tmp_path: Path, context: CostContext, columns: dict[str, np.ndarray], provenance: Provenance
) -> None:
    """`check` of rows that the roofline itself timed: what is left is the flat form of many chunks."""
    from profiles.check import check_file
    from sim.cost.roofline import Roofline

    curves = Roofline().curves(context)
    seconds = row_seconds(curves, {name: columns[name] for name in WORK_COLUMNS})
    times = dict.fromkeys(("seconds_p20", "seconds_p50", "seconds_p80"), seconds)
    path = tmp_path / "exact.parquet"
    write_profile(path, {**columns, **times}, provenance)
    lines = check_file(path, context.device, context.model, 1)
    assert max(line.worst for line in lines) < 1e-9
