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
from typing import TYPE_CHECKING, Any

from sim.hydra_app import hydra_main
from sim.notes import print_notes, print_unfinished
from sim.results import shown_path
from sim.simulate import all_policies, simulate, swept

if TYPE_CHECKING:
    from analysis.figures.frontier import Point

DEFAULTS = {
    "workload.rate_rps": "4,8,12,16,20,24",
    "cluster/router": "least_tokens,consolidate",
}


def main(argv: Sequence[str]) -> int:
    """`coserve frontier`."""
    given = {arg.partition("=")[0] for arg in argv}
    defaults = {"policy": all_policies(), **DEFAULTS}
    argv = [*argv, *(f"{key}={value}" for key, value in defaults.items() if key not in given)]
    return hydra_main(
        simulate,
        swept(argv),
        prog="coserve frontier",
        at_end=_show,
        about="Simulate every policy over arrival rates and routers: how much finetuning at how much goodput.",
        example="coserve frontier device=h100 slo=mlperf_server workload=azure_conv workload.duration_s=600",
    )


def _show(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """The table of the best finetuning at each rate, as text and CSV, and the figure."""
    from analysis.figures.frontier import Point, frontier, peak_tok_s, write_frontier
    from analysis.figures.style import check_one_scene, scene_title, settings_title
    from analysis.repeats import over_seeds
    from analysis.runs import unlike_seeds

    check_one_scene(rows)
    lines = frontier(rows)
    with (folder / "frontier.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", *Point._fields])
        writer.writerows([policy, *point] for policy, points in lines.items() for point in points)
    rates = sorted({point.rate_rps for points in lines.values() for point in points})
    peak = peak_tok_s(rows)
    alone = "" if peak is None else f"; finetuning alone {peak:,.0f}"
    print(f"{scene_title(rows)}{settings_title(rows)}")
    print(f"trained tok/s where the SLO is kept{alone}")
    letters = router_letters(rows)
    beside = "  " if letters else ""
    width = max([18, *(len(policy) + 2 for policy in lines)])
    print(f"{'policy':{width}}" + "".join(f"{f'{rate:g}{beside}':>10}" for rate in rates) + "   req/s")
    for policy in sorted(lines):
        at = {point.rate_rps: point for point in lines[policy]}
        print(f"{policy:{width}}" + "".join(_cell(at.get(rate), letters) for rate in rates).rstrip())
    if letters:
        named = ", ".join(f"{letter} {name}" for name, letter in letters.items())
        print(f"behind each number the router that trained most, of equals the first: {named}")
    if unlike_seeds([one.with_seeds for one in over_seeds(rows)]):
        print("not all numbers are of the same seeds")
    print_notes(rows)
    print_unfinished(rows)
    print(f"runs:   {shown_path(folder)}")
    print(f"figure: {shown_path(write_frontier(rows, folder / 'frontier.png'))}")


def _cell(point: Point | None, letters: Mapping[str, str]) -> str:
    """Trained tok/s to the right, the letter of the router behind it."""
    if point is None:
        return f"{'-  ' if letters else '-':>10}"
    text = f"{point.finetune_tok_s:,.0f}"
    return f"{f'{text} {letters[point.router]}' if letters else text:>10}"


def router_letters(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Router -> the letter that stands for it, its first that no other has; empty when there is only one."""
    names = sorted({str(row["router"]) for row in rows})
    letters: dict[str, str] = {}
    for name in names:
        free = (letter for letter in name if letter.isalpha() and letter not in letters.values())
        letters[name] = next(free, str(len(letters) + 1))
    return letters if len(names) > 1 else {}
