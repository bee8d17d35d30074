"""`coserve simulate` and `coserve compare` from the command line to the run folder."""

from __future__ import annotations

import io
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from profiles.named import device_named, model_named
from profiles.schema import Provenance, write_profile
from sim.cli import main
from sim.core.rows import WORK_COLUMNS, work_row
from sim.core.specs import LoraSpec
from sim.core.work import Chunk, Work
from sim.cost.context import CostContext
from sim.cost.roofline import Roofline
from sim.results import find_runs, read_run
from sim.simulate import all_policies, fitting_policies

CONFIGS = Path(__file__).parents[2] / "configs"
POLICIES = sorted(path.stem for path in (CONFIGS / "policy").glob("*.yaml"))
SHORT = ("workload=poisson", "workload.rate_rps=4", "workload.duration_s=20")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COSERVE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def simulate(*argv: str, folder: str = "out") -> Path:
    assert main(["simulate", *SHORT, *argv, f"hydra.run.dir={folder}"]) == 0
    return Path(folder)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_config_runs_and_leaves_a_complete_folder(policy: str) -> None:
    run = read_run(simulate(f"policy={policy}", "run.bounds=false"))
    assert run.summary["requests"] == len(run.table("requests"))
    ended = sum(run.summary[key] for key in ("finished", "rejected", "aborted", "unfinished"))
    assert ended == run.summary["requests"] > 0
    assert run.config["policy"]["_target_"].startswith("sim.policies.")
    steps = run.table("steps")
    in_time = steps[steps["end_s"] <= 20.0]
    assert run.summary["finetune_tok_s"] == pytest.approx(in_time["tokens"].sum() / 20.0)
    assert (run.table("iterations")["end_s"] > run.table("iterations")["start_s"]).all()


def test_a_single_run_shows_itself_between_the_bounds(capfd: pytest.CaptureFixture[str]) -> None:
    folder = simulate()
    out = capfd.readouterr().out
    for name in ("coserving", "inference_only", "finetune_only"):
        assert re.search(rf"^[* ] {name} ", out, re.MULTILINE)
    assert out.rstrip().endswith("compare.png")
    assert (folder / "compare.png").stat().st_size > 10_000
    shares = {path.name: read_run(path).summary for path in folder.glob("bounds/*")}
    own = read_run(folder).summary
    assert shares["inference_only"]["finetune_tok_s"] == 0
    assert 0 < own["finetune_tok_s"] < shares["finetune_only"]["finetune_tok_s"]
    assert shares["finetune_only"]["attainment"] == 0


def test_a_single_run_shows_on_a_terminal_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    simulate()
    for policy in ("coserving", "inference_only", "finetune_only"):
        assert f"{policy}:   0%|" in terminal.getvalue()
    assert "/20 simulated s [" in terminal.getvalue()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    one, two = simulate(folder="one"), simulate(folder="two")
    other = simulate("seed=1", folder="other")
    for table in ("requests", "iterations", "steps", "ticks", "segments"):
        name = f"{table}.parquet"
        assert (one / name).read_bytes() == (two / name).read_bytes()
        assert (one / name).read_bytes() != (other / name).read_bytes()


