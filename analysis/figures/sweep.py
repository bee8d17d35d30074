"""Trained tokens and attainment over the arrival rate: a panel each, with one line per policy.

Several runs at one point (seeds) are their mean, with a band from the smallest to the largest. Where
a metric is missing the line has a gap; it never falls to 0. A hollow marker is a point that misses the SLO.
Where policies come with several routers, the marker is the router's, and the legend says which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.figures import style
from analysis.repeats import alike, line_names
from analysis.runs import SLO_KEPT_SHARE, Row, kept, number, of_each_class, text, worst_attainment
from analysis.table import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {
    "finetune_tok_s": ("trained tokens per second (tok/s)", 1.0),
    "attainment": ("requests that meet their SLO (%)", 100.0),
}
"""Column of the rows -> what the axis says, and its factor."""


class Point(NamedTuple):
    """Of the runs at one rate; NaN where none of them has the number."""

    rate_rps: float
    mean: float
    low: float
    high: float


Points = list[Point]
"""By rising rate."""


def sweep_figure(rows: Sequence[Row], *, kept_share: float = SLO_KEPT_SHARE) -> Figure:
    """Of `rows` of one workload, model and device."""
    style.check_one_scene(rows)
    rows = [{**row, "worst_attainment": worst_attainment(row)} for row in rows]
    lines = {metric: series(rows, metric) for metric in METRICS}
    attained = series(rows, "worst_attainment")
    height_inches = max(5.2, 0.8 + 0.21 * len(attained))
    figure, panels = style.new_figure(height_inches, nrows=1, ncols=len(METRICS))
    looks, routers = _looks(rows)
    for axes, (metric, (title, factor)) in zip(panels, METRICS.items(), strict=True):
        for place, (name, points) in enumerate(lines[metric].items()):
            met = [kept(point.mean, kept_share) for point in attained[name]]
            _draw(axes, shorten(name, 34), looks[name], points, factor, met, size=8.5 - place % 3 * 1.5)
        axes.set_xlabel("arrivals (req/s)")
        axes.set_ylabel(title)
        axes.yaxis.set_major_formatter(style.thousands)
        _x_ticks(axes, [point.rate_rps for points in lines[metric].values() for point in points])
        style.tidy(axes, "both")
    left, right = panels
    if (most := left.dataLim.y1) > 0:
        left.set_ylim(-0.02 * most, 1.05 * most)
    style.token_ticks(left.yaxis, most)
    right.set_ylim(-2, 102)
    right.axhline(100 * kept_share, color=style.BLACK, linewidth=1.2, linestyle=(0, (6, 2)), zorder=1.5)
    _legend(figure, left, looks, routers)
    share = f"fewer than {kept_share * 100:g} % of the requests{of_each_class(rows, 'some')} meet it, the dashed line"
    hollow = f"hollow marker: SLO missed ({share})"
    scene = f"{style.scene_title(rows)}{style.seeds_title(rows, 'band')}{style.settings_title(rows)}"
    figure.suptitle(f"{scene}\n{hollow}", fontsize=12, wrap=True)
    return figure


def write_sweep(rows: Sequence[Row], path: str | Path, *, kept_share: float = SLO_KEPT_SHARE) -> Path:
    """Draw and save; returns the path."""
    return style.save(sweep_figure(rows, kept_share=kept_share), path)


def series(rows: Sequence[Row], metric: str) -> dict[str, Points]:
    """Display name -> points; a point without any known value has NaNs. ValueError for a run without a rate."""
    found: dict[str, dict[float, list[float]]] = {}
    for name, group in _named(rows):
        for row in group:
            x = number(row, "rate_rps")
            if math.isnan(x):
                raise ValueError(f"a run of {name} has no rate_rps")
            found.setdefault(name, {}).setdefault(x, []).append(number(row, metric))
    return {name: [_point(x, found[name][x]) for x in sorted(found[name])] for name in found}


def _named(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Repeats of a run under their display name; a name comes once for each rate."""
    groups = alike(rows)
    return list(zip(line_names([group[0] for group in groups]), groups, strict=True))


def _looks(rows: Sequence[Row]) -> tuple[dict[str, style.Look], dict[str, tuple[str, str]]]:
    """The look of each line; and where lines differ in nothing but the router, what each is called without it, and
    the router, whose marker it then has."""
    firsts = [group[0] for group in alike(rows)]
    names, short = line_names(firsts), line_names(firsts, ["source"])
    looks = style.looks({name: text(row, "policy") for name, row in zip(names, firsts, strict=True)})
    routers = {
        name: (own, text(row, "router") or "-") for name, own, row in zip(names, short, firsts, strict=True)
    }
    strokes = {own: (looks[name].color, looks[name].dash) for name, (own, _) in routers.items()}
    markers = dict(zip(dict.fromkeys(router for _, router in routers.values()), style.MARKERS, strict=False))
    told = len(set(strokes.values())) == len(strokes) and all(r in markers for _, r in routers.values())
    if len(strokes) == len(looks) or not told:
        return looks, {}
    return {
        name: looks[name]._replace(marker=markers[router]) for name, (_, router) in routers.items()
    }, routers


def _legend(
    figure: Figure, axes: Any, looks: Mapping[str, style.Look], routers: Mapping[str, tuple[str, str]]
) -> None:
    """Each line with its name; with `routers` each line but for the marker, and below them whose each marker is."""
    from matplotlib.lines import Line2D

    handles, names = axes.get_legend_handles_labels()
    if routers:
        lines = {own: looks[name] for name, (own, _) in routers.items()}
        markers = {router: looks[name].marker for name, (_, router) in routers.items()}
        handles = [
            *(
                Line2D([], [], color=look.color, linestyle=look.dash, linewidth=1.8)
                for look in lines.values()
            ),
            Line2D([], [], linestyle=""),
            *(Line2D([], [], color=style.GREY, linestyle="", marker=marker) for marker in markers.values()),
        ]
        names = [*(shorten(name, 34) for name in lines), "router:", *markers]
    figure.legend(handles, names, loc="outside right center", fontsize=9, frameon=False)


def _point(x: float, values: list[float]) -> Point:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Point(x, math.nan, math.nan, math.nan)
    return Point(x, sum(known) / len(known), min(known), max(known))


def _draw(
    axes: Any, name: str, look: style.Look, points: Points, factor: float, met: Sequence[bool], size: float
) -> None:
    """One line; markers of several sizes, so that of two lines that coincide both are seen."""
    x = [point.rate_rps for point in points]
    mean, low, high = ([factor * value for value in v] for v in zip(*(p[1:] for p in points), strict=True))
    line = {"color": look.color, "linestyle": look.dash, "linewidth": 1.8}
    axes.plot(x, mean, label=name, marker=look.marker, markersize=size, **line)
    missed = [i for i, at_point in enumerate(met) if not at_point]
    axes.scatter(
        [x[i] for i in missed], [mean[i] for i in missed], s=size**2, marker=look.marker, facecolor="white",
        edgecolor=look.color, linewidth=1.4, zorder=3,
    )  # fmt: skip
    if low != high:
        axes.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0)


_MOST_TICKS = 12


def _x_ticks(axes: Any, values: Sequence[float]) -> None:
    """A tick at every x that was run, unless they are too many to read."""
    ticks = sorted(set(values))
    if len(ticks) <= _MOST_TICKS:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
