"""Tables, figures and the report over run folders: what they show is what the rows say."""

from __future__ import annotations

import io
import json
import math
import struct
from itertools import chain, combinations, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from omegaconf import OmegaConf
from rich.console import Console

from analysis.figures import style
from analysis.figures.compare import compare_figure, ranked
from analysis.figures.frontier import frontier, frontier_figure
from analysis.figures.sweep import series, sweep_figure
from analysis.figures.timeline import spread, timeline_figure
from analysis.repeats import alike, display_names, over_seeds, run_names
from analysis.report import main
from analysis.runs import USUAL, best, collect, flatten, keeps_slo
from analysis.table import WIDTH, plain_table, print_table
from sim.assemble import CONFIGS
from sim.core.request import Slo
from sim.core.rows import ITERATION_COLUMNS, Outcome, Recorder
from sim.metrics import DEFINITIONS, summarize
from sim.results import read_run, write_run

NAN = math.nan
POLICIES = {
    "inference_only": (0.0, 0.999),
    "finetune_only": (15000.0, NAN),
    "coserving": (11800.0, 0.978),
    "coserving_static": (7200.0, 0.991),
    "temporal_64": (9000.0, 0.62),
    "a_policy_with_a_name_that_is_far_too_long_for_any_table": (NAN, NAN),
}


def rows(rate: float = 20.0, seed: int = 0, factor: float = 1.0) -> list[dict[str, Any]]:
    return [
        {
            "name": policy,
            "policy": policy,
            "workload": "azure_conv",
            "model": "llama_3_1_8b",
            "device": "a100_80gb",
            "rate_rps": rate,
            "seed": seed,
            "source": "sim",
            "finetune_tok_s": trained * factor,
            "attainment": met,
            "tpot_p99_s": 0.0434,
            "peak_finetune_tok_s": 15000.0,
        }
        for policy, (trained, met) in POLICIES.items()
    ]


def write(folder: Path, policy: str, rate: float = 2.0, tokens: int = 50, seed: int = 0) -> Path:
    recorder = Recorder()
    code = recorder.slos.code("chat")
    recorder.requests.append((0, 0, code, 0, Outcome.FINISHED, 0.0, 0.5, 1.0, 3.0, 5, 3, 3, 0))
    recorder.segments.append((0, 0, code, 1.0, 0, 2))
    recorder.ticks.append((0, 2.0))
    recorder.ticks.append((0, 3.0))
    for i in range(3):
        values = {**dict.fromkeys(ITERATION_COLUMNS, 0), "start_s": i, "end_s": i + 1.0, "predicted_s": NAN}
        values |= {"iteration": i, "sampled_tokens": 1, "running": 1, "forward_tokens": 10}
        recorder.iterations.append([values[c] for c in ITERATION_COLUMNS])
    recorder.steps.append((0, recorder.jobs.code("job"), 1, 8, tokens, 2.5, 0))
    labels = {
        "name": policy, "policy": policy, "model": "tiny", "device": "a100_80gb", "workload": "fixed",
        "rate_rps": rate, "seed": seed,
    }  # fmt: skip
    summary = summarize(recorder, slos={"chat": Slo()}, duration_s=4.0, labels=labels)
    config = {"policy": {"name": policy}, "workload": {"rate_rps": rate}, "device": "a100_80gb"}
    return write_run(folder, recorder, summary, config=config, manifest={}, source="sim")


def test_several_slo_classes_have_a_table_of_their_attainment_and_one_has_none() -> None:
    def row(policy: str, seed: int, **met: float) -> dict[str, Any]:
        """`met` of a class that nobody asked for is missing."""
        classes = [
            {"slo": name, "attainment": share, "requests": 0 if math.isnan(share) else 10}
            for name, share in met.items()
        ]
        return {"policy": policy, "seed": seed, "workload": "w", "finetune_tok_s": 1.0, "classes": classes}

    one = [row("p", 0, default=NAN, chat=0.5), row("q", 0, default=NAN, chat=1.0)]
    assert plain_table(one) == plain_table([{k: v for k, v in r.items() if k != "classes"} for r in one])
    several = [row("p", s, default=NAN, chat=0.99996 - s / 10, batch=s / 10) for s in (0, 1)]
    below = plain_table([*several, row("q", 0, chat=1.0)]).split("\n\n")[1]
    assert [line.split() for line in below.split("\n")] == [
        ["by", "SLO", "class"],
        ["chat", "batch"],
        ["policy", "met", "%", "met", "%"],
        ["-" * 9, "-----", "-----"],
        ["p", "94.9", "5.0"],
        ["2", "seeds", "±7.1", "±7.1"],
        ["q", "100.0", "-"],
    ]


