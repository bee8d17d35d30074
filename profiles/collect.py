"""`coserve profile collect`: time the engine of this machine on a designed grid of work, into a profile.

    coserve profile collect
    coserve profile collect device=h100 model=llama_3_1_8b job/lora=down_proj seconds=360
    coserve profile collect device=h100 model=llama_3_1_8b out=mine.parquet restart=true

The file is written anew after every point, so whoever stops it loses that point at most; the next call goes on
where it stopped, as long as the machine, the settings, torch and the code that is timed are what they were. The
n-th point is always the same (`engine.design`) and any beginning of the design covers everything, so a short
profile is a coarse one and not a wrong one. A point whose time contradicts another's (less work, more than
twice as long) was disturbed: it is timed again at once, and left out if that does not help, so that a file is
sound whenever it is left.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from platform import machine, processor
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from engine.assemble import TrainingJob, assemble_engine
from engine.bench import CONFIGS
from engine.design import Point, design
from engine.launching import LaunchSettings
from engine.lora import new_adapter
from engine.machine import model_of, place_of, release, shape_of
from engine.model import Model
from engine.optimizer import OptimizerSettings
from engine.rig import Rig, Timed
from engine.room import limits_and_plans
from profiles.collected import BROKEN, DISTURBED, TOO_LARGE, ProfileFile, points_line
from profiles.fit import LEAST_ROWS
from profiles.schema import TABLES, Provenance, contradiction, read_profile
from sim.checked import build, check
from sim.core.finetune import AUTO, MEMORIES, ORDERS
from sim.core.plan import Limits
from sim.core.rows import WORK_COLUMNS, work_row
from sim.core.specs import DeviceSpec, LoraSpec
from sim.errors import keys_as, writing
from sim.hydra_app import hydra_main
from sim.native import ROOT, sources
from sim.results import make_manifest
from sim.settings import LimitSettings
from sim.unread import refuse_needless, refuse_unread

MOST_REPEATS = 32
AGAIN = 3
"""Times that a contradicting point is timed again."""
TIMED = "engine/rig.py"
"""It and all that it imports is the code whose time a row is."""
NOT_TIMED = ("data", "accumulation")
"""Keys of `job` that the `scale` group brings for `coserve bench`."""
UNREAD = ("measure_s", "peak_s", "run", *(f"job.{key}" for key in NOT_TIMED))
"""All that it brings for that command alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The keys of engine/configs/profile.yaml that are not a group."""

    adapters: int
    out: str | None
    restart: bool
    points: int
    repeats: int
    seconds: float

    def __post_init__(self) -> None:
        for key, least, most in (("adapters", 0, 64), ("points", 1, 10**6), ("repeats", 3, MOST_REPEATS)):
            if not least <= getattr(self, key) <= most:
                raise ValueError(f"{key} must be from {least} to {most}, got {getattr(self, key)}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, got {self.seconds}")
        if self.out is not None and Path(self.out).suffix != ".parquet":
            raise ValueError(f"out must be a file that ends in .parquet, got {self.out!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """The `job` node, as far as times depend on it."""

    sample_tokens: int
    order: str
    memory: str
    lora: LoraSpec

    def __post_init__(self) -> None:
        if self.sample_tokens < 2:
            raise ValueError(f"job.sample_tokens must be at least 2, got {self.sample_tokens}")
        for key, allowed in (("order", ORDERS), ("memory", (*MEMORIES, AUTO))):
            if getattr(self, key) not in allowed:
                raise ValueError(f"job.{key} must be one of {', '.join(allowed)}, got {getattr(self, key)!r}")


def main(argv: Sequence[str]) -> int:
    """`coserve profile collect`."""
    return hydra_main(
        collect,
        argv,
        prog="coserve profile collect",
        config_name="profile",
        config_dir=CONFIGS,
        at_end=_show,
    )


def collect(config: DictConfig) -> dict[str, Any]:
    """Time the engine of this machine on a designed grid of work, and write a profile."""
    refuse_unread(UNREAD, "coserve bench")
    refuse_needless(config)
    plain = {key: config[key] for key in Settings.__dataclass_fields__}
    with keys_as({"profile.": ""}):
        settings = build(Settings, OmegaConf.create(plain), "profile")
    device, shape = build(DeviceSpec, config.device, "device"), shape_of(config.model, config.weights)
    if shape.tp > 1:
        raise ValueError(f"coserve profile collect times one device: model.tp must be 1, got {shape.tp}")
    own = {str(key): value for key, value in config.job.items() if key not in NOT_TIMED}
    with keys_as({"finetune.lora.": "job.lora."}):
        job = build(JobSettings, own, "job")
    launch = build(LaunchSettings, config.launch, "launch")
    place_of(device)
    path = Path(settings.out) if settings.out is not None else TABLES / f"{device.name}-{shape.name}.parquet"
    with writing("out", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    model = model_of(shape, device, config.weights)
    utilization = check(config.memory_utilization, float, "memory_utilization")
    given = build(LimitSettings, config.limits, "limits")
    limits, _ = limits_and_plans(model, device, given, _jobs(model, job), utilization)
    file = ProfileFile(path, _about(model, device, limits, job, settings, launch), _provenance(model, device))
    if settings.restart:
        file.begin()
    else:
        limits = replace(limits, kv_tokens=file.resume(open_kv=config.limits.kv_tokens is None))

    def rig() -> Rig:
        adapters = _adapters(model, job.lora, settings.adapters)
        assemble = partial(assemble_engine, launching=launch.on(model))
        return Rig(model, limits, _jobs(model, job), adapters, assemble)

    _time_points(Timing(rig, settings.repeats), file, settings)
    if not file.rows:
        raise ValueError(f"seconds must allow a point, {settings.seconds} gave none")
    return {"file": str(path), "points": settings.points}


class Timing:
    """A rig, made anew when a point was too large for the device's memory."""

    def __init__(self, make: Callable[[], Rig], repeats: int) -> None:
        self._make = make
        self._repeats = repeats
        self._rig: Rig | None = make()
        self.space = self._rig.space

    def row(self, point: Point, index: int) -> dict[str, float] | None:
        """One row; None for a point that the memory does not hold."""
        if self._rig is None:
            self._rig = self._make()
        try:
            return _flat(self._rig.time(point, self._repeats, ahead=True), index)
        except torch.OutOfMemoryError:
            print(f"note: point {index} does not fit into memory and is left out: {point}", file=sys.stderr)
        # It stopped midway: what it left half done goes with the rig.
        self._rig = None
        release()
        return None


