"""The comparison of runs as text: coloured in a terminal, aligned plain text in logs and the README.

One section per workload, model and device; within it a line per run. Runs that differ only in the seed
are one line, their mean, with the standard deviation below it. The line with most finetuning among those
that keep the SLO is marked, unless they are of unlike seeds, as in a sweep that was cut short. Requests of several SLO
classes have a table of their attainment below it. A line of usual columns fits in 110 letters and none is wrapped.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from analysis.repeats import Repeated, display_names, over_seeds, shared_settings
from analysis.runs import (
    SCENE,
    SLO_KEPT_SHARE,
    Row,
    best,
    by_class,
    keeps_slo,
    number,
    scene,
    text,
    unlike_seeds,
    unusual,
    varied,
)

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100
"""Of the usual table; names of variants, which would lose what they tell, may go beyond."""
_VARIANT_LETTERS = 44
UNLIKE_SHARE = 0.1
"""A rate this far from the one that was asked for is said: a short piece of a trace has a rate of its own."""


class Column(NamedTuple):
    """A metric and how it is shown."""

    key: str
    head: tuple[str, str]
    scale: float
    decimals: int
    down: bool = False
    """Rounded down, so that 100.0 is all of them and a bound just missed is not shown as kept."""

    def cell(self, value: float) -> str:
        if math.isnan(value):
            return "-"
        value *= self.scale
        if self.down:
            unit = 10**self.decimals
            value = math.floor(round(value * unit, 6)) / unit
        return f"{value:,.{self.decimals}f}"


COLUMNS = (
    Column("attainment", ("SLO", "met %"), 100, 1, down=True),
    Column("goodput_rps", ("goodput", "req/s"), 1, 2),
    Column("ttft_p99_s", ("TTFT", "p99 s"), 1, 2),
    Column("tpot_p99_s", ("TPOT", "p99 ms"), 1000, 1),
    Column("itl_p99_s", ("ITL", "p99 ms"), 1000, 1),
    Column("finetune_tok_s", ("finetune", "tok/s"), 1, 0),
    Column("finetune_share_of_peak", ("% of", "peak"), 100, 1),
)
WHERE_KNOWN = (
    Column("energy_j_per_token", ("energy", "J/token"), 1, 2),
    Column("cost_per_mtoken", ("cost", "per Mtok"), 1, 2),
    Column("data_done_s", ("data", "done s"), 1, 0),
)
"""Of devices with a price, or the power that they take when idle; of finetuning data that end."""

BY_CLASS = "by SLO class"
"""Title of the table of what each class attains."""

_LABEL_HEADS = {
    "router": ("", "router"),
    "rate_rps": ("rate", "req/s"),
    "source": ("", "source"),
}


class Section(NamedTuple):
    """Lines that are compared with each other, all cells as text."""

    title: list[str]
    """Lines; the second and those after it are settings."""
    heads: list[tuple[str, str]]
    lines: list[list[str]]
    winners: set[int]
    kept: list[bool]
    unlike_seeds: bool
    """Whether lines that could be compared are not of the same seeds."""


def sections(rows: Sequence[Row], kept_share: float = SLO_KEPT_SHARE) -> list[Section]:
    """`rows` by scene, in order of first appearance; behind one with requests of several SLO classes, these."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(text(row, key) for key in SCENE), []).append(row)
    return [section for group in groups.values() for section in _scene(group, kept_share)]


def plain_table(rows: Sequence[Row], kept_share: float = SLO_KEPT_SHARE) -> str:
    """Aligned text without colours; ends without a newline."""
    shown = sections(rows, kept_share)
    blocks = []
    for section in shown:
        widths = _widths(section)
        lines = [*section.title]
        lines += [_line([head[level] for head in section.heads], widths, "  ") for level in (0, 1)]
        lines.append("  " + "  ".join("-" * width for width in widths))
        for i, cells in enumerate(section.lines):
            lines.append(_line(cells, widths, "* " if i in section.winners else "  "))
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, *filter(None, [footnote(shown, kept_share)])])


def print_table(
    rows: Sequence[Row], kept_share: float = SLO_KEPT_SHARE, console: Console | None = None
) -> None:
    """The same table for a terminal: the best line bold green, those that miss the SLO dim."""
    from rich.console import Console
    from rich.text import Text

    console = Console() if console is None else console
    for line, style in _styled(rows, kept_share):
        console.print(Text(line, style=style), no_wrap=True, overflow="ignore", crop=False)


def footnote(shown: Sequence[Section], kept_share: float = SLO_KEPT_SHARE) -> str:
    """What the signs that occur in the sections mean, and why a star that could be expected is not there; empty if
    there is nothing to say."""
    cells = [cell for section in shown for line in section.lines for cell in line[1:]]
    signs = []
    if any(section.winners for section in shown):
        each = " of each class" if any(section.title == [BY_CLASS] for section in shown) else ""
        met = f"{kept_share * 100:g} % of arrived requests{each} meet it"
        signs.append(f"* most finetuning among those keeping the SLO ({met})")
    if "-" in cells:
        signs.append("-: missing")
    seeds = []
    if any(cell.startswith("±") for cell in cells):
        seeds.append("±: sample standard deviation over the seeds")
    if any(cell.endswith(")") for cell in cells):
        seeds.append("(n): so many of the seeds have the number")
    lines = [". ".join(signs), ". ".join(seeds)]
    if any(section.unlike_seeds for section in shown):
        lines.append("no * among runs that are not of the same seeds")
    return "\n".join(filter(None, lines))


