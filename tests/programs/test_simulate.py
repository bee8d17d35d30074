"""`coserve simulate` and `coserve compare` from the command line to the run folder."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest

from sim.cli import main
from sim.results import find_runs, read_run
from sim.simulate import all_policies, fitting_policies
from tests.programs.simulated import CONFIGS, SHORT, simulate

pytestmark = pytest.mark.usefixtures("inside")

POLICIES = sorted(path.stem for path in (CONFIGS / "policy").glob("*.yaml"))


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


def test_a_pipeline_that_serves_leaves_samples_to_the_others() -> None:
    """All requests are packed onto one of two, and both are done at nearly the same time."""
    Path("lengths.json").write_text(json.dumps([1000] * 320))
    own = ("finetune=file", "finetune.jobs.file.data.file=lengths.json", "finetune.jobs.file.epochs=1")
    run = read_run(simulate(*own, "cluster.pipelines=2", "run.bounds=false", "workload.duration_s=60"))
    steps = run.table("steps")
    samples, end_s = (steps.groupby("pipeline")[key] for key in ("samples", "end_s"))
    assert samples.sum().sum() == 320 and samples.sum().max() > 1.2 * samples.sum().min()
    assert end_s.max().min() > 0.9 * end_s.max().max()


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
