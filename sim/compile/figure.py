"""The figure of one compilation. Imports matplotlib when it draws, not before."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sim.compile.program import GRADIENTS, CompileReport, held_bytes, marked_columns

LESS_SHARE = 0.8
"""What FlexLLM says that it saves; the line is that much less than PEFT's default."""


def draw(report: CompileReport, path: Path) -> None:
    """Write the figure: classes of tensors by column, and the Pareto list with what others need."""
    from analysis.figures import style

    plan = report.plan
    figure, (left, right) = style.new_figure(5.2, nrows=1, ncols=2)
    _classes(left, report)
    _choices(right, report)
    per_device = f", per device of {plan.tp}" if plan.tp > 1 else ""
    method = f"{plan.method} on {len(plan.targets)} projections of {plan.layers} layers"
    figure.suptitle(
        f"{plan.model}, {method}, a sample of {plan.seq_tokens:,} tokens{per_device}", fontsize=13
    )
    style.save(figure, path)


def _classes(axes: Any, report: CompileReport) -> None:
    from analysis.figures import style

    colors = (
        style.BLUE, style.ORANGE, style.GREEN, style.VERMILION,
        style.PURPLE, style.SKY, style.YELLOW, style.GREY,
    )  # fmt: skip
    columns = marked_columns(report.plan)
    below = [0.0] * len(columns)
    for i, row in enumerate(report.rows):
        heights = [v / 1024 for v in row.values]
        axes.bar(columns, heights, bottom=below, label=row.kind, color=colors[i % len(colors)], width=0.7)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    for x, total in enumerate(below):
        axes.text(x, total, f"{total:.1f}", ha="center", va="bottom")
    axes.set_ylim(0, max(below) * 1.1)
    axes.set_ylabel("KiB per token and layer")
    axes.set_title("tensors that are held (*: by this plan)", fontsize=11)
    handles, kinds = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], kinds[::-1], fontsize=9, frameon=False)
    style.tidy(axes, "y")


def _choices(axes: Any, report: CompileReport) -> None:
    from analysis.figures import style

    plan = report.plan
    points = sorted(plan.pareto, key=lambda p: p.extra_share)
    axes.step(
        [100 * p.extra_share for p in points], [p.kept_bytes / 1024 for p in points], where="post",
        color=style.BLUE, linewidth=1.8, label="stash: least that can be kept",
    )  # fmt: skip
    chosen, extra = held_bytes(report) / 1024, plan.extra_flops_share
    gradients = "" if plan.mode == "stash" else f",\n{GRADIENTS} among it"
    axes.plot(
        [100 * extra], [chosen], "o", color=style.VERMILION,
        label=f"chosen: {chosen:.1f} KiB, {extra:.1%} extra FLOPs{gradients}",
    )  # fmt: skip
    saved = math.fsum(r.autograd for r in report.rows) / 1024
    axes.axhline(saved, color=style.BLACK, ls="--", linewidth=1.2, label=f"PEFT default: {saved:.1f} KiB")
    less = f"{100 * LESS_SHARE:g} % less than PEFT default: {(1 - LESS_SHARE) * saved:.1f} KiB"
    axes.axhline((1 - LESS_SHARE) * saved, color=style.BLACK, ls=":", linewidth=1.2, label=less)
    axes.set_xlabel("extra FLOPs (% of forward and backward)")
    axes.set_ylabel("held (KiB per token and layer)")
    axes.set_ylim(0, saved * 1.1)
    axes.set_title("recomputing instead of keeping: choices that none beats", fontsize=11)
    axes.legend(fontsize=9, frameon=False, loc="center right")
    style.tidy(axes, "both")
