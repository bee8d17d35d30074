"""What `coserve simulate` says below a table of what the table does not."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from profiles.named import device_named, model_named
from profiles.schema import Provenance, write_profile
from sim.cli import main
from sim.core.rows import WORK_COLUMNS, work_row
from sim.core.specs import LoraSpec
from sim.core.work import Chunk, Work
from sim.cost.context import CostContext
from sim.cost.roofline import Roofline
from sim.results import read_run
from tests.programs.simulated import LATE, SHORT, simulate

pytestmark = pytest.mark.usefixtures("inside")


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
        (
            ["policy=coserving", "policy.budget_s=45"],
            "policy.budget_s is 45 s an iteration: bounds are in seconds, 45 ms are 0.045",
        ),
        (["slo.classes.default.tpot_s=4", "slo.classes.default.ttft_s=3600"], None),
        (["policy=coserving", "policy.budget_s=.inf"], None),
        (["slo=two_classes"], None),
    ],
)
def test_a_bound_in_milliseconds_is_told(
    bounds: list[str], told: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    simulate(*bounds, "run.bounds=false")
    notes = [line for line in capfd.readouterr().err.splitlines() if "in seconds" in line]
    assert notes == ([] if told is None else [f"note: {told}"])


@pytest.mark.parametrize(("policy", "idle"), [("finetune_only", 4), ("separate_25", 3), ("coserving", 0)])
def test_pipelines_that_only_finetune_without_a_job_are_told(
    policy: str, idle: int, capfd: pytest.CaptureFixture[str]
) -> None:
    simulate(f"policy={policy}", "finetune=none", "cluster.pipelines=4", "run.bounds=false")
    notes = [line for line in capfd.readouterr().err.splitlines() if "finetune=none" in line]
    told = f"note: {idle} of 4 pipelines only finetune, and do nothing since there is no finetuning job (finetune=none)"
    assert notes == ([told] if idle else [])


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


def test_a_reader_of_ones_own_that_breaks_ends_the_sweep_before_its_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader = "class Broken:\n    def read(self, file):\n        return {}[file]\n"
    (tmp_path / "own_reader.py").write_text(reader)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ("workload=csv", "workload.file=my.csv", "workload.reader._target_=own_reader.Broken")
    assert main(["simulate", "-m", *own, "seed=0,1", "hydra/launcher=basic", "hydra.sweep.dir=out"]) == 1
    err = capfd.readouterr().err
    assert err.count("KeyError: 'my.csv'") == 1 and "runs failed" not in err
