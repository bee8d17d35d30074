"""`coserve reproduce [--out DIR]`: FlexLLM's evaluation, simulated, beside what was published.

Runs every case of `analysis.paper` in parallel processes and writes into DIR

    predictions.csv                           every number of both figures, in the columns of published.csv
    errors.csv                                predicted and published, each in its own column, and the error
    fair.csv, case_study.csv                  the good engine's table; throughput over time
    end_to_end.png, sharing.png, case_study.png
    claims.md                                 what the paper says, and what the simulator says of it

and prints a line for each claim, with the paper's number and the simulator's.
Published numbers are read from `flexllm/published.csv` of the data folder (COSERVE_DATA); without them the
predictions are the same and stand alone.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from analysis.paper import (
    PREDICTION_COLUMNS,
    SERVING,
    SHARING,
    UNITS,
    Case,
    Key,
    cases,
    error,
    predictions,
    prepare_worker,
    read_published,
    spreads,
)
from sim.arguments import Parser, whole_number
from sim.errors import writing
from sim.workload.files import data_dir

SEEDS = (0, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, write the folder and print the verdict. 0, or 1 with a line for each case that failed."""
    options = _parser().parse_args(argv)
    out: Path = options.out
    with writing("--out", out):
        out.mkdir(parents=True, exist_ok=True)
    published = read_published(data_dir() / "flexllm" / "published.csv")
    todo = cases(SEEDS)
    rows = run_all(todo, options.workers)
    failed = [(case, row["error"]) for case, row in zip(todo, rows, strict=True) if "error" in row]
    if failed:
        for case, text in failed:
            print(f"coserve reproduce: {' '.join(case.overrides)}: {text}", file=sys.stderr)
        return 1
    print(write(out, todo, rows, published))
    print(f"predictions: {out / 'predictions.csv'}")
    print(f"page:        {out / 'claims.md'}")
    return 0


def run_all(todo: Sequence[Case], workers: int) -> list[dict[str, Any]]:
    """The row of each case, in order; a worker that dies leaves an `error` instead."""
    from tqdm import tqdm

    from sim.pool import run_calls

    rows: list[dict[str, Any]] = [{} for _ in todo]
    with (
        closing(run_calls(prepare_worker, (), todo, workers)) as results,
        tqdm(total=len(todo), unit="run", file=sys.stderr, disable=None) as bar,
    ):
        for index, result in results:
            rows[index] = result if isinstance(result, dict) else {"error": str(result)}
            bar.update()
    return rows


def write(
    out: Path, todo: Sequence[Case], rows: Sequence[Mapping[str, Any]], published: Mapping[Key, float]
) -> str:
    """All files of the folder `out`, which exists; returns the verdict on the claims, a line for each."""
    from analysis.figures import style
    from analysis.figures.paper_case_study import case_study_figure
    from analysis.figures.paper_grid import grid_figure
    from analysis.paper_page import claims, page, verdict

    predicted = predictions(todo, rows)
    _csv(
        out / "predictions.csv",
        PREDICTION_COLUMNS,
        ((*key, f"{value:.6g}", UNITS[key.metric], "simulated") for key, value in predicted.items()),
    )
    spread = {metric: spreads(todo, rows, metric) for metric in UNITS}
    _csv(
        out / "errors.csv",
        (*Key._fields, "predicted", "published", "error", "error_unit", "range_over_seeds"),
        (
            (
                *key, f"{predicted[key]:.6g}", f"{value:.6g}", f"{error(key, predicted[key], value):.2f}",
                "points" if key.metric == "slo_attainment" else "%", f"{spread[key.metric][key[1:4]]:.3g}",
            )
            for key, value in published.items()
        ),
    )  # fmt: skip
    fair = [(case, row) for case, row in zip(todo, rows, strict=True) if case.figure == "fair"]
    metrics = (*UNITS, "ttft_p99_s", "attainment")
    _csv(
        out / "fair.csv",
        ("policy", "model", "cluster_rate_rps", *metrics),
        ((c.system, c.model, c.rate_rps, *(f"{row[name]:.6g}" for name in metrics)) for c, row in fair),
    )
    bins = next(row["timeline"] for row in rows if "timeline" in row)
    _csv(out / "case_study.csv", tuple(bins), zip(*bins.values(), strict=True))
    systems = ("flexllm", *SERVING)
    style.save(grid_figure("end-to-end", systems, predicted, published), out / "end_to_end.png")
    style.save(grid_figure("sharing", ("flexllm", *SHARING), predicted, published), out / "sharing.png")
    style.save(case_study_figure(bins), out / "case_study.png")
    on_fair_terms = {(c.system, c.model, c.rate_rps): row for c, row in fair}
    found = claims(predicted, on_fair_terms)
    text = page(found, predicted, published, on_fair_terms)
    (out / "claims.md").write_text(text, encoding="utf-8")
    return verdict(found)


def _csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _parser() -> Parser:
    parser = Parser(
        prog="coserve reproduce", description="FlexLLM's evaluation, simulated, beside what was published."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/reproduce"),
        metavar="DIR",
        help="folder (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=whole_number, default=os.cpu_count() or 1, metavar="N", help="processes at a time"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