def with_classes(
    policy: str, trained: float, seed: int = 0, rate: float = 1.0, **met: float
) -> dict[str, Any]:
    """A run whose classes attain `met`, 100 requests of each; of a class without requests 0."""
    classes = [
        {"slo": name, "attainment": share, "requests": 100 if share else 0} for name, share in met.items()
    ]
    labels = {"policy": policy, "seed": seed, "workload": "w", "model": "m", "device": "d", "rate_rps": rate}
    return labels | {"attainment": 0.96, "finetune_tok_s": trained, "goodput_rps": rate, "classes": classes}


def test_the_slo_is_kept_where_each_class_keeps_it() -> None:
    """As tables, figures and the frontier have it; 96 % of all requests attain theirs."""
    made = [
        with_classes("a", 10.0, chat=0.95, batch=0.97, none=0.0),
        with_classes("b", 20.0, chat=0.94, batch=0.97),
        with_classes("c", 30.0),
    ]
    assert [keeps_slo(row) for row in made] == [True, False, True]
    assert best(made[:2]) == {0}
    assert [(line.name, line.keeps) for line in ranked(made[:2])] == [("a", True), ("b", False)]
    assert set(frontier(made[:2])) == {"a"}
    table = plain_table(made[:2])
    assert "\n* a " in table and "(95 % of arrived requests of each class meet it)" in table
    assert "(95 % of arrived requests meet it)" in plain_table(made[2:])
    for chat, hollow in ((0.95, 0), (0.94, 4)):
        swept = sweep_figure(
            [with_classes("a", 20.0, rate=rate, chat=chat, batch=1.0) for rate in (1.0, 2.0)]
        )
        assert "(fewer than 95 % of the requests of some class meet it" in swept.get_suptitle()
        marks = [c for panel in swept.axes for c in panel.collections if isinstance(c, PathCollection)]
        assert sum(len(each.get_offsets()) for each in marks) == hollow


def test_over_seeds_the_worst_class_counts_in_the_mean() -> None:
    for second, kept in ((0.93, False), (0.96, True)):
        two = [
            with_classes("a", 10.0, 0, chat=0.945, batch=1.0),
            with_classes("a", 10.0, 1, chat=1.0, batch=second),
        ]
        (mean,) = over_seeds(two)
        assert keeps_slo(mean.mean) == kept
        assert [line.keeps for line in ranked(two)] == [kept]


def test_energy_and_cost_are_columns_where_a_run_has_them() -> None:
    usual = {"policy": "p", "attainment": 1.0, "energy_j_per_token": NAN, "cost_per_mtoken": None}
    assert "cost" not in plain_table([usual]) and "energy" not in plain_table([usual])
    heads, units, _, line, other = plain_table([usual | {"cost_per_mtoken": 0.276}, usual]).split("\n")[:5]
    assert heads.endswith("% of      cost") and units.endswith("peak  per Mtok")
    assert (line.split()[-1], other.split()[-1]) == ("0.28", "-")
    assert plain_table([usual | {"energy_j_per_token": 0.118}]).split("\n")[3].endswith("0.12")


def test_the_mark_goes_to_most_finetuning_among_those_that_keep_the_slo() -> None:
    lines = [line for line in plain_table(rows()).split("\n") if line.startswith("*")]
    assert lines[0].split()[:2] == ["*", "coserving"]
    stricter = [line for line in plain_table(rows(), 0.99).split("\n") if line.startswith("*")]
    assert stricter[0].split()[:2] == ["*", "coserving_static"]
    assert best(rows(), 1.0) == set()


@pytest.mark.parametrize(("share", "seeds", "keep"), [(0.95, 3, "95"), (0.999, 1, "99.9")])
def test_exactly_the_share_that_is_asked_for_keeps_the_slo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float, seeds: int, keep: str
) -> None:
    assert not share * seeds / seeds >= float(keep) / 100  # the rounding of a mean and of a percentage
    for seed in range(seeds):
        summary = write(tmp_path / str(seed), "a", seed=seed) / "summary.json"
        summary.write_text(json.dumps({**json.loads(summary.read_text()), "attainment": share}))
    assert main([str(tmp_path), "--keep", keep]) == 0
    assert "\n* a " in capsys.readouterr().out
    same = [row | {"attainment": share} for seed in range(seeds) for row in rows(seed=seed)]
    left, right = compare_figure(same, kept_share=float(keep) / 100).axes
    assert not any(bar.get_hatch() for axes in (left, right) for bar in axes.patches)
    swept = sweep_figure(same, kept_share=float(keep) / 100)
    markers = [c for axes in swept.axes for c in axes.collections if isinstance(c, PathCollection)]
    assert markers and not any(len(hollow.get_offsets()) for hollow in markers)


def test_each_rate_has_its_own_best() -> None:
    both = rows(4.0) + rows(20.0)
    assert best(both) == {2, 2 + len(POLICIES)}


