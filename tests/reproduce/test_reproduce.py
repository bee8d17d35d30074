"""The reproduction: complete, near what was published, and drawn as it was."""

from __future__ import annotations

import csv
import math
import os
import re
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest

from analysis import reproduce
from analysis.figures.paper_grid import POLICIES, grid_figure
from analysis.paper import (
    DEVICES,
    FINETUNE_TOK_S,
    MODELS,
    PREDICTION_COLUMNS,
    RATES_RPS,
    SERVING,
    SHARING,
    UNITS,
    Case,
    Key,
    cases,
    error,
    predictions,
    read_published,
    run_case,
)
from analysis.paper_page import claims, page, verdict
from analysis.reproduce import main, write
from sim.assemble import CONFIGS, assemble
from sim.simulate import run_assembly
from sim.workload.lengths import Lognormal
from sim.workload.strata import Strata

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = (
    Path(os.environ.get("COSERVE_DATA", ROOT.parent / "shared" / "data")) / "flexllm" / "published.csv"
)
needs_data = pytest.mark.skipif(not PUBLISHED.is_file(), reason="published measurements are not here")
SYSTEMS = ("flexllm", *SERVING, *SHARING)


def fake_row(case: Case) -> dict[str, Any]:
    """Numbers that can be told apart, instead of a simulation."""
    row: dict[str, Any] = {metric: 50.0 + case.rate_rps + i for i, metric in enumerate(UNITS)}
    row |= {"ttft_p99_s": 1.0, "attainment": 99.0, "iteration_mean_s": 0.03}
    if case.timeline:
        names = ("time_s", "arrivals_rps", "inference_tok_s", "finetune_fwd_tok_s")
        row["timeline"] = {name: [0.0, 5.0] for name in names}
    return row


def find(system: str, model: str, rate_rps: int) -> Case:
    wanted = (system, model, rate_rps)
    return next(
        c for c in cases((0,)) if (c.system, c.model, c.rate_rps) == wanted and c.figure != "case_study"
    )


def test_predictions_have_every_system_model_and_rate_of_both_figures(tmp_path: Path) -> None:
    todo = cases((0,))
    write(tmp_path, todo, [fake_row(case) for case in todo], {})
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == PREDICTION_COLUMNS
    assert {row["how_obtained"] for row in rows} == {"simulated"}
    names = ("figure", "system", "model", "cluster_rate_rps", "metric")
    found = {tuple(row[name] for name in names) for row in rows}
    figures = {"end-to-end": ("flexllm", *SERVING), "sharing": ("flexllm", *SHARING)}
    wanted = {
        (figure, system, model, str(rate), metric)
        for figure, systems in figures.items()
        for system in systems
        for model in MODELS
        for rate in RATES_RPS
        for metric in UNITS
    }
    assert found == wanted
    assert len(rows) == len(wanted)
    for name in ("end_to_end.png", "sharing.png", "case_study.png", "claims.md", "fair.csv", "errors.csv"):
        assert (tmp_path / name).stat().st_size > 0


@needs_data
def test_every_published_point_has_a_prediction_of_the_same_unit() -> None:
    todo = cases((0,))
    predicted = predictions(todo, [fake_row(case) for case in todo])
    with PUBLISHED.open(newline="") as file:
        units = {row["metric"]: row["unit"] for row in csv.DictReader(file)}
    assert units == {metric: UNITS[metric] for metric in units}
    assert set(read_published(PUBLISHED)) <= set(predicted)


def test_figures_contain_the_simulated_and_the_published_points() -> None:
    todo = cases((0,))
    predicted = predictions(todo, [fake_row(case) for case in todo])
    key = Key("sharing", "temporal-64", "14B", 12, "finetune_tok_s")
    axes = grid_figure("sharing", ("flexllm", *SHARING), predicted, {key: 77.0}).axes
    assert len(axes) == 9
    markers = [line for panel in axes for line in panel.lines if line.get_label() == "_published"]
    hollow = [line for line in markers if len(line.get_xdata())]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in hollow] == [([12], [77.0])]
    assert hollow[0] in axes[4].lines
    shown = {line.get_label(): list(line.get_ydata()) for line in axes[4].lines}
    wanted = [predicted[key._replace(rate_rps=rate)] for rate in RATES_RPS]
    assert shown["temporal_64"] == wanted
    with pytest.raises(ValueError, match="without a prediction"):
        grid_figure("sharing", ("flexllm",), {}, {key: 77.0})
    assert set(POLICIES) == set(SYSTEMS)


@needs_data
@pytest.mark.parametrize(("model", "rate_rps"), [("8B", 4), ("8B", 20), ("14B", 12)])
def test_the_published_engine_is_met(model: str, rate_rps: int) -> None:
    row, published = run_case(find("flexllm", model, rate_rps)), read_published(PUBLISHED)
    bounds = {"finetune_tok_s": 8.0, "tpot_mean": 3.0, "tpot_p99": 10.0, "slo_attainment": 3.0}
    for metric, bound in bounds.items():
        key = Key("end-to-end", "flexllm", model, rate_rps, metric)
        assert abs(error(key, row[metric], published[key])) < bound, metric


