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
    figure.suptitle(f"{title}: predicted by a measured profile", fontsize=13)
    return style.save(figure, path)


def _iterations(axis: Any, frame: pd.DataFrame) -> None:
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
        own = [
            metric for one in found for metric in one.metrics if metric.metric == name and metric.measured > 0
        ]
        offsets = np.linspace(-0.25, 0.25, len(own)) if len(own) > 1 else [0.0]
        for metric, offset in zip(own, offsets, strict=True):
            low, mid, high = (
                value / metric.measured
                for value in (metric.predicted_low, metric.predicted, metric.predicted_high)
            )
            axis.plot([low, high], [place + offset] * 2, color=style.BLUE, linewidth=1.6, alpha=0.7)
            axis.plot(mid, place + offset, marker="o", markersize=4.5, color=style.BLUE)
    axis.set_yticks(
        range(len(names)), [name.removesuffix("_s").replace("_", " ") for name in names], fontsize=9
    )
    axis.invert_yaxis()
    _ratio(axis, "predicted / measured, and of the seeds")


def _parts(axis: Any, findings: Sequence[Finding]) -> None:
    told = [finding for finding in findings if np.isfinite(finding.factor)]
    for place, finding in enumerate(told):
        color = style.VERMILION if finding.off else style.BLACK if finding.freed else style.GREY
        axis.plot([max(finding.low, 1e-2), max(finding.high, 1e-2)], [place] * 2, color=color, linewidth=1.6)
        axis.plot(max(finding.factor, 1e-2), place, marker="o", markersize=5, color=color)
    axis.set_yticks(range(len(told)), [f"{f.part} ({f.share:.0%})" for f in told], fontsize=9)
    axis.invert_yaxis()
    _ratio(axis, "part: measured / profile (red: off)")


def _ratio(axis: Any, label: str) -> None:
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(max(0.1, min(low, 0.7)), min(10.0, max(high, 1.4)))
    ticks = [
        t
        for t in (0.1, 0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0, 10.0)
        if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]
    ]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.axvline(1.0, color=style.BLACK, linewidth=1.0)
    axis.axvspan(1 / OFF, OFF, color=style.GREY, alpha=0.18, linewidth=0)
    axis.set_xlabel(label)
    style.tidy(axis, "x")
