"""What the engine is to reach on one H200 with Llama-3.1-8B in bfloat16, and what was measured of it.

A target is words and a rule from measured rows to a number; without rows there is no number. Nothing here
needs a GPU package: rows come from files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from analysis.runs import SLO_KEPT_SHARE

Row = Mapping[str, Any]

DEVICE, MODEL = "h200", "llama_3_1_8b"
"""What the targets are of."""
DECODE_RATIO = 1.3
PRODUCT_SHARE = 0.55
CHECKPOINTED_RATIO = 1.3
BEST_PEFT_RATIO = 1.0
MEMORY_RATIO = 0.2
FUSED_RATIO = 1.03
SPLITS = ("separate_25", "separate_50", "separate_75")
OURS = ("coserving", "coserving_slack")
ERRORS = {
    "tpot_p50_s": 0.03,
    "tpot_p99_s": 0.06,
    "ttft_p50_s": 0.06,
    "ttft_p99_s": 0.12,
    "finetune_tok_s": 0.03,
    "attainment": 0.01,
}
"""Metric -> largest relative error of the simulator; of `attainment` the difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything that was measured, as it was read from files."""

    reference: Sequence[Row] = ()
    """Rows of reference.parquet."""
    bench: Sequence[Row] = ()
    """Summary rows of runs of the engine."""
    fidelity: Sequence[Row] = ()
    """Rows of `coserve fidelity`: metric, measured, predicted."""


class Measured(NamedTuple):
    """A measured value in words, and whether it reaches the target."""

    text: str
    reached: bool | None
    """None where what it is compared with did not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One line of the table."""

    what: str
    target: str
    measured: Callable[[Evidence], Measured | None]
    """None without the rows that it needs."""


def reference_target(row: Row, device: str, model: str) -> str | None:
    """The target of a row of `coserve reference` on the device with the model, in words, if its ratio has one."""
    if row["ratio"] is None or (device, model) != (DEVICE, MODEL):
        return None
    if row["what"] == "decode" and (row["sequences"], row["context_tokens"]) in ((32, 1024), (128, 1024)):
        return f"at most {DECODE_RATIO}"
    if row["what"] in ("prefill", "window") and row["tokens"] == 2048:
        return f"at least {PRODUCT_SHARE}"
    if row["what"] == "fused":
        return f"at most {FUSED_RATIO}"
    if row["what"] == "finetune":
        return f"at least {CHECKPOINTED_RATIO}"
    return f"at most {MEMORY_RATIO}" if row["what"] == "memory" else None


def _decode(sequences: int) -> Callable[[Evidence], Measured | None]:
    def measured(evidence: Evidence) -> Measured | None:
        rows = [r for r in evidence.reference if r["what"] == "decode" and r["sequences"] == sequences]
        row = _known([r for r in rows if r["context_tokens"] == 1024], "ratio")
        if row is None:
            return None
        return Measured(f"{row['ratio']:.2f}x, {1e3 * row['p50_s']:.2f} ms", row["ratio"] <= DECODE_RATIO)

    return measured


def _product_share(what: str) -> Callable[[Evidence], Measured | None]:
    def measured(evidence: Evidence) -> Measured | None:
        rows = [r for r in evidence.reference if r["what"] == what and r["tokens"] == 2048]
        rows = [r for r in rows if _is_number(r["ratio"])]
        if not rows:
            return None
        lowest = min(row["ratio"] for row in rows)
        return Measured(f"{100 * lowest:.0f} %", lowest >= PRODUCT_SHARE)

    return measured


def _finetune(name: str, memory: str) -> Callable[[Evidence], Measured | None]:
    """Against PEFT with checkpointing, and against the fastest PEFT that fits."""

    def measured(evidence: Evidence) -> Measured | None:
        rows = [r for r in evidence.reference if r["what"] == "finetune" and _is_number(r["tok_s"])]
        tok_s = {
            r["variant"].removeprefix(f"{name}: "): r["tok_s"] for r in rows if r["variant"].startswith(name)
        }
        own, checkpointed = tok_s.get(f"engine + {memory}"), tok_s.get("peft + checkpointing")
        if own is None or checkpointed is None:
            return None
        best, best_tok_s = max(
            ((how, n) for how, n in tok_s.items() if how.startswith("peft")), key=lambda pair: pair[1]
        )
        text = f"{own:,.0f} tok/s: {own / checkpointed:.2f}x, {own / best_tok_s:.2f}x the best ({best})"
        return Measured(
            text, own >= CHECKPOINTED_RATIO * checkpointed and own >= BEST_PEFT_RATIO * best_tok_s
        )

    return measured


def _memory(name: str, memory: str, what: str) -> Callable[[Evidence], Measured | None]:
    """The allocator's peak against PEFT's default; a default that does not fit leaves no number."""

    def measured(evidence: Evidence) -> Measured | None:
        rows = {r["variant"]: r for r in evidence.reference if r["what"] == what}
        own, other = (rows.get(f"{name}: {how}") for how in (f"engine + {memory}", "peft"))
        if own is None or other is None or not _is_number(own["peak_bytes"]):
            return None
        text = f"{own['peak_bytes'] / 2**30:.1f} GiB"
        if not _is_number(other["peak_bytes"]):
            return Measured(f"{text}; PEFT's default: {other['note']}", None) if other["note"] else None
        share = own["peak_bytes"] / other["peak_bytes"]
        below = f"{text} of {other['peak_bytes'] / 2**30:.1f} GiB: {100 * (1 - share):.0f} % below"
        return Measured(below, share <= MEMORY_RATIO)

    return measured


def _fused(evidence: Evidence) -> Measured | None:
    rows = [r for r in evidence.reference if r["what"] == "fused" and _is_number(r["ratio"])]
    if not rows:
        return None
    worst = max(row["ratio"] for row in rows)
    return Measured(f"{100 * (worst - 1):+.1f} %", worst <= FUSED_RATIO)


def _streams(evidence: Evidence) -> Measured | None:
    row = _known([r for r in evidence.reference if r["what"] == "streams"], "ratio")
    if row is None:
        return None
    return Measured(f"{row['ratio']:.2f}x, {1e3 * row['p50_s']:.1f} ms", None)


def _light(evidence: Evidence) -> Measured | None:
    """At 5 req/s: the best of our policies, by finetuning among those that keep the bound."""
    found = [means(evidence.bench, policy, 5.0) for policy in OURS]
    rows = [row for row in found if row is not None and _is_number(row["finetune_share_of_peak"])]
    if not rows:
        return None
    best = max(rows, key=lambda row: (row["attainment"] >= 0.98, row["finetune_share_of_peak"]))
    text = (
        f"{100 * best['attainment']:.1f} % within the SLO, finetuning {100 * best['finetune_share_of_peak']:.0f} % "
        f"of alone ({best['policy']})"
    )
    return Measured(text, best["attainment"] >= 0.98 and best["finetune_share_of_peak"] >= 0.85)


def _heavy(evidence: Evidence) -> Measured | None:
    rows = [row for policy in OURS if (row := means(evidence.bench, policy, 20.0)) is not None]
    if not rows:
        return None
    best = max(rows, key=lambda row: (row["attainment"] >= 0.95, row["finetune_tok_s"]))
    text = f"{100 * best['attainment']:.1f} % within the SLO, {best['finetune_tok_s']:,.0f} tok/s ({best['policy']})"
    return Measured(text, best["attainment"] >= 0.95 and best["finetune_tok_s"] >= 7200)


def _ahead_of(others: Sequence[str]) -> Callable[[Evidence], Measured | None]:
    """Trained tok/s of our best policy that keeps the SLO over that of the best other that does, by rate."""

    def measured(evidence: Evidence) -> Measured | None:
        parts, reached = [], True
        for rate in sorted({row["rate_rps"] for row in evidence.bench}):
            ours, theirs = (_best_kept(evidence.bench, names, rate) for names in (OURS, others))
            if not any(means(evidence.bench, name, rate) for name in others) or not any(
                means(evidence.bench, name, rate) for name in OURS
            ):
                continue
            ahead = ours is not None and (theirs is None or ours > theirs)
            reached = reached and ahead
            if ours is None:
                parts.append(f"{rate:g} req/s: ours misses the SLO")
            elif theirs is None:
                parts.append(f"{rate:g} req/s: none of them keeps the SLO")
            else:
                parts.append(
                    f"{rate:g} req/s: {ours / theirs:.2f}x"
                    if theirs
                    else f"{rate:g} req/s: they train nothing"
                )
        return Measured("; ".join(parts), reached) if parts else None

    return measured


def _fidelity(metric: str) -> Callable[[Evidence], Measured | None]:
    def measured(evidence: Evidence) -> Measured | None:
        rows = [row for row in evidence.fidelity if row["metric"] == metric]
        errors = [abs(error) for row in rows if (error := metric_error(row)) is not None]
        if not errors:
            return None
        worst = max(errors)
        unit = "points" if metric == "attainment" else "%"
        return Measured(f"{100 * worst:.1f} {unit}, the worst of {len(errors)} runs", worst <= ERRORS[metric])

    return measured


def metric_error(row: Row) -> float | None:
    """Predicted over measured, less one; of attainment their difference. None where one is missing."""
    measured, predicted = row["measured"], row["predicted"]
    if not (_is_number(measured) and _is_number(predicted)):
        return None
    if row["metric"] == "attainment":
        return float(predicted - measured)
    return float(predicted / measured - 1) if measured else None


def means(rows: Iterable[Row], policy: str, rate_rps: float) -> dict[str, Any] | None:
    """One row of a policy at a rate: numbers are means over the seeds; None without any run."""
    chosen = [row for row in rows if row["policy"] == policy and row["rate_rps"] == rate_rps]
    if not chosen:
        return None
    out: dict[str, Any] = {"policy": policy, "rate_rps": rate_rps, "runs": len(chosen)}
    for key in ("attainment", "finetune_tok_s", "finetune_share_of_peak", "tpot_p99_s", "ttft_p99_s"):
        known = [row[key] for row in chosen if _is_number(row[key])]
        out[key] = sum(known) / len(known) if known else math.nan
    return out


def _best_kept(rows: Sequence[Row], policies: Sequence[str], rate_rps: float) -> float | None:
    found = [means(rows, policy, rate_rps) for policy in policies]
    kept = [row["finetune_tok_s"] for row in found if row is not None and row["attainment"] >= SLO_KEPT_SHARE]
    return max(kept) if kept else None


def _known(rows: Sequence[Row], key: str) -> Row | None:
    return next((row for row in rows if _is_number(row[key])), None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


_MODES = (
    ("all-linear", "stash"),
    ("all-linear", "recompute"),
    ("down_proj", "stash"),
    ("down_proj", "recompute"),
)

TARGETS: tuple[Target, ...] = (
    *(
        Target(
            what=f"decode iteration, {n} sequences at 1k context",
            target=f"at most {DECODE_RATIO}x the bandwidth floor",
            measured=_decode(n),
        )
        for n in (32, 128)
    ),
    Target(
        what="prefill of 2,048 tokens",
        target="at least 55 % of the measured product rate",
        measured=_product_share("prefill"),
    ),
    Target(
        what="finetuning forward of 2,048 tokens",
        target="at least 55 % of the measured product rate",
        measured=_product_share("window"),
    ),
    *(
        Target(
            what=f"finetuning alone, 4k samples, {name}, {memory}",
            target="at least 1.3x the tok/s of PEFT with checkpointing, 1.0x the best PEFT that fits",
            measured=_finetune(name, memory),
        )
        for name, memory in _MODES
    ),
    *(
        Target(
            what=f"peak memory of it, {name}, {memory}",
            target="at least 80 % below PEFT's default",
            measured=_memory(name, memory, "finetune"),
        )
        for name, memory in _MODES
    ),
    *(
        Target(
            what=f"memory of an 8k sample in flight, {name}, {memory}",
            target="at least 80 % below PEFT's default, by the allocator",
            measured=_memory(name, memory, "memory"),
        )
        for name, memory in _MODES
    ),
    Target(
        what="fused iteration, a few decodes and a full window",
        target="within 3 % of the window alone",
        measured=_fused,
    ),
    Target(
        what="decodes and a backward on a stream of its own, against one after the other",
        target="none: it says which of the two a plan should ask for",
        measured=_streams,
    ),
    Target(
        what="co-serving, paper's workload at 5 req/s, TPOT SLO 50 ms",
        target="attainment at least 98 %, finetuning at least 85 % of finetuning alone",
        measured=_light,
    ),
    Target(
        what="co-serving at 20 req/s on this one GPU",
        target="attainment at least 95 %, finetuning at least 7,200 tok/s",
        measured=_heavy,
    ),
    Target(
        what="co-serving against the best static split that keeps the SLO, same engine",
        target="ahead at every rate",
        measured=_ahead_of(SPLITS),
    ),
    Target(
        what="co-serving against budgeted time slicing (temporal_limited), same engine",
        target="ahead at every rate",
        measured=_ahead_of(("temporal_limited",)),
    ),
    *(
        Target(
            what=f"simulator against engine on loads it was not fitted on: {metric}",
            target="1 point" if metric == "attainment" else f"{100 * most:g} %",
            measured=_fidelity(metric),
        )
        for metric, most in ERRORS.items()
    ),
)
