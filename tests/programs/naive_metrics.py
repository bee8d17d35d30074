"""README's metrics once more, one request and one iteration at a time: lists, loops and `numpy.percentile` over what
stands in a run folder's tables and config. Nothing here is shared with `sim.metrics`."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

DEVICES = Path(__file__).parents[2] / "configs" / "device"
Row = dict[str, Any]
NAN = math.nan


class Pipeline(NamedTuple):
    """One pipeline as the config says it."""

    device: Row
    tp: int
    kv_tokens: int | None


class Tables:
    """A run folder as lists of rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Row = yaml.safe_load((folder / "config.yaml").read_text())
        self.frames = {
            name: pd.read_parquet(folder / f"{name}.parquet")
            for name in ("requests", "iterations", "steps", "ticks", "segments")
        }
        self.requests, self.iterations, self.steps, self.ticks, self.segments = (
            frame.to_dict("records") for frame in self.frames.values()
        )
        self.pipelines = pipelines_of(self.config)
        self.tick_s = self._tick_s()
        self.token_s = self._token_s()

    @property
    def limits(self) -> Row:
        limits: Row = self.config["cluster"]["limits"]
        return limits

    def _tick_s(self) -> dict[int, list[float]]:
        """Pipeline -> the end of each iteration that decoded."""
        ends: dict[int, list[float]] = defaultdict(list)
        for tick in self.ticks:
            ends[tick["pipeline"]].append(tick["end_s"])
        return ends

    def _token_s(self) -> dict[int, list[float]]:
        """Request -> the time of each of its tokens."""
        times: dict[int, list[float]] = {row["request"]: [] for row in self.requests}
        for segment in sorted(self.segments, key=lambda s: s["first_s"]):
            own = self.tick_s[segment["pipeline"]][segment["start_tick"] : segment["end_tick"]]
            times[segment["request"]] += [segment["first_s"], *own]
        return times


def pipelines_of(config: Row) -> list[Pipeline]:
    cluster = config["cluster"]
    groups = cluster["groups"] or [{"pipelines": cluster["pipelines"]}]
    found = []
    for group in groups:
        name = group.get("device")
        device = config["device"] if name is None else yaml.safe_load((DEVICES / f"{name}.yaml").read_text())
        tp = group.get("tp") or cluster["tp"] or config["model"].get("tp", 1)
        kv_tokens = group.get("kv_tokens") or cluster["limits"]["kv_tokens"]
        found += [Pipeline(device, tp, kv_tokens)] * group["pipelines"]
    return found


def expected(run: Tables, duration_s: float, peak_tok_s: float | None) -> Row:
    """What `summary.json` should say, without labels and `jobs_failed`."""
    slos = run.config["slo"]["classes"]
    classes = []
    for name, bounds in slos.items():
        shown = {f"{key}_bound_s": _shown(bounds.get(f"{key}_s")) for key in ("ttft", "tpot", "e2e")}
        own = [row for row in run.requests if row["slo"] == name]
        classes.append({"slo": name, **shown, **of_requests(run, own, duration_s)})
    return {
        "duration_s": duration_s,
        "pipelines": len(run.pipelines),
        **of_requests(run, run.requests, duration_s),
        **of_the_system(run, duration_s, NAN if peak_tok_s is None else peak_tok_s),
        "classes": classes,
    }


def of_requests(run: Tables, rows: list[Row], duration_s: float) -> Row:
    values: dict[str, list[float]] = {
        key: [] for key in ("ttft", "tpot", "itl", "e2e", "queueing", "tpot_paper")
    }
    outcomes = dict.fromkeys(("finished", "rejected", "aborted", "unfinished"), 0)
    attained = attained_paper = generated = preemptions = 0
    for row in rows:
        outcomes[row["outcome"]] += 1
        preemptions += row["preemptions"]
        token_s = run.token_s[row["request"]]
        generated += sum(time_s <= duration_s for time_s in token_s)
        if row["outcome"] != "finished":
            continue
        arrival_s, first_s, last_s, n = row["arrival_s"], token_s[0], token_s[-1], len(token_s)
        values["ttft"].append(first_s - arrival_s)
        values["e2e"].append(last_s - arrival_s)
        values["queueing"].append(row["scheduled_s"] - arrival_s)
        values["tpot_paper"].append((last_s - first_s) / n)
        values["itl"] += [b - a for a, b in itertools.pairwise(token_s)]
        if n > 1:
            values["tpot"].append((last_s - first_s) / (n - 1))
        bounds = run.config["slo"]["classes"][row["slo"]]
        ttft_s, tpot_s, e2e_s = (_bound(bounds.get(f"{key}_s")) for key in ("ttft", "tpot", "e2e"))
        in_time = n == 1 or (last_s - first_s) / (n - 1) <= tpot_s
        attained += first_s - arrival_s <= ttft_s and in_time and last_s - arrival_s <= e2e_s
        attained_paper += first_s - arrival_s < ttft_s and (last_s - first_s) / n < tpot_s
    return {
        "requests": len(rows),
        **outcomes,
        "attainment": _ratio(attained, len(rows)),
        "attainment_paper": _ratio(attained_paper, len(rows)),
        "goodput_rps": attained / duration_s,
        "inference_tok_s": generated / duration_s,
        "preemptions": preemptions,
        **{f"{key}_{kind}_s": value for key, own in values.items() for kind, value in _spread(own).items()},
    }


