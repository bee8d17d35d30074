"""`coserve results`: a page of what was measured on a GPU, beside what it was meant to reach.

    coserve results                                         the page without any measurement
    coserve results profiles/results --page profiles/RESULTS.md

Every number is read from a file of FOLDER, which `python -m profiles.session` fills; what has no file behind it
is "not measured yet". Targets are of one device and model; other runs are shown and fill no target.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.targets import DEVICE, MODEL, TARGETS, Evidence, Row, means, metric_error
from sim.arguments import Parser
from sim.errors import message, report, writing
from sim.json_file import read_object, taken_apart

WORKLOAD = "builtin"
NOT_MEASURED = "not measured yet"
SESSION, REFERENCE, BENCH = "session.json", "reference.parquet", "bench.json"
KERNELS, FIDELITY = "kernels.json", "fidelity.parquet"
COMMAND = "coserve results profiles/results --page profiles/RESULTS.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page, or write it. 0, or 2 with one line on stderr."""
    parser = Parser(prog="coserve results", description="What was measured, and the targets.")
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="what a session on a GPU has left")
    parser.add_argument("--page", metavar="PATH", help="write the page there")
    options = parser.parse_args(argv)
    try:
        text = page(None if options.folder is None else Path(options.folder))
        if options.page is None:
            print(text, end="")
        else:
            with writing("--page", options.page):
                Path(options.page).write_text(text, encoding="utf-8")
            print(f"page:   {options.page}")
    except (ValueError, OSError) as error:
        return report("coserve results", error, message(error))
    return 0


def page(folder: Path | None) -> str:
    """The whole page as Markdown, from the files of `folder`; None is without any."""
    if folder is not None and not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist")
    known = (SESSION, REFERENCE, BENCH, KERNELS, FIDELITY)
    if folder is not None and not any((folder / name).exists() for name in known):
        raise ValueError(
            f"folder {folder} has none of {', '.join(known)}; a session leaves them in OUT/gathered"
        )
    with taken_apart(folder or Path("."), "python -m profiles.session"):
        return _page(folder)