def _styled(rows: Sequence[Row], kept_share: float) -> list[tuple[str, str]]:
    """Each line of the plain table with its style; the text is the same in both."""
    lines = plain_table(rows, kept_share).split("\n")
    styles = []
    for section in sections(rows, kept_share):
        styles += [*(["bold"] * len(section.title)), "bold", "dim", "dim"]
        for i, kept in enumerate(section.kept):
            styles.append("bold green" if i in section.winners else "" if kept else "dim")
        styles.append("")
    return list(zip_longest(lines, styles[: len(lines)], fillvalue="dim"))


def _scene(rows: Sequence[Row], kept_share: float) -> list[Section]:
    """The table, and where there are several SLO classes one with a column of each."""
    known = [c for c in WHERE_KNOWN if any(not math.isnan(number(row, c.key)) for row in rows)]
    table = _section(rows, [*COLUMNS, *known], kept_share)
    classes = [by_class(row) for row in rows]
    names = dict.fromkeys(name for own in classes for name in own)
    if len(names) < 2:
        return [table]
    columns = [Column(f"attainment of {name}", (name, "met %"), 100, 1, down=True) for name in names]
    flat = [
        {**row, **{f"attainment of {name}": met for name, met in own.items()}}
        for row, own in zip(rows, classes, strict=True)
    ]
    attained = _section(flat, columns, kept_share)
    return [table, attained._replace(title=[BY_CLASS], winners=set(), unlike_seeds=False)]


def _section(rows: Sequence[Row], columns: Sequence[Column], kept_share: float) -> Section:
    repeated = over_seeds(rows)
    means = [one.mean for one in repeated]
    labels = varied(means, list(_LABEL_HEADS))
    compared = [one.with_seeds for one in repeated]
    winners = best(compared, kept_share)
    lines: list[list[str]] = []
    marked: set[int] = set()
    kept: list[bool] = []
    for i, (one, name) in enumerate(zip(repeated, display_names(means), strict=True)):
        if i in winners:
            marked.add(len(lines))
        numbers = [column.cell(number(one.mean, column.key)) for column in columns]
        lines.append([name, *(text(one.mean, key) for key in labels), *numbers])
        kept.append(keeps_slo(one.mean, kept_share))
        if len(one.seeds) > 1:
            lines.append(
                [f"  {len(one.seeds)} seeds", *("" for _ in labels), *(_spread(c, one) for c in columns)]
            )
            kept.append(kept[-1])
    heads = [("", "policy"), *(_LABEL_HEADS[key] for key in labels), *(c.head for c in columns)]
    section = Section(
        title=_title(means, labels),
        heads=heads,
        lines=lines,
        winners=marked,
        kept=kept,
        unlike_seeds=unlike_seeds(compared),
    )
    room = max(_VARIANT_LETTERS, WIDTH - 2 - sum(width + 2 for width in _widths(section)[1:]))
    for line in lines:
        line[0] = shorten(line[0], room)
    return section


def _title(rows: Sequence[Row], labels: Sequence[str]) -> list[str]:
    """What all lines share and is worth saying; the rate as it was asked for, and as it came where that is another.
    Settings are lines of their own."""
    shared = [*scene(rows), *unusual(rows)]
    rates = came_at(rows)
    if "rate_rps" not in labels:
        shared += [f"{asked:.4g} req/s{came and f' asked, {came}'}" for asked, came in rates.items()]
    elif any(rates.values()):
        shared.append("req/s " + "; ".join(f"{asked:.4g}: {came}" for asked, came in rates.items() if came))
    first = ", ".join(shared)
    settings = ", ".join(shared_settings(rows))
    lines = textwrap.wrap(settings, WIDTH, break_long_words=False, break_on_hyphens=False)
    return [*filter(None, [first]), *lines]


def came_at(rows: Sequence[Row]) -> dict[float, str]:
    """Rate that was asked for -> the mean rates that came and in which times, empty where they are alike."""
    at: dict[float, dict[float, list[float]]] = {}
    for row in rows:
        asked, duration_s = number(row, "rate_rps"), number(row, "duration_s")
        if not math.isnan(asked):
            came = at.setdefault(asked, {})
            if duration_s > 0:
                came.setdefault(duration_s, []).append(number(row, "requests") / duration_s)
    return {
        asked: ", ".join(
            f"{mean:.3g} came in {duration_s:g} s"
            for duration_s, rates in came.items()
            if abs((mean := sum(rates) / len(rates)) / asked - 1) > UNLIKE_SHARE
        )
        for asked, came in at.items()
    }


def _spread(column: Column, one: Repeated) -> str:
    """The deviation, and how many of the runs have the number where not all do."""
    value = number(one.deviation, column.key)
    known = one.known.get(column.key, 0)
    few = f" ({known})" if 0 < known < len(one.seeds) else ""
    return ("-" if math.isnan(value) else f"±{value * column.scale:,.{column.decimals}f}") + few


def shorten(name: str, width: int) -> str:
    """`name`, its middle left out if it is longer than `width`: variants differ at their ends."""
    if len(name) <= width:
        return name
    tail = (width - 2) // 2
    return f"{name[: width - 2 - tail]}..{name[len(name) - tail :]}"


def cell(key: str, value: float) -> str:
    """A number of the column `key`, as table and figure show it."""
    return next(column for column in COLUMNS if column.key == key).cell(value)


def _widths(section: Section) -> list[int]:
    columns = zip(*section.lines, strict=True)
    return [
        max(len(head[0]), len(head[1]), *(len(cell) for cell in cells))
        for head, cells in zip(section.heads, columns, strict=True)
    ]


def _line(cells: Sequence[str], widths: Sequence[int], mark: str) -> str:
    """Cells to the right, but for the first, the policy."""
    padded = [
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return (mark + "  ".join(padded)).rstrip()
