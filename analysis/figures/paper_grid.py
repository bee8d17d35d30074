"""FlexLLM's figures: SLO attainment, finetuning and inference throughput by rate, a column per model.

Lines are simulated, hollow markers are published; a published point without a line would be a hole in the
predictions and is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.figures import style
from analysis.paper import MODELS, RATES_RPS, Key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (
    ("slo_attainment", "requests within the SLO (%)"),
    ("finetune_tok_s", "finetuning (tok/s)"),
    ("inference_tok_s", "inference (tok/s)"),
)
POLICIES = {
    "flexllm": "coserving",
    "separate-25vllm": "separate_25",
    "separate-50vllm": "separate_50",
    "separate-75vllm": "separate_75",
    "temporal-64": "temporal_64",
    "temporal-128": "temporal_128",
    "temporal-512": "temporal_512",
    "temporal-dynamic": "temporal_dynamic",
    "spatial": "spatial",
}
"""System -> the policy whose look and, but for FlexLLM's own, name it has."""
CAPTIONS = {
    "end-to-end": "flexllm: the policy coserving_static; separate_N: N % of the pipelines serve with vLLM "
    "(published as separate-Nvllm), the others finetune",
    "sharing": "flexllm: the policy coserving_static; temporal_N: a finetuning iteration after every N of "
    "inference; published as temporal-N",
}


def grid_figure(
    figure_name: str,
    systems: Sequence[str],
    predicted: Mapping[Key, float],
    published: Mapping[Key, float],
) -> Figure:
    """Nine panels: three metrics by three models."""
    own = [key for key in published if key.figure == figure_name]
    missing = [key for key in own if key not in predicted]
    if missing:
        raise ValueError(f"published point without a prediction: {missing[0]}")
    from matplotlib.legend_handler import HandlerTuple

    figure, axes = style.new_figure(10.7, nrows=3, ncols=3, sharex=True)
    for row, (metric, label) in enumerate(PANELS):
        for column, model in enumerate(MODELS):
            panel = axes[row][column]
            for place, system in enumerate(systems):
                _draw(panel, figure_name, system, model, metric, predicted, published, place)
            panel.set_xticks(RATES_RPS)
            panel.set_ylim(0, 105 if metric == "slo_attainment" else None)
            style.tidy(panel, "both")
            if column == 0:
                panel.set_ylabel(label)
            if row == 0:
                panel.set_title(model)
            if row == 2:
                panel.set_xlabel("requests per second of the cluster")
    handles: list[Any] = list(axes[0][0].get_legend_handles_labels()[0])
    names = [handle.get_label() for handle in handles]
    seen = {key.system for key in own}
    marks = dict.fromkeys(style.look(POLICIES[system]).marker for system in systems if system in seen)
    hollow = {"ls": "", "mfc": "none", "ms": 8, "color": style.BLACK}
    published_marks = tuple(axes[0][0].plot([], [], marker=mark, **hollow)[0] for mark in marks)
    looks: dict[str, Any] = {
        "loc": "outside lower center", "ncols": 9, "frameon": False, "fontsize": 9,
        "handlelength": 2.6, "columnspacing": 1.3, "handler_map": {tuple: HandlerTuple(ndivide=None, pad=0.3)},
    }  # fmt: skip
    if published_marks:
        handles.append(published_marks)
        names.append("published: hollow, the same shape")
    figure.legend(handles, names, **looks)
    title = f"{figure_name}: FlexLLM's figure, simulated{' (lines) and published (hollow)' if own else ''}"
    figure.suptitle(f"{title}\n{CAPTIONS[figure_name]}", fontsize=11, wrap=True)
    figure.align_ylabels(axes[:, 0])
    return figure


def _draw(
    panel: Any,
    figure_name: str,
    system: str,
    model: str,
    metric: str,
    predicted: Mapping[Key, float],
    published: Mapping[Key, float],
    place: int,
) -> None:
    """The first system lies on top with the smallest marker, so that those below it are seen around it."""
    look = style.look(POLICIES[system])
    keys = [Key(figure_name, system, model, rate, metric) for rate in RATES_RPS]
    values = [predicted[key] for key in keys]
    name = "flexllm" if system == "flexllm" else POLICIES[system]
    above = {"zorder": 3 - 0.1 * place, "ms": 4 + 0.8 * place, "lw": 1.2 + 0.3 * place}
    panel.plot(RATES_RPS, values, color=look.color, ls=look.dash, marker=look.marker, label=name, **above)
    known = [key for key in keys if key in published]
    panel.plot(
        [key.rate_rps for key in known], [published[key] for key in known], color=look.color, ls="",
        marker=look.marker, ms=11, mfc="none", mew=1.5, label="_published", zorder=4,
    )  # fmt: skip