def _time_points(timing: Timing, file: ProfileFile, settings: Settings) -> None:
    """The points that the file lacks, until the time is over."""
    started_s = time.perf_counter()
    rest = itertools.islice(design(timing.space), file.passed, settings.points)
    with tqdm(total=settings.points, initial=file.passed, unit="point", leave=False, disable=None) as bar:
        for point in rest:
            if time.perf_counter() - started_s > settings.seconds:
                break
            file.passed += 1
            try:
                row = timing.row(point, file.passed - 1)
            except Exception:
                file.left_out[BROKEN] += 1
                file.write()  # the next call goes on behind it
                raise
            if row is None:
                file.left_out[TOO_LARGE] += 1
            else:
                file.add(row)
                _settle(timing, file)
            file.write()
            bar.update()


def _flat(timed: Timed, index: int) -> dict[str, float]:
    low, mid, high = np.quantile(timed.seconds, (0.2, 0.5, 0.8))
    times = dict(zip(("seconds_p20", "seconds_p50", "seconds_p80"), (low, mid, high), strict=True))
    return {
        **dict(zip(WORK_COLUMNS, map(float, work_row(timed.work)), strict=True)),
        **{name: float(value) for name, value in times.items()},
        "point": float(index),
        "repeats": float(len(timed.seconds)),
        "host_s": float(np.median(timed.host_s)),
        "ahead_s": timed.ahead_s,
    }


def _settle(timing: Timing, file: ProfileFile) -> None:
    """Time rows that contradict others again; those that go on doing so are left out."""
    tries = dict.fromkeys((row["point"] for row in file.rows), 0)
    while (found := contradiction(file.columns())) is not None:
        _, slow = found
        index = int(file.rows[slow]["point"])
        point = next(itertools.islice(design(timing.space), index, None))
        tries[index] += 1
        again = timing.row(point, index) if tries[index] <= AGAIN else None
        if again is None:
            del file.rows[slow]
            file.left_out[DISTURBED] += 1
        elif again["seconds_p50"] < file.rows[slow]["seconds_p50"]:
            file.rows[slow] = again