def test_of_equals_the_one_that_was_done_with_its_data_first_is_best() -> None:
    one = {"attainment": 1.0, "finetune_tok_s": 100.0}
    rows = [one, one | {"data_done_s": 50.0}, one | {"data_done_s": 40.0}, one | {"finetune_tok_s": 99.0}]
    assert best(rows) == {2}
    assert best([*rows, one | {"finetune_tok_s": 101.0}]) == {4}


def test_a_sweep_that_was_cut_short_has_no_best_where_the_seeds_differ() -> None:
    whole = rows(seed=0) + rows(seed=1, factor=1.1)
    assert "no *" not in plain_table(whole)
    early = [row for row in whole if (row["policy"], row["seed"]) != ("coserving_static", 1)]
    for cut in (early, early + rows(4.0)):
        table = plain_table(cut)
        assert table.endswith("\nno * among runs that are not of the same seeds")
        starred = [line for line in table.split("\n") if line.startswith("* ") and "most" not in line]
        assert [line.split()[2] for line in starred] == ["4"] * (len(cut) > len(early))
    only_serves = [row for row in whole if (row["policy"], row["seed"]) != ("inference_only", 1)]
    assert plain_table(only_serves).count("* coserving ") == 1


def test_cells_say_missing_and_zero_apart_and_round_attainment_down() -> None:
    table = plain_table([{"policy": "p", "attainment": 0.99999, "finetune_tok_s": 0.0, "goodput_rps": NAN}])
    cells = table.split("\n")[3].split()
    assert cells == ["p", "99.9", "-", "-", "-", "-", "0", "-"]
    exact = plain_table([{"policy": "p", "attainment": 0.991}, {"policy": "q", "attainment": 1.0}])
    assert [line.split()[1] for line in exact.split("\n")[3:5]] == ["99.1", "100.0"]


def test_lines_fit_and_are_aligned_whatever_varies() -> None:
    many = [{**row, "source": source} for source in ("sim", "engine") for row in rows(4.0) + rows(12.5, 123)]
    many = [row for row in many if len(row["policy"]) <= len("temporal_dynamic")]
    lines = plain_table(many).split("\n")
    assert max(map(len, lines)) <= WIDTH
    rule = next(line for line in lines if line.startswith("  -"))
    body = lines[lines.index(rule) + 1 : -2]
    assert len(body) == len(many)
    gaps = [i for i, char in enumerate(rule) if char == " " and i >= 2]
    assert all(len(line) <= len(rule) and all(line[i : i + 1] in (" ", "") for i in gaps) for line in body)


def test_runs_that_differ_only_in_the_seed_are_one_line_with_their_deviation() -> None:
    both = rows(seed=0) + rows(seed=1, factor=1.1) + rows(4.0, seed=0)
    lines = plain_table(both).split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("* coserving"))
    trained = 11800.0 * np.array([1.0, 1.1])
    assert f"{trained.mean():,.0f}" in lines[at]
    assert lines[at + 1].split()[:2] == ["2", "seeds"]
    assert f"±{trained.std(ddof=1):,.0f}" in lines[at + 1]
    assert "±: sample standard deviation over the seeds" in lines
    missing = next(i for i, line in enumerate(lines) if line.startswith("  finetune_only"))
    assert lines[missing + 1].split()[2] == "-"
    assert sum("2 seeds" in line for line in lines) == len(POLICIES)
    routers = [{**row, "router": name} for name in ("RoundRobin", "Consolidate") for row in rows()]
    assert "seeds" not in plain_table(routers) and "seeds" not in plain_table(rows() + rows())


def variant(seed: int = 0, folder: str = "", name: str | None = None, **launch: object) -> dict[str, Any]:
    return {
        **rows(seed=seed)[2], "name": name, "folder": folder,
        "config": {"seed": seed, "launch": launch, "run": {"name": None}},
    }  # fmt: skip


def names_of(variants: list[dict[str, Any]]) -> list[str]:
    return display_names([group[0] for group in alike(variants)])


def test_runs_of_other_settings_are_never_taken_for_seeds() -> None:
    made = [variant(graphs=g, streams=n) for g in ("auto", "off") for n in (2, 1)]
    assert names_of(made) == [f"coserving (graphs={g}, streams={n})" for g in ("auto", "off") for n in (2, 1)]
    assert "seeds" not in plain_table(made)
    assert [line.name for line in ranked(made)] == names_of(made)
    seeds = [variant(seed=seed, graphs=g) for seed in (0, 1) for g in ("auto", "off")]
    assert [len(one.seeds) for one in over_seeds(seeds)] == [2, 2]
    assert names_of(seeds) == ["coserving (graphs=auto)", "coserving (graphs=off)"]


