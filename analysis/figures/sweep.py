"""Metrics over a swept number, such as the request rate: one line per policy, one panel per metric.

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
from analysis.runs import SLO_KEPT_SHARE, Row, number, text
from analysis.table import shorten
from sim.metrics import DEFINITIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_METRICS = ("finetune_tok_s", "attainment")

_TITLES = {
    "finetune_tok_s": "trained tokens per second (tok/s)",
    "attainment": "requests that meet their SLO (%)",
    "attainment_paper": "requests that meet their SLO, paper's rule (%)",
    "goodput_rps": "goodput (req/s)",
    "inference_tok_s": "generated tokens per second (tok/s)",
    "rate_rps": "arrivals (req/s)",
}
_UNITS = {
    "tok_s": ("tok/s", 1.0),
    "rps": ("req/s", 1.0),
    "s": ("s", 1.0),
    "j": ("J", 1.0),
}


class Point(NamedTuple):
    """Of the runs at one x; NaN where none of them has the number."""

    x: float
    mean: float
    low: float
    high: float


Points = list[Point]
"""By rising x."""


def sweep_figure(
    rows: Sequence[Row],
    *,
    key: str = "rate_rps",
    metrics: Sequence[str] = DEFAULT_METRICS,
    kept_share: float = SLO_KEPT_SHARE,
) -> Figure:
    """Lines of `metrics` over the numeric column `key` of `rows`, one workload, model and device."""
    style.check_one_scene(rows)
    for metric in metrics:
        if metric not in DEFINITIONS:
            raise ValueError(f"{metric!r} is not a metric; among them are {', '.join(DEFAULT_METRICS)}")
    lines = {metric: series(rows, key, metric) for metric in metrics}
    attained = series(rows, key, "attainment")
    height_inches = max(5.2, 0.8 + 0.21 * len(attained))
    figure, grid = style.new_figure(height_inches, nrows=1, ncols=len(metrics), squeeze=False)
    looks, routers = _looks(rows)
    for axes, metric in zip(grid[0], metrics, strict=True):
        for place, (name, points) in enumerate(lines[metric].items()):
            kept = [point.mean >= kept_share for point in attained[name]]
            _draw(
                axes, shorten(name, 34), looks[name], points, scale(metric), kept, size=8.5 - place % 3 * 1.5
            )
        axes.set_xlabel(axis_title(key))
        axes.set_ylabel(axis_title(metric))
        axes.yaxis.set_major_formatter(_thousands)
        _x_ticks(axes, [point.x for points in lines[metric].values() for point in points])
        _y_limits(axes, metric)
        if metric == "attainment":
            axes.axhline(
                100 * kept_share, color=style.BLACK, linewidth=1.2, linestyle=(0, (6, 2)), zorder=1.5
            )
        style.tidy(axes, "both")
    _legend(figure, grid[0][0], looks, routers)
    line = ", the dashed line" if "attainment" in metrics else ""
    hollow = f"hollow marker: SLO missed (fewer than {kept_share * 100:g} % of the requests meet it{line})"
    scene = f"{style.scene_title(rows)}{style.seeds_title(rows, 'band')}{style.settings_title(rows)}"
    figure.suptitle(f"{scene}\n{hollow}", fontsize=12)
    return figure


def write_sweep(
    rows: Sequence[Row],
    path: str | Path,
    *,
    key: str = "rate_rps",
    metrics: Sequence[str] = DEFAULT_METRICS,
    kept_share: float = SLO_KEPT_SHARE,
) -> Path:
    """Draw and save; returns the path."""
    return style.save(sweep_figure(rows, key=key, metrics=metrics, kept_share=kept_share), path)


def series(rows: Sequence[Row], key: str, metric: str) -> dict[str, Points]:
    """Display name -> points; a point without any known value has NaNs. ValueError without a number
    under `key`."""
    found: dict[str, dict[float, list[float]]] = {}
    for name, group in _named(rows):
        for row in group:
            try:
                x = number(row, key)
            except (TypeError, ValueError):
                raise ValueError(f"{key} must be a number to be an axis, got {row[key]!r}") from None
            if math.isnan(x):
                raise ValueError(f"a run of {name} has no {key}")
            found.setdefault(name, {}).setdefault(x, []).append(number(row, metric))
    return {name: [_point(x, found[name][x]) for x in sorted(found[name])] for name in found}


def _named(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Repeats of a run under their display name; a name comes once for each x."""
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


def _thousands(value: float, _: object) -> str:
    """As the tables write numbers; what is small as short as it is."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def axis_title(key: str) -> str:
    """What an axis says: words where there are some, else the name and its unit."""
    if key in _TITLES:
        return _TITLES[key]
    if scale(key) == 1000:
        return f"{key[: -len('_s')]} (ms)"
    if scale(key) == 100:
        return f"{key} (%)"
    for suffix, (unit, _) in _UNITS.items():
        if key.endswith(f"_{suffix}"):
            return f"{key[: -len(suffix) - 1]} ({unit})"
    return key


def scale(metric: str) -> float:
    """Shares in per cent, gaps between tokens and iterations in milliseconds, the rest as they are."""
    if metric.startswith(("attainment", "prediction_error", "kv_use", "gpu_busy_share", "finetune_share")):
        return 100.0
    return 1000.0 if metric.startswith(("tpot", "itl", "iteration_")) else 1.0


def _point(x: float, values: list[float]) -> Point:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Point(x, math.nan, math.nan, math.nan)
    return Point(x, sum(known) / len(known), min(known), max(known))


def _draw(
    axes: Any, name: str, look: style.Look, points: Points, factor: float, kept: Sequence[bool], size: float
) -> None:
    """One line; markers of several sizes, so that of two lines that coincide both are seen."""
    x = [point.x for point in points]
    mean, low, high = ([factor * value for value in v] for v in zip(*(p[1:] for p in points), strict=True))
    line = {"color": look.color, "linestyle": look.dash, "linewidth": 1.8}
    axes.plot(x, mean, label=name, marker=look.marker, markersize=size, **line)
    missed = [i for i, met in enumerate(kept) if not met]
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


def _y_limits(axes: Any, metric: str) -> None:
    most = axes.dataLim.y1
    if metric.startswith("attainment"):
        axes.set_ylim(-2, 102)
    elif most > 0:
        axes.set_ylim(-0.02 * most, 1.05 * most)