def of_the_system(run: Tables, duration_s: float, peak_tok_s: float) -> Row:
    ended = [row for row in run.iterations if row["end_s"] <= duration_s]
    took = [row["end_s"] - row["start_s"] for row in ended]
    trained = sum(row["tokens"] for row in run.steps if row["end_s"] <= duration_s and not row["failed"])
    generated = sum(time_s <= duration_s for times in run.token_s.values() for time_s in times)
    decodes = [row["decode_count"] for row in ended if row["decode_count"] > 0]
    busy = [0.0] * len(run.pipelines)
    for row in run.iterations:
        busy[row["pipeline"]] += max(0.0, min(row["end_s"], duration_s) - row["start_s"]) / duration_s
    errors = [
        abs(row["predicted_s"] / actual_s - 1)
        for row, actual_s in zip(ended, took, strict=True)
        if not math.isnan(row["predicted_s"])
    ]
    row = {
        "prefill_tok_s": sum(row["prefill_tokens"] for row in ended) / duration_s,
        "finetune_tok_s": trained / duration_s,
        "finetune_fwd_tok_s": sum(row["forward_tokens"] for row in ended) / duration_s,
        "peak_finetune_tok_s": peak_tok_s,
        "finetune_share_of_peak": _ratio(trained / duration_s, peak_tok_s),
        "iterations": len(ended),
        "iteration_mean_s": _ratio(math.fsum(took), len(took)),
        "iteration_p99_s": _percentile(took, 99),
        "decode_batch_mean": _ratio(sum(decodes), len(decodes)),
        "gpu_busy_share": sum(busy) / len(busy),
        "prediction_error_p50": _percentile(errors, 50),
        "prediction_error_p90": _percentile(errors, 90),
    }
    if all(pipeline.kv_tokens is not None for pipeline in run.pipelines):
        row |= _kv_use(run, ended, took)
    profile = run.config["cost"]["world"].get("of", {}).get("path")
    if profile is not None:
        row["extrapolated_share"] = _outside(pd.read_parquet(profile), ended)
    return row | _energy_and_cost(run, busy, duration_s, generated + trained)


def _kv_use(run: Tables, ended: list[Row], took: list[float]) -> Row:
    blocks = [(p.kv_tokens or 0) // run.limits["block_tokens"] for p in run.pipelines]
    use = [row["kv_blocks_used"] / blocks[row["pipeline"]] for row in ended]
    weighted = math.fsum(share * seconds for share, seconds in zip(use, took, strict=True))
    return {"kv_use_mean": _ratio(weighted, math.fsum(took)), "kv_use_max": max(use, default=NAN)}


def _outside(measured: pd.DataFrame, ended: list[Row]) -> float:
    """Share of iterations that have less or more of something than every measured one."""
    names = [name for name in measured if ended and name in ended[0]]
    low, high = measured[names].min(), measured[names].max()
    outside = sum(any(not low[name] <= row[name] <= high[name] for name in names) for row in ended)
    return _ratio(outside, len(ended))


def _energy_and_cost(run: Tables, busy: list[float], duration_s: float, tokens: float) -> Row:
    energy_j = cost = 0.0
    for share, (device, tp, _) in zip(busy, run.pipelines, strict=True):
        power_w, idle_w, price = (
            NAN if device.get(key) is None else device[key]
            for key in ("power_w", "idle_power_w", "price_per_hour")
        )
        energy_j += tp * (idle_w + share * (power_w - idle_w)) * duration_s
        cost += tp * price * duration_s / 3600
    return {
        "energy_j": energy_j,
        "energy_j_per_token": _ratio(energy_j, tokens),
        "cost": cost,
        "cost_per_mtoken": _ratio(cost * 1e6, tokens),
    }


def peak_tok_s(alone: Tables, duration_s: float) -> float | None:
    """`peak_finetune_tok_s` from the tables of a run that only finetunes."""
    peak = 0.0
    for pipeline in range(len(alone.pipelines)):
        own = [row for row in alone.steps if row["pipeline"] == pipeline]
        if own:
            until_s = max(row["end_s"] for row in own)
            if any(_ended(alone, name) for name in alone.config["finetune"]["jobs"]):
                until_s = max(until_s, duration_s)
            peak += sum(row["tokens"] for row in own) / until_s
    return peak or None


def _ended(run: Tables, name: str) -> bool:
    """Whether all data of a job were trained."""
    job = run.config["finetune"]["jobs"][name]
    done = sum(row["samples"] for row in run.steps if row["job"] == name)
    return bool(job["epochs"]) and done == job["epochs"] * len(data_of(job))


def data_of(job: Row) -> list[int]:
    """Tokens of the samples of a file."""
    lines = Path(job["data"]["file"]).read_text().splitlines()
    return [min(json.loads(line)["tokens"], job["cutoff_len"]) for line in lines]


def _spread(values: list[float]) -> dict[str, float]:
    mean = math.fsum(values) / len(values) if values else NAN
    return {"mean": mean, **{f"p{p}": _percentile(values, p) for p in (50, 90, 99)}}


def _percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else NAN


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else NAN


def _bound(value: float | None) -> float:
    return math.inf if value is None else value


def _shown(value: float | None) -> float:
    return NAN if value is None or value == math.inf else value
