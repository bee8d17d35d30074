"""One run over time: tokens per second, and how many sequences run and wait.

Quantities are spread over the iterations' own time and averaged in equal bins, so a bin says the
same whether many short iterations or one long one fell into it. Between iterations nothing runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from analysis.figures import style
from sim.results import Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]


def timeline_figure(run: Run, *, bins: int = 150) -> Figure:
    """Two panels over the run's time; ValueError for a run without iterations."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    rows = run.table("iterations")
    if rows.empty:
        raise ValueError(f"{run.folder} has no iterations to show")
    edges = np.linspace(0.0, float(rows["end_s"].max()), bins + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    took_s = (rows["end_s"] - rows["start_s"]).to_numpy()

    figure, (tokens, sequences) = style.new_figure(6.4, nrows=2, ncols=1, sharex=True)
    for column, label, color in (
        ("sampled_tokens", "inference: generated", style.BLUE),
        ("prefill_tokens", "inference: prompts", style.SKY),
        ("forward_tokens", "finetuning: forward", style.ORANGE),
    ):
        rate = spread(rows, rows[column].to_numpy(dtype=np.float64), edges)
        tokens.plot(middle, rate, color=color, label=label, linewidth=1.5)
    tokens.set_ylabel("tokens per second (tok/s)")
    for column, label, color in (("running", "running", style.BLUE), ("waiting", "waiting", style.VERMILION)):
        held = spread(rows, rows[column].to_numpy(dtype=np.float64) * took_s, edges)
        sequences.fill_between(middle, held, color=color, alpha=0.25, linewidth=0)
        sequences.plot(middle, held, color=color, label=label, linewidth=1.5)
    sequences.set_ylabel("sequences")
    sequences.set_xlabel("time (s)")
    for axes in (tokens, sequences):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(style.thousands)
        axes.set_xlim(0, edges[-1])
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=10)
        style.tidy(axes, "both")
    policy = run.summary.get("policy")
    title = f"{policy} over time" if policy is not None else "Run over time"
    row = [run.summary]
    figure.suptitle(f"{title}\n{style.scene_title(row)}{style.settings_title(row)}", fontsize=13, wrap=True)
    return figure


def write_timeline(run: Run, path: str | Path) -> Path:
    """Draw and save; returns the path."""
    return style.save(timeline_figure(run), path)


def spread(rows: pd.DataFrame, amounts: Floats, edges: Floats) -> Floats:
    """`amounts` of each iteration, spread evenly over its time: per second in each bin, summed over
    the pipelines. Shape (bins,)."""
    total = np.zeros(edges.size - 1)
    pipelines = rows["pipeline"].to_numpy()
    for pipeline in np.unique(pipelines):
        chosen = pipelines == pipeline
        start_s, end_s = rows["start_s"].to_numpy()[chosen], rows["end_s"].to_numpy()[chosen]
        sums = np.cumsum(amounts[chosen])
        # A running total that rises within iterations and is flat between them.
        times = np.stack((start_s, end_s), axis=1).ravel()
        levels = np.stack((sums - amounts[chosen], sums), axis=1).ravel()
        total += np.diff(np.interp(edges, times, levels, left=0.0))
    result: Floats = total / np.diff(edges)
    return result