@pytest.mark.parametrize("cost", ["roofline", "table"])
def test_iterations_outside_what_was_measured_are_counted_and_said_once(
    cost: str, inside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Prompts of 3,000 tokens in one pass; seconds are known for passes of 1,024, or of measured works."""
    long = [
        "policy=inference_only",
        "workload.rate_rps=1",
        "run.bounds=false",
        "cluster.limits.max_tokens=4096",
    ]
    long += ["workload/lengths=fixed", "workload.lengths.prompt.tokens=3000"]
    narrow = ["+cost.world.of.max_tokens=1024"]
    if cost == "table":
        path = str(write_measured(inside / "a100_80gb-llama_3_1_8b.parquet", longest=1000))
        narrow = ["cost=table", f"cost.world.of.path={path}", f"cost.predictor.of.path={path}"]
    summary = read_run(simulate(*long, *narrow, folder="narrow")).summary
    rows = read_run(Path("narrow")).table("iterations")
    rows = rows[rows["end_s"] <= 20.0]
    tokens = rows["prefill_tokens"] + rows["decode_count"]
    assert summary["extrapolated_share"] >= (tokens > 1024).mean() > 0
    notes = [line for line in capfd.readouterr().err.splitlines() if "extrapolated" in line]
    assert len(notes) == 1 and re.search(r"_tokens [34]\d{3} \(known 0 to 1\d{3}\)", notes[0]), notes
    wide = read_run(simulate(*long, "cost=roofline", folder="wide")).summary
    assert wide["extrapolated_share"] == 0
    assert "extrapolated" not in capfd.readouterr().err


def test_extrapolation_is_told_of_the_runs_that_it_is_true_of(capfd: pytest.CaptureFixture[str]) -> None:
    own = [
        "policy=coserving,inference_only",
        "+cost.world.of.max_tokens=1024",
        "cluster.limits.max_tokens=4096",
    ]
    own += ["workload/lengths=fixed", "workload.lengths.prompt.tokens=3000", "hydra.sweep.dir=sweep"]
    assert main(["compare", *SHORT, "workload.rate_rps=1", *own]) == 0
    notes = [line for line in capfd.readouterr().err.splitlines() if "extrapolated" in line]
    assert {note.rpartition(": ")[2] for note in notes} == {"coserving", "inference_only"}
    assert len(notes) == 2 and all(note.startswith("note: ") for note in notes)


def write_measured(path: Path, longest: int) -> Path:
    """A profile of whole iterations of serving, prompts up to `longest`."""
    c = CostContext(
        device=device_named("a100_80gb"), model=model_named("llama_3_1_8b"), tp=1, lora=LoraSpec(), seed=0
    )
    cost = Roofline().build(c)
    works = [
        Work(decode_count=n, decode_context_tokens=n * k, sampled_tokens=n)
        for n in (0, 1, 4, 8, 16, 64)
        for k in (1, 500, 2000)
    ]
    works = [
        w._replace(prefill=(Chunk(p, 0),) if p else ()) for w in works for p in (0, 16, 64, 200, longest)
    ]
    flat, first = np.unique(np.array([work_row(w) for w in works], dtype=float), axis=0, return_index=True)
    seconds = np.array([cost.iteration_s(works[i]) for i in first])
    columns = {name: flat[:, i] for i, name in enumerate(WORK_COLUMNS)}
    columns |= dict.fromkeys(("seconds_p20", "seconds_p50", "seconds_p80"), seconds)
    texts = dict.fromkeys(("source", "date", "how", "licence", "versions"), "test")
    write_profile(path, columns, Provenance(device="a100_80gb", model="llama_3_1_8b", tp=1, **texts))
    return path


def test_a_sweep_runs_every_combination(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["simulate", "-m", *SHORT, "policy=coserving,temporal", "seed=0,1", "hydra.sweep.dir=sweep"]
    assert main(argv) == 0
    runs = [read_run(folder).summary for folder in find_runs(["sweep"])]
    assert sorted((run["policy"], run["seed"]) for run in runs) == [
        ("coserving", 0),
        ("coserving", 1),
        ("temporal_64", 0),
        ("temporal_64", 1),
    ]
    assert Path("sweep/compare.png").is_file()
    assert "coserving" in capfd.readouterr().out


@pytest.mark.parametrize("subdir", ["${hydra.job.num}", "runs/${hydra.job.num}"])
def test_a_sweep_shows_what_it_is_of_in_its_own_folder_even_of_one_run(
    subdir: str, inside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = ["simulate", "-m", *SHORT, "hydra.sweep.dir=sweep", f"hydra.sweep.subdir={subdir}"]
    for policies, code in (("inference_only", 0), ("coserving,separate,inference_only", 1)):
        # Of a sweep with a run that is refused, the others are left.
        assert main([*sweep, f"policy={policies}", "cluster.pipelines=3"]) == code
        assert capfd.readouterr().out.endswith("runs:   sweep\nfigure: sweep/compare.png\n")
        (inside / "sweep/compare.png").unlink()
        assert not list(inside.glob("sweep/**/compare.png"))


def test_compare_runs_every_policy(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *SHORT, "hydra.sweep.dir=sweep"]) == 0
    names = {read_run(folder).config["policy"]["name"] for folder in find_runs(["sweep"])}
    assert len(names) == len(POLICIES) - 2  # `separate` is `separate_50`, `temporal` is `temporal_64`
    assert "run/s" not in capfd.readouterr().err  # nobody watches a bar that goes into a file


def test_titles_name_the_trace_the_slo_and_what_else_is_not_the_default(
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("my.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,100,5\n1,200,5\n")
    own = ["workload=csv", "workload.file=my.csv", "policy=coserving,inference_only"]
    told = ["slo=llmstation", "cluster/router=least_tokens", "cluster.limits.admission=deadline"]
    for more, said in (([], ""), (told, "SLO llmstation, router least_tokens, admission deadline, ")):
        assert main(["compare", *own, *more, f"hydra.sweep.dir={len(more)}"]) == 0
        title = f"my, llama_3_1_8b, 4 x a100_80gb, {said}1 req/s\nworkload.file=my.csv\n"
        assert capfd.readouterr().out.startswith(title)
        assert main(["report", f"{len(more)}"]) == 0
        assert capfd.readouterr().out.startswith(title)


def test_a_setting_that_is_not_the_policys_own_is_told_of_its_bounds_as_well(
    capfd: pytest.CaptureFixture[str],
) -> None:
    simulate("policy.margin=0.2", "cost.predictor.factor=0.9")
    _, settings, *lines = capfd.readouterr().out.split("\n")
    assert settings.endswith("cost.predictor.factor=0.9") and "margin" not in settings
    assert [line[2:].partition("  ")[0] for line in lines[3:6]] == [
        "coserving (margin=0.2)",
        "finetune_only",
        "inference_only",
    ]


def test_unequal_pipelines_get_unequal_shares() -> None:
    run = read_run(simulate("cluster=mixed", "policy=inference_only", "run.bounds=false"))
    counts = run.table("requests")["pipeline"].value_counts()
    assert counts[2] > counts[0]
    assert run.summary["device"] == "a100_80gb+h100"


@pytest.mark.parametrize("router", sorted(p.stem for p in (CONFIGS / "cluster/router").glob("*.yaml")))
def test_every_router_serves_everyone(router: str) -> None:
    run = read_run(simulate(f"cluster/router={router}", "workload.adapters.count=3", "run.bounds=false"))
    assert run.summary["finished"] == run.summary["requests"]
    assert run.summary["router"] == router


def test_consolidating_leaves_pipelines_to_finetune() -> None:
    rows = {}
    for router in ("least_tokens", "consolidate"):
        folder = simulate(f"cluster/router={router}", "workload.duration_s=120", folder=router)
        rows[router] = read_run(folder).summary
    assert rows["consolidate"]["attainment"] > 0.95
    assert rows["consolidate"]["finetune_tok_s"] > 1.05 * rows["least_tokens"]["finetune_tok_s"]


def test_a_prompt_longer_than_the_room_is_rejected_and_counted() -> None:
    Path("long.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,100,5\n1,5000,5\n2,100,5\n")
    own = ("workload=csv", "workload.file=long.csv", "cluster.limits.kv_tokens=4096", "run.bounds=false")
    assert main(["simulate", *own, "hydra.run.dir=out"]) == 0
    summary = read_run("out").summary
    assert (summary["finished"], summary["rejected"]) == (2, 1)


def test_requests_that_do_not_fit_and_answers_cut_short_are_told(capfd: pytest.CaptureFixture[str]) -> None:
    rows = ("0,100,5", "1,5000,5", "2,100,5", "3,4090,50")
    Path("long.csv").write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")
    own = ("workload=csv", "workload.file=long.csv", "cluster.limits.max_sequence_tokens=4096")
    assert main(["simulate", *own, "hydra.run.dir=out"]) == 0
    told = "1 of 4 requests were rejected and 1 of 4 answers end early: prompt and output do not fit 4,096 tokens"
    err = capfd.readouterr().err
    assert err.count(f"note: {told} (cluster.limits.kv_tokens, cluster.limits.max_sequence_tokens") == 1
    assert main(["simulate", *own[:2], "hydra.run.dir=all"]) == 0
    assert "do not fit" not in capfd.readouterr().err


def test_requests_that_did_not_finish_are_told_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def told(command: str, *arguments: str) -> list[str]:
        assert main([command, *arguments]) == 0
        return [line for line in capfd.readouterr().err.splitlines() if "did not finish" in line]

    Path("long.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,100,5\n1,100,20000\n2,100,5\n")
    own = ("workload=csv", "workload.file=long.csv", "run.drain_s=1")
    what = "did not finish: they count as missed, latencies are of finished ones (longer: run.drain_s)"
    assert told("simulate", *own, "run.bounds=false", "hydra.run.dir=alone") == [
        f"note: 1 of 3 requests {what}"
    ]
    # The bounds, which the table shows, are told as `coserve report` tells them.
    with_bounds = [f"note: requests of 2 of 3 runs (most: 1 of 3 of coserving) {what}"]
    assert told("simulate", *own, "hydra.run.dir=out") == with_bounds
    assert told("report", "out") == with_bounds
    assert read_run("out").summary["unfinished"] == 1
    assert told("simulate", *own[:2], "run.drain_s=2000", "run.bounds=false", "hydra.run.dir=all") == []
    # Nobody is served by finetune_only: its requests are rejected, not unfinished.
    for policies, who in (
        ("coserving,finetune_only", "1 of 3 requests of coserving"),
        ("coserving,finetune_only,inference_only", "requests of 2 of 3 runs (most: 1 of 3 of coserving)"),
    ):
        assert told("compare", *own, f"policy={policies}", f"hydra.sweep.dir={len(policies)}") == [
            f"note: {who} {what}"
        ]


def test_finetuning_without_an_optimizer_step_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    own = [*SHORT, "finetune.jobs.sky_t1.accumulation=500", "policy=coserving,temporal,inference_only"]
    assert main(["compare", *own, "hydra.sweep.dir=sweep"]) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "optimizer step" in line]
    pattern = (
        r"note: no optimizer step ended within 20 s \(a step is 500 samples, the first of [\d,]+ tokens\): .*"
    )
    assert len(told) == 1 and re.fullmatch(pattern, told[0])
    assert "coserving" in told[0] and "temporal_64" in told[0] and "inference_only" not in told[0]


def test_finetuning_of_few_optimizer_steps_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    own = [*SHORT, "policy=coserving,temporal,inference_only"]
    assert main(["compare", *own, "hydra.sweep.dir=sweep"]) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "optimizer step" in line]
    assert len(told) == 1 and told[0].startswith("note: fewer than 10 optimizer steps of a pipeline ended")
    assert told[0].endswith("(longer: workload.duration_s): coserving, temporal_64")
    assert main(["simulate", *SHORT, "finetune.jobs.sky_t1.accumulation=1", "hydra.run.dir=out"]) == 0
    assert "optimizer step" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("cluster", "left_out", "count"),
    [
        (["cluster=single"], ["25", "50", "75"], "1 pipeline"),
        (["cluster.pipelines=2"], ["25", "75"], "2 pipelines"),
        (["cluster=mixed", "seed=0,1"], ["25", "50", "75"], "3 pipelines"),
        (["cluster.pipelines=1,4"], [], ""),
        (["cluster.pipelines=no"], [], ""),
        ([], [], ""),
    ],
)
def test_policies_that_cannot_share_out_the_pipelines_are_left_out(
    cluster: list[str], left_out: list[str], count: str, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [f"separate_{share}" for share in left_out]
    assert fitting_policies([*SHORT, *cluster]).split(",") == [
        name for name in all_policies().split(",") if name not in names
    ]
    told = f"note: {', '.join(names)} left out: {count} cannot be shared out so\n" if names else ""
    assert capfd.readouterr().err == told


@pytest.mark.parametrize("command", ["compare", "frontier"])
def test_all_policies_of_one_pipeline_run_and_those_asked_for_by_name_are_refused(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    own = ["workload=poisson", "workload.rate_rps=4", "workload.duration_s=2", "cluster=single"]
    own += [] if command == "compare" else ["cluster/router=least_tokens"]
    assert main([command, *own, "hydra.sweep.dir=all"]) == 0
    assert capfd.readouterr().err.count(" left out: ") == 1
    ran = {read_run(path).config["policy"]["name"] for path in find_runs(["all"])}
    assert {"coserving", "temporal_64"} < ran and "separate_50" not in ran
    assert main([command, *own, "policy=coserving,separate_50", "hydra.sweep.dir=named"]) == 1
    told = capfd.readouterr().err
    assert "a share of 0.5 of 1 pipeline cannot serve" in told
    assert " left out: " not in told


@pytest.mark.parametrize(
    ("swept", "without"),
    [
        (["workload.adapters.count=0,2", "workload.adapters.zipf=2"], "workload.adapters.count=0"),
        (["cluster.pipelines=1,2", "cluster.router.headroom=0.5"], "cluster.pipelines=1"),
    ],
)
def test_a_sweep_may_give_a_key_that_only_some_of_its_runs_read(
    swept: list[str], without: str, capfd: pytest.CaptureFixture[str]
) -> None:
    own = ["workload=constant", "workload.duration_s=2", "policy=inference_only", "finetune=none"]
    assert main(["simulate", "-m", *own, *swept, "hydra.sweep.dir=swept"]) == 0
    assert main(["simulate", *own, without, swept[1]]) == 2
    assert f"{swept[1].partition('=')[0]} changes nothing here: " in capfd.readouterr().err


def test_a_sweep_that_goes_on_runs_only_what_is_missing(capfd: pytest.CaptureFixture[str]) -> None:
    sweep = ["simulate", "-m", *SHORT, "policy=coserving,temporal", "hydra.sweep.dir=sweep"]
    assert main(sweep) == 0
    out = capfd.readouterr().out
    first, second = (Path(f"sweep/{n}/summary.json") for n in (0, 1))
    kept, asked = first.stat().st_mtime_ns, contents(first.parent)
    second.unlink()
    assert main([*sweep, "run.resume=true"]) == 0
    assert first.stat().st_mtime_ns == kept and second.exists()
    assert "run.resume=True" in Path("sweep/1/.hydra/overrides.yaml").read_text()
    assert contents(first.parent) == asked
    assert capfd.readouterr().out == out
    whole = contents(Path("sweep"))
    assert main([*sweep, "run.resume=true", "seed=1"]) == 1
    assert (
        "sweep/0 holds a run of other settings (seed 0, asked for 1); choose another folder; "
        "a sweep is resumed with all values of its axes, in their order\n"
    ) in capfd.readouterr().err
    assert main([*sweep, "run.resume=true", "policy=temporal"]) == 1
    assert '(policy.name "coserving", asked for "temporal_64", ' in capfd.readouterr().err
    assert main(sweep) == 1 and first.stat().st_mtime_ns == kept
    assert "sweep/0 holds a run already" in capfd.readouterr().err
    assert contents(Path("sweep")) == whole
    assert main([*sweep, "run.resume=maybe"]) == 1
    assert "run.resume must be true or false, got 'maybe'" in capfd.readouterr().err


def test_a_run_is_not_replaced(capfd: pytest.CaptureFixture[str]) -> None:
    folder = simulate()
    out = capfd.readouterr().out
    kept = contents(folder)
    command = ["simulate", *SHORT, f"hydra.run.dir={folder}"]
    for argv, why in (
        (
            command,
            "already: choose another folder, or, where it is the same run, run.resume=true takes it as it is",
        ),
        (
            [*command, "seed=1"],
            "already: choose another folder, or, where it is the same run, run.resume=true",
        ),
        (
            [*command, "seed=1", "run.resume=true"],
            "of other settings (seed 0, asked for 1); choose another folder\n",
        ),
    ):
        assert main(argv) == 2
        assert f"coserve simulate: error: out holds a run {why}" in capfd.readouterr().err
        assert contents(folder) == kept
    assert main([*command, "run.resume=true"]) == 0
    assert capfd.readouterr().out == out
    assert contents(folder) == kept


@pytest.mark.parametrize("missing", [".", "bounds/inference_only", "bounds/finetune_only"])
def test_what_is_missing_of_a_run_and_its_bounds_is_made_up_for(
    missing: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = simulate()
    told, kept = capfd.readouterr().out, contents(folder)
    runs = [folder / name for name in (".", "bounds/inference_only", "bounds/finetune_only")]
    written = {run: (run / "summary.json").stat().st_mtime_ns for run in runs}
    command = ["simulate", *SHORT, f"hydra.run.dir={folder}"]
    (folder / missing / "summary.json").unlink()
    # What is there is never replaced, and that is said before anything is simulated.
    there = contents(folder)
    assert main(command) == 2
    assert " holds a run already" in capfd.readouterr().err
    assert {path: text for path, text in contents(folder).items() if ".hydra" not in path.parts} == {
        path: text for path, text in there.items() if ".hydra" not in path.parts
    }
    assert main([*command, "run.resume=true"]) == 0
    assert capfd.readouterr().out == told
    tables = {
        path: text for path, text in kept.items() if path.suffix == ".parquet" or path.name == "summary.json"
    }
    assert tables.items() <= contents(folder).items()
    for run in runs:
        same = (run / "summary.json").stat().st_mtime_ns == written[run]
        assert same == (run != folder / missing), run


def contents(folder: Path) -> dict[Path, bytes]:
    """Of all files below."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_least_chunk_beyond_what_an_iteration_takes_is_the_whole_iteration() -> None:
    own = ("slo.classes.default.ttft_s=0.02", "workload.duration_s=10", "run.bounds=false")
    rows = [
        read_run(simulate(*own, f"policy.min_chunk_tokens={tokens}", folder=str(tokens))).summary
        for tokens in (512, 10**15)
    ]
    assert rows[0]["attainment"] < 0.95
    assert rows[0]["ttft_mean_s"] == rows[1]["ttft_mean_s"]


def test_a_twice_too_optimistic_predictor_breaks_coserving_and_slack_recovers() -> None:
    """The one knows no more than which requests were late."""
    rows = {}
    for policy in ("coserving", "coserving_slack"):
        folder = simulate(
            f"policy={policy}", "cost.predictor.factor=0.5", "workload.duration_s=60", folder=policy
        )
        rows[policy] = read_run(folder).summary["attainment"]
    assert rows["coserving"] < 0.95
    assert rows["coserving_slack"] >= 0.95


def test_room_for_the_kv_cache_follows_memory_and_what_finetuning_keeps() -> None:
    def room(*argv: str, folder: str) -> float:
        run = read_run(simulate(*argv, "run.bounds=false", "workload.duration_s=5", folder=folder))
        rows = run.table("iterations")
        return rows["kv_blocks_used"][rows["end_s"] <= 5].max() / run.summary["kv_use_max"]

    base = room(folder="a")
    assert room("finetune=none", folder="b") > 1.2 * base
    assert room("cluster.memory_utilization=0.8", folder="c") < 0.9 * base
    assert room("policy=inference_only", folder="d") == pytest.approx(room("finetune=none", folder="e"))


def test_finite_data_counts_against_a_peak_over_the_same_time() -> None:
    own = ("finetune.jobs.sky_t1.epochs=1", "finetune.jobs.sky_t1.data.samples=16")
    run = read_run(simulate(*own, "policy=finetune_only", "workload.duration_s=60"))
    assert run.summary["finetune_share_of_peak"] == pytest.approx(1.0)
    # Cut inside the last iteration, which goes on to its end.
    duration_s = run.table("steps")["end_s"].max() - 1e-3
    run = read_run(simulate(*own, "policy=finetune_only", f"workload.duration_s={duration_s}", folder="cut"))
    tokens, end_s = (run.table("steps")[key].to_numpy() for key in ("tokens", "end_s"))
    peak = (tokens / end_s.clip(min=duration_s)).sum()
    assert end_s.max() > duration_s and run.summary["peak_finetune_tok_s"] == pytest.approx(peak)


@pytest.mark.parametrize(
    "policy", ["coserving", "separate_25", "separate_50", "separate_75", "finetune_only"]
)
def test_an_epoch_is_of_the_whole_data_set_however_many_pipelines_finetune(policy: str) -> None:
    """The peak is that of all pipelines, also where fewer finetune."""
    Path("lengths.json").write_text(json.dumps([1000] * 30))
    own = ("finetune=file", "finetune.jobs.file.data.file=lengths.json", "finetune.jobs.file.epochs=2")
    run = read_run(simulate(f"policy={policy}", *own, "workload.duration_s=60", "run.bounds=false"))
    assert run.table("steps")["tokens"].sum() == 60_000
    assert run.summary["peak_finetune_tok_s"] == pytest.approx(1000)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (10, None),
        (37.4, "the last samples of the finetuning data were begun and not trained"),
        (60, "all finetuning data were trained"),
    ],
)
def test_finite_data_are_told_to_be_trained_or_not(
    seconds: float, told: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("lengths.json").write_text(json.dumps([1000] * 320))
    own = ("finetune=file", "finetune.jobs.file.data.file=lengths.json", "finetune.jobs.file.epochs=1")
    packed = ("cluster.pipelines=2", "run.bounds=false", "run.drain_s=0")
    run = read_run(simulate(*own, *packed, f"workload.duration_s={seconds}"))
    out, err = capfd.readouterr()
    steps = run.table("steps")
    data_done_s = steps["end_s"].max() if steps["samples"].sum() == 320 else math.nan
    assert run.summary["data_done_s"] == pytest.approx(data_done_s, nan_ok=True)
    assert ("done s" in out) == (not math.isnan(data_done_s)) == (told or "").startswith("all")
    notes = [line for line in err.splitlines() if "finetuning data" in line]
    assert [note.removeprefix("note: ")[: len(told or "")] for note in notes] == ([told] if told else [])


def test_a_pipeline_that_serves_leaves_samples_to_the_others() -> None:
    """All requests are packed onto one of two, and both are done at nearly the same time."""
    Path("lengths.json").write_text(json.dumps([1000] * 320))
    own = ("finetune=file", "finetune.jobs.file.data.file=lengths.json", "finetune.jobs.file.epochs=1")
    run = read_run(simulate(*own, "cluster.pipelines=2", "run.bounds=false", "workload.duration_s=60"))
    steps = run.table("steps")
    samples, end_s = (steps.groupby("pipeline")[key] for key in ("samples", "end_s"))
    assert samples.sum().sum() == 320 and samples.sum().max() > 1.2 * samples.sum().min()
    assert end_s.max().min() > 0.9 * end_s.max().max()


def test_of_two_jobs_the_one_whose_data_end_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    """The other never ends: on each pipeline one is done and one is not."""
    own = ("start_s=0", "epochs=1", "data.samples=32")
    ends = [f"finetune.jobs.instructions.{setting}" for setting in own]
    run = read_run(simulate("finetune=two_jobs", *ends, "policy=finetune_only", "run.bounds=false"))
    steps = run.table("steps")
    last_s = steps.loc[steps["job"] == "instructions", "end_s"].max()
    err = capfd.readouterr().err
    assert f"note: all data of finetuning job instructions were trained by {last_s:,.0f} s" in err
    assert "were begun" not in err and "sky_t1 were trained" not in err


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        (("cluster.pipelines=1",), "a100_80gb"),
        (("cluster.pipelines=3",), "3 x a100_80gb"),
        (("cluster.pipelines=3", "cluster.tp=2"), "6 x a100_80gb in 3 pipelines"),
        (("cluster.pipelines=1", "cluster.tp=2"), "2 x a100_80gb in 1 pipeline"),
        (("cluster.pipelines=2", "+device.price_per_hour=1.5"), "2 x a100_80gb at 3.00 per hour"),
        (("cluster=mixed",), "2 x a100_80gb + h100"),
    ],
)
def test_the_devices_of_a_cluster_are_in_the_title(
    cluster: tuple[str, ...], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    simulate("run.bounds=false", "policy=coserving", *cluster)
    assert f", llama_3_1_8b, {told}, " in capfd.readouterr().out


def test_a_report_of_runs_has_their_notes(capfd: pytest.CaptureFixture[str]) -> None:
    """And so has a run that is resumed."""
    own = ("cluster.limits.kv_tokens=1000", "policy=coserving", "run.bounds=false")
    folder = simulate(*own)
    notes = read_run(folder).summary["notes"]
    told = capfd.readouterr().err
    assert any("were rejected" in note for note in notes) and all(f"note: {note}\n" in told for note in notes)
    simulate(*own, "run.resume=true")
    assert capfd.readouterr().err == told
    assert main(["report", str(folder)]) == 0
    assert capfd.readouterr().err == told


def test_runs_that_differ_in_a_setting_are_told_apart(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["simulate", "-m", *SHORT, "policy.margin=0,0.3", "hydra.sweep.dir=sweep"]
    assert main(argv) == 0
    out = capfd.readouterr().out
    assert "coserving (margin=0.3)" in out
    assert Path("sweep/compare.png").is_file()


def test_a_sweep_over_rates_ends_with_a_figure(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["simulate", "-m", "workload=poisson", "workload.duration_s=10", "hydra.sweep.dir=sweep"]
    assert main([*argv, "policy=coserving,temporal", "workload.rate_rps=2,4", "seed=0,1"]) == 0
    assert capfd.readouterr().out.rstrip().endswith("compare.png")


LATE = "arrival_s,prompt_tokens,output_tokens\n5,10,5\n1,20,5\n3,30,5\n"
BAD = {
    "polcy=coserving": "no key or group named 'polcy'; did you mean 'policy'?",
    "policy=temporl": "no policy named 'temporl'; did you mean 'temporal'?",
    "policy.margn=0.1": "'policy.margn'",
    "policy.margin=wide": "policy.margin must be a number, got 'wide'",
    "policy.margin=2": "policy.margin must be in [0, 1), got 2",
    "workload.rate_rps=fast": "workload.rate_rps must be a number, got 'fast'",
    "workload.rate_rps=-1": "workload.rate_rps must be a number above 0, got -1",
    "workload.duration_s=0": "workload.duration_s",
    "slo.classes.default.tpot_s=-1": "slo.classes.default.tpot_s must be above 0",
    "slo.classes.default.tpot_s=0.001": "slo.classes.default.tpot_s cannot be kept",
    "slo.classes.default.ttft_s=0.001": "slo.classes.default.ttft_s cannot be kept",
    "+slo.more=1": "slo has no key 'more'; known: name, classes, tpot_s",
    "+slo.tpot_s={typo:0.1}": "slo.tpot_s.typo is read by no SLO class",
    "+slo.tpot_s.mine=1": "slo.tpot_s.mine is read by no SLO class; their bounds are slo.tpot_s.llama_3_1_8b",
    "slo.tpot_s.qwen2_5_7b=1": "slo.tpot_s.qwen2_5_7b is read by no SLO class; their bounds are slo.tpot_s.llama",
    "slo=two_classes +slo.tpot_s.llama_3_1_8b=1": "their bounds are slo.classes.interactive.tpot_s, slo.classes.b",
    "+slo.classes.more=1": "slo.classes.more must be a group of keys, got 1",
    "+experiment.more=1": "no key or group named 'experiment.more'; did you mean 'experiment'?",
    "cluster.limits.kv_tokens=3": "cluster.limits.kv_tokens must hold a block of 16 tokens, got 3",
    "cluster.limits.admission=random": "cluster.limits.admission must be one of fcfs, deadline, shortest",
    "cluster.limits.lookahead=2": "cluster.limits.lookahead must be 0 or 1, got 2",
    "cluster.pipelines=0": "cluster.pipelines must be in 1..4096, got 0",
    "cluster.tp=3": "tp must divide heads 32",
    "cluster.groups=[{pipelines:1,device:h100}]": "cluster.pipelines (equal pipelines) or cluster.groups",
    "cluster.pipelines=null cluster.groups=[{pipelines:1,device:h10}]": "no device named 'h10'; did you mean 'h100'?",
    "model=llama_3_1_70b cluster.tp=1": "leaves no room for finetuning",
    "policy=separate cluster.pipelines=3": "policy=separate policy.inference_share=0.333333333333, 0.666666666667",
    "policy=separate_25 cluster.pipelines=2": "a share of 0.25 of 2 pipelines cannot serve: whole ones must, and at "
    "least one must finetune; possible with policy=separate policy.inference_share=0.5",
    "policy=separate_25 cluster.pipelines=1": "possible with cluster.pipelines=2 or more",
    "policy=separate_25 cluster.pipelines=9": "0.777777777778 and other multiples of 1/9",
    "workload.adapters.zipf=2": "workload.adapters.zipf changes nothing here: workload.adapters.count is 0",
    "workload.adapters={base_share:0.5}": "workload.adapters.base_share changes nothing here: workload.adapters.count",
    "cluster=single cluster.router.headroom=0.5": "headroom changes nothing here: the cluster has 1 pipeline",
    "cluster.pipelines=null cluster.groups=[{pipelines:1}] cluster.router.headroom=0.5": "the cluster has 1 pipeline",
    "finetune.lora.targets=[down]": "finetune.lora.targets must be among",
    "finetune.jobs.sky_t1.weight=0": "error: finetune.jobs.sky_t1.weight must be a number above 0",
    "finetune.jobs.sky_t1.order=x": "error: finetune.jobs.sky_t1.order must be one of layer_major, window_major",
    "finetune.jobs.sky_t1.data.samples=0": "error: finetune.jobs.sky_t1.data.samples must be a whole number",
    "finetune=file": "error: finetune.jobs.file.data.file must be the path of a data set, got none",
    "workload/lengths=lognormal workload.lengths.prompt.quantiles.p50=0": "lengths.prompt.quantiles.p50 must",
    "hydra.run.dir=": "hydra.run.dir must be a folder, got nothing",
    "device.peak_flops=inf": "device.peak_flops must be from 1e+08 to 1e+20 FLOP/s, got inf",
    "device.link_bandwidth_bytes_s=inf": "device.link_bandwidth_bytes_s must be 0 or from 1e+06 to 1e+16 B/s, got inf",
    "device.peak_flops=989": "got 989; 989 TFLOP/s are 989e12",
    "device.peak_flops=989000": "got 989000; 989000 GFLOP/s are 989000e9",
    "device.memory_bandwidth_bytes_s=3350": "from 1e+06 to 1e+19 B/s, got 3350; 3350 GB/s are 3350e9",
    "device.link_bandwidth_bytes_s=900": "device.link_bandwidth_bytes_s must be 0 or from 1e+06 to 1e+16 B/s, got 900",
    "device.memory_bytes=80": "device.memory_bytes must be from 1e+06 to 1e+15 B, got 80; 80 GB are 80e9",
    "device.memory_bytes=81920": "got 81920; 81920 MB are 81920e6",
    "device.l2_bytes=40": "got 40; 40 MB are 40e6",
    "device.vector_flops=19.5": "got 19.5; 19.5 TFLOP/s are 19.5e12",
    "device.clock_hz=1.41": "got 1.41; 1.41 GHz are 1.41e9",
    "device.clock_hz=1410000": "device.clock_hz must be from 1e+07 to 1e+12 Hz, got 1410000; 1410000 kHz are 1410000e3",
    "device.link_bandwidth_bytes_s=-1": "device.link_bandwidth_bytes_s must be 0 or from 1e+06 to 1e+16 B/s, got -1",
    "model.hidden=7": "model.hidden must be a multiple of model.heads, got 7 and 32",
    "model.head_dim=7": "model.head_dim must be even, for rotary embeddings, got 7",
    "model.kv_heads=3": "model.heads must be a multiple of model.kv_heads, got 32 and 3",
    "model.layers=0": "model.layers must be at least 1 and at most 2147483647, got 0",
    "device.power_w=-5": "device.power_w must be at least 0 and finite, got -5.0",
    "+device.price_per_hour=-2": "device.price_per_hour must be at least 0 and finite, got -2.0",
    "+device.idle_power_w=500": "device.idle_power_w must be at most power_w 400, got 500",
    "policy.budget_s=fast": "policy.budget_s must be a number, got 'fast'",
    "policy.budget_s=0": "policy.budget_s must be above 0 seconds, got 0",
    "seed=x": "seed must be a whole number from 0, got 'x'",
    "run.drain_s=-1": "run.drain_s must be at least 0 seconds",
    "workload=csv": "workload.file must be the path of a trace",
    "workload=csv workload.file=none.csv": "no such file: none.csv",
    "workload=azure_conv": "coserve fetch azure_conv",
    "workload=csv workload.file=empty.csv": "empty.csv",
    "workload=csv workload.file=bad.csv": "bad.csv: row 3",
    "workload=csv workload.file=nan.csv": "nan.csv: row 2",
    "workload=csv workload.file=zero.csv": "zero.csv: row 2",
    "workload=csv workload.file=blank.csv": "no column 'arrival_s', got an empty file",
    "workload=csv workload.file=folder": "folder is a folder, and must be a file",
    "workload.rate_rps=1e9": "workload.rate_rps x workload.duration_s must be at most 10,000,000 requests",
    "workload.duration_s=1e9": "got 8 x 1e+09 = 8e+09",
    "workload.duration_s=1e9 workload.rate_rps=1e-4": "workload.duration_s must be at most 10,000,000 seconds",
    "workload=csv workload.file=late.csv workload.repeat=true workload.duration_s=1e8": "at most 10,000,000",
    "cost.predictor.factor=0": "error: cost.predictor.factor must be in [0.001, 1000], got 0",
    "cost.world.spread=2": "error: cost.world.spread must be in [0, 1), got 2",
    "+cost.world.of.host_s=inf": "cost.world.of.host_s must be at least 0 and finite, got inf",
    "+cost.path=mine.parquet": "error: cost has no key 'path'; known: world, predictor",
    "model.name=mine": "give it with +slo.tpot_s.mine=..., or slo.classes.default.tpot_s=... itself",
    "hydra.run.dir=file/below": "file",
    "run=5": "run must be a group of keys, got 5",
    "policy.name=[a]": "policy.name must be text that is not empty, got ['a']",
    "device.name=''": "device.name must be text that is not empty, got ''",
    "~seed": "seed is not there; the command needs it",
    "policy=5": "policy must be one of coserving, ",
    "policy=[]": "policy must be one of coserving, ",
    "cost={a:1}": "no key or group named 'cost.a'",
    "cost.world=[1]": "cost.world must be a group of keys, got [1]",
    "cost.predictor.of.rows=1000000000": "cost.predictor.of.rows must be at least 100 to fit all terms and at most",
    "cost.predictor.of.seed=-1": "cost.predictor.of.seed must be at least 0, got -1",
    "cluster/router=power_of_two cluster.router.seed=-1": "cluster.router.seed must be at least 0, got -1",
    "cluster/router=adapter_affinity cluster.router.max_imbalance=inf": "cluster.router.max_imbalance must be at",
    "cluster.limits.max_sequences=0": "cluster.limits.max_sequences must be at least 1, got 0",
    "cluster.limits.block_tokens=0": "cluster.limits.block_tokens must be at least 1, got 0",
    "cluster.pipelines=1000000000": "cluster.pipelines must be in 1..4096, got 1000000000",
    "cluster.pipelines=null cluster.groups=[{pipelines:4000},{pipelines:97}]": "at most 4096 pipelines together",
    "slo.tpot_s.llama_3_1_8b=-1": "slo.tpot_s.llama_3_1_8b must be above 0 seconds, got -1.0",
    "device.memory_bandwidth_bytes_s=1e-300": "device.memory_bandwidth_bytes_s must be from 1e+06 to 1e+19 B/s",
    "device.link_bandwidth_bytes_s=0.5": "B/s, got 0.5",
    "+device.extras.layer_fixed_s=inf": "device.extras.layer_fixed_s must be above 0 and finite, got inf",
    "finetune.lora.targets=[]": "finetune.lora.targets must name at least one linear layer, got none",
    "finetune.lora.targets=[q_proj,q_proj]": "finetune.lora.targets must name each layer once, got q_proj again",
    "finetune.jobs.sky_t1.data.samples=1000000000": "sky_t1.data.samples must be a whole number, at least 1 and",
    "finetune=file finetune.jobs.file.data.file=''": "finetune.jobs.file.data.file must be the path of a file, got ''",
    "finetune=file finetune.jobs.file.data.file=bad.csv finetune.jobs.file.data.column=''": "data.column must be null",
    "workload.adapters.count=1000000000": "workload.adapters.count must be a whole number, at least 0 and",
    "workload.arrivals.bin_s=1e-9": "workload.arrivals.bin_s must leave at most 10,000,000 bins",
    "workload=gamma workload.arrivals.cv=1e-200": "workload.arrivals.cv must be a number at least 0.001",
    "workload=csv workload.file=[]": "workload.file must be the path of a file, got []",
    "workload=csv workload.file=far.csv": "far: the trace lasts 2e+300 s, of which at most 10,000,000 can be run",
    "workload=csv workload.file=late.csv workload.rate_rps=1e-300": "the trace lasts 3e+300 s, of which at most",
    "workload=csv workload.file=named.csv": "named.csv: row 2, column slo: no SLO class 'chat'; the slo",
    "workload=closed_loop workload.clients=1000000000": "workload.clients must be a whole number, at least 1 and",
    "workload=closed_loop workload.duration_s=1e9": "workload.duration_s must be at most 10,000,000 seconds",
    "workload=closed_loop workload.retry_s=1e-9": "workload.retry_s must be a number at least 0.001, got 1e-09",
    "workload=burstgpt workload.reader.models=[]": "workload.reader.models must be null or a list of names, got []",
    "workload/lengths=from_trace workload.lengths.file=''": "workload.lengths.file must be the path of a file, got ''",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input_is_one_clear_line(override: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("empty.csv").write_text("arrival_s,prompt_tokens,output_tokens\n")
    Path("bad.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,many,5\n")
    Path("nan.csv").write_text("arrival_s,prompt_tokens,output_tokens\nnan,10,5\n")
    Path("zero.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,0,5\n")
    Path("late.csv").write_text(LATE)
    Path("far.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1e300,10,5\n")
    Path("named.csv").write_text("arrival_s,prompt_tokens,output_tokens,slo\n0,10,5,chat\n")
    Path("blank.csv").write_text("")
    Path("folder").mkdir()
    Path("file").write_text("not a folder")
    assert main(["simulate", *override.split()]) == 2
    err = capfd.readouterr().err
    assert err.startswith("coserve simulate: error: ")
    assert BAD[override] in err
    assert err.count("\n") == 1
    assert not Path("runs").exists()


BROKEN = """
from sim.core.plan import Plan


class Broken:
    serves = True
    finetunes = False

    def plan(self, view):
        return Plan() if view.now_s == 0 else next(map(self.pick, [view]))

    def pick(self, view):
        raise ValueError("none of\\nthem") from KeyError(3)
"""


@pytest.mark.parametrize("workers", ["processes", "basic"])
def test_a_policy_that_raises_is_told_with_the_lines_of_its_own_file(
    workers: str, inside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = inside / f"policy_under_{workers}.py"
    file.write_text(BROKEN)
    monkeypatch.syspath_prepend(inside)
    monkeypatch.setenv("PYTHONPATH", f"{inside}{os.pathsep}{CONFIGS.parent}")
    own = ("policy=finetune_only", f"policy._target_={file.stem}.Broken")
    lines = [
        r"policy Broken at \d\.\d{6} s: ValueError: none of; them",
        rf"  {file}:10 in plan: return Plan\(\) if view\.now_s == 0 else next\(map\(self\.pick, \[view\]\)\)",
        rf'  {file}:13 in pick: raise ValueError\("none of\\nthem"\) from KeyError\(3\)',
    ]
    assert main(["simulate", *SHORT, *own]) == 2
    assert re.fullmatch("coserve simulate: error: " + "\n".join(lines) + "\n", capfd.readouterr().err)
    sweep = ["simulate", "-m", *SHORT, *own, "seed=0,1", f"hydra/launcher={workers}"]
    assert main(sweep) == 1
    failed = [rf"run .* seed={seed} failed: " + "\n".join(lines) + "\n" for seed in (0, 1)]
    said = capfd.readouterr().err
    assert all(re.search(text, said) for text in failed) and "Traceback" not in said and "simpy" not in said


OWN = """
from sim.core.plan import Plan


class Own:
    serves = finetunes = True

    def __init__(self, *, few: int) -> None:
        self.few = few

    def plan(self, view):
        return Plan()
"""
BAD_POLICIES = {
    "serves = finetunes = True": (
        "",
        "policy Own in {file} needs serves = True or False, finetunes = True or False",
    ),
    "serves = f": ("f", "policy Own in {file} needs serves = True or False"),
    "= finetunes = True": (
        "= True; finetunes = 'yes'",
        "policy Own in {file} needs finetunes = True or False",
    ),
    "plan(self, view)": ("plam(self, view)", "policy Own in {file} needs a method plan(view) -> Plan"),
    "class Own:": (
        "class Own",
        "policy._target_ '{module}.Own' cannot be imported: {file}, line 5: not Python: ",
    ),
    "import Plan": (
        "import Plam",
        "policy._target_ '{module}.Own' cannot be imported: {file}, line 2: ImportError: cannot import name 'Plam'",
    ),
    "from sim.core.plan": (
        "from nowhere.plan",
        "policy._target_ '{module}.Own' cannot be imported: {file}, line 2: ModuleNotFoundError: No module named",
    ),
    "Own:": ("Owl:", "policy._target_ names nothing that exists: '{module}.Own'; did you mean 'Owl'?"),
    "few: int": ("fw: int", "policy has no key 'few'; did you mean 'fw'?; known: fw"),
    "few: int)": ("few: 'Int')", "policy._target_: an annotation of Own names 'Int', which is not imported"),
    "self.few = few": (
        "self.few = fw",
        "policy Own: NameError: name 'fw' is not defined\n  {file}:9 in __init__: self.few = fw",
    ),
    "    def plan(self, view):\n        return Plan()": (
        "    def assign(self, pipelines):\n        return [self]",
        "policy Own in {file}: assign(4) must return as many policies, got 1",
    ),
}


@pytest.mark.parametrize("change", BAD_POLICIES)
def test_a_policy_that_is_none_is_told_by_its_file(
    change: str, inside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    instead, told = BAD_POLICIES[change]
    file = inside / f"own_{list(BAD_POLICIES).index(change)}.py"
    file.write_text(OWN.replace(change, instead))
    monkeypatch.syspath_prepend(inside)
    (inside / "policy").mkdir()
    (inside / "policy/own.yaml").write_text(f"name: own\n_target_: {file.stem}.Own\nfew: 3\n")
    assert main(["simulate", *SHORT, "--config-dir", ".", "policy=own"]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"coserve simulate: error: {told.format(file=file, module=file.stem)}")
    assert err.count("\n") == 1 + told.count("\n")


def test_keys_of_a_policy_in_a_folder_of_its_own_are_known(
    inside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (inside / "policy").mkdir()
    (inside / "policy/own.yaml").write_text("name: own\n_target_: nowhere.Own\nfew: 3\n")
    for place in (["--config-dir", "."], [f"hydra.searchpath=[{inside}]"]):
        assert main(["simulate", *place, "policy=own", "policy.fw=4"]) == 2
        assert "no key or group named 'policy.fw'; did you mean 'policy.few'?" in capfd.readouterr().err
        assert main(["simulate", *place, "policy=own"]) == 2
        missing = (
            "policy._target_ names a module that does not exist: 'nowhere.Own'; is its folder on PYTHONPATH?"
        )
        assert missing in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "missing", "ways"),
    [
        (
            "device=l4 model=llama_3_1_8b",
            "to take 0.06468 s on llama_3_1_8b, got 0.045",
            ["cluster.tp=2", "model=llama_3_2_3b", "slo.classes.default.tpot_s=0.065"],
        ),
        (
            "model=llama_3_1_70b cluster.tp=1",
            "need 60.4 GiB more per device",
            ["cluster.tp=4", "model=codellama_34b"],
        ),
        (
            "cluster.limits.kv_tokens=900000",
            "need 53.7 GiB more per device",
            ["cluster.tp=2", "cluster.limits.kv_tokens=null", "model=qwen2_5_7b"],
        ),
        (
            "device=l4 model=llama_3_1_70b",
            "need 11.9 GiB more per device",
            ["cluster.tp=8 finetune.jobs.sky_t1.order=window_major", "model=llama_3_2_3b"],
        ),
        (
            "device=rtx_4090 finetune.jobs.sky_t1.memory=stash",
            "17.5 more: runtime 0.5 GiB, weights 15.0 GiB",
            [
                "cluster.tp=4",
                "finetune.jobs.sky_t1.memory=auto",
                "finetune.jobs.sky_t1.cutoff_len=1024",
                "model=llama_3_2_3b",
            ],
        ),
        (
            # The degree stays when another model is chosen: Llama 3.2 3B, which fits on one device, has 24 heads.
            "device=l4 model=llama_3_1_70b model.tp=16 finetune.jobs.sky_t1.memory=stash",
            "finetuning 26.0 GiB",
            [
                "finetune.jobs.sky_t1.memory=auto finetune.jobs.sky_t1.order=window_major",
                "finetune.jobs.sky_t1.cutoff_len=2048",
                "model=codellama_34b",
            ],
        ),
        ("device.memory_bytes=3e8", "need 15.6 GiB more per device", []),
    ],
)
def test_what_devices_cannot_do_is_refused_with_all_that_would_help(
    given: str, missing: str, ways: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Each of them does."""
    argv = [*given.split(), "workload.duration_s=20", "run.bounds=false"]
    assert main(["simulate", *argv]) == 2
    error = capfd.readouterr().err
    assert missing in error and error.count("\n") == 1
    told = error.rstrip().partition("; possible with ")[2]
    assert told.split(" or ") == ways if ways else "no smaller model would do" in error
    for way in ways:
        assert main(["simulate", *argv, *way.split()]) == 0, way


def test_bounds_of_models_are_read_where_these_run(capfd: pytest.CaptureFixture[str]) -> None:
    """Those of a sweep over models may be given for all of them."""
    own = ["workload=poisson", "workload.duration_s=5", "run.bounds=false"]
    given = ["model.name=mine", "+slo.tpot_s.mine=0.06"]
    assert main(["simulate", *own, *given, "hydra.run.dir=one"]) == 0
    assert read_run("one").summary["classes"][0]["tpot_bound_s"] == 0.06
    sweep = ["simulate", "-m", *own, "model=llama_3_2_1b,llama_3_2_3b", "hydra.sweep.dir=two"]
    assert main([*sweep, "slo.tpot_s.llama_3_2_1b=0.06"]) == 0
    bounds = [read_run(f"two/{n}").summary["classes"][0]["tpot_bound_s"] for n in (0, 1)]
    assert bounds == [0.06, 0.045]
    assert main([*sweep, "+slo.tpot_s.llama_3_2_1=0.06"]) == 1
    assert "slo.tpot_s.llama_3_2_1 is read by no SLO class" in capfd.readouterr().err


def test_a_small_slo_class_that_is_not_kept_is_said_to_be_so(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["simulate", "workload=poisson", "workload.duration_s=20", "slo=two_classes", "run.bounds=false"]
    tight = [*argv, "workload.slo_mix={interactive:0.02,batch:0.98}", "slo.classes.interactive.ttft_s=0.013"]
    assert main(tight) == 0
    err = capfd.readouterr().err
    assert re.search(
        r"SLO class interactive does not keep its bounds: 0\.0% of its \d+ requests meet them", err
    )
    for mix in ("{interactive:0.02,batch:0.98}", "{batch:1.0}"):
        assert main([*argv, f"workload.slo_mix={mix}"]) == 0
    assert "SLO class" not in capfd.readouterr().err


def test_a_slo_that_cannot_be_kept_is_said_to_be_so(capfd: pytest.CaptureFixture[str]) -> None:
    argv = [
        "simulate",
        "workload=poisson",
        "workload.duration_s=20",
        "workload.rate_rps=12",
        "cluster.pipelines=1",
    ]
    tight = [*argv, "device=rtx_4090", "policy.min_chunk_tokens=256", "slo.classes.default.tpot_s=0.02"]
    assert main(tight) == 0
    err = capfd.readouterr().err
    assert "a decode beside the least chunk of a prompt, 256 tokens, is predicted to take" in err
    assert "above the TPOT bound of 20 ms: while prompts arrive it is not kept" in err
    assert "serving alone does not keep the SLO either: " in err
    unbounded = [
        *argv,
        "slo.classes.default.tpot_s=inf",
        "slo.classes.default.ttft_s=inf",
        "run.bounds=false",
    ]
    assert main([*unbounded, "run.drain_s=1"]) == 0
    assert "no SLO class bounds TPOT, so that a policy" in capfd.readouterr().err
    assert main([*argv, "workload.rate_rps=1"]) == 0
    assert "SLO" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        ("kv_tokens=4000", "K/V room for 4,000 tokens in a pipeline is too small"),
        (
            "max_sequences=8",
            "requests wait for one of 8 sequences of a pipeline to end (cluster.limits.max_sequences)",
        ),
    ],
)
def test_too_little_room_for_answers_is_told(
    limit: str, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "simulate",
        "workload=poisson",
        "workload.duration_s=60",
        "cluster.pipelines=1",
        "run.bounds=false",
    ]
    for rate_rps in (4, 0.2):
        assert main([*argv, f"workload.rate_rps={rate_rps}", f"cluster.limits.{limit}"]) == 0
        err = capfd.readouterr().err
        assert (told in err) == (rate_rps == 4)
        assert ("preempted" in err) == (rate_rps == 4 and "kv_tokens" in limit)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["device=l40s", "model=llama_3_2_1b"], ["l40s"]),
        (["device=a100_40gb", "device.name=mine"], ["mine"]),
        (
            [
                "cluster=mixed",
                "cluster.groups=[{pipelines:1},{pipelines:2,device:b200},{pipelines:1,device:b200}]",
            ],
            ["b200"],
        ),
        (["cluster=mixed"], []),
        (["device=rtx_4090", "model=llama_3_2_1b"], []),
        (["device=b200", "+device.extras.layer_fixed_s=4e-6"], []),
    ],
)
def test_devices_that_nobody_measured_are_told(
    given: list[str], told: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    simulate("policy=inference_only", "finetune=none", "run.bounds=false", *given)
    notes = [line for line in capfd.readouterr().err.splitlines() if "not measured" in line]
    assert notes == [
        f"note: the efficiencies of {name} are those of its architecture, not measured: its seconds may be off by 10 "
        "to 40 % (profiles/README.md)"
        for name in told
    ]


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        (
            ["slo.tpot_s.llama_3_1_8b=45"],
            "SLO class default bounds TPOT by 45 s per token: bounds are in seconds, 45 ms are 0.045",
        ),
        (
            ["slo.classes.default.tpot_s=5"],
            "SLO class default bounds TPOT by 5 s per token: bounds are in seconds, 5 ms are 0.005",
        ),
        (["slo.classes.default.tpot_s=4", "slo.classes.default.ttft_s=3600"], None),
        (["slo=two_classes"], None),
    ],
)
def test_a_tpot_bound_in_milliseconds_is_told(
    bounds: list[str], told: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    simulate(*bounds, "run.bounds=false")
    notes = [line for line in capfd.readouterr().err.splitlines() if "in seconds" in line]
    assert notes == ([] if told is None else [f"note: {told}"])


HEADER = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize("command", [["simulate", "hydra.run.dir=out"], ["compare", "hydra.sweep.dir=out"]])
@pytest.mark.parametrize(
    ("gap_s", "more", "told"),
    [
        (7200, [], "20 requests in 40.0 hours, a mean of 0.000139 per second"),
        (7200, ["workload.duration_s=20"], None),
        (7200, ["workload.rate_rps=2"], None),
        (0.002, [], "20 requests in 0.04 s, a mean of 500 per second"),
        (0, [], None),
        (1, [], None),
    ],
)
def test_a_trace_in_other_units_than_seconds_is_told_before_it_runs(
    gap_s: float, more: list[str], told: str | None, command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("my.csv").write_text(HEADER + "".join(f"{gap_s * n:g},100,10\n" for n in range(20)))
    own = [
        "policy=inference_only",
        "finetune=none",
        "run.bounds=false",
        "workload=csv",
        "workload.file=my.csv",
    ]
    assert main([*command, *own, *more]) == 0
    notes = [line for line in capfd.readouterr().err.splitlines() if "arrival_s" in line]
    hint = "(arrival_s is in seconds; workload.duration_s takes a part, workload.rate_rps another rate)"
    assert notes == ([] if told is None else [f"note: my: {told}, are simulated {hint}"])


def test_unsorted_stamps_are_sorted_with_one_note(capfd: pytest.CaptureFixture[str]) -> None:
    Path("late.csv").write_text(LATE)
    assert main(["simulate", "workload=csv", "workload.file=late.csv", "hydra.run.dir=out"]) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "late.csv" in line or "Warning" in line]
    assert told == ["note: late.csv: 2 of 3 rows are stamped earlier than a row above; sorted by time"]
    assert read_run("out").table("requests").sort_values("request")["prompt_tokens"].tolist() == [20, 30, 10]


def test_the_azure_trace_at_20_rps_over_four_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(os.environ.get("COSERVE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (data / "azure/AzureLLMInferenceTrace_conv.csv").is_file():
        pytest.skip("the Azure trace is not here")
    monkeypatch.setenv("COSERVE_DATA", str(data))
    argv = ["workload=azure_conv", "workload.rate_rps=20", "workload.duration_s=30", "run.bounds=false"]
    assert main(["simulate", *argv, "hydra.run.dir=out"]) == 0
    requests = read_run("out").table("requests")
    assert len(requests) == 600
    assert isinstance(requests, pd.DataFrame)


def test_the_summary_is_strict_json_with_missing_numbers_missing() -> None:
    folder = simulate("policy=finetune_only", "run.bounds=false")
    text = (folder / "summary.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["ttft_p99_s"] is None
