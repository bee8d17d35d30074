"""Compare runs that are already there: `coserve report RUN_FOLDER... [--figure PATH] [--csv PATH]`.

A folder may be a run or hold runs. The figure is a comparison of policies; over several request rates
it is a sweep; of a single run it is its course over time; of a folder that `coserve frontier` has left it is
the frontier, whose table then stands for that of the runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.runs import SCENE, SLO_KEPT_SHARE, Row, collect, row_of, varied
from sim.arguments import Parser, number
from sim.errors import message, report, writing
from sim.metrics import DEFINITIONS
from sim.results import Run, find_runs, read_run


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write what was asked for. 0, or 2 with one line on stderr."""
    options = _parser().parse_args(argv)
    if options.definitions:
        print("\n".join(f"{name}: {text}" for name, text in DEFINITIONS.items()))
        return 0
    try:
        _report(options)
    except (ValueError, OSError) as error:
        return report("coserve report", error, message(error))
    return 0


def write_figure(runs: Sequence[Run], path: str | Path, *, kept_share: float = SLO_KEPT_SHARE) -> Path:
    """The figure that fits the runs; returns the path."""
    from analysis.figures.compare import write_compare
    from analysis.figures.sweep import write_sweep
    from analysis.figures.timeline import write_timeline

    rows: list[Row] = [row_of(run) for run in runs]
    if len(runs) == 1:
        return write_timeline(runs[0], path)
    if varied(rows, ["rate_rps"]):
        return write_sweep(rows, path, kept_share=kept_share)
    return write_compare(rows, path, kept_share=kept_share)


def _report(options: argparse.Namespace) -> None:
    from analysis.figures.frontier import write_frontier
    from analysis.figures.style import check_suffix
    from analysis.frontier_table import POINTS, frontier_table
    from analysis.table import plain_table, print_table
    from sim.notes import print_notes

    if not options.runs:
        raise ValueError("name at least one run folder")
    if options.figure is not None:
        check_suffix(options.figure)
    kept_share = options.keep / 100
    runs = [read_run(folder) for folder in find_runs(options.runs)]
    rows = [row_of(run) for run in runs]
    is_frontier = all((Path(folder) / POINTS).is_file() for folder in options.runs) and not varied(
        rows, SCENE
    )
    if is_frontier:
        print(frontier_table(rows, kept_share))
    elif sys.stdout.isatty():
        print_table(rows, kept_share)
    else:
        print(plain_table(rows, kept_share))
    print_notes(rows)
    if options.csv is not None:
        with writing("--csv", options.csv):
            collect(runs).to_csv(options.csv, index=False)
        print(f"table: {options.csv}")
    if options.figure is not None:
        if is_frontier:
            path = write_frontier(rows, options.figure, kept_share=kept_share)
        else:
            path = write_figure(runs, options.figure, kept_share=kept_share)
        print(f"figure: {path}")


def _parser() -> Parser:
    parser = Parser(prog="coserve report", description="Compare runs that are already there.")
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN_FOLDER",
        help="a run, or a folder that holds runs: one of coserve frontier is shown as its frontier",
    )
    parser.add_argument("--figure", metavar="PATH", help="write a figure (png, pdf, svg)")
    parser.add_argument("--csv", metavar="PATH", help="write every metric of every run")
    parser.add_argument(
        "--keep",
        type=_percent,
        default=SLO_KEPT_SHARE * 100,
        metavar="PERCENT",
        help="share of requests that must meet the SLO for it to be kept (default: %(default)g)",
    )
    parser.add_argument("--definitions", action="store_true", help="say what each metric is, and stop")
    return parser


def _percent(text: str) -> float:
    percent = number(text)
    if not 0 < percent <= 100:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 100, got {text}")
    return percent


if __name__ == "__main__":
    sys.exit(main())