def _jobs(model: Model, job: JobSettings) -> list[TrainingJob]:
    """The job that was asked for, and one of the other order."""
    other = "window_major" if job.order == "layer_major" else "layer_major"
    kinds = [(job.order, job.memory), (other, "recompute" if other == "window_major" else "stash")]
    return [
        TrainingJob(
            id=order,
            samples=(),
            max_sample_tokens=job.sample_tokens,
            adapter=new_adapter(job.lora, model.config.shape, model.compute, model.device, seed),
            optimizer=OptimizerSettings(schedule="constant", learning_rate=1e-6),
            order=order,
            memory=memory,
        )
        for seed, (order, memory) in enumerate(kinds)
    ]


def _adapters(model: Model, lora: LoraSpec, count: int) -> dict[str, Any]:
    return {
        f"adapter_{n}": new_adapter(lora, model.config.shape, model.compute, model.device, 2 + n)
        for n in range(count)
    }


def _about(
    model: Model,
    device: DeviceSpec,
    limits: Limits,
    job: JobSettings,
    settings: Settings,
    launch: LaunchSettings,
) -> dict[str, Any]:
    """What makes two calls measure the same thing, and the command."""
    manifest = make_manifest(seed=None, device=device.name, wall_s=0.0)
    return {
        "device": device.name,
        "hardware": _hardware(model.device),
        "model": asdict(model.config.shape),
        "dtype": str(model.dtype).removeprefix("torch."),
        "commit": manifest["commit"],
        "dirty": manifest["dirty"],
        "sources": _sources(),
        "versions": _versions(),
        "limits": asdict(limits),
        "job": {**asdict(job), "lora": {**asdict(job.lora), "targets": list(job.lora.targets)}},
        "launch": asdict(launch),
        "adapters": settings.adapters,
        "command": manifest["command"],
    }


def _provenance(model: Model, device: DeviceSpec) -> Provenance:
    manifest = make_manifest(seed=None, device=device.name, wall_s=0.0)
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    return Provenance(
        device=device.name,
        model=model.config.shape.name,
        tp=1,
        source=f"coserve profile collect on {_hardware(model.device)}",
        date=date.today().isoformat(),
        how="one iteration from the end of the last to its own, through the engine; wall clock, and device "
        "events for the host's share",
        licence="of whoever measured it",
        versions=f"coserve {manifest['commit'] or 'unknown'}, {versions}",
    )


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return processor() or machine()


def _sources() -> str:
    """Hash of the code that is timed. A commit that leaves it as it was does not matter."""
    digest = hashlib.sha256()
    for path in sources(ROOT, [TIMED]):
        digest.update(path.encode() + b"\0" + (ROOT / path).read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    try:
        found["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found["triton"] = "none"
    if torch.version.cuda is not None:
        found["cuda"] = str(torch.version.cuda)
    return found


def _show(rows: Sequence[Mapping[str, Any]], _: Path) -> None:
    """What the profile holds and how well a table fits it."""
    from profiles.program import describe

    for row in rows:
        profile = read_profile(Path(row["file"]))
        assert profile.collected is not None
        c = profile.columns
        if len(profile.seconds) < LEAST_ROWS:
            print(f"{len(profile.seconds)} rows: a fit needs {LEAST_ROWS}")
        else:
            describe(profile)
        spread = (c["seconds_p80"] - c["seconds_p20"]) / c["seconds_p50"]
        print(f"spread of repeats (p80 - p20 over median): {100 * np.median(spread):.1f} % in the median row")
        print(f"host, not hidden: {1e3 * np.median(c['host_s']):.2f} ms an iteration in the median row")
        ahead = np.nanmedian(1 - c["ahead_s"] / c["seconds_p50"])
        print(f"launched one ahead: {100 * ahead:.1f} % shorter in the median row")
        print(points_line(profile.collected, len(profile.seconds), row["points"]))
        print(f"file: {row['file']}")
