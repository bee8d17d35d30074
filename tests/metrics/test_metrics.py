"""Metrics against hand-made examples and against lists of every token time in plain Python."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.core.request import Slo
from sim.core.rows import ITERATION_COLUMNS, REQUEST_COLUMNS, Outcome, Recorder
from sim.core.specs import DeviceSpec
from sim.metrics import DEFINITIONS, PipelineFacts, column_views, summarize
from sim.notes import class_notes, extrapolation_notes, with_serving_alone

SLOS = {
    "chat": Slo(name="chat", ttft_s=3.0, tpot_s=1.1),
    "batch": Slo(name="batch", e2e_s=20.0),
    "nobody": Slo(name="nobody", ttft_s=1.0),
}


@dataclass
class Truth:
    """One request as the tiny simulator saw it, every token time listed."""

    slo: str
    arrival_s: float
    wanted: int
    pipeline: int
    scheduled_s: float = math.nan
    token_s: list[float] = field(default_factory=list)
    outcome: Outcome = Outcome.UNFINISHED
    preemptions: int = 0


def tiny_run(seed: int, pipelines: int = 2, iterations: int = 60) -> tuple[Recorder, list[Truth], float]:
    """A random run: its rows, what really happened, and a window that ends inside it.

    Each iteration decodes all running requests, may admit one (whose first token comes at the end of
    this iteration, or earlier by a little, so that first tokens need not fall on ticks), may preempt
    or abort one.
    """
    rng = random.Random(seed)
    recorder, truths = Recorder(), []
    for _ in range(rng.randrange(25)):
        truth = Truth(
            rng.choice(["chat", "batch"]), rng.uniform(0, 30), rng.randint(1, 12), rng.randrange(pipelines)
        )
        if rng.random() < 0.1:
            truth.outcome = Outcome.REJECTED
        truths.append(truth)
    for pipeline in range(pipelines):
        _run_pipeline(rng, recorder, truths, pipeline, iterations)
    ids = rng.sample(range(1000), len(truths))
    for number, truth in zip(ids, truths, strict=True):
        times = truth.token_s
        row = {
            "request": number,
            "pipeline": math.nan if truth.outcome == Outcome.REJECTED else truth.pipeline,
            "slo": recorder.slos.code(truth.slo),
            "adapter": 0,
            "outcome": truth.outcome,
            "arrival_s": truth.arrival_s,
            "scheduled_s": truth.scheduled_s,
            "first_token_s": times[0] if times else math.nan,
            "last_token_s": times[-1] if times else math.nan,
            "prompt_tokens": 5,
            "output_tokens": truth.wanted,
            "generated_tokens": len(times),
            "preemptions": truth.preemptions,
        }
        recorder.requests.append([row[c] for c in REQUEST_COLUMNS])
    rename = dict(enumerate(ids))
    renamed = column_views(recorder.segments)["request"]
    renamed[:] = [rename[int(id)] for id in renamed]
    return recorder, truths, rng.uniform(5, 60)


def _run_pipeline(
    rng: random.Random, recorder: Recorder, truths: list[Truth], pipeline: int, iterations: int
) -> None:
    now, tick = 0.0, 0
    mine = [i for i, t in enumerate(truths) if t.pipeline == pipeline and t.outcome != Outcome.REJECTED]
    waiting = sorted(mine, key=lambda i: truths[i].arrival_s)
    running: dict[int, tuple[float, int]] = {}

    def leave(i: int) -> None:
        first_s, start = running.pop(i)
        code = recorder.slos.code(truths[i].slo)
        recorder.segments.append([i, pipeline, code, first_s, start, tick])

    for number in range(iterations):
        start_s = now + (rng.random() if rng.random() < 0.2 else 0.0)
        now = start_s + rng.choice([0.5, 1.0, rng.random() + 0.1])
        decodes = list(running)
        if running:
            tick += 1
            recorder.ticks.append([pipeline, now])
            for i in decodes:
                truths[i].token_s.append(now)
        admitted = [i for i in waiting if truths[i].arrival_s <= start_s][:1]
        for i in admitted:
            truth = truths[i]
            waiting.remove(i)
            first_s = now - rng.choice([0.0, 0.05])
            truth.scheduled_s = start_s if math.isnan(truth.scheduled_s) else truth.scheduled_s
            truth.token_s.append(first_s)
            running[i] = (first_s, tick)
        row = {
            **dict.fromkeys(ITERATION_COLUMNS, 0),
            "pipeline": pipeline,
            "iteration": number,
            "start_s": start_s,
            "end_s": now,
            "predicted_s": rng.choice([math.nan, 1.1 * (now - start_s)]),
            "decode_count": len(decodes),
            "prefill_tokens": 5 * len(admitted),
            "sampled_tokens": len(decodes) + len(admitted),
            "forward_tokens": rng.randrange(9),
            "kv_blocks_used": len(running),
        }
        recorder.iterations.append([row[c] for c in ITERATION_COLUMNS])
        for i in list(running):
            truth = truths[i]
            if len(truth.token_s) == truth.wanted or rng.random() < 0.02:
                done = len(truth.token_s) == truth.wanted
                truth.outcome = Outcome.FINISHED if done else Outcome.ABORTED
                leave(i)
            elif rng.random() < 0.1:
                truth.preemptions += 1
                leave(i)
                waiting.insert(0, i)
        if rng.random() < 0.1:
            job = recorder.jobs.code("job")
            recorder.steps.append([pipeline, job, 1, 2, rng.randrange(1, 99), now, 0])
    for i in list(running):
        leave(i)


def expected(truths: list[Truth], duration_s: float) -> dict[str, float]:
    """The definitions, word by word, over lists."""
    done = [t for t in truths if t.outcome == Outcome.FINISHED]
    lists = {
        "ttft": [t.token_s[0] - t.arrival_s for t in done],
        "tpot": [(t.token_s[-1] - t.token_s[0]) / (len(t.token_s) - 1) for t in done if len(t.token_s) > 1],
        "tpot_paper": [(t.token_s[-1] - t.token_s[0]) / len(t.token_s) for t in done],
        "itl": [b - a for t in done for a, b in zip(t.token_s, t.token_s[1:], strict=False)],
        "e2e": [t.token_s[-1] - t.arrival_s for t in done],
        "queueing": [t.scheduled_s - t.arrival_s for t in done],
    }
    out: dict[str, float] = {}
    for key, values in lists.items():
        out[f"{key}_mean_s"] = sum(values) / len(values) if values else math.nan
        for percent in (50, 90, 99):
            out[f"{key}_p{percent}_s"] = float(np.percentile(values, percent)) if values else math.nan
    met = [t for t in done if _meets(t)]
    met_paper = [t for t in done if _meets_paper(t)]
    out["attainment"] = len(met) / len(truths) if truths else math.nan
    out["attainment_paper"] = len(met_paper) / len(truths) if truths else math.nan
    out["goodput_rps"] = len(met) / duration_s
    out["inference_tok_s"] = sum(x <= duration_s for t in truths for x in t.token_s) / duration_s
    out["requests"] = len(truths)
    out["preemptions"] = sum(t.preemptions for t in truths)
    for outcome in Outcome:
        out[outcome.name.lower()] = sum(t.outcome == outcome for t in truths)
    return out


def _meets(truth: Truth) -> bool:
    slo, times = SLOS[truth.slo], truth.token_s
    gaps = len(times) - 1
    return (
        times[0] - truth.arrival_s <= slo.ttft_s
        and (gaps == 0 or (times[-1] - times[0]) / gaps <= slo.tpot_s)
        and times[-1] - truth.arrival_s <= slo.e2e_s
    )


def _meets_paper(truth: Truth) -> bool:
    slo, times = SLOS[truth.slo], truth.token_s
    return times[0] - truth.arrival_s < slo.ttft_s and (times[-1] - times[0]) / len(times) < slo.tpot_s


def agree(row: dict[str, object], reference: dict[str, float]) -> None:
    got = {key: row[key] for key in reference}
    assert got == pytest.approx(reference, rel=1e-9, abs=1e-9, nan_ok=True)


@settings(max_examples=150)
@given(seed=st.integers(0, 10**9), pipelines=st.integers(1, 3))
def test_every_latency_equals_that_of_the_listed_tokens(seed: int, pipelines: int) -> None:
    recorder, truths, duration_s = tiny_run(seed, pipelines)
    summary = summarize(
        recorder, slos=SLOS, duration_s=duration_s, pipelines=[PipelineFacts(kv_blocks=10)] * pipelines
    )
    agree(summary, expected(truths, duration_s))
    rows = summary["classes"]
    assert isinstance(rows, list)
    assert [row["slo"] for row in rows] == list(SLOS)
    for row in rows:
        agree(row, expected([t for t in truths if t.slo == row["slo"]], duration_s))


@settings(max_examples=50)
@given(seed=st.integers(0, 10**9))
def test_system_numbers_equal_loops_over_rows(seed: int) -> None:
    recorder, _, end_s = tiny_run(seed)
    summary = summarize(recorder, slos=SLOS, duration_s=end_s, pipelines=[PipelineFacts(kv_blocks=10)] * 2)
    table = recorder.iterations.arrays()
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    inside = [r for r in rows if r["end_s"] <= end_s]
    times = [r["end_s"] - r["start_s"] for r in inside]
    decodes = [r["decode_count"] for r in inside if r["decode_count"] > 0]
    errors = [
        abs(r["predicted_s"] / t - 1)
        for r, t in zip(inside, times, strict=True)
        if not math.isnan(r["predicted_s"])
    ]
    busy = sum(max(0.0, min(r["end_s"], end_s) - r["start_s"]) for r in rows)
    steps = recorder.steps.arrays()
    trained = sum(n for n, t in zip(steps["tokens"], steps["end_s"], strict=True) if t <= end_s)
    use = [r["kv_blocks_used"] / 10 for r in inside]
    reference = {
        "iterations": len(inside),
        "iteration_mean_s": sum(times) / len(times),
        "gpu_busy_share": busy / (2 * end_s),
        "decode_batch_mean": sum(decodes) / len(decodes) if decodes else math.nan,
        "prefill_tok_s": sum(r["prefill_tokens"] for r in inside) / end_s,
        "finetune_tok_s": trained / end_s,
        "finetune_fwd_tok_s": sum(r["forward_tokens"] for r in inside) / end_s,
        "kv_use_mean": sum(u * t for u, t in zip(use, times, strict=True)) / sum(times),
        "kv_use_max": max(use),
        "prediction_error_p50": float(np.median(errors)) if errors else math.nan,
    }
    agree(summary, reference)
    # Tokens counted from segments are those that iterations say they sampled, but for first tokens
    # that the tiny simulator stamps a little before their iteration's end.
    whole = summarize(recorder, slos=SLOS, duration_s=1e6, pipelines=[PipelineFacts()] * 2)
    assert whole["inference_tok_s"] == pytest.approx(sum(r["sampled_tokens"] for r in rows) / 1e6)


def hand_made() -> Recorder:
    """Three requests: two tokens at the bounds, one single token, one preempted after two tokens."""
    recorder = Recorder()
    code = recorder.slos.code("chat")
    for end_s in (2.0, 3.0, 4.5, 6.0):
        recorder.ticks.append([0, end_s])
    finished = Outcome.FINISHED
    nan = math.nan
    for row in (
        (0, 0, code, 0, finished, 0.0, 0.25, 1.0, 2.0, 5, 2, 2, 0),
        (1, 0, code, 0, finished, 1.0, 1.5, 2.0, 2.0, 5, 1, 1, 0),
        (2, 0, code, 0, finished, 1.0, 1.5, 2.0, 6.0, 5, 4, 4, 1),
        (3, nan, code, 0, Outcome.REJECTED, 2.0, nan, nan, nan, 5, 4, 0, 0),
    ):
        recorder.requests.append(row)
    # In order of ending: request 2's parts are apart, as a loop writes them.
    for segment in ((0, 0, code, 1.0, 0, 1), (1, 0, code, 2.0, 1, 1), (2, 0, code, 2.0, 1, 2)):
        recorder.segments.append(segment)
    recorder.segments.append((2, 0, code, 4.5, 3, 4))
    return recorder


def test_a_hand_computed_run() -> None:
    slos = {"chat": Slo(ttft_s=1.0, tpot_s=1.0)}
    row = summarize(hand_made(), slos=slos, duration_s=4.0)
    # Gaps: request 0: 1.0; request 2: 1.0, then 1.5 over its preemption, then 1.5.
    agree(row, {"itl_mean_s": 5.0 / 4, "itl_p50_s": 1.25, "itl_p99_s": 1.5})
    # TPOT 1.0 and 4/3; the single token has none and meets the bound. TTFT 1, 1, 1: `<=` holds.
    agree(row, {"tpot_mean_s": 7 / 6, "tpot_paper_mean_s": (0.5 + 0.0 + 1.0) / 3, "ttft_mean_s": 1.0})
    agree(row, {"attainment": 2 / 4, "goodput_rps": 2 / 4.0, "finished": 3, "rejected": 1})
    # The paper's strict bound on TTFT is missed by all three.
    agree(row, {"attainment_paper": 0.0})
    # By 2 s, that instant included: 2 + 1 + 1 tokens. By 4 s: 2 + 1 + 2.
    agree(summarize(hand_made(), slos=slos, duration_s=2.0), {"inference_tok_s": 4 / 2.0})
    agree(row, {"inference_tok_s": 5 / 4.0, "preemptions": 1, "queueing_mean_s": (0.25 + 0.5 + 0.5) / 3})


@pytest.mark.parametrize(("e2e_s", "share"), [(1.0, 1 / 4), (2.0, 2 / 4), (4.9, 2 / 4), (5.0, 3 / 4)])
def test_an_end_to_end_bound_counts_in_attainment(e2e_s: float, share: float) -> None:
    """Requests 0, 1 and 2 take 2, 1 and 5 s from arrival to their last token; 3 is rejected."""
    row = summarize(hand_made(), slos={"chat": Slo(e2e_s=e2e_s)}, duration_s=4.0)
    agree(row, {"attainment": share})


def test_nothing_arrived_is_missing_and_not_zero() -> None:
    row = summarize(Recorder(), slos=SLOS, duration_s=10.0)
    for key in ("attainment", "ttft_p99_s", "itl_mean_s", "kv_use_mean", "iteration_mean_s", "energy_j"):
        assert math.isnan(row[key]), key  # type: ignore[arg-type]
    for key in ("requests", "goodput_rps", "inference_tok_s", "finetune_tok_s", "gpu_busy_share"):
        assert row[key] == 0, key


def test_unknown_facts_are_missing() -> None:
    row = summarize(hand_made(), slos=SLOS, duration_s=4.0)
    for key in (
        "kv_use_max",
        "extrapolated_share",
        "finetune_share_of_peak",
        "peak_finetune_tok_s",
        "cost",
        "cost_per_mtoken",
    ):
        assert math.isnan(row[key]), key  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_extrapolated_iterations_are_those_with_a_count_outside_the_known(seed: int) -> None:
    recorder, _, end_s = tiny_run(seed)
    arrays = recorder.iterations.arrays()
    names = list(arrays)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*arrays.values(), strict=True)]
    known = {"decode_count": (1.0, 2.0), "pass_tokens": (0.0, 4.0)}
    facts = [PipelineFacts(measured=known), PipelineFacts()]
    row = summarize(recorder, slos=SLOS, duration_s=end_s, pipelines=facts)
    own = [r for r in rows if r["pipeline"] == 0 and r["end_s"] <= end_s]
    tokens = [r["prefill_tokens"] + r["decode_count"] + r["forward_tokens"] for r in own]
    outside = [not 1 <= r["decode_count"] <= 2 or n > 4 for r, n in zip(own, tokens, strict=True)]
    assert row["extrapolated_share"] == pytest.approx(np.mean(outside))
    for share, told in (
        (0.25, "25.0%"),
        (0.001, "0.1%"),
        (0.0004, "fewer than 0.1%"),
        (1e-9, "fewer than 0.1%"),
    ):
        (note,) = extrapolation_notes(recorder, {"extrapolated_share": share}, facts)
        assert note.startswith(f"{told} of the iterations are extrapolated: ")
    for none in (0.0, math.nan):
        assert extrapolation_notes(recorder, {"extrapolated_share": none}, facts) == []


def test_energy_lies_between_idle_and_full_power_by_busy_share() -> None:
    device = DeviceSpec(
        name="d",
        peak_flops=1e12,
        memory_bandwidth_bytes_s=1e12,
        memory_bytes=1e9,
        link_bandwidth_bytes_s=1e9,
        sms=1,
        source="made up",
        power_w=400.0,
        idle_power_w=100.0,
        price_per_hour=3.6,
    )
    recorder = hand_made()
    values = {**dict.fromkeys(ITERATION_COLUMNS, 0), "start_s": 1.0, "end_s": 2.0, "predicted_s": math.nan}
    recorder.iterations.append([values[c] for c in ITERATION_COLUMNS])
    recorder.steps.append([0, recorder.jobs.code("job"), 1, 1, 95, 3.0, 0])
    facts = [PipelineFacts(device=device, devices=2), PipelineFacts(device=device, devices=1)]
    row = summarize(recorder, slos=SLOS, duration_s=4.0, pipelines=facts, peak_finetune_tok_s=95.0)
    # Pipeline 0 busy a quarter of the time: 175 W per device; pipeline 1 idle: 100 W.
    agree(row, {"energy_j": (2 * 175 + 100) * 4.0, "energy_j_per_token": 1800 / 100, "cost": 0.012})
    agree(row, {"finetune_tok_s": 95 / 4, "finetune_share_of_peak": 0.25, "cost_per_mtoken": 120.0})
    assert row["devices"] == "3 x d in 2 pipelines"
    facts = [PipelineFacts(device=device, share=share) for share in (0.25, 0.75)]
    row = summarize(recorder, slos=SLOS, duration_s=4.0, pipelines=facts)
    # One device in turns: what it takes when idle once, the rest for the quarter of the time that it was busy.
    agree(row, {"energy_j": 175 * 4.0, "cost": 0.004})
    assert row["devices"] == "d"


def test_a_step_counts_only_if_it_ended_in_the_window() -> None:
    recorder = Recorder()
    job = recorder.jobs.code("job")
    recorder.steps.append([0, job, 1, 8, 100, 5.0, 0])
    recorder.steps.append([0, job, 2, 8, 100, 5.1, 0])
    assert summarize(recorder, slos={}, duration_s=5.0)["finetune_tok_s"] == 20.0


def test_every_number_of_a_summary_is_defined_and_every_definition_is_used() -> None:
    row = summarize(hand_made(), slos=SLOS, duration_s=4.0, labels={"name": "x", "seed": 0})
    classes = row.pop("classes")
    assert isinstance(classes, list)
    assert set(row) | set(classes[0]) == set(DEFINITIONS) | {"name", "seed", "slo", "devices"}
    assert list(row)[:2] == ["name", "seed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"duration_s": 0.0}, "duration_s must be above 0"),
        ({"duration_s": math.nan}, "duration_s must be above 0"),
        ({"slos": {}}, "SLO class 'chat'"),
        ({"pipelines": []}, "rows name pipeline 0"),
        ({"labels": {"attainment": 1}}, "label 'attainment'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarize(hand_made(), **{"slos": SLOS, "duration_s": 4.0, **arguments})  # type: ignore[arg-type]


def test_the_recorder_can_grow_after_a_summary() -> None:
    recorder = hand_made()
    summarize(recorder, slos=SLOS, duration_s=4.0)
    recorder.ticks.append([0, 7.0])
    assert len(recorder.ticks) == 5


def test_a_share_just_below_the_bound_is_never_told_as_the_bound() -> None:
    missed = {"slo": "chat", "requests": 2000, "attainment": 0.94996}
    [told] = class_notes({"attainment": 0.99, "classes": [missed]})
    assert "94.9% of its 2,000 requests" in told
    alone = {"policy": "inference_only", "attainment": 0.94996}
    [told] = with_serving_alone({"attainment": 0.9}, [alone])["notes"]
    assert "94.9% of the requests" in told
