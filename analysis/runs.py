"""Many runs as one table: their summary rows, and the config keys in which they differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sim.results import Run

if TYPE_CHECKING:
    import pandas as pd

SLO_KEPT_SHARE = 0.95
"""A run keeps its SLO if at least this share of the arrived requests attains it."""

Row = Mapping[str, Any]
"""One summary row: labels and metrics of `sim.metrics`; what is not there is missing. Where it is known, `folder`
is the run's and `config` its resolved config."""


def row_of(run: Run) -> dict[str, Any]:
    """The summary row of a run, with its folder and config."""
    return {**run.summary, "folder": str(run.folder), "config": run.config}


def collect(runs: Sequence[Run]) -> pd.DataFrame:
    """One line per run: `folder`, its summary without classes and notes, and each config key (dotted, such
    as `policy.budget_s`) whose value is not the same in all runs; that a sweep was gone on with is nothing of a run."""
    import pandas as pd

    summaries = [{k: v for k, v in run.summary.items() if k not in ("classes", "notes")} for run in runs]
    frame = pd.DataFrame(summaries)
    frame.insert(0, "folder", [str(run.folder) for run in runs])
    configs = [flatten(run.config) for run in runs]
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [config.get(key) for config in configs]
        if key not in (*frame, "run.resume") and any(value != values[0] for value in values):
            frame[key] = values
    return frame


IDENTITY = ("name", "policy", "workload", "model", "device", "rate_rps", "seed", "source")
"""Labels that tell runs apart."""

SCENE = ("workload", "model", "device")
"""Runs that agree in these can be compared side by side."""

USUAL = {"slo_set": "flexllm", "router": "consolidate", "admission": "fcfs"}
"""Label -> what `coserve simulate` takes unless told otherwise, which titles leave out."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted key and value; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def number(row: Row, key: str) -> float:
    """The metric as a float, NaN if it is missing."""
    value = row.get(key)
    return math.nan if value is None else float(value)


def text(row: Row, key: str) -> str:
    """The label as it is shown; a missing one is empty."""
    value = row.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def varied(rows: Iterable[Row], keys: Sequence[str]) -> list[str]:
    """Those of `keys` in which `rows` differ."""
    rows = list(rows)
    return [key for key in keys if len({text(row, key) for row in rows}) > 1]


def scene(rows: Sequence[Row]) -> list[str]:
    """For titles: workload, model and devices, those that the rows share; with how many devices these are and what an
    hour of them costs where that is known and the same."""
    shared = {key: text(rows[0], key) for key in SCENE if not varied(rows, [key])}
    if "device" in shared and not varied(rows, ["devices"]):
        shared["device"] = text(rows[0], "devices") or shared["device"]
        prices = {f"{3600 * number(row, 'cost') / number(row, 'duration_s'):,.2f}" for row in rows}
        if len(prices) == 1 and prices != {"nan"}:
            shared["device"] += f" at {prices.pop()} per hour"
    return [name for name in shared.values() if name]


def unusual(rows: Sequence[Row]) -> list[str]:
    """For titles: what the runs share and is not as usual, such as `SLO mlperf_server`, `router least_tokens`."""
    words = {"slo_set": "SLO", "router": "router", "admission": "admission"}
    shared = [key for key in USUAL if not varied(rows, [key])]
    return [f"{words[key]} {own}" for key in shared if (own := text(rows[0], key)) not in ("", USUAL[key])]


def keeps_slo(row: Row, kept_share: float = SLO_KEPT_SHARE) -> bool:
    """Whether attainment is known and at least `kept_share`, also that of each SLO class."""
    return kept(worst_attainment(row), kept_share)


def worst_attainment(row: Row) -> float:
    """That of all requests, or of the SLO class that attains less; NaN if it is missing. A mean over seeds has it as a
    number of its own."""
    if "worst_attainment" in row:
        return number(row, "worst_attainment")
    return min([number(row, "attainment"), *by_class(row).values()])


def by_class(row: Row) -> dict[str, float]:
    """SLO class -> attainment, of the classes that have requests."""
    children = [child for child in row.get("classes", ()) if number(child, "requests") > 0]
    return {text(child, "slo"): number(child, "attainment") for child in children}


def of_each_class(rows: Iterable[Row], which: str = "each") -> str:
    """For lines that say of how many requests the SLO is kept, or of `which` class it is not: empty where there is one
    class."""
    return f" of {which} class" if len({name for row in rows for name in by_class(row)}) > 1 else ""


def kept(attainment: float, kept_share: float) -> bool:
    """Whether it is at least `kept_share`, up to the rounding of a mean over seeds and of a percentage."""
    return attainment >= kept_share - 1e-9


def peaks_tok_s(rows: Sequence[Row]) -> list[float]:
    """What finetuning alone reaches on the cluster of `rows`, for each seed of those that state it. None where rows of
    one seed state several: they are of unlike clusters or jobs."""
    stated: dict[str, set[float]] = {}
    for row in rows:
        if (peak := number(row, "peak_finetune_tok_s")) > 0:
            stated.setdefault(text(row, "seed"), set()).add(peak)
    alike = all(len(peaks) == 1 for peaks in stated.values())
    return [peak for peaks in stated.values() for peak in peaks] if alike else []


def best(rows: Sequence[Row], kept_share: float = SLO_KEPT_SHARE) -> set[int]:
    """Positions of the rows with most finetuning among those that keep the SLO, of equals the one that was done with
    its data first, one for each scene, SLO, rate and source. None where nobody keeps it, nothing was trained, or the
    rows that train are of unlike seeds; nor one whose job failed."""
    winners = set()
    for contest in _contests(rows):
        sound = [i for i in contest if not number(rows[i], "jobs_failed") > 0]
        keepers = [i for i in sound if keeps_slo(rows[i], kept_share)]
        if keepers and not _unlike(rows, contest):
            winners.add(max(keepers, key=lambda i: _trained(rows[i])))
    return winners


def _trained(row: Row) -> tuple[float, float]:
    """For an order: trained tokens per second, and where these are equal how early finite data were trained."""
    done_s = number(row, "data_done_s")
    return number(row, "finetune_tok_s"), -math.inf if math.isnan(done_s) else -done_s


def unlike_seeds(rows: Sequence[Row]) -> bool:
    """Whether `best` finds rows that it does not compare, since their seeds are not the same."""
    return any(_unlike(rows, contest) for contest in _contests(rows))


def _contests(rows: Sequence[Row]) -> list[list[int]]:
    """Positions of the rows that train, by scene, SLO, rate and source."""
    places: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if number(row, "finetune_tok_s") > 0:
            places.setdefault(
                tuple(text(row, key) for key in (*SCENE, "slo_set", "rate_rps", "source")), []
            ).append(i)
    return list(places.values())


def _unlike(rows: Sequence[Row], contest: Sequence[int]) -> bool:
    return bool(varied([rows[i] for i in contest], ["seed"]))
