"""What the numbers of a run do not say of themselves, in lines for people below its table.

A run's own lines are `notes` of its summary; those that several runs of a sweep share are told once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sim.checked import check
from sim.core.finetune import Job
from sim.core.plan import Limits
from sim.core.request import Slo
from sim.core.rows import Outcome, Recorder
from sim.metrics import PipelineFacts, column_views, data_done_s, extrapolated

FEW_STEPS = 10
"""Of which one more or less changes what was trained by a tenth and more."""
SHORT_SHARE = 0.05
"""Preemptions per request, and iterations with no place for those that wait, above which they are told of."""
SLOW_TOKEN_S = 5.0
"""A TPOT bound from which milliseconds are meant more likely than seconds: no token of a device takes less than 5 ms
for anyone to bound it below, and an answer of 1,000 tokens at 5 s each takes more than an hour."""
MOST_NAMES = 4
"""More runs of a sweep with the same note are counted, not named."""


def request_notes(recorder: Recorder, limits: Sequence[Limits], keys: str) -> list[str]:
    """Requests that do not fit their pipeline. `limits` are those of each, `keys` what they are called."""
    rows = column_views(recorder.requests)
    served = rows["pipeline"] >= 0
    rejected = int((served & (rows["outcome"] == Outcome.REJECTED)).sum())
    finished = rows["outcome"] == Outcome.FINISHED
    cut = int((finished & (rows["generated_tokens"] < rows["output_tokens"])).sum())
    room = _either(min(each.max_sequence_tokens, _whole_blocks(each)) for each in limits)
    count = len(rows["outcome"])
    parts = [f"{rejected:,} of {count:,} requests were rejected"] if rejected else []
    parts += [f"{cut:,} of {count:,} answers end early"] if cut else []
    if not parts:
        return []
    return [
        f"{' and '.join(parts)}: prompt and output do not fit {room} tokens "
        f"({keys}.kv_tokens, {keys}.max_sequence_tokens, the model's context)"
    ]


def room_notes(
    recorder: Recorder, summary: Mapping[str, Any], limits: Sequence[Limits], keys: str
) -> list[str]:
    """Of a run that does not keep the SLO: that there was no place for requests. As for `request_notes`."""
    from analysis.runs import keeps_slo

    if summary["attainment"] is None or keeps_slo(summary) or not limits:
        return []
    notes = []
    if summary["preemptions"] > SHORT_SHARE * summary["requests"]:
        notes.append(
            f"K/V room for {_either(each.kv_tokens for each in limits)} tokens in a pipeline is too small, answers are "
            f"preempted ({keys}.kv_tokens, and what samples in flight leave: their cutoff_len and memory)"
        )
    rows = column_views(recorder.iterations)
    most = max(each.max_sequences for each in limits)
    full = (rows["running"] >= most) & (rows["waiting"] > 0)
    if full.sum() > SHORT_SHARE * len(full):
        notes.append(
            f"requests wait for one of {_either(each.max_sequences for each in limits)} sequences of a pipeline to end "
            f"({keys}.max_sequences)"
        )
    return notes


def step_notes(recorder: Recorder, summary: Mapping[str, Any], pipelines: int, step: str) -> list[str]:
    """Of a run in which so many `pipelines` finetune; `step` says what an optimizer step is."""
    if not summary["finetune_tok_s"] > 0:
        return [f"no optimizer step ended within {summary['duration_s']:g} s (a step is {step})"]
    ended = int((column_views(recorder.steps)["end_s"] <= summary["duration_s"]).sum())
    if ended < FEW_STEPS * pipelines:
        return [
            f"fewer than {FEW_STEPS} optimizer steps of a pipeline ended, and tokens are trained when theirs ends: "
            "finetune tok/s is coarse (longer: workload.duration_s)"
        ]
    return []


def data_notes(recorder: Recorder, jobs: Sequence[Job]) -> list[str]:
    """Of each of `jobs`, those of every pipeline: that its data were trained, of several jobs by when, or that its last
    samples were not."""
    ids = list(dict.fromkeys(job.spec.id for job in jobs))
    notes = []
    for id in ids:
        data = "finetuning data" if len(ids) == 1 else f"data of finetuning job {id}"
        own = [job for job in jobs if job.spec.id == id]
        done = [job.finished and not job.given_up for job in own]
        if all(done):
            by = "" if len(ids) == 1 else f" by {data_done_s(recorder, own):,.0f} s"
            notes.append(f"all {data} were trained{by}, finetune tok/s is over the whole run")
        elif any(done):
            notes.append(
                f"the last samples of the {data} were begun and not trained when the run ended (longer: "
                "workload.duration_s)"
            )
    return notes


def class_notes(summary: Mapping[str, Any]) -> list[str]:
    """SLO classes too small to be seen in the attainment of all requests."""
    from analysis.runs import SLO_KEPT_SHARE, keeps_slo, kept
    from analysis.table import cell

    if summary["attainment"] is None or not kept(summary["attainment"], SLO_KEPT_SHARE):
        return []
    return [
        f"SLO class {row['slo']} does not keep its bounds: {cell('attainment', row['attainment'])}% of its "
        f"{row['requests']:,} requests meet them"
        for row in summary["classes"]
        if row["requests"] and not keeps_slo(row)
    ]


def extrapolation_notes(
    recorder: Recorder, summary: Mapping[str, Any], pipelines: Sequence[PipelineFacts]
) -> list[str]:
    """Of a run with iterations that lie outside what the seconds of its `pipelines` are known for."""
    share, least = summary["extrapolated_share"], 0.001
    if not share > 0:
        return []
    _, found = extrapolated(recorder, pipelines)
    where = [f"{name} {worst:g} (known {low:g} to {high:g})" for name, (low, high, worst) in found.items()]
    told = f"{share:.1%}" if share >= least else f"fewer than {least:.1%}"
    return [f"{told} of the iterations are extrapolated: {', '.join(where)}"]


def device_notes(unmeasured: Sequence[str]) -> list[str]:
    """Devices that nobody measured."""
    return [
        f"the efficiencies of {name} are those of its architecture, not measured: its seconds may be off by 10 to 40 % "
        "(profiles/README.md)"
        for name in unmeasured
    ]


def bound_notes(slos: Iterable[Slo], policy: Mapping[str, Any]) -> list[str]:
    """SLO classes whose bound on TPOT, and a `policy` (its node) whose own budget of an iteration is as large as if it
    were in milliseconds."""
    bounds = [(f"SLO class {slo.name} bounds TPOT by", " per token", slo.tpot_s) for slo in slos]
    budget_s = check(policy.get("budget_s"), float | None, "policy.budget_s")
    bounds += [] if budget_s is None else [("policy.budget_s is", " an iteration", budget_s)]
    return [
        f"{what} {bound:g} s{each}: bounds are in seconds, {bound:g} ms are {bound / 1e3:g}"
        for what, each, bound in bounds
        if SLOW_TOKEN_S <= bound < math.inf
    ]


def idle_notes(idle: int, pipelines: int) -> list[str]:
    """Of a run with `idle` of its `pipelines` that only finetune and have no job."""
    told = f"{idle} of {pipelines} pipelines only finetune, and do nothing since there is no finetuning job"
    return [f"{told} (finetune=none)"] if idle else []


def slo_notes(
    summary: Mapping[str, Any],
    least: tuple[float, int] | None,
    tpot_s: float,
) -> list[str]:
    """Of a run that does not keep the SLO: that its policy could not.

    `least`: predicted seconds of the shortest iteration that computes of a prompt beside a decode, and the tokens
    of that chunk; None for a policy without a least chunk. `tpot_s`: the tightest bound.
    """
    from analysis.runs import SLO_KEPT_SHARE, kept

    if summary["attainment"] is None or kept(summary["attainment"], SLO_KEPT_SHARE):
        return []
    notes = []
    if least is not None and least[0] > tpot_s:
        notes.append(
            f"a decode beside the least chunk of a prompt, {least[1]} tokens, is predicted to take "
            f"{1e3 * least[0]:.1f} ms, above the TPOT bound of {1e3 * tpot_s:g} ms: while prompts arrive it is not "
            "kept (policy.min_chunk_tokens)"
        )
    if tpot_s == math.inf:
        notes.append(
            "no SLO class bounds TPOT, so that a policy with a latency budget takes iterations of any length that the "
            "other bounds leave (policy.budget_s)"
        )
    return notes


def with_serving_alone(row: Mapping[str, Any], bounds: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """`row`, where it misses the SLO with a note that serving alone, if that is among its `bounds`, does so too."""
    from analysis.runs import SLO_KEPT_SHARE, kept, number
    from analysis.table import cell

    alone = next(
        (number(bound, "attainment") for bound in bounds if bound["policy"] == "inference_only"), math.nan
    )
    own = number(row, "attainment")
    if math.isnan(alone) or math.isnan(own) or kept(max(alone, own), SLO_KEPT_SHARE):
        return row
    told = f"serving alone does not keep the SLO either: {cell('attainment', alone)}% of the requests meet it"
    return {**row, "notes": [*row.get("notes", ()), told]}


def print_notes(rows: Sequence[Mapping[str, Any]]) -> None:
    """The notes of all rows on stderr, each once and with the runs that it is true of, unless these are all; then
    what of them did not finish."""
    from analysis.repeats import run_names

    runs: dict[str, list[str]] = {}
    for row, name in zip(rows, run_names(rows), strict=True):
        for note in row.get("notes", ()):
            runs.setdefault(note, []).append(name)
    for note, names in runs.items():
        who = ", ".join(names) if len(names) <= MOST_NAMES else f"{len(names)} of {len(rows)} runs"
        print(f"note: {note}" + (f": {who}" if len(names) < len(rows) else ""), file=sys.stderr)
    _print_unfinished(rows)


def _print_unfinished(rows: Sequence[Mapping[str, Any]]) -> None:
    """In one line, of which runs some requests had not finished at the end, and what that does to the numbers."""
    from analysis.repeats import run_names
    from analysis.runs import number

    found = [
        (row["unfinished"], f"{row['unfinished']:,} of {row['requests']:,}", name)
        for row, name in zip(rows, run_names(rows), strict=True)
        if number(row, "unfinished") > 0
    ]
    if not found:
        return
    _, count, name = max(found, key=lambda run: run[0])
    if len(rows) == 1:
        who = f"{count} requests"
    elif len(found) == 1:
        who = f"{count} requests of {name}"
    else:
        who = f"requests of {len(found)} of {len(rows)} runs (most: {count} of {name})"
    print(
        f"note: {who} did not finish: they count as missed, latencies are of finished ones (longer: run.drain_s)",
        file=sys.stderr,
    )


def _either(values: Iterable[int]) -> str:
    return " or ".join(f"{value:,}" for value in sorted(set(values)))


def _whole_blocks(limits: Limits) -> int:
    return limits.kv_tokens // limits.block_tokens * limits.block_tokens