def test_a_label_is_what_names_do_not_share() -> None:
    shared = "workload.duration_s=60"
    made = [variant(name=f"slo={slo}, {shared}, policy.list=[1, 2]") for slo in ("flexllm", "mlperf_server")]
    assert names_of(made) == ["coserving (slo=flexllm)", "coserving (slo=mlperf_server)"]
    assert names_of(made[:1]) == ["coserving"]
    assert plain_table(made).split("\n")[1] == f"{shared}, policy.list=[1, 2]"
    assert style.settings_title(made) == f"\n{shared}, policy.list=[1, 2]"
    other = {**variant(name="slo=flexllm, cost.factor=2"), "policy": "spatial"}
    assert names_of([made[0], other]) == [
        "coserving (duration_s=60, list=[1, 2])",
        "spatial (factor=2)",
    ]
    assert style.settings_title([made[0], other]) == style.settings_title([other, rows()[0]]) == ""
    both = [variant(name=f"world.path={n}, predictor.path={3 - n}") for n in (1, 2)]
    assert names_of(both)[0] == "coserving (world.path=1, predictor.path=2)"
    assert "coserving (slo=mlperf_server)" in plain_table(made)


def test_settings_too_long_for_a_figures_title_have_the_last_words_of_their_keys() -> None:
    given = [
        "workload.duration_s=600", "finetune.jobs.file.data.file=samples/lengths.jsonl", "finetune.jobs.file.epochs=2",
        "finetune.jobs.other.epochs=3", "cluster.limits.max_sequences=128",
    ]  # fmt: skip
    title = style.settings_title([variant(name=", ".join(given))])
    short = "\nworkload.duration_s=600, data.file=samples/lengths.jsonl, file.epochs=2, other.epochs=3"
    assert title == f"{short} and 1 more"
    assert (
        style.settings_title([variant(name=", ".join([*given, "cluster.limits.max_tokens=1024"]))])
        == f"{short} and 2 more"
    )
    figure = compare_figure([variant(name=", ".join(given))])
    figure.canvas.draw()
    assert figure._suptitle is not None
    box = figure._suptitle.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert style.settings_title([variant(name=", ".join(given[:3]))]) == "\n" + ", ".join(given[:3])
    alone = style.settings_title([variant(name=f"workload.file={'x' * 200}.csv")])
    assert (
        alone.startswith("\nworkload.file=x")
        and alone.endswith("x.csv")
        and len(alone) == 1 + style.SETTINGS_LETTERS
    )


def test_a_scene_too_long_for_a_line_is_within_the_figure() -> None:
    devices = "8 x h100_nvl in 4 pipelines + 8 x a100_40gb in 4 pipelines + 4 x rtx_pro_6000 in 4 pipelines"
    made = [{**row, "devices": devices, "workload": "x" * 40, "attainment": 1.0} for row in rows()]
    for draw in (compare_figure, sweep_figure, frontier_figure):
        figure = draw(made)
        figure.canvas.draw()
        assert figure._suptitle is not None
        box = figure._suptitle.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert box.y0 >= max(axes.get_tightbbox().y1 for axes in figure.axes)


@pytest.mark.parametrize("trained", [0.0, 0.5, 5.0])
def test_no_two_ticks_of_trained_tokens_read_alike(trained: float) -> None:
    made = [
        {**row, "finetune_tok_s": trained, "peak_finetune_tok_s": NAN, "goodput_rps": 2.0, "attainment": 1.0}
        for row in rows()
    ]
    others = [{**row, "rate_rps": 3.0} for row in made]
    for figure, axis in (
        (compare_figure(made), "xaxis"),
        (sweep_figure([*made, *others]), "yaxis"),
        (frontier_figure([*made, *others]), "yaxis"),
    ):  # fmt: skip
        figure.canvas.draw()
        shown = [label.get_text() for label in getattr(figure.axes[0], axis).get_ticklabels()]
        assert len(set(shown)) == len(shown)
        assert (shown == ["0"]) == (trained == 0)


def test_a_number_written_whole_or_not_is_one_setting() -> None:
    made = [variant(seed=seed, streams=streams) for seed, streams in enumerate((2, 2.0))]
    assert [len(one.seeds) for one in over_seeds(made)] == [2]
    other = [variant(streams=2), variant(seed=1, streams=2.5)]
    assert names_of(other) == ["coserving (streams=2)", "coserving (streams=2.5)"]
    named = [variant(streams=streams, alone=alone) for streams, alone in ((2, True), (2.0, False))]
    assert names_of(named) == ["coserving (alone=true)", "coserving (alone=false)"]


def test_a_line_about_a_run_says_every_label_that_runs_differ_in() -> None:
    made = [variant(seed=seed) | {"rate_rps": rate} for rate in (8.0, 16.0) for seed in (0, 1)]
    assert run_names(made)[:2] == ["coserving [8 req/s, seed 0]", "coserving [8 req/s, seed 1]"]
    assert len(set(run_names(made))) == len(made)
    assert run_names(made[:1]) == ["coserving"]


