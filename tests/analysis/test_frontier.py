"""The frontier shows each policy's best router where the SLO is kept at every seed, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from analysis.figures.frontier import frontier, frontier_figure, peak_tok_s
from analysis.frontier_table import frontier_table, router_letters
from sim.cli import main
from sim.frontier import _show


def row(
    policy: str, rate: float, router: str, attainment: float, trained: float, seed: int = 0
) -> dict[str, Any]:
    return {
        "policy": policy,
        "rate_rps": rate,
        "router": router,
        "seed": seed,
        "attainment": attainment,
        "goodput_rps": rate * attainment,
        "finetune_tok_s": trained,
        "peak_finetune_tok_s": 100.0,
        "requests": 9,
        "unfinished": 0,
        "workload": "w",
        "model": "m",
        "device": "d",
    }


ROWS = [
    row("a", 1.0, "near", 1.0, 50.0),
    row("a", 1.0, "far", 1.0, 60.0),
    row("a", 2.0, "near", 1.0, 40.0),
    row("a", 2.0, "far", 0.5, 90.0),
    row("a", 3.0, "near", 0.5, 30.0),
    row("b", 1.0, "near", 1.0, 10.0, seed=0),
    row("b", 1.0, "near", 0.9, 30.0, seed=1),
    row("inference_only", 1.0, "near", 1.0, 0.0),
]


def test_each_policy_has_its_best_router_at_the_rates_where_it_keeps_the_slo() -> None:
    lines = frontier(ROWS)
    assert [(p.rate_rps, p.finetune_tok_s, p.router) for p in lines["a"]] == [
        (1.0, 60.0, "far"),
        (2.0, 40.0, "near"),
    ]
    assert "b" not in lines  # it misses the SLO at one of its seeds
    assert peak_tok_s(ROWS) == 100.0


def test_a_router_counts_where_its_numbers_are_known() -> None:
    for key in ("finetune_tok_s", "goodput_rps"):
        missing = [row("a", 1.0, "far", 1.0, 60.0) | {key: None}, *ROWS[:1], ROWS[6] | {key: None}]
        assert frontier(missing) == {"a": [(1.0, 1.0, 50.0, "near")]}
        frontier_figure(missing).canvas.draw()


def test_the_peak_is_told_where_finetuning_alone_does_the_same_in_all_runs() -> None:
    other = row("a", 1.0, "near", 1.0, 50.0) | {"config": {"pipelines": 2}, "peak_finetune_tok_s": 200.0}
    assert peak_tok_s([*ROWS, other]) is None
    # The seeds have a peak each, and what they trained is a mean.
    assert peak_tok_s([*ROWS, other | {"seed": 2}]) == pytest.approx((100 + 100 + 200) / 3)
    assert "finetuning alone" not in frontier_table([*ROWS, other])


def test_a_table_without_a_policy_that_keeps_the_slo_says_so() -> None:
    missed = [{**one, "attainment": 0.5} for one in ROWS]
    title, line = frontier_table(missed).split("\n")
    assert title == "w, m, d" and line.startswith(
        "no policy keeps the SLO (95 % of arrived requests meet it)"
    )
    assert "policy   " in frontier_table(ROWS)


def test_the_figure_draws_every_point_and_the_bounds() -> None:
    axes = frontier_figure(ROWS).axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["a"] == [[1.0, 60.0], [2.0, 40.0]]
    assert drawn["ideal sum"] == [[1.0, 100.0]]


def test_names_stand_beside_the_figure_without_overlapping() -> None:
    many = [row(f"p{i}", 1.0, "near", 1.0, 50.0 + 0.01 * i) for i in range(15)]
    figure = frontier_figure(many)
    figure.canvas.draw()
    names = [text for text in figure.axes[0].texts if text.get_text().startswith("p")]
    assert len(names) == 15
    # The extent of an annotation holds its arrow; that of a plain text is its words.
    boxes = [Text.get_window_extent(text) for text in names]
    for i, box in enumerate(boxes):
        assert box.x0 >= figure.axes[0].bbox.x1 and box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_what_joins_a_name_to_its_line_crosses_no_other_line() -> None:
    rates = (1.0, 2.0, 4.0)
    one = [row("once", 1.0, "near", 1.0, 80.0)]
    long = [row(policy, rate, "near", 1.0, at) for policy, at in (("a", 90.0), ("b", 40.0)) for rate in rates]
    axes = frontier_figure([*one, *long]).axes[0]
    joined = [text.xy for text in axes.texts if getattr(text, "arrow_patch", None) is not None]
    assert sorted(joined) == [(4.0, 40.0), (4.0, 90.0)]
    assert {text.get_text() for text in axes.texts} >= {"once", "a", "b"}


def test_each_router_has_a_letter_of_its_own_where_there_are_several() -> None:
    assert router_letters(ROWS) == {"far": "f", "near": "n"}
    assert router_letters(ROWS[:1]) == {}
    several = [row("a", 1.0, router, 1.0, 1.0) for router in ("slo_aware", "s")]
    assert len(set(router_letters(several).values())) == 2


def test_the_program_prints_a_table_and_writes_the_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["policy=coserving_slack,inference_only", "workload=poisson", "workload.duration_s=20"]
    argv += ["workload.rate_rps=2,4", "cluster/router=least_tokens", "hydra.sweep.dir=out"]
    assert main(["frontier", *argv]) == 0
    table, _ = capfd.readouterr().out.split("runs: ")
    assert "coserving_slack" in table
    lines = Path("out/frontier.csv").read_text().splitlines()
    assert lines[0] == "policy,rate_rps,goodput_rps,finetune_tok_s,router"
    assert len(lines) == 5
    assert Path("out/frontier.png").stat().st_size > 10_000
    assert main(["report", "out", "--figure", "again.png"]) == 0
    assert capfd.readouterr().out == f"{table}figure: again.png\n"
    assert Path("again.png").read_bytes() == Path("out/frontier.png").read_bytes()
    assert main(["report", "out/0", "out/1"]) == 0
    assert "goodput" in capfd.readouterr().out


def test_of_several_models_the_runs_are_shown_and_no_frontier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["policy=inference_only", "workload=poisson", "workload.duration_s=20", "workload.rate_rps=2"]
    argv += ["cluster/router=least_tokens", "model=llama_3_1_8b,qwen2_5_14b", "hydra.sweep.dir=out"]
    assert main(["frontier", *argv]) == 0
    out = capfd.readouterr().out
    assert "runs:   out\nfigure: none, the runs differ in model" in out and out.count("inference_only") == 2
    assert main(["report", "out"]) == 0


def test_the_table_of_a_sweep_that_was_cut_short_says_that_seeds_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "not all numbers are of the same seeds"
    whole = [row(policy, 1.0, "near", 1.0, 50.0, seed) for policy in ("a", "b") for seed in (0, 1)]
    _show(whole, tmp_path)
    assert said not in capsys.readouterr().out
    _show(whole[:-1], tmp_path)
    assert said in capsys.readouterr().out.split("\n")


def test_requests_that_did_not_finish_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = [row("a", rate, "near", 1.0, 50.0) for rate in (1.0, 2.0)]
    _show(whole, tmp_path)
    assert capsys.readouterr().err == ""
    _show([whole[0], whole[1] | {"unfinished": 3}], tmp_path)
    assert capsys.readouterr().err.startswith(
        "note: 3 of 9 requests of a [2 req/s] did not finish: they count"
    )


def test_runs_of_other_settings_have_a_line_of_their_own() -> None:
    ways = [
        row("a", 1.0, "near", 1.0, 50.0) | {"config": {"cost": {"factor": 1}}},
        row("a", 1.0, "near", 1.0, 70.0) | {"config": {"cost": {"factor": 2}}},
    ]
    trained = {name: [p.finetune_tok_s for p in points] for name, points in frontier(ways).items()}
    assert trained == {"a (factor=1)": [50.0], "a (factor=2)": [70.0]}