def _page(folder: Path | None) -> str:
    session = _json(folder, SESSION) or {}
    reference = _frame(folder, REFERENCE)
    bench = _rows(folder, BENCH)
    evidence = Evidence(
        reference=reference if _is_ours(session) else (),
        bench=[row for row in bench if _is_target(row)],
        fidelity=_frame(folder, FIDELITY) if _is_ours(session) else (),
    )
    parts = [
        "# What was measured on a GPU",
        f"Written by `{COMMAND}`; numbers are read from the files of that folder, "
        "and nothing here is typed by hand.",
        _about(session),
        _targets(evidence, session),
        _reference_tables(reference),
        _bench_table(bench),
        _fidelity_table(_frame(folder, FIDELITY)),
        _kernels(folder),
        _steps(session),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(session: Mapping[str, Any]) -> str:
    if not session:
        return f"Date: {NOT_MEASURED}. Device: {NOT_MEASURED}."
    versions = ", ".join(f"{name} {version}" for name, version in session["versions"].items())
    return (
        f"Date: {session['date']}. Device: {session['gpu'] or session['device']}. Model: {session['model']}, "
        f"random weights. Commit {session['commit']}. {versions}."
    )


def _targets(evidence: Evidence, session: Mapping[str, Any]) -> str:
    lines = []
    for target in TARGETS:
        measured = target.measured(evidence)
        if measured is None:
            lines.append((target.what, target.target, NOT_MEASURED, ""))
        else:
            reached = "" if measured.reached is None else "yes" if measured.reached else "no"
            lines.append((target.what, target.target, measured.text, reached))
    head = ("what", "target", "measured", "reached")
    title = "## Targets: one H200, Llama-3.1-8B in bfloat16"
    other = f"{session['model']} on {session['device']}, which is below, fills no target." if session else ""
    parts = [title, "" if _is_ours(session) else other, _table(head, lines)]
    return "\n\n".join(part for part in parts if part)


def _reference_tables(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [
        (
            row["what"],
            row["variant"],
            _cell(row["p50_s"], 1e3, ",.3f"),
            "-"
            if row["p20_s"] is None
            else f"{_cell(row['p20_s'], 1e3, ',.3f')} to {_cell(row['p80_s'], 1e3, ',.3f')}",
            _cell(row["tok_s"], 1, ",.0f"),
            _cell(row["peak_bytes"], 2**-30, ",.1f"),
            _cell(row["ratio"], 1, ".3f"),
            row["note"] or row["against"],
        )
        for row in rows
    ]
    head = ("what", "variant", "p50 ms", "p20 to p80 ms", "tok/s", "peak GiB", "ratio", "against")
    ceilings = [row for row in rows if row["what"] == "ceiling" and row["rate"] is not None]
    said = "; ".join(f"{row['variant']}: {row['rate']:.4g} per second" for row in ceilings)
    text = (
        "The peak is the allocator's, without the weights. Ceilings of this device (bytes, operations): "
        f"{said}."
    )
    return f"## Against the device and against PEFT\n\n{text}\n\n{_table(head, lines)}"


def _bench_table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    scenes = {(r["workload"], r["model"], r["device"], r["rate_rps"], r["policy"]) for r in rows}
    lines = []
    for workload, model, device, rate, policy in sorted(scenes):
        scene = [r for r in rows if (r["workload"], r["model"], r["device"]) == (workload, model, device)]
        mean = means(scene, policy, rate)
        assert mean is not None
        lines.append(
            (
                f"{workload}, {model}, {device}",
                f"{rate:g}",
                policy,
                str(mean["runs"]),
                _cell(mean["attainment"], 100, ".1f"),
                _cell(mean["ttft_p99_s"], 1, ".2f"),
                _cell(mean["tpot_p99_s"], 1e3, ".1f"),
                _cell(mean["finetune_tok_s"], 1, ",.0f"),
                _cell(mean["finetune_share_of_peak"], 100, ".0f"),
            )
        )
    head = (
        "scene",
        "req/s",
        "policy",
        "runs",
        "SLO met %",
        "TTFT p99 s",
        "TPOT p99 ms",
        "finetune tok/s",
        "of peak %",
    )
    return f"## Serving and finetuning\n\nMeans over the runs (seeds) of a line.\n\n{_table(head, lines)}"


def _fidelity_table(rows: Sequence[Row]) -> str:
    """The errors of each metric over all runs."""
    if not rows:
        return ""
    lines = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        errors = [
            error for row in rows if row["metric"] == metric and (error := metric_error(row)) is not None
        ]
        if errors:
            worst = max(errors, key=abs)
            middle = statistics.median(map(abs, errors))
            lines.append((metric, str(len(errors)), f"{100 * middle:.1f}", f"{100 * worst:+.1f}"))
    text = (
        "Predicted over measured, less one; of attainment the difference. The simulation's world is the measured "
        "profile; nothing is fitted on the runs."
    )
    head = ("metric", "runs", "median error %", "worst error %")
    return f"## Simulator against engine\n\n{text}\n\n{_table(head, lines)}"


def _kernels(folder: Path | None) -> str:
    record = _json(folder, KERNELS)
    if record is None:
        return ""
    lines = [
        (
            row["case"],
            row["variant"],
            _cell(row["median_s"], 1e6, ",.1f"),
            _cell(row["floor_s"], 1e6, ",.1f"),
            _cell(row["floor_s"] / row["median_s"], 100, ".0f"),
            _cell(row["torch_s"], 1e6, ",.1f"),
            _cell(row["error"], 1, ".1e"),
        )
        for row in record["rows"]
    ]
    head = ("case", "tile", "median us", "floor us", "of floor %", "torch us", "error")
    return f"## Kernels, on {record['device']}\n\n{_table(head, lines)}"


def _steps(session: Mapping[str, Any]) -> str:
    if not session:
        return ""
    lines = [
        (step["name"], f"`{step['command']}`", step["status"], _cell(step["seconds"], 1, ",.0f"), _last(step))
        for step in session["steps"]
    ]
    return f"## Commands\n\n{_table(('step', 'command', 'outcome', 'seconds', 'last words'), lines)}"


def _last(step: Mapping[str, Any]) -> str:
    """Why a step is not done, as far as its last line tells; the session's file has more of them."""
    said = [line.strip() for line in step.get("tail", ()) if line.strip()]
    return "" if step["status"] == "done" or not said else said[-1].replace("|", "/")


def _is_ours(session: Mapping[str, Any]) -> bool:
    return session.get("device") == DEVICE and session.get("model") == MODEL


def _is_target(row: Row) -> bool:
    return (row["device"], row["model"], row["workload"]) == (DEVICE, MODEL, WORKLOAD)


def _frame(folder: Path | None, name: str) -> list[dict[str, Any]]:
    if folder is None or not (folder / name).exists():
        return []
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(folder / name).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / name} is not readable as Parquet: {error}") from None
    return rows


def _rows(folder: Path | None, name: str) -> list[dict[str, Any]]:
    record = _json(folder, name)
    return [] if record is None else list(record["rows"])


def _json(folder: Path | None, name: str) -> dict[str, Any] | None:
    if folder is None or not (folder / name).exists():
        return None
    return read_object(folder / name)


def _cell(value: float | None, scale: float, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(float(value) * scale, form)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
