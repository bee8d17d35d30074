"""An engine's run against the simulator, number by number: what `coserve fidelity` compares.

Nothing is fitted on the run. The world is the profile's table with the profile's own spread as noise, several
seeds of it; policy, workload, limits and predictor are the run's. Host time between iterations needs no term of
its own: a profile's times go from one iteration's end to the next one's, with the same lookahead as the run, so
what planning, launching and collecting cost and a lookahead does not hide is in the table. Left out is only the
policy's own thinking, some tens of microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from profiles.fit import regimes
from profiles.schema import Floats, Profile
from profiles.table_file import TableFile
from sim.checked import build, check
from sim.core.rows import WORK_COLUMNS, Recorder
from sim.core.specs import DeviceSpec, LoraSpec, ModelShape
from sim.cost.context import CostContext
from sim.cost.fitted import FittedCost
from sim.cost.flat import row_parts, row_seconds
from sim.cost.noisy import NoisyCost
from sim.errors import keys_as
from sim.metrics import PipelineFacts, summarize
from sim.rerun import COMPARED, Rerun, config_of, replay, same_plans, simulate

METRICS = (
    *(f"{kind}_{name}_s" for kind in ("ttft", "tpot", "itl") for name in ("p50", "p90", "p99")),
    "attainment",
    "goodput_rps",
    "inference_tok_s",
    "finetune_tok_s",
    "iterations",
    "iteration_mean_s",
)
_QUANTILES_APART = 2 * 0.8416
"""p80 - p20 of a normal distribution, in standard deviations."""


class Metric(NamedTuple):
    """One number of a run: as the engine measured it, and as the simulator says with several seeds."""

    run: str
    metric: str
    measured: float
    predicted: float
    """Median of the seeds."""
    predicted_low: float
    predicted_high: float
    """Least and largest of the seeds."""

    @property
    def error(self) -> float:
        """Relative; NaN where nothing was measured."""
        return self.predicted / self.measured - 1 if self.measured else np.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """One run and its simulation."""

    name: str
    metrics: tuple[Metric, ...]
    iterations: pd.DataFrame
    """One row per recorded iteration: run, iteration, kind, measured_s, predicted_s."""
    parts: dict[str, Floats]
    """`row_parts` of them."""
    replayed: float
    """Share of plans that come out the same under the recorded times."""
    alike: float
    """Share of iterations whose number has the same plan in a simulation without noise."""
    outside: float
    """Share of iterations with some count beyond what the profile's rows cover."""


def against(rerun: Rerun, profile: Profile, name: str, seeds: int) -> Against:
    """Compare; ValueError when the profile is of another device or model."""
    context = context_of(rerun)
    _check_same_model(rerun, profile)
    table = TableFile(path=profile.file).build(context)
    rows = rerun.run.table("iterations")
    recorded = {name: rows[name].to_numpy() for name in (*COMPARED, "iteration")}
    spread = noise_of(profile)
    summaries = [
        _summary(rerun, simulate(rerun, NoisyCost(table, spread, (rerun.seed, seed))), context.device)
        for seed in range(seeds)
    ]
    work = {column: rows[column].to_numpy(np.float64) for column in WORK_COLUMNS}
    return Against(
        name=name,
        metrics=tuple(_metric(name, key, rerun.run.summary, summaries) for key in METRICS),
        iterations=pd.DataFrame(
            {
                "run": name,
                "iteration": rows["iteration"],
                "kind": regimes(work),
                "measured_s": rows["end_s"] - rows["start_s"],
                "predicted_s": row_seconds(table.curves, work),
            }
        ),
        parts=row_parts(table.curves, work),
        replayed=float(same_plans(recorded, replay(rerun)).mean()),
        alike=float(same_plans(recorded, simulate(rerun, table)).mean()),
        outside=_outside(table, work),
    )


def context_of(rerun: Rerun) -> CostContext:
    """What the run's costs depend on."""
    with config_of(rerun.run) as config, keys_as({"finetune.lora.": "job.lora."}):
        return CostContext(
            device=build(DeviceSpec, config.device, "device"),
            model=build(ModelShape, config.model, "model"),
            tp=1,
            lora=build(LoraSpec, config.job.lora, "job.lora"),
            seed=0,
            lookahead=rerun.limits.lookahead,
        )


def noise_of(profile: Profile) -> float:
    """Coefficient of variation of repeated iterations: what p20 and p80 of the median row say."""
    c = profile.columns
    return min(0.9, float(np.median(np.log(c["seconds_p80"] / c["seconds_p20"]))) / _QUANTILES_APART)


def differences(rerun: Rerun, profile: Profile) -> list[str]:
    """What the profile was measured with and the run not, in words without the run's name: allowed, and to be
    known."""
    about = profile.collected
    if about is None:
        return [f"{profile.file} does not say with which LoRA, limits and versions it was measured"]
    config = OmegaConf.create(rerun.run.config)
    lora = OmegaConf.to_container(config.job.lora)
    manifest = rerun.run.manifest
    versions = check(
        manifest.get("versions", {}), dict[str, Any], f"{rerun.run.folder}: manifest.json: versions"
    )
    found = []
    for what, profiled, ours in (
        ("LoRA", about["job"]["lora"], lora),
        ("job memory", about["job"]["memory"], config.job.memory),
        ("block_tokens", about["limits"]["block_tokens"], rerun.limits.block_tokens),
        ("commit", about["commit"], manifest.get("commit")),
        ("torch", about["versions"]["torch"], versions.get("torch")),
    ):
        if profiled != ours:
            said = (_said(profiled, ours), _said(ours, profiled))
            found.append(f"{what}: the profile was measured with {said[0]}, run with {said[1]}")
    return found


def _said(value: Any, other: Any) -> str:
    """A setting in words; of a group of settings what is not the same in `other`."""
    if isinstance(value, Mapping):
        own = {k: v for k, v in value.items() if not isinstance(other, Mapping) or other.get(k) != v}
        return " and ".join(f"{key} {_said(v, None)}" for key, v in own.items()) or "none of that"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "nothing known" if value is None else str(value)[:40]


def _check_same_model(rerun: Rerun, profile: Profile) -> None:
    about, ours = profile.collected, rerun.run.config["model"]
    if about is None:
        return
    for key, value in about["model"].items():
        if key in ours and ours[key] != value:
            raise ValueError(
                f"{profile.file}: measured for a model with {key} {value}; {rerun.run.folder} has {ours[key]}"
            )


def _summary(rerun: Rerun, recorder: Recorder, device: DeviceSpec) -> dict[str, Any]:
    blocks = rerun.limits.kv_tokens // rerun.limits.block_tokens
    return summarize(
        recorder,
        slos=rerun.slos,
        duration_s=rerun.horizon.duration_s,
        pipelines=(PipelineFacts(kv_blocks=blocks, device=device),),
    )


def _metric(
    run: str, key: str, measured: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]]
) -> Metric:
    values = np.array([summary[key] for summary in summaries], dtype=np.float64)
    own = float(measured.get(key, np.nan))
    if np.isnan(values).all():
        return Metric(run, key, own, *(np.nan,) * 3)
    numbers = np.nanmedian(values), np.nanmin(values), np.nanmax(values)
    return Metric(run, key, own, *map(float, numbers))


def _outside(table: FittedCost, work: Mapping[str, Floats]) -> float:
    beyond = [(work[name] < low) | (work[name] > high) for name, (low, high) in table.ranges.items()]
    return float(np.logical_or.reduce(beyond).mean())
