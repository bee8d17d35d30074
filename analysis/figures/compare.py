"""Policies side by side on one workload: how much finetuning each gets done, and who keeps the SLO.

One line per policy through both panels, the SLO keepers on top and in each group the most finetuning
first, so that the first line is the answer. Colour says one thing, whether the SLO is kept, and hatching says it
again. Runs that differ only in their seed are one line, with their mean and a whisker from the smallest to the
largest. Numbers are those of the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.figures import style
from analysis.repeats import alike, line_names
from analysis.runs import (
    SLO_KEPT_SHARE,
    Row,
    kept,
    number,
    of_each_class,
    peaks_tok_s,
    text,
    varied,
    worst_attainment,
)
from analysis.table import cell, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GUIDES = (0.90, 0.95, 0.99)
_NAME_LETTERS = 44


class Spread(NamedTuple):
    mean: float
    low: float
    high: float


class Line(NamedTuple):
    name: str
    finetune: Spread
    share_of_peak: Spread
    attainment: Spread
    keeps: bool
    """The SLO, in the mean of its worst class."""


def compare_figure(rows: Sequence[Row], *, kept_share: float = SLO_KEPT_SHARE) -> Figure:
    """Two panels over the policies of `rows`, which share workload, model, device and rate."""
    style.check_one_scene(rows)
    if varied(rows, ["rate_rps"]):
        raise ValueError("a comparison shows one rate_rps; several rates make a sweep")
    lines = ranked(rows, kept_share)
    figure, (left, right) = style.new_figure(
        1.9 + 0.36 * len(lines), nrows=1, ncols=2, sharey=True, gridspec_kw={"width_ratios": [1.25, 1]}
    )
    _finetune_panel(left, lines, _peak(rows))
    _attainment_panel(right, lines, kept_share)
    left.set_yticks(range(len(lines)), [shorten(line.name, _NAME_LETTERS) for line in lines])
    left.set_ylim(len(lines) - 0.4, -0.6)
    title = "Finetuning beside inference, and who keeps the SLO"
    scene = f"{style.scene_title(rows)}{style.seeds_title(rows, 'whisker')}{style.settings_title(rows)}"
    figure.suptitle(f"{title}\n{scene}", fontsize=13, wrap=True)
    figure.supxlabel(
        f"both sides: blue, SLO kept (at least {kept_share * 100:g} % of the requests{of_each_class(rows)} meet it); "
        "hatched orange, SLO missed",
        fontsize=10,
    )
    return figure


def write_compare(rows: Sequence[Row], path: str | Path, *, kept_share: float = SLO_KEPT_SHARE) -> Path:
    """Draw and save; returns the path."""
    return style.save(compare_figure(rows, kept_share=kept_share), path)


def ranked(rows: Sequence[Row], kept_share: float = SLO_KEPT_SHARE) -> list[Line]:
    """One line per policy (and source and router, if there are several), keepers of the SLO first, most trained
    first."""
    groups = alike(rows)
    lines = [
        Line(
            name,
            _spread(group, "finetune_tok_s"),
            _spread(group, "finetune_share_of_peak"),
            _spread(group, "attainment"),
            kept(math.fsum(map(worst_attainment, group)) / len(group), kept_share),
        )
        for name, group in zip(line_names([group[0] for group in groups]), groups, strict=True)
    ]

    def rank(line: Line) -> tuple[bool, float, float]:
        trained, met = line.finetune.mean, line.attainment.mean
        return (
            not line.keeps,
            math.inf if math.isnan(trained) else -trained,
            math.inf if math.isnan(met) else -met,
        )

    return sorted(lines, key=rank)


def _spread(rows: Sequence[Row], key: str) -> Spread:
    values = [value for row in rows if not math.isnan(value := number(row, key))]
    if not values:
        return Spread(math.nan, math.nan, math.nan)
    return Spread(math.fsum(values) / len(values), min(values), max(values))


def _peak(rows: Sequence[Row]) -> float | None:
    """What finetuning alone reaches: as the runs state it, if they agree, else as a finetune-only run among them."""
    known = peaks_tok_s(rows)
    if not any(number(row, "peak_finetune_tok_s") > 0 for row in rows):
        measured = [number(row, "finetune_tok_s") for row in rows if text(row, "policy") == "finetune_only"]
        known = [value for value in measured if value > 0]
    return sum(known) / len(known) if known else None


def _finetune_panel(axes: Any, lines: Sequence[Line], peak: float | None) -> None:
    """Numbers stand in columns beside the bars, where no line runs through them."""
    from matplotlib.ticker import MaxNLocator

    largest = max([peak or 0.0, *(line.finetune.high for line in lines if line.finetune.high > 0)])
    span = largest if largest > 0 else 1.0
    for y, line in enumerate(lines):
        trained, share = line.finetune.mean, line.share_of_peak.mean
        if math.isnan(trained):
            axes.text(span * 0.01, y, "missing", va="center", fontsize=9, style="italic", color=style.GREY)
            continue
        _bar(axes, line.finetune, y, line.keeps)
        axes.text(span * 1.14, y, cell("finetune_tok_s", trained), va="center", ha="right", fontsize=9)
        if trained > 0 and not math.isnan(share):
            shown = f"{cell('finetune_share_of_peak', share)} %"
            axes.text(span * 1.27, y, shown, va="center", ha="right", fontsize=9)
    axes.set_xticks(
        [tick for tick in MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(0, span) if tick <= span]
    )
    style.token_ticks(axes.xaxis, largest)
    axes.set_xlim(0, span * 1.28)
    axes.set_xlabel("trained tokens per second (tok/s)")
    if peak is not None:
        axes.axvline(peak, color=style.BLACK, linewidth=1.2, linestyle="--", zorder=3)
        axes.annotate(
            f"finetuning alone: {peak:,.0f} tok/s = 100 %", (peak, 1), xycoords=("data", "axes fraction"),
            xytext=(0, 4), textcoords="offset points", ha="center", fontsize=9,
        )  # fmt: skip
    elif any(line.share_of_peak.mean > 0 for line in lines):
        axes.annotate(
            "%: of finetuning alone with the same settings", (span * 1.27, 1), xycoords=("data", "axes fraction"),
            xytext=(0, 4), textcoords="offset points", ha="right", fontsize=9,
        )  # fmt: skip
    style.tidy(axes, "x")
    axes.tick_params(axis="y", length=0)


def _attainment_panel(axes: Any, lines: Sequence[Line], kept_share: float) -> None:
    # Four points apart at most, so the outer two numbers stand outside of their lines.
    guides = dict(zip(GUIDES, ("right", "center", "left"), strict=True))
    if not any(math.isclose(guide, kept_share) for guide in GUIDES):
        guides = {kept_share: "center"}
    for guide, side in guides.items():
        chosen = math.isclose(guide, kept_share)
        axes.axvline(
            guide * 100, color=style.BLACK if chosen else style.GREY, linewidth=1.2 if chosen else 0.8,
            linestyle="--" if chosen else ":", zorder=3,
        )  # fmt: skip
        axes.annotate(
            f"{guide * 100:g}", (guide * 100, 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
            textcoords="offset points", ha=side, fontsize=8, weight="bold" if chosen else "normal",
        )  # fmt: skip
    for y, line in enumerate(lines):
        value = line.attainment
        if math.isnan(value.mean):
            axes.text(1, y, "missing", va="center", fontsize=9, style="italic", color=style.GREY)
            continue
        _bar(axes, Spread(*(100 * share for share in value)), y, line.keeps)
        axes.text(
            115, y, cell("attainment", value.mean), va="center", ha="right", fontsize=9,
            color=style.KEPT if line.keeps else style.MISSED, weight="bold",
        )  # fmt: skip
    axes.set_xlim(0, 116)
    axes.set_xticks([0, 20, 40, 60, 80, 100])
    axes.set_xlabel("requests that meet their SLO (%)")
    style.tidy(axes, "x")
    axes.tick_params(axis="y", length=0)


def _bar(axes: Any, value: Spread, y: int, met: bool) -> None:
    if met:
        axes.barh(y, value.mean, height=0.66, color=style.KEPT)
    else:
        axes.barh(y, value.mean, height=0.62, facecolor="white", edgecolor=style.MISSED, hatch="////")
    if value.high > value.low:
        axes.plot([value.low, value.high], [y, y], color=style.BLACK, linewidth=1.4, marker="|", zorder=4)