def test_runs_that_differ_in_nothing_are_told_apart_by_their_folders() -> None:
    same = [variant(folder=folder) for folder in ("runs/a/0", "runs/b/0")]
    assert names_of(same) == ["coserving (a/0)", "coserving (b/0)"]


def test_lines_of_a_seed_that_comes_twice_are_told_apart_whatever_else_they_are_means_of() -> None:
    runs = [(0, "one/0"), (1, "one/1"), (1, "two/1")]
    twice = [
        row | {"seed": seed, "folder": folder, "config": {}} for seed, folder in runs for row in rows()[2:3]
    ]
    names = [line.name for line in ranked(twice)]
    assert names == ["coserving (0)", "coserving (1)"]
    assert all(f"  {name} " in plain_table(twice) for name in names)
    assert list(series(twice, "attainment")) == names


def test_a_mean_is_over_the_seeds_that_have_the_number() -> None:
    made = [{**variant(seed=seed), "ttft_p99_s": ttft} for seed, ttft in enumerate((1.0, NAN, 3.0))]
    one = over_seeds(made)[0]
    assert (one.mean["ttft_p99_s"], one.known["ttft_p99_s"], len(one.seeds)) == (2.0, 2, 3)
    table = plain_table(made)
    assert " 2.00 " in table and "±1.41 (2)" in table and "(n): so many" in table


def test_only_signs_that_occur_are_explained() -> None:
    missed = plain_table([{"policy": "p", "attainment": 0.5, "finetune_tok_s": 1.0}])
    assert "most finetuning" not in missed and missed.endswith("-: missing") and "±" not in missed


def test_a_short_piece_of_a_trace_is_shown_with_the_rate_it_had() -> None:
    row = {"policy": "p", "rate_rps": 8.0, "requests": 77, "duration_s": 30.0}
    assert plain_table([row]).startswith("8 req/s asked, 2.57 came in 30 s\n")
    assert plain_table([row | {"requests": 239}]).startswith("8 req/s\n")
    longer = row | {"requests": 240, "duration_s": 60.0, "policy": "q"}
    whole = row | {"requests": 4800, "duration_s": 600.0, "policy": "r"}
    both = plain_table([row, whole, longer])
    assert both.startswith("8 req/s asked, 2.57 came in 30 s, 4 came in 60 s\n")
    rates = plain_table([row, row | {"rate_rps": 2.5, "seed": 1}])
    assert rates.startswith("req/s 8: 2.57 came in 30 s\n")
    assert "asked" in style.scene_title([row])


def test_a_figure_tells_the_rate_of_a_trace_as_its_table_does() -> None:
    row = rows(3000 / 338.3917)[2]
    assert style.scene_title([row]).endswith(", 8.865 req/s")
    assert plain_table([row]).startswith(style.scene_title([row]) + "\n")


def test_titles_say_what_all_runs_share_that_is_not_as_usual() -> None:
    usual = {"policy": "p", "workload": "w", "rate_rps": 8.0, **USUAL}
    other = {**usual, "slo_set": "mlperf_server", "router": "least_tokens", "admission": "shortest"}
    said = "SLO mlperf_server, router least_tokens, admission shortest"
    assert plain_table([usual]).startswith("w, 8 req/s\n") and style.scene_title([usual]) == "w, 8 req/s"
    assert plain_table([other, other]).startswith(f"w, {said}, 8 req/s\n")
    assert style.scene_title([other, other]) == f"w, {said}, 8 req/s"
    assert plain_table([usual, other]).startswith("w, 8 req/s\n")
    assert plain_table([other, {**other, "router": "x"}]).startswith(
        "w, SLO mlperf_server, admission shortest, 8 req/s\n"
    )
    config = OmegaConf.load(CONFIGS / "config.yaml")
    cluster = OmegaConf.load(CONFIGS / "cluster/default.yaml")
    groups = {key: name for entry in config.defaults if entry != "_self_" for key, name in entry.items()}
    router = next(entry.router for entry in cluster.defaults if entry != "_self_")
    assert {"slo_set": groups["slo"], "router": router, "admission": cluster.limits.admission} == USUAL


def test_the_terminal_shows_the_same_text_even_when_it_is_narrow() -> None:
    stream = io.StringIO()
    print_table(rows() + rows(4.0), console=Console(file=stream, width=40, color_system=None))
    assert stream.getvalue() == plain_table(rows() + rows(4.0)) + "\n"


