"""The frontier: how much finetuning each policy gets done at how much goodput, while the SLO is kept.

A point is one arrival rate; of the routers that were run, each policy is shown with its best. A rate at
which a policy misses the SLO has no point, so a line ends where the policy does. Names stand beside the figure, each
with its line's look and in the order of the lines' ends, joined to those that are near. Drawn in are the bounds:
finetuning alone, serving alone, and the ideal sum, both at once at full rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.figures import style
from analysis.repeats import alike, display_names
from analysis.runs import SLO_KEPT_SHARE, Row, keeps_slo, number, of_each_class, peaks_tok_s, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Point(NamedTuple):
    """The best that a policy did at one rate, mean over seeds."""

    rate_rps: float
    goodput_rps: float
    finetune_tok_s: float
    router: str


def frontier(rows: Sequence[Row], kept_share: float = SLO_KEPT_SHARE) -> dict[str, list[Point]]:
    """Policy, with what else tells runs of it apart -> points by rising rate. A router counts at a rate when the SLO
    is kept and both numbers are known at every seed."""
    names = {id(row): name for row, name in zip(rows, display_names(rows), strict=True)}
    best: dict[tuple[str, float], Point] = {}
    for group in alike(rows):
        policy, rate_rps = names[id(group[0])], number(group[0], "rate_rps")
        router = text(group[0], "router")
        goodput_rps, trained = (
            sum(number(row, key) for row in group) / len(group) for key in ("goodput_rps", "finetune_tok_s")
        )
        known = not math.isnan(goodput_rps + trained)
        if not (known and all(keeps_slo(row, kept_share) for row in group)):
            continue
        point = Point(rate_rps, goodput_rps, trained, router)
        place = (policy, rate_rps)
        if place not in best or trained > best[place].finetune_tok_s:
            best[place] = point
    lines: dict[str, list[Point]] = {}
    for (policy, _), point in sorted(best.items(), key=lambda item: item[0][1]):
        lines.setdefault(policy, []).append(point)
    return lines


def peak_tok_s(rows: Sequence[Row]) -> float | None:
    """Finetuning alone on the same cluster, mean over seeds, if some row knows it and all that do are of one
    cluster."""
    known = peaks_tok_s(rows)
    return sum(known) / len(known) if known else None


def frontier_figure(rows: Sequence[Row], *, kept_share: float = SLO_KEPT_SHARE) -> Figure:
    """One workload, model and device, several rates."""
    style.check_one_scene(rows)
    figure, axes = style.new_figure(7.6)
    lines = frontier(rows, kept_share)
    peak = peak_tok_s(rows)
    if peak is not None:
        axes.axhline(peak, color=style.BLACK, linestyle=":", linewidth=1.2)
        ideal = lines.get("inference_only", [])
        stars = "; stars: ideal sum, that much beside all that serving alone serves"
        axes.plot(
            [p.goodput_rps for p in ideal], [peak] * len(ideal), linestyle="", marker="*", markersize=11,
            color=style.BLACK, label="ideal sum",
        )  # fmt: skip
        axes.annotate(
            f"finetuning alone, {peak:,.0f} tok/s{stars if ideal else ''}",
            (0.01, peak), xycoords=("axes fraction", "data"), xytext=(0, 9), textcoords="offset points",
            fontsize=9,
        )  # fmt: skip
    shown = {policy: points for policy, points in lines.items() if policy != "finetune_only"}
    looks = style.looks({name: name.partition(" ")[0] for name in shown})
    for policy, points in shown.items():
        _draw(axes, policy, points, looks[policy])
    most = max([peak or 0.0, *(p.finetune_tok_s for points in shown.values() for p in points)])
    top = most or 1.0
    right = max([p.goodput_rps for points in shown.values() for p in points], default=1.0)
    axes.set_xlim(0, 1.03 * right)
    axes.set_ylim(-0.03 * top, 1.06 * top)
    _name_ends(axes, shown, looks, top)
    style.token_ticks(axes.yaxis, most)
    axes.set_xlabel(
        f"goodput (req/s)\nat least {100 * kept_share:g} % of the requests{of_each_class(rows)} meet their SLO; "
        "a line ends where the policy no longer keeps that"
    )
    axes.set_ylabel("trained tokens per second (tok/s)")
    style.tidy(axes, "both")
    several = len({text(row, "router") for row in rows}) > 1
    router = ", each point with its better router" if several else ""
    scene = f"{style.scene_title(rows)}{style.settings_title(rows)}"
    figure.suptitle(f"Finetuning at a goodput{router}\n{scene}", fontsize=13, wrap=True)
    return figure


def write_frontier(rows: Sequence[Row], path: str | Path, *, kept_share: float = SLO_KEPT_SHARE) -> Path:
    return style.save(frontier_figure(rows, kept_share=kept_share), path)


def _draw(axes: Any, policy: str, points: Sequence[Point], look: style.Look) -> None:
    axes.plot(
        [p.goodput_rps for p in points], [p.finetune_tok_s for p in points],
        color=look.color, marker=look.marker, linestyle=look.dash, label=policy,
        linewidth=2.4 if policy == "coserving_slack" else 1.4, markersize=6,
    )  # fmt: skip


_NAME_HEIGHT = 0.034
"""Of the largest value: names closer than this would overlap."""
_NEAR = 0.85
"""Of the width: what joins a name to an end left of it would cross the other lines."""


def _name_ends(
    axes: Any, lines: Mapping[str, Sequence[Point]], looks: Mapping[str, style.Look], top: float
) -> None:
    """The name of each line beside the figure with a piece of the line, in the order of the lines' ends, joined to
    an end that is near."""
    ends = sorted(
        ((points[-1], policy) for policy, points in lines.items()), key=lambda e: e[0].finetune_tok_s
    )
    heights = _apart([point.finetune_tok_s for point, _ in ends], _NAME_HEIGHT * top, -0.02 * top, 1.04 * top)
    beside = axes.get_yaxis_transform()
    for (point, policy), y in zip(ends, heights, strict=True):
        look = looks[policy]
        if point.goodput_rps >= _NEAR * axes.get_xlim()[1]:
            axes.annotate(
                "", (point.goodput_rps, point.finetune_tok_s), xytext=(1.025, y), textcoords=beside,
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": style.GREY, "linewidth": 0.5, "shrinkB": 4, "shrinkA": 0},
            )  # fmt: skip
        axes.plot(
            [1.03, 1.05, 1.07], [y, y, y], transform=beside, color=look.color, marker=look.marker,
            markevery=[1], linestyle=look.dash, clip_on=False,
        )  # fmt: skip
        axes.annotate(
            policy, (1.08, y), xycoords=beside, va="center", fontsize=9, color=style.BLACK,
            annotation_clip=False,
        )  # fmt: skip


def _apart(values: Sequence[float], gap: float, least: float, most: float) -> list[float]:
    """Rising `values` moved as little as is needed to be `gap` apart within the bounds, as far as these allow."""
    out = list(values)
    for _ in range(200):
        for i in range(1, len(out)):
            if (short := gap - (out[i] - out[i - 1])) > 1e-9 * gap:
                out[i - 1] -= short / 2
                out[i] += short / 2
        out = [min(max(value, least), most) for value in out]
    return out
