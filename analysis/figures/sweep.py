"""Metrics over a swept number, such as the request rate: one line per policy, one panel per metric.

Several runs at one point (seeds) are their mean, with a band from the smallest to the largest. Where
a metric is missing the line has a gap; it never falls to 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.figures import style
from analysis.runs import Row, number, text
from analysis.table import display_names, shorten
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

Points = list[tuple[float, float, float, float]]
"""(x, mean, smallest, largest) by rising x."""


def sweep_figure(
    rows: Sequence[Row], *, key: str = "rate_rps", metrics: Sequence[str] = DEFAULT_METRICS
) -> Figure:
    """Lines of `metrics` over the numeric column `key` of `rows`, one workload, model and device."""
    style.check_one_scene(rows)
    for metric in metrics:
        if metric not in DEFINITIONS:
            raise ValueError(f"{metric!r} is not a metric; among them are {', '.join(DEFAULT_METRICS)}")
    lines = {metric: series(rows, key, metric) for metric in metrics}
    figure, grid = style.new_figure(5.2, nrows=1, ncols=len(metrics), squeeze=False)
    looks = style.looks(
        {name: text(row, "policy") for row, name in zip(rows, display_names(rows), strict=True)}
    )
    for axes, metric in zip(grid[0], metrics, strict=True):
        for name, points in lines[metric].items():
            _draw(axes, shorten(name, 28), looks[name], points, scale(metric))
        axes.set_xlabel(axis_title(key))
        axes.set_ylabel(axis_title(metric))
        _y_limits(axes, metric)
        style.tidy(axes, "both")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle(style.scene_title(rows), fontsize=13)
    return figure


def write_sweep(
    rows: Sequence[Row],
    path: str | Path,
    *,
    key: str = "rate_rps",
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> Path:
    """Draw and save; returns the path."""
    return style.save(sweep_figure(rows, key=key, metrics=metrics), path)


def series(rows: Sequence[Row], key: str, metric: str) -> dict[str, Points]:
    """Display name -> points; a point without any known value has NaNs. ValueError without a number
    under `key`."""
    found: dict[str, dict[float, list[float]]] = {}
    for row, name in zip(rows, display_names(rows), strict=True):
        try:
            x = number(row, key)
        except (TypeError, ValueError):
            raise ValueError(f"{key} must be a number to be an axis, got {row[key]!r}") from None
        if math.isnan(x):
            raise ValueError(f"a run of {name} has no {key}")
        found.setdefault(name, {}).setdefault(x, []).append(number(row, metric))
    return {name: [_point(x, found[name][x]) for x in sorted(found[name])] for name in found}


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


def _point(x: float, values: list[float]) -> tuple[float, float, float, float]:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return (x, math.nan, math.nan, math.nan)
    return (x, sum(known) / len(known), min(known), max(known))


def _draw(axes: Any, name: str, look: style.Look, points: Points, factor: float) -> None:
    x = [p[0] for p in points]
    mean, low, high = ([factor * p[i] for p in points] for i in (1, 2, 3))
    axes.plot(
        x, mean, label=name, color=look.color, marker=look.marker, linestyle=look.dash, markersize=5.5,
        linewidth=1.8,
    )  # fmt: skip
    if low != high:
        axes.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0)


def _y_limits(axes: Any, metric: str) -> None:
    top = axes.get_ylim()[1]
    if metric.startswith("attainment"):
        axes.set_ylim(-2, 102)
    elif top > 0:
        axes.set_ylim(-0.02 * top, top)
