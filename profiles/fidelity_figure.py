"""The picture of `coserve fidelity`: iteration times, metrics and parts, predicted against measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.figures import style
from profiles.against import Against
from profiles.diagnosis import OFF, Finding
from profiles.schema import Floats

KINDS = {
    "inference alone": (style.BLUE, "o"),
    "finetuning alone": (style.ORANGE, "s"),
    "both": (style.GREEN, "^"),
}
MOST_POINTS = 4000


def draw(path: Path, found: Sequence[Against], findings: Sequence[Finding]) -> Path:
    """Write the figure to `path`; its suffix is the format."""
    figure, axes = style.new_figure(5.4, ncols=3, width_ratios=(1.15, 1.0, 1.0))
    _iterations(axes[0], pd.concat([one.iterations for one in found], ignore_index=True))
    _metrics(axes[1], found)
    _parts(axes[2], findings)
    title = found[0].name if len(found) == 1 else f"{len(found)} runs of the engine"
    figure.suptitle(f"{title}: predicted by a measured profile", fontsize=13, wrap=True)
    return style.save(figure, path)


def _iterations(axis: Any, frame: pd.DataFrame) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    if len(frame) > MOST_POINTS:
        frame = frame.sample(MOST_POINTS, random_state=0)
    measured_ms, predicted_ms = 1e3 * frame["measured_s"], 1e3 * frame["predicted_s"]
    kinds = frame["kind"].map(_kind)
    for kind, (color, marker) in KINDS.items():
        own = kinds == kind
        if own.any():
            axis.scatter(
                measured_ms[own], predicted_ms[own], s=14, color=color, marker=marker, alpha=0.4,
                linewidths=0, label=f"{kind} ({int(own.sum())})",
            )  # fmt: skip
    ends = [
        min(measured_ms.min(), predicted_ms.min()) * 0.8,
        max(measured_ms.max(), predicted_ms.max()) * 1.25,
    ]
    axis.plot(ends, ends, color=style.BLACK, linewidth=1.0)
    axis.fill_between(
        ends, np.array(ends) / OFF, np.array(ends) * OFF, color=style.GREY, alpha=0.18, linewidth=0,
        label=f"within {OFF:g}x",
    )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        each.set_major_formatter("{x:g}")
        each.set_minor_locator(NullLocator())
    axis.set_xlabel("measured iteration (ms)")
    axis.set_ylabel("predicted iteration (ms)")
    axis.legend(loc="upper left", frameon=False, fontsize=9)
    style.tidy(axis, "both")


def _kind(regime: str) -> str:
    inference = "decode" in regime or "prefill" in regime
    finetuning = any(word in regime for word in ("windows", "backward", "recompute", "optimizer"))
    return "both" if inference and finetuning else "finetuning alone" if finetuning else "inference alone"


def _metrics(axis: Any, found: Sequence[Against]) -> None:
    """Predicted over measured of every run, with the range of the seeds."""
    names = [metric.metric for metric in found[0].metrics]
    for place, name in enumerate(names):
        own = [m for one in found for m in one.metrics if m.metric == name and m.measured > 0]
        offsets = np.linspace(-0.25, 0.25, len(own)) if len(own) > 1 else np.zeros(len(own))
        for metric, offset in zip(own, offsets, strict=True):
            numbers = np.array([metric.predicted_low, metric.predicted, metric.predicted_high])
            _bar(axis, place + offset, numbers / metric.measured, style.BLUE)
    _ratios(axis, [_label(name) for name in names], "predicted / measured, over the seeds")


def _label(metric: str) -> str:
    """A metric's name as it is written elsewhere: TTFT p50, goodput req/s, finetune tok/s."""
    for suffix, unit in (("_tok_s", " tok/s"), ("_rps", " req/s"), ("_s", "")):
        if metric.endswith(suffix):
            metric = metric.removesuffix(suffix) + unit
            break
    first, *others = metric.split("_")
    return " ".join([first.upper() if first in ("ttft", "tpot", "itl") else first, *others])


def _parts(axis: Any, findings: Sequence[Finding]) -> None:
    told = [finding for finding in findings if np.isfinite(finding.factor)]
    for place, finding in enumerate(told):
        ratios = np.array([finding.low, finding.factor, finding.high])
        if finding.freed:
            color = style.VERMILION if finding.off else style.BLACK
            _bar(axis, place, ratios, color, weight=min(1.0, finding.share / FULL_SHARE))
        else:
            _bar(axis, place, ratios, style.GREY)
    labels = [f"{finding.part} ({finding.share:.0%})" for finding in told]
    _ratios(axis, labels, "measured / profile (grey: none shown;\nlarge and dark: much of the time)")


LEAST, MOST = 0.2, 5.0
"""Ratios beyond are drawn at the edge, as arrows."""


FULL_SHARE = 0.25
"""Of the time: a part with so much of it is drawn at full weight."""


def _bar(axis: Any, place: float, ratios: Floats, color: str, weight: float = 0.5) -> None:
    """The interval and its middle; `weight`, from 0 to 1, is the size and the opacity."""
    low, mid, high = np.clip(ratios, LEAST, MOST)
    marker = "<" if ratios[1] < LEAST else ">" if ratios[1] > MOST else "o"
    faint = 0.35 + 0.65 * min(1.0, 2 * weight)
    axis.plot([low, high], [place] * 2, color=color, linewidth=0.9 + 1.8 * weight, alpha=0.7 * faint)
    axis.plot(mid, place, marker=marker, markersize=3.5 + 5 * weight, color=color, alpha=faint, clip_on=False)


def _ratios(axis: Any, labels: Sequence[str], title: str) -> None:
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(LEAST, MOST)
    ticks = (LEAST, 0.5, 1.0, 2.0, MOST)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.axvline(1.0, color=style.BLACK, linewidth=1.0)
    axis.axvspan(1 / OFF, OFF, color=style.GREY, alpha=0.18, linewidth=0)
    axis.set_xlabel(title)
    style.tidy(axis, "x")
