"""The figure of one compilation. Imports matplotlib when it draws, not before."""

from __future__ import annotations

import math
from pathlib import Path

from sim.compile.program import COLUMNS, CompileReport


def draw(report: CompileReport, path: Path) -> None:
    """Write the figure: classes of tensors by column, and the Pareto list with what others need."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plan = report.plan
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    below = [0.0] * len(COLUMNS)
    for i, row in enumerate(report.rows):
        heights = [v / 1024 for v in row.values]
        left.bar(COLUMNS, heights, bottom=below, label=row.kind, color=plt.get_cmap("tab10")(i), width=0.7)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    for x, total in enumerate(below):
        left.text(x, total, f"{total:.1f}", ha="center", va="bottom")
    left.set_ylim(0, max(below) * 1.1)
    left.set_ylabel("KiB per token and layer")
    left.set_title(f"{plan.model}, {plan.method} on {len(plan.targets)} layer(s), {plan.seq_tokens} tokens")
    left.legend(fontsize=8)
    points = sorted(plan.pareto, key=lambda p: p.extra_share)
    right.step([100 * p.extra_share for p in points], [p.kept_bytes / 1024 for p in points], where="post")
    chosen = plan.kept_bytes_per_token_layer / 1024
    right.plot(
        [100 * plan.extra_flops / plan.layer_step_flops], [chosen], "o", label=f"chosen: {chosen:.1f} KiB"
    )
    saved = math.fsum(r.autograd for r in report.rows) / 1024
    right.axhline(saved, color="tab:red", ls="--", label=f"PEFT default: {saved:.1f} KiB")
    right.axhline(0.2 * saved, color="tab:red", ls=":", label="80 % less")
    right.set_xlabel("extra FLOPs, % of forward and backward")
    right.set_ylabel("kept, KiB per token and layer")
    right.set_ylim(0, saved * 1.1)
    right.set_title("rematerialisation: undominated choices")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