@needs_data
@pytest.mark.parametrize("rate_rps", [4, 20])
def test_temporal_sharing_that_no_fit_has_seen_is_met(rate_rps: int) -> None:
    row, published = run_case(find("temporal-128", "8B", rate_rps)), read_published(PUBLISHED)
    key = Key("sharing", "temporal-128", "8B", rate_rps, "finetune_tok_s")
    assert abs(error(key, row["finetune_tok_s"], published[key])) < 13


@pytest.mark.parametrize(("system", "last_rps"), [("separate-25vllm", 8), ("separate-50vllm", 16)])
def test_separate_splits_of_8b_saturate_after_the_right_rate(system: str, last_rps: int) -> None:
    assert run_case(find(system, "8B", last_rps))["slo_attainment"] > 99
    assert run_case(find(system, "8B", last_rps + 4))["slo_attainment"] < 95


def test_static_policy_gives_its_closed_form() -> None:
    """L / ((ceil(L / (256 - c)) + layers) t) of FLEXLLM, with the run's own t and c."""
    case = find("flexllm", "8B", 8)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        assembly = assemble(hydra.compose("config", [*case.overrides, "workload.duration_s=300"]))
    rows = run_assembly(assembly).iterations.arrays()
    inside = rows["end_s"] <= 300
    mean_s = float((rows["end_s"] - rows["start_s"])[inside].mean())
    c = float((rows["decode_count"] + rows["prefill_tokens"])[inside].mean())
    length = 3650
    closed = length / ((math.ceil(length / (256 - c)) + 32) * mean_s)
    assert rows["forward_tokens"][inside].sum() / 300 == pytest.approx(closed, rel=0.05)


def test_separate_finetuning_is_the_published_rate_of_the_other_pipelines() -> None:
    row = run_case(find("separate-75vllm", "32B", 4))
    assert row["finetune_tok_s"] == FINETUNE_TOK_S["32B"]
    assert DEVICES == {"8B": 1, "14B": 2, "32B": 4}


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_begins_with_its_command_and_can_be_built(path: Path) -> None:
    first, command = path.read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert command.startswith("# coserve ")
    assert f"experiment={path.stem}" in command
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        assert assemble(hydra.compose("config", [f"experiment={path.stem}"])).pipelines


def test_strata_have_the_mean_and_the_spread_of_their_law() -> None:
    law = Lognormal(quantiles={"p50": 3100}, mean_tokens=3650, max_tokens=8192, min_tokens=128)
    drawn = Strata(of=law).draw(64, np.random.default_rng(0))
    many = law.draw(200_000, np.random.default_rng(1))
    assert drawn.mean() == pytest.approx(3650, rel=0.01)
    assert drawn.std() == pytest.approx(many.std(), rel=0.03)
    assert list(drawn) != sorted(drawn)


def test_a_damaged_row_of_published_numbers_is_named(tmp_path: Path) -> None:
    path = tmp_path / "published.csv"
    path.write_text(",".join(PREDICTION_COLUMNS) + "\nsharing,flexllm,8B,four,tpot_mean,1,ms,\n")
    with pytest.raises(ValueError, match="row 2"):
        read_published(path)


def test_the_command_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--workers", "0"])
    assert "at least 1" in capsys.readouterr().err


def test_a_claim_whose_slo_is_missed_is_words_not_a_number() -> None:
    todo = cases((0,))
    predicted = predictions(todo, [fake_row(case) for case in todo])
    good = {"slo_attainment": 100.0, "finetune_tok_s": 1000.0, "tpot_mean": 40.0}
    fair = {(c.system, c.model, c.rate_rps): dict(good) for c in todo if c.figure == "fair"}
    fair["finetune_only", "8B", 4]["tpot_mean"] = math.nan
    for policy in ("coserving", "coserving_slack"):
        fair[policy, "14B", 20]["slo_attainment"] = 75.0
    fair["temporal_limited", "32B", 20]["slo_attainment"] = 75.0
    found = claims(predicted, fair)
    text = page(found, predicted, {}, fair)
    assert "co-serving misses the SLO (separate_75 keeps it)" in text
    assert "time slicing misses the SLO |" in text
    assert "1.00x (separate_75)" in text and "| SLO missed | SLO missed |" in text
    assert "nan" not in text and " 0.00x" not in text and "| 0 %" not in text
    assert "; on a good engine 1.00x, co-serving misses the SLO, 1.00x" in verdict(found)


def test_the_verdict_is_printed_with_a_line_for_each_claim_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "run_all", lambda todo, workers: [fake_row(case) for case in todo])
    assert main(["--out", str(tmp_path)]) == 0
    head, *lines, predicted, written = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", head) == ["claim", "paper", "simulator (8B, 14B, 32B)"]
    assert predicted.startswith("predictions: ") and written == f"page:        {tmp_path / 'claims.md'}"
    sections = (tmp_path / "claims.md").read_text().split("## ")[1 : 1 + len(lines)]
    assert len(lines) == 5 and sections[-1].startswith("Up to 80 % less memory")
    for line, section in zip(lines, sections, strict=True):
        _, paper, simulator = re.split(r"  +", line)
        assert paper in ("by all", "over 76 %", "up to 80 %") or paper in section
        numbers = re.findall(r"[\d.]+(?:x| %)", simulator)
        said = section.replace("%)", " %)")
        assert len(numbers) >= 3 and all(re.search(rf"[ (]{number}[ )]", said) for number in numbers)
