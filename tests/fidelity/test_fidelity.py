"""A run against its simulation: where the profile is right they agree, where it is wrong the part is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from profiles.against import METRICS, against, differences
from profiles.diagnosis import OTHERS, PARTS, Finding, diagnose
from profiles.fidelity import findings_of, main, report
from profiles.fidelity_figure import _label, draw
from profiles.schema import read_profile
from sim.cli import main as coserve
from sim.rerun import read_rerun, replay, same_plans, simulate
from sim.results import read_run
from tests.fidelity.conftest import Bench, truth


def test_a_right_profile_predicts_the_run_and_has_no_part_off(
    run_folder: Path, profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_folder), f"profile={profile_file}", f"out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert (
        "off by more than 1.2x: none is shown to be\n" in out and "under the recorded times: 100.00%" in out
    )
    metrics = pd.read_parquet(tmp_path / "metrics.parquet").set_index("metric")
    assert list(metrics.index) == list(METRICS)
    summary = read_run(run_folder).summary
    assert all(metrics.loc[name, "measured"] == summary[name] for name in METRICS)
    assert (metrics["predicted_low"] <= metrics["predicted"]).all()
    assert (metrics["predicted"] <= metrics["predicted_high"]).all()
    for name in ("tpot_p50_s", "finetune_tok_s", "inference_tok_s", "iteration_mean_s"):
        assert abs(metrics.loc[name, "error"]) < 0.05, name
    rows = pd.read_parquet(tmp_path / "iterations.parquet")
    error = rows["predicted_s"] / rows["measured_s"] - 1
    assert len(rows) == len(read_run(run_folder).table("iterations"))
    assert np.median(np.abs(error)) < 0.05
    parts = [name for names in PARTS.values() for name in names if name in rows]
    np.testing.assert_allclose(rows[parts].sum(axis=1), rows["predicted_s"])
    for name in ("metrics", "iterations", "parts", "plans"):
        assert len(pd.read_csv(tmp_path / f"{name}.csv")) == len(
            pd.read_parquet(tmp_path / f"{name}.parquet")
        )
    assert (tmp_path / "fidelity.png").stat().st_size > 10_000


@pytest.mark.parametrize("part", ["backward", "forward pass", "decode attention", "prefill attention"])
def test_a_part_of_the_profile_that_is_wrong_by_two_is_found_and_named(
    part: str, run_folder: Path, doubled: Callable[[tuple[str, ...]], Path]
) -> None:
    wrong = read_profile(doubled(tuple(name for name in PARTS[part] if name != "collective")))
    found = [against(read_rerun(read_run(run_folder)), wrong, "run", seeds=1)]
    findings = findings_of(found)
    text = report(found, findings, wrong, 1)
    assert [finding.part for finding in findings if finding.off] == [part], text
    named = next(finding for finding in findings if finding.off)
    assert named.low <= named.factor <= named.high and named.factor == pytest.approx(0.5, abs=0.08)
    assert text.endswith(f"off by more than 1.2x: {part}")


def test_errors_of_shares_are_points_and_what_differs_is_said_in_words(
    run_folder: Path, profile_file: Path
) -> None:
    profile, rerun = read_profile(profile_file), read_rerun(read_run(run_folder))
    one = against(rerun, profile, "run", seeds=1)
    halved = tuple(
        m._replace(measured=0.9, predicted=0.5) if m.metric == "attainment" else m for m in one.metrics
    )
    text = report([replace(one, metrics=halved)], [], profile, 1)
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("attainment")]
    assert line.endswith("-40.0 pt")
    job = rerun.run.config["job"]
    wide = {"memory": job["memory"], "lora": {**job["lora"], "rank": 4096}}
    limits, versions = {"block_tokens": rerun.limits.block_tokens}, rerun.run.manifest["versions"]
    about = {"job": wide, "limits": limits, "versions": versions, "commit": rerun.run.manifest["commit"]}
    told = differences(rerun, replace(profile, collected=about))
    assert len(told) == 1
    (line,) = [line for line in told if line.startswith("LoRA")]
    assert "rank 4096" in line and "{" not in line and "alpha" not in line and str(run_folder) not in line


def test_what_no_run_has_is_an_empty_line_of_the_picture(
    run_folder: Path, profile_file: Path, tmp_path: Path
) -> None:
    """Nothing was finetuned: there is no ratio to draw."""
    one = against(read_rerun(read_run(run_folder)), read_profile(profile_file), "run", seeds=1)
    none = tuple(m._replace(measured=0.0) if m.metric == "finetune_tok_s" else m for m in one.metrics)
    path = draw(tmp_path / "none.png", [replace(one, metrics=none)], findings_of([one]))
    assert path.stat().st_size > 0


def test_host_time_that_is_off_is_said_to_be_the_machines_load() -> None:
    """It differs between two hours of a shared machine as much as between a right profile and a wrong one."""
    host = Finding("host", 0.2, True, 1.5, 1.4, 1.6)
    assert host.line().endswith("<- off, as where other work keeps the processor busy")
    assert host._replace(part="backward").line().endswith("<- off")
    assert "busy" not in host._replace(low=1.1).line()


def test_a_part_that_is_not_shown_to_be_off_is_not_called_right() -> None:
    part = Finding("backward", 0.2, False, 1.05, 0.95, 1.15)
    assert part.line() == "backward: within 1.2x (a factor of its own would be 1.05, 0.95-1.15)"
    for low, high in ((0.95, 1.25), (0.8, 1.1)):
        line = part._replace(low=low, high=high).line()
        assert line.startswith("backward: the runs do not say whether it is off by more than 1.2x (a factor")
    far = part._replace(factor=1.4, low=1.3, high=1.6)
    own = "a factor of its own would be 1.40 (1.30-1.60), and explain the runs hardly better"
    assert far.line() == f"backward: not shown to be off; {own}"
    assert far._replace(common=True).line() == f"backward: as all other parts; {own}"


def test_metrics_of_the_picture_are_named_as_elsewhere() -> None:
    names = [_label(metric) for metric in METRICS]
    assert names[:4] == ["TTFT p50", "TTFT p90", "TTFT p99", "TPOT p50"]
    assert names[9:] == [
        "attainment", "goodput req/s", "inference tok/s", "finetune tok/s", "iterations", "iteration mean",
    ]  # fmt: skip


def test_factors_of_many_rows_are_those_of_all() -> None:
    """Two parts that are wrong at once, under noise and hiccups; and a machine that is slower all over."""
    random = np.random.default_rng(3)
    parts = {name: random.lognormal(size=20_000) for name in ("backward", "forward pass", "decode attention")}
    noise = np.exp(0.05 * random.standard_normal(20_000)) * np.where(random.random(20_000) < 0.02, 5, 1)
    wrong = (0.5 * parts["backward"] + 2 * parts["forward pass"] + parts["decode attention"]) * noise
    found = {finding.part: finding for finding in diagnose(parts, wrong)}
    assert found["backward"].factor == pytest.approx(0.5, abs=0.02) and found["backward"].off
    assert found["forward pass"].factor == pytest.approx(2, abs=0.04) and found["forward pass"].off
    assert not found["decode attention"].freed
    slow = diagnose(parts, 1.5 * noise * sum(parts.values()))
    assert [finding.part for finding in slow if finding.off] == [OTHERS]
    assert slow[0].factor == pytest.approx(1.5, abs=0.02)
    assert all(": as all other parts; a factor of its own would be" in finding.line() for finding in slow[1:])
    assert not any(finding.freed for finding in diagnose(parts, noise * sum(parts.values())))


@pytest.mark.parametrize(
    ("policy", "lookahead"), [("coserving_slack", 1), ("temporal_dynamic", 0), ("finetune_only", 0)]
)
def test_a_run_can_be_replayed_and_simulated_from_its_folder(
    policy: str, lookahead: int, bench: Bench, tmp_path: Path
) -> None:
    """After a warm-up, that is with the job in the midst of a sample."""
    settings = (
        f"policy={policy}",
        f"limits.lookahead={lookahead}",
        "run.warm_up_s=1",
        "workload.duration_s=3",
    )
    folder = bench.run(tmp_path / "run", *settings, spread=0.0)
    rerun = read_rerun(read_run(folder))
    table = rerun.run.table("iterations")
    rows = {name: table[name].to_numpy() for name in table if name != "source"}
    assert len(table) > 30
    assert same_plans(rows, replay(rerun)).all()
    again = simulate(rerun, truth())
    assert same_plans(rows, again).all() and len(again.iterations) == len(table)
    assert main([str(folder), f"profile={bench.profile_file}", f"out={tmp_path / 'out'}", "seeds=1"]) == 0
    late = {**rows, "decode_count": rows["decode_count"] + (rows["iteration"] == 7)}
    assert np.flatnonzero(~same_plans(late, again)).tolist() == [7]


def test_mistakes_are_told_in_one_line(
    run_folder: Path, profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert coserve(["fidelity", *arguments]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1, error
        return error[0]

    profile = f"profile={profile_file}"
    assert "needs folders of engine runs and profile=FILE" in refused(profile)
    assert "does not exist" in refused(str(tmp_path / "nowhere"), profile)
    assert "no run there" in refused(str(profile_file.parent), profile)
    assert "profile: no profile named 'absent'" in refused(str(run_folder), "profile=absent")
    assert "no setting named 'seed'; did you mean 'seeds'?" in refused(str(run_folder), profile, "seed=3")

    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("  name: tiny\n", "  name: large\n"))
    assert "measured for tiny on 1 x cpu; asked for large" in refused(str(copy), profile)
    for change, told in (
        ({"policy": "temporal"}, "policy must be a group of keys, got 'temporal'"),
        ({"job": {"lora": {"rank": 0}}}, "job.lora.rank must be at least 1, got 0"),
        ({"run": {"drain_s": "x"}}, "run.drain_s must be a number, got 'x'"),
        ({"run": {}}, "run.drain_s is not there"),
    ):
        (copy / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(config) | change))
        assert f"copy/config.yaml: {told}" in refused(str(copy), profile)
    (copy / "config.yaml").write_text(config)
    plain = json.loads((copy / "rerun.json").read_text())
    job, curves = plain["jobs"][0], plain["predictor"]["curves"]
    for change, told in (
        ({"jobs": None}, "jobs must be a list"),
        (
            {"jobs": [job | {"view": job["view"] | {"layers": "4"}}]},
            "jobs[0].view.layers must be a whole number",
        ),
        ({"jobs": [job | {"progress": {"steps": 0.5}}]}, "jobs[0].progress.steps must be a whole number"),
        ({"predictor": {}}, "is damaged, or not as this version of coserve bench writes it: no 'curves'"),
        (
            {"predictor": {"lookahead": 0, "curves": curves | {"decode": ["x"]}}},
            "curves.decode[0] must be a number",
        ),
        ({"predictor": {"lookahead": 0, "curves": curves | {"decode": [0] * 9}}}, "is damaged, or not"),
        ({"limits": {**plain["limits"], "max_tokens": "many"}}, "limits.max_tokens must be a whole number"),
    ):
        (copy / "rerun.json").write_text(json.dumps(plain | change))
        line = refused(str(copy), profile)
        assert "copy/rerun.json" in line and told in line
    (copy / "rerun.json").write_text("{}")
    assert "rerun.json has no limits" in refused(str(copy), profile)
    (copy / "rerun.json").unlink()
    assert "rerun.json is missing" in refused(str(copy), profile)
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps({**summary, "source": "sim"}))
    assert "no run of the engine" in refused(str(copy), profile)
    assert coserve(["fidelity", str(run_folder), profile, "seeds=1", f"out={profile_file}/x"]) == 2
    told = f"error: out: {profile_file}/x cannot be written: Not a directory\n"
    assert capsys.readouterr().err.endswith(told)
    assert coserve(["fidelity", "--help"]) == 0
    assert "measured and predicted side by side" in capsys.readouterr().out