def test_scenes_are_sections() -> None:
    other = [{**row, "model": "qwen2_5_14b"} for row in rows()]
    table = plain_table(rows() + other)
    assert "azure_conv, llama_3_1_8b, a100_80gb, 20 req/s" in table
    assert "azure_conv, qwen2_5_14b, a100_80gb, 20 req/s" in table
    assert sum(line.startswith("* coserving ") for line in table.split("\n")) == 2


def test_collect_keeps_only_config_keys_that_vary(tmp_path: Path) -> None:
    runs = [read_run(write(tmp_path / p, p, rate)) for p, rate in (("a", 1.0), ("b", 2.0))]
    frame = collect(runs)
    assert frame["workload.rate_rps"].tolist() == [1.0, 2.0]
    assert frame["policy.name"].tolist() == ["a", "b"]
    assert "classes" not in frame
    assert frame["finetune_tok_s"].tolist() == [12.5, 12.5]
    assert flatten({"a": {"b": [1], "c": {}}, "d": None}) == {"a.b": [1], "d": None}


def test_the_comparison_draws_each_policy_once_with_its_numbers() -> None:
    figure = compare_figure(rows())
    left, right = figure.axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names[:3] == ["coserving", "coserving_static", "inference_only"]
    assert len(names) == len(POLICIES)
    assert sorted(bar.get_width() for bar in left.patches) == [0.0, 7200.0, 9000.0, 11800.0, 15000.0]
    assert sorted(bar.get_width() for bar in right.patches) == pytest.approx([62.0, 97.8, 99.1, 99.9])
    assert [text.get_text() for text in left.texts].count("missing") == 1
    assert [text.get_text() for text in right.texts].count("missing") == 2
    assert any("finetuning alone: 15,000" in text.get_text() for text in left.texts)
    assert "azure_conv" in figure.get_suptitle()


def test_runs_that_finetuning_alone_would_not_do_at_the_same_rate_have_no_common_peak() -> None:
    def said(peaks: tuple[float, float], seeds: tuple[int, int]) -> str:
        own = zip(peaks, seeds, strict=True)
        unlike = [
            row | {"peak_finetune_tok_s": peak, "finetune_share_of_peak": 0.5, "config": {"pipelines": peak}}
            for peak, seed in own
            for row in rows(seed=seed)
        ]
        (text,) = [t for t in compare_figure(unlike).axes[0].texts if "finetuning alone" in t.get_text()]
        return str(text.get_text())

    assert said((15000.0, 30000.0), (0, 0)) == "%: of finetuning alone with the same settings"
    assert said((15000.0, 15000.0), (0, 0)) == "finetuning alone: 15,000 tok/s = 100 %"
    assert said((15000.0, 15100.0), (0, 1)) == "finetuning alone: 15,050 tok/s = 100 %"


@pytest.mark.parametrize("factor", [1.0, 1.0 / 7, 100.0, 1.46])
def test_no_text_of_the_comparison_overlaps_another_or_leaves_the_figure(factor: float) -> None:
    figure = compare_figure([{**row, "peak_finetune_tok_s": 15000.0 * factor} for row in rows(factor=factor)])
    figure.canvas.draw()
    frame = figure.bbox
    for axes in figure.axes:
        shown = [*axes.texts, axes.xaxis.label, *axes.get_xticklabels()]
        boxes = [text.get_window_extent() for text in shown if text.get_text()]
        for i, box in enumerate(boxes):
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, shown[i]
            assert not any(box.overlaps(other) for other in boxes[:i]), shown[i]


def test_no_line_runs_through_a_number_of_the_comparison() -> None:
    many = [*rows(), {**rows()[0], "policy": "all", "finetune_tok_s": 14990.0, "attainment": 0.999}]
    figure = compare_figure([{**row, "finetune_share_of_peak": 0.999} for row in many])
    figure.canvas.draw()
    for axes in figure.axes:
        lines = [*axes.lines, *axes.xaxis.get_gridlines()]
        texts = [text for text in axes.texts if text.get_text() != "missing"]
        assert len(lines) > 4 and len(texts) >= 8
        for line in lines:
            box = line.get_window_extent()
            assert not any(box.overlaps(text.get_window_extent()) for text in texts), line


def test_the_comparison_shows_the_numbers_of_the_table() -> None:
    both = [
        {**row, "finetune_share_of_peak": share * factor}
        for seed, factor in enumerate((1.0, 1.001))
        for row, share in zip(
            rows(seed=seed, factor=factor), (0.0, 0.996, 0.7548, 0.4965, 0.7, NAN), strict=True
        )
    ]
    left, right = compare_figure(both).axes
    shown = {text.get_text().removesuffix(" %") for axes in (left, right) for text in axes.texts}
    lines = [line.lstrip("* ").split() for line in plain_table(both).split("\n")]
    for policy in list(POLICIES)[:5]:
        name, met, *_, trained, share = next(line for line in lines if line[0] == policy)
        assert shown >= {met, trained, share} - {"-", "0.0"}, name


