"""FlexLLM's case study: ten minutes of bursty traffic, and what inference and finetuning get of the GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from analysis.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def case_study_figure(bins: Mapping[str, Sequence[float]]) -> Figure:
    """Two panels over time from the bins of `analysis.paper.timeline`."""
    figure, (arrivals, tokens) = style.new_figure(
        6.4, nrows=2, ncols=1, sharex=True, gridspec_kw={"height_ratios": [1, 2]}
    )
    time_s = bins["time_s"]
    arrivals.step(time_s, bins["arrivals_rps"], where="post", color=style.GREY)
    arrivals.set_ylabel("arrivals (req/s)")
    tokens.step(time_s, bins["inference_tok_s"], where="post", color=style.BLUE, label="inference: generated")
    finetune = bins["finetune_fwd_tok_s"]
    tokens.step(time_s, finetune, where="post", color=style.ORANGE, label="finetuning: forward")
    tokens.set_ylabel("tokens per second (tok/s)")
    tokens.set_xlabel("time (s)")
    tokens.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for axes in (arrivals, tokens):
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 600)
        style.tidy(axes, "both")
    figure.suptitle("Case study: 14B, four pipelines, bins of 5 s, simulated", fontsize=13)
    return figure
