"""`coserve frontier`: finetuning against goodput for every policy, over arrival rates and routers.

    coserve frontier                                        built-in workload, 4 x A100
    coserve frontier device=h100 slo=mlperf_server workload=azure_conv workload.duration_s=600 \
        workload.rate_rps=8,16,24,32,40

Each policy is shown with its better router; `seed=0,1,2,3,4` asks that the SLO is kept at every seed.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sim.hydra_app import hydra_main
from sim.notes import print_notes
from sim.results import shown_path
from sim.simulate import fitting_policies, show, simulate, swept, tell_workload

DEFAULTS = {
    "workload.rate_rps": "4,8,12,16,20,24",
    "cluster/router": "least_tokens,consolidate",
}


def main(argv: Sequence[str]) -> int:
    """`coserve frontier`."""
    given = {arg.partition("=")[0] for arg in argv}
    defaults = DEFAULTS if "policy" in given else {"policy": fitting_policies(argv), **DEFAULTS}
    argv = [*argv, *(f"{key}={value}" for key, value in defaults.items() if key not in given)]
    return hydra_main(
        simulate,
        swept(argv),
        prog="coserve frontier",
        at_start=tell_workload,
        at_end=_show,
        about="Simulate every policy over arrival rates and routers: how much finetuning at how much goodput.",
        example="coserve frontier device=h100 slo=mlperf_server workload=azure_conv workload.duration_s=600",
    )


def _show(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """The table of the best finetuning at each rate, as text and CSV, and the figure; of several scenes the table of
    all runs."""
    from analysis.figures.frontier import Point, frontier, write_frontier
    from analysis.frontier_table import POINTS, frontier_table
    from analysis.runs import SCENE, varied

    if varied(rows, SCENE):
        show(rows, folder)
        return
    print(frontier_table(rows))
    with (folder / POINTS).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", *Point._fields])
        writer.writerows([policy, *point] for policy, points in frontier(rows).items() for point in points)
    print_notes(rows)
    print(f"runs:   {shown_path(folder)}")
    print(f"figure: {shown_path(write_frontier(rows, folder / 'frontier.png'))}")