def test_seeds_are_one_line_with_their_range() -> None:
    lines = {line.name: line for line in ranked(rows(seed=0) + rows(seed=1, factor=1.1))}
    assert lines["coserving"].finetune == pytest.approx((12390.0, 11800.0, 12980.0))
    assert len(lines) == len(POLICIES)


@pytest.mark.parametrize(("label", "one", "other"), [("source", "sim", "engine"), ("router", "Near", "Far")])
def test_sources_and_routers_are_never_averaged(label: str, one: str, other: str) -> None:
    both = [{**row, label: one} for row in rows()]
    both += [{**row, label: other, "finetune_tok_s": 1.0} for row in rows()]
    lines = {line.name: line.finetune.mean for line in ranked(both)}
    assert (lines[f"coserving [{one}]"], lines[f"coserving [{other}]"]) == (11800.0, 1.0)
    points = series(both, "finetune_tok_s")
    assert [points[f"coserving [{way}]"][0].mean for way in (one, other)] == [11800.0, 1.0]


@pytest.mark.parametrize(("panel", "metric", "factor"), [(0, "finetune_tok_s", 1), (1, "attainment", 100)])
def test_a_sweep_draws_what_the_rows_have_and_a_gap_where_they_have_nothing(
    panel: int, metric: str, factor: float
) -> None:
    swept = [
        {**row, metric: None if rate == 8 else 0.1 * rate * (i + 1)}
        for rate in (4, 8, 12)
        for i, row in enumerate(rows(rate))
    ]
    axes = sweep_figure(swept).axes[panel]
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    assert len(lines) == len(POLICIES)
    x, y = (np.asarray(values, dtype=float) for values in lines[1].get_data())
    assert x.tolist() == [4, 8, 12]
    assert math.isnan(y[1])
    assert y[2] == pytest.approx(3 * y[0])
    assert y[0] == pytest.approx(0.8 * factor)


def test_a_sweep_marks_what_misses_the_slo_and_has_a_tick_at_each_rate() -> None:
    figure = sweep_figure(rows(16.0) + rows(20.0))
    left, right = figure.axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["16", "20"]
    hollow = {name: len(c.get_offsets()) for name, c in zip(POLICIES, left.collections, strict=False)}
    assert hollow["temporal_64"] == 2 and hollow["coserving"] == 0
    assert "95 %" in figure.get_suptitle() and "dashed" in figure.get_suptitle()
    assert right.lines[-1].get_ydata() == [95.0, 95.0] and not right.texts


def test_the_legend_of_a_sweep_fits_however_many_lines_there_are() -> None:
    many = [{**row, "config": {"way": n}} for n in range(6) for row in rows(4.0) + rows(8.0)]
    figure = sweep_figure(many)
    figure.canvas.draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 6 * len(POLICIES)
    box = legend.get_window_extent()
    assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1


def test_a_marker_of_a_sweep_over_routers_is_a_router_in_the_legend_and_at_every_line() -> None:
    routers = ("Near", "Far", "Middle")
    swept = [{**row, "router": router} for router in routers for row in rows(4.0) + rows(8.0)]
    figure = sweep_figure(swept)
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(texts) == len(POLICIES) + 1 + len(routers) and tuple(texts[-3:]) == routers
    markers = {
        router: line.get_marker() for router, line in zip(routers, legend.get_lines()[-3:], strict=True)
    }
    assert len(set(markers.values())) == 3
    lines = [line for line in figure.axes[0].lines if str(line.get_label()).endswith("]")]
    for router, marker in markers.items():
        own = [line.get_marker() for line in lines if str(line.get_label()).endswith(f"[{router}]")]
        assert len(own) == len(POLICIES) and set(own) == {marker}


def test_lines_that_their_strokes_do_not_tell_apart_are_all_in_the_legend() -> None:
    ways = [("Near", 1), ("Far", 1), ("Near", 2), ("Far", 2)]
    swept = [{**row, "router": router, "config": {"way": n}} for router, n in ways for row in rows(4.0)]
    (legend,) = sweep_figure(swept).legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(set(texts)) == 4 * len(POLICIES) and "coserving (way=2) [Far]" in texts


def test_points_of_a_sweep_are_means_with_range() -> None:
    points = series(rows(4.0) + rows(4.0, seed=1, factor=2.0), "finetune_tok_s")
    assert points["coserving"] == [(4.0, 17700.0, 11800.0, 23600.0)]


def test_every_policy_has_one_look_and_no_two_lines_the_same() -> None:
    variants = [f"{family}_{n}" for family in ("temporal", "separate", "spatial") for n in range(8)]
    names = [*variants, *POLICIES]
    looks = style.looks({name: name for name in names})
    assert len(set(looks.values())) == len(names)
    assert style.looks({"coserving": "coserving"}) == {"coserving": style.look("coserving")}


