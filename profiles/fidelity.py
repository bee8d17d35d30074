"""`coserve fidelity`: runs of the engine against their simulation with a measured profile.

    coserve profile collect device=h100 model=llama_3_1_8b
    coserve bench -m device=h100 model=llama_3_1_8b policy=coserving,temporal predictor=h100-llama_3_1_8b
    coserve fidelity runs/<bench> profile=h100-llama_3_1_8b [seeds=5] [out=FOLDER]

Each run is simulated with its own workload, policy, limits and predictor, and the profile as the world; nothing
is fitted on the run. Printed are its metrics, measured and predicted side by side; the error of each iteration's
predicted time; the share of plans that come out the same; and which part of the profile, if any, is off. The
same goes into FOLDER (default: `fidelity` in what was named) as Parquet and CSV, with a figure.

Exit code 2 with one line for a folder that is no engine run or a profile of another device or model, 1 when a
replay makes other plans, which is a mistake of ours.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from profiles.against import Against, Metric, against, differences, noise_of
from profiles.diagnosis import LEAST_CUT, OFF, Finding, diagnose, grouped
from profiles.schema import Profile, find_profile, read_profile
from profiles.settings import settings_of, whole_number
from sim.errors import BUG, keys_as, writing
from sim.rerun import Rerun, read_rerun
from sim.results import Run, find_runs, read_run

KNOWN = ("profile", "seeds", "out")


def main(argv: Sequence[str]) -> int:
    """`coserve fidelity`."""
    if not argv or {"--help", "-h"} & set(argv):
        assert __doc__ is not None
        print(__doc__.strip())
        return 0 if argv else 2
    named, settings = settings_of(argv, KNOWN)
    if not named or "profile" not in settings:
        raise ValueError("fidelity needs folders of engine runs and profile=FILE")
    seeds = whole_number(settings, "seeds", 5)
    with keys_as({"no profile ": "profile: no profile "}):
        file = find_profile(settings["profile"])
    profile = read_profile(file)
    runs = [read_rerun(run) for run in _engine_runs(named)]
    names = _names(runs)
    found = [against(run, profile, name, seeds) for run, name in zip(runs, names, strict=True)]
    notes = Counter(note for run in runs for note in differences(run, profile))
    for note, count in notes.items():
        print(f"note: {note}" + (f" ({count} of {len(runs)} runs)" if len(runs) > 1 else ""), file=sys.stderr)
    findings = findings_of(found)
    folder = Path(settings["out"]) if "out" in settings else _common(named) / "fidelity"
    print(report(found, findings, profile, seeds))
    _write(folder, found, findings)
    print(f"\ntables: {folder}\nfigure: {_draw(folder, found, findings)}")
    return 0 if all(one.replayed == 1.0 for one in found) else BUG


TESTED = (
    "parts of the profile, over all iterations; off is one that needs a factor of its own "
    f"(the mean error falls by {LEAST_CUT:.0%} or more)\nwhose 90 % interval lies beyond {OFF:g}x"
)


def report(found: Sequence[Against], findings: Sequence[Finding], profile: Profile, seeds: int) -> str:
    """All of it as text."""
    title = f"{profile.file}: {len(profile.seconds)} rows, spread {noise_of(profile):.1%}; {seeds} seeds"
    blocks = [title, *(_run_text(one) for one in found)]
    if len(found) > 1:
        blocks.append(_all_text(found))
    lines = [f"  {finding.line()}" for finding in findings]
    off = [finding.part for finding in findings if finding.off]
    verdict = ", ".join(off) if off else "none is shown to be"
    return "\n\n".join([*blocks, "\n".join([TESTED, *lines, f"off by more than {OFF:g}x: {verdict}"])])


def _run_text(one: Against) -> str:
    head = f"{'':<20}{'measured':>12}{'predicted':>12}{'of the seeds':>22}{'error':>9}"
    lines = [one.name, head, *(_metric_line(metric) for metric in one.metrics)]
    frame = one.iterations
    error = _errors(frame)
    lines += [
        f"iteration time: median {np.median(np.abs(error)):.1%}, p90 {np.quantile(np.abs(error), 0.9):.1%}, "
        f"bias {np.median(error):+.1%} over {len(frame)} iterations; {one.outside:.0%} extrapolate",
    ]
    width = max(map(len, frame["kind"].unique()))
    for kind, part in frame.groupby("kind"):
        own = _errors(part)
        lines.append(
            f"  {kind:<{width}}{len(part):>9}  {np.median(np.abs(own)):>7.1%}  bias {np.median(own):+.1%}"
        )
    lines += [
        f"same plans under the recorded times: {one.replayed:.2%}",
        f"same plans under predicted times: {one.alike:.1%} (one other plan shifts all that come after it)",
    ]
    return "\n".join(lines)


def _metric_line(metric: Metric) -> str:
    time = metric.metric.endswith("_s") and not metric.metric.endswith("_tok_s")
    scale, name = (1e3, metric.metric[:-2] + " ms") if time else (1.0, metric.metric)
    seeds = f"{_number(metric.predicted_low * scale)} .. {_number(metric.predicted_high * scale)}"
    error = "-" if np.isnan(_error(metric)) else _error_text(metric.metric, _error(metric))
    cells = f"{_number(metric.measured * scale):>12}{_number(metric.predicted * scale):>12}"
    return f"  {name:<18}{cells}{seeds:>22}{error:>9}"


POINTS = ("attainment",)
"""Shares, whose error is a difference in points."""


def _error(metric: Metric) -> float:
    return metric.predicted - metric.measured if metric.metric in POINTS else metric.error


def _error_text(name: str, error: float, sign: str = "+") -> str:
    return f"{100 * error:{sign}.1f} pt" if name in POINTS else f"{error:{sign}.1%}"


def _number(value: float) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _all_text(found: Sequence[Against]) -> str:
    """Errors over all runs: median of the absolute ones, and the worst."""
    lines = [f"all {len(found)} runs", f"{'':<20}{'median error':>14}{'worst':>9}"]
    by_name: dict[str, list[Metric]] = {}
    for one in found:
        for metric in one.metrics:
            by_name.setdefault(metric.metric, []).append(metric)
    for name, metrics in by_name.items():
        errors = np.array([_error(metric) for metric in metrics])
        errors = errors[np.isfinite(errors)]
        if errors.size:
            worst = errors[np.argmax(np.abs(errors))]
            median = _error_text(name, float(np.median(np.abs(errors))), "")
            lines.append(f"  {name:<18}{median:>14}{_error_text(name, worst):>9}")
    error = _errors(pd.concat([one.iterations for one in found]))
    lines.append(
        f"  {'iteration time':<18}{np.median(np.abs(error)):>14.1%}{error.iloc[np.abs(error).argmax()]:>+9.1%}"
    )
    return "\n".join(lines)


def _errors(frame: pd.DataFrame) -> pd.Series[float]:
    return frame["predicted_s"] / frame["measured_s"] - 1


def findings_of(found: Sequence[Against]) -> list[Finding]:
    """The parts over the iterations of all runs."""
    parts = {name: np.concatenate([one.parts[name] for one in found]) for name in found[0].parts}
    measured_s = np.concatenate([one.iterations["measured_s"].to_numpy() for one in found])
    return diagnose(grouped(parts), measured_s)


def _engine_runs(named: Sequence[str]) -> list[Run]:
    """Engine runs of one pipeline, among and below what was named. ValueError if there are none."""
    runs = [run for run in map(read_run, find_runs(named)) if run.summary.get("source") == "engine"]
    if not runs:
        raise ValueError(f"no run of the engine in or below {', '.join(named)}: they are simulated ones")
    single = [run for run in runs if run.summary.get("pipelines") == 1]
    for run in runs:
        if run not in single:
            print(f"note: {run.folder} is a split in two, which is not simulated", file=sys.stderr)
    if not single:
        raise ValueError(f"no run of one pipeline in or below {', '.join(named)}: they are splits")
    return single


def _names(runs: Sequence[Rerun]) -> list[str]:
    """Policy, rate and seed; the folder's name where that is not enough."""
    summaries = [run.run.summary for run in runs]
    names = [f"{s['policy']}, {s['rate_rps'] or 0:g} req/s, seed {s['seed']}" for s in summaries]
    return [
        name if names.count(name) == 1 else f"{name}, {run.run.folder.name}"
        for name, run in zip(names, runs, strict=True)
    ]


def _common(named: Sequence[str]) -> Path:
    return Path(os.path.commonpath([Path(name).resolve() for name in named]))


def _write(folder: Path, found: Sequence[Against], findings: Sequence[Finding]) -> None:
    with writing("out", folder):
        folder.mkdir(parents=True, exist_ok=True)
    metrics = pd.DataFrame([{**m._asdict(), "error": m.error} for one in found for m in one.metrics])
    plans = pd.DataFrame(
        [{"run": o.name, "replayed": o.replayed, "alike": o.alike, "outside": o.outside} for o in found]
    )
    tables = {
        "metrics": metrics,
        "iterations": pd.concat([one.iterations.assign(**one.parts) for one in found], ignore_index=True),
        "parts": pd.DataFrame(
            [{**f._asdict(), "rivals": ", ".join(f.rivals), "off": f.off} for f in findings]
        ),
        "plans": plans,
    }
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False)
        table.to_csv(folder / f"{name}.csv", index=False)


def _draw(folder: Path, found: Sequence[Against], findings: Sequence[Finding]) -> Path:
    from profiles.fidelity_figure import draw

    return draw(folder / "fidelity.png", found, findings)
