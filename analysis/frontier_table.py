"""The table of `coserve frontier`: the most finetuning of each policy at each rate where it keeps the SLO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.figures.frontier import Point, frontier, peak_tok_s
from analysis.figures.style import check_one_scene, scene_title, settings_title
from analysis.repeats import over_seeds
from analysis.runs import SLO_KEPT_SHARE, Row, of_each_class, unlike_seeds

POINTS = "frontier.csv"
"""What the command leaves in the folder of its sweep: a line per policy and rate."""


def frontier_table(rows: Sequence[Row], kept_share: float = SLO_KEPT_SHARE) -> str:
    """Lines of rows of one workload, model and device; ValueError for others."""
    check_one_scene(rows)
    lines = frontier(rows, kept_share)
    rates = sorted({point.rate_rps for points in lines.values() for point in points})
    peak = peak_tok_s(rows)
    alone = "" if peak is None else f"; finetuning alone {peak:,.0f}"
    letters = router_letters(rows)
    beside = "  " if letters else ""
    width = max([18, *(len(policy) + 2 for policy in lines)])
    title = f"{scene_title(rows)}{settings_title(rows)}"
    if not lines:
        met = f"{kept_share * 100:g} % of arrived requests{of_each_class(rows)} meet it"
        return f"{title}\nno policy keeps the SLO ({met}) at any of the rates{alone}"
    table = [
        title,
        f"trained tok/s where the SLO is kept{alone}",
        f"{'policy':{width}}" + "".join(f"{f'{rate:g}{beside}':>10}" for rate in rates) + "   req/s",
    ]
    for policy in sorted(lines):
        at = {point.rate_rps: point for point in lines[policy]}
        table.append(f"{policy:{width}}" + "".join(_cell(at.get(rate), letters) for rate in rates).rstrip())
    if letters:
        named = ", ".join(f"{letter} {name}" for name, letter in letters.items())
        table.append(f"behind each number the router that trained most, of equals the first: {named}")
    if unlike_seeds([one.with_seeds for one in over_seeds(rows)]):
        table.append("not all numbers are of the same seeds")
    return "\n".join(table)


def _cell(point: Point | None, letters: Mapping[str, str]) -> str:
    """Trained tok/s to the right, the letter of the router behind it."""
    if point is None:
        return f"{'-  ' if letters else '-':>10}"
    text = f"{point.finetune_tok_s:,.0f}"
    return f"{f'{text} {letters[point.router]}' if letters else text:>10}"


def router_letters(rows: Sequence[Row]) -> dict[str, str]:
    """Router -> the letter that stands for it, its first that no other has; empty when there is only one."""
    names = sorted({str(row["router"]) for row in rows})
    letters: dict[str, str] = {}
    for name in names:
        free = (letter for letter in name if letter.isalpha() and letter not in letters.values())
        letters[name] = next(free, str(len(letters) + 1))
    return letters if len(names) > 1 else {}