def luminance(color: str) -> float:
    """Relative luminance of #RRGGBB, 0 to 1 (WCAG 2.1)."""
    return float(linear(color) @ [0.2126, 0.7152, 0.0722])


def linear(color: str) -> Any:
    """Red, green and blue of #RRGGBB as light, 0 to 1."""
    parts = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("family", style._FAMILIES)
def test_shades_of_a_family_differ_in_lightness_which_every_reader_sees(family: str) -> None:
    light = sorted(luminance(color) + 0.05 for color in style._FAMILIES[family])
    assert all(high / low > 1.5 for low, high in pairwise(light))
    assert light[-1] < (1.0 + 0.05) / 1.5, "or it is lost on white"


def test_policies_of_ones_own_have_colours_apart_from_all_others() -> None:
    shipped = [*chain(*style._FAMILIES.values()), *(bound.color for bound in style._BOUNDS.values())]
    own = [f"mine_{n}" for n in range(len(style._OTHERS))]
    looks = style.looks({name: name for name in [*own, "temporal"]})
    colors = [looks[name].color for name in own]
    assert len(set(colors)) == len(own) and all(luminance(color) < 0.65 for color in colors)
    assert min(distance(*pair) for pair in [*combinations(colors, 2), *product(colors, shipped)]) > 30
    variants = style.looks({"mine_0 (few=4)": "mine_0", "mine_0 (few=8)": "mine_0"})
    assert len({look.color for look in variants.values()}) == 1 and len(set(variants.values())) == 2


def distance(one: str, other: str) -> float:
    """In CIELAB (1976), where about 2 is just seen."""
    return float(np.linalg.norm(lab(one) - lab(other)))


def lab(color: str) -> Any:
    xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]] @ linear(color)
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])  # without the straight piece near black
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_a_timeline_keeps_every_token(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, "coserving"))
    figure = timeline_figure(run, bins=7)
    generated = figure.axes[0].get_lines()[0].get_ydata()
    assert np.sum(generated) * 3.0 / 7 == pytest.approx(3.0)
    assert figure.axes[1].get_lines()[0].get_ydata() == pytest.approx(np.ones(7))


def test_spread_counts_by_overlap_and_sums_pipelines() -> None:
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame({"pipeline": [0, 1, 0], "start_s": [0.0, 1.0, 3.0], "end_s": [2.0, 2.0, 4.0]})
    rate = spread(table, np.array([4.0, 1.0, 8.0]), np.array([0.0, 1.0, 2.0, 3.0, 4.0]))
    assert rate == pytest.approx([2.0, 3.0, 0.0, 8.0])


@pytest.mark.parametrize(
    ("folders", "drawn"),
    [
        ([("a", 1.0)], "course"),
        ([("a", 1.0), ("b", 1.0)], "comparison"),
        ([("a", 1.0), ("a", 2.0)], "sweep"),
    ],
)
def test_report_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folders: list[tuple[str, float]], drawn: str
) -> None:
    for i, (policy, rate) in enumerate(folders):
        write(tmp_path / "runs" / str(i), policy, rate)
    picture, csv = tmp_path / "out" / f"{drawn}.png", tmp_path / "all.csv"
    assert main([str(tmp_path / "runs"), "--figure", str(picture), "--csv", str(csv)]) == 0
    out = capsys.readouterr().out
    assert "fixed, tiny, a100_80gb" in out
    assert out.rstrip().endswith(f"figure: {picture}")
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert width == 1200
    assert height > 150
    assert len(csv.read_text().splitlines()) == 1 + len(folders)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "name at least one run folder"),
        (["NOWHERE"], "does not exist"),
        (["FILE"], "FILE is a file; give the folder of a run, or one that holds runs"),
        (["EMPTY"], "no summary.json in or below"),
        (["RUN", "--figure", "x.nothing"], "the suffix must be one of"),
        (["RUN", "--figure", "FILE/x.png"], "cannot write figure"),
        (["RUN", "--csv", "FILE/x.csv"], "error: --csv: "),
        (["DAMAGED"], "summary.json is not JSON"),
        (["RUN", "OTHER", "--figure", "x.png"], "a figure shows one model"),
    ],
)
def test_report_fails_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    write(tmp_path / "RUN", "a")
    other = write(tmp_path / "OTHER", "b") / "summary.json"
    other.write_text(other.read_text().replace('"tiny"', '"huge"'))
    (write(tmp_path / "DAMAGED", "a") / "summary.json").write_text("{")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("")
    arguments = [a if a.startswith("--") else str(tmp_path / a) for a in extra]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_report_tells_definitions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--definitions"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(DEFINITIONS)
