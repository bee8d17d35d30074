"""The picture of `coserve validate`: tokens and requests over time, and the latencies as distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from analysis.figures import style
from profiles.compare import Floats, Timeline, measured_latencies, predicted_latencies
from sim.vllm.replay import Replay
from sim.vllm.run import RunFolder

MEASURED: dict[str, Any] = {"color": style.BLACK, "linewidth": 1.4, "label": "measured"}
PREDICTED: dict[str, Any] = {
    "color": style.VERMILION,
    "linewidth": 1.4,
    "label": "predicted",
    "linestyle": "--",
}


def draw(path: Path, run: RunFolder, replay: Replay, line: Timeline) -> None:
    """Write the figure to `path`; its suffix is the format."""
    figure, axes = style.new_figure(9.0, nrows=3, ncols=3)
    grid = axes[0, 0].get_gridspec()
    for row in (0, 1):
        for axis in axes[row]:
            axis.remove()
    tokens, requests = (figure.add_subplot(grid[row, :]) for row in (0, 1))
    window = max(1, round(len(line.end_s) / 40))
    _over_time(tokens, line, "gen_tok_s", f"output tok/s, mean of {window * run.tick_s:g} s", window)
    _over_time(requests, line, "running", "running requests", 1)
    requests.set_xlabel("time (s)")
    named = {
        "TTFT": "time to first token (s)",
        "TPOT": "time per output token (ms)",
        "latency": "latency (s)",
    }
    pairs = zip(
        measured_latencies(run.requests),
        predicted_latencies(run.requests, replay),
        named.items(),
        strict=True,
    )
    for axis, (measured, predicted, (name, label)) in zip(axes[2], pairs, strict=True):
        scale = 1e3 if name == "TPOT" else 1.0
        _distribution(axis, measured * scale, predicted * scale, label)
    axes[2, 0].set_ylabel("share of requests")
    tokens.legend(loc="lower right", frameon=False, ncols=2)
    engine = run.engine
    title = f"{engine.model}, vLLM {engine.version}: a recorded run and its simulation"
    figure.suptitle(title, fontsize=13, wrap=True)
    style.save(figure, path)


def _over_time(axis: Any, line: Timeline, name: str, label: str, window: int) -> None:
    ticks = len(line.end_s) // window * window
    end_s = line.end_s[:ticks].reshape(-1, window)[:, -1]
    for series, look in ((line.measured, MEASURED), (line.predicted, PREDICTED)):
        axis.plot(end_s, series[name][:ticks].reshape(-1, window).mean(axis=1), **look)
    axis.set_ylabel(label)
    axis.set_xlim(0, line.end_s[-1])
    axis.set_ylim(bottom=0)
    style.tidy(axis, "both")


def _distribution(axis: Any, measured: Floats, predicted: Floats, label: str) -> None:
    for values, look in ((measured, MEASURED), (predicted, PREDICTED)):
        share = np.arange(1, values.size + 1) / max(values.size, 1)
        axis.step(np.sort(values), share, where="post", **look)
    axis.set_xlabel(label)
    axis.set_ylim(0, 1)
    style.tidy(axis, "both")
