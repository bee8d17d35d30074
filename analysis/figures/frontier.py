"""The frontier: how much finetuning each policy gets done at how much goodput, while the SLO is kept.

A point is one arrival rate; of the routers that were run, each policy is shown with its best. A rate at
which a policy misses the SLO has no point, so a line ends where the policy does. Drawn in are the bounds:
finetuning alone, serving alone, and the ideal sum, both at once at full rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.figures import style
from analysis.runs import SLO_KEPT_SHARE, Row, keeps_slo, number, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOUNDS = ("inference_only", "finetune_only")


class Point(NamedTuple):
    """The best that a policy did at one rate, mean over seeds."""

    rate_rps: float
    goodput_rps: float
    finetune_tok_s: float
    router: str


def frontier(rows: Sequence[Row], kept_share: float = SLO_KEPT_SHARE) -> dict[str, list[Point]]:
    """Policy -> points by rising rate. A router counts at a rate when the SLO is kept at every seed."""
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        key = (text(row, "policy"), number(row, "rate_rps"), text(row, "router"))
        groups.setdefault(key, []).append(row)
    best: dict[tuple[str, float], Point] = {}
    for (policy, rate_rps, router), group in groups.items():
        if not all(keeps_slo(row, kept_share) for row in group):
            continue
        goodput_rps, trained = (
            sum(number(row, key) for row in group) / len(group) for key in ("goodput_rps", "finetune_tok_s")
        )
        point = Point(rate_rps, goodput_rps, trained, router)
        place = (policy, rate_rps)
        if place not in best or trained > best[place].finetune_tok_s:
            best[place] = point
    lines: dict[str, list[Point]] = {}
    for (policy, _), point in sorted(best.items(), key=lambda item: item[0][1]):
        lines.setdefault(policy, []).append(point)
    return lines


def peak_tok_s(rows: Sequence[Row]) -> float | None:
    """Finetuning alone on the same cluster, if some row knows it."""
    known = [value for row in rows if (value := number(row, "peak_finetune_tok_s")) > 0]
    return max(known, default=None)


def frontier_figure(rows: Sequence[Row], *, kept_share: float = SLO_KEPT_SHARE) -> Figure:
    """One workload, model and device, several rates."""
    style.check_one_scene(rows)
    figure, axes = style.new_figure(6.4)
    lines = frontier(rows, kept_share)
    peak = peak_tok_s(rows)
    if peak is not None:
        axes.axhline(peak, color=style.BLACK, linestyle=":", linewidth=1.2)
        axes.annotate(
            f"finetuning alone {peak:,.0f} tok/s", (0.01, peak), xycoords=("axes fraction", "data"),
            xytext=(0, 9), textcoords="offset points", fontsize=9,
        )  # fmt: skip
        ideal = lines.get("inference_only", [])
        axes.plot(
            [p.goodput_rps for p in ideal], [peak] * len(ideal), linestyle="", marker="*", markersize=11,
            color=style.BLACK, label="ideal sum",
        )  # fmt: skip
    for policy, points in lines.items():
        if policy != "finetune_only":
            _draw(axes, policy, points)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"goodput (req/s), where at least {100 * kept_share:g} % of the requests meet their SLO")
    axes.set_ylabel("trained tokens per second (tok/s)")
    style.tidy(axes, "both")
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle(f"Finetuning at a goodput: {style.scene_title(rows)}", fontsize=13)
    return figure


def write_frontier(rows: Sequence[Row], path: str | Path, *, kept_share: float = SLO_KEPT_SHARE) -> Path:
    return style.save(frontier_figure(rows, kept_share=kept_share), path)


def _draw(axes: Any, policy: str, points: Sequence[Point]) -> None:
    look = style.look(policy)
    axes.plot(
        [p.goodput_rps for p in points], [p.finetune_tok_s for p in points],
        color=look.color, marker=look.marker, linestyle=look.dash, label=policy, clip_on=False,
        linewidth=2.4 if policy == "coserving_slack" else 1.4, markersize=6,
    )  # fmt: skip
