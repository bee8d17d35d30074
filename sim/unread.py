"""Overrides that nothing reads are refused: a setting without effect would pass for one that had none.

Hydra refuses keys that the config does not have. What is left are keys that are there for another command, keys
that another one makes needless, bounds of models that are not run, and what is said of adapters or of a router where
there are no adapters or one pipeline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sim.checked import build
from sim.settings import ClusterSettings


def override_keys() -> list[str]:
    """Keys and groups of this run's overrides in the order given, without `+` and `~`; of a mapping those in it."""
    given = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(given, list)
    return [key for override in given for key in _keys_of(str(override))]


def _keys_of(override: str) -> list[str]:
    key = re.split(r"[@=]", override.lstrip("+~"), maxsplit=1)[0]
    if "={" not in override:
        return [key]
    return _inner(key, OverridesParser.create().parse_override(override).value())


def _inner(key: str, value: object) -> list[str]:
    if not isinstance(value, dict) or not value:
        return [key]
    return [own for name, inner in value.items() for own in _inner(f"{key}.{name}", inner)]


def refuse_unread(unread: Sequence[str], reader: str) -> None:
    """ValueError for an override of one of the keys `unread`, or below it, which only the command `reader` reads."""
    for key in override_keys():
        for other in unread:
            if f"{key}.".startswith(f"{other}."):
                raise ValueError(f"{key} changes nothing here: {other} is read by {reader} alone")


INSTEAD = {"measure_s": "predictor", "memory_utilization": "limits.kv_tokens"}
"""Key of the engine -> the key that, unless it is null, takes its place."""


def refuse_needless(config: DictConfig) -> None:
    """ValueError for an override of a key whose place another one has taken."""
    for key in override_keys():
        if key in INSTEAD and (value := OmegaConf.select(config, INSTEAD[key])) is not None:
            raise ValueError(
                f"{key} changes nothing here: {INSTEAD[key]} is {value}, and only null asks for it"
            )


def check_bounds(config: DictConfig) -> None:
    """ValueError for an override of `slo.tpot_s.NAME` that no SLO class refers to. A sweep over models may give the
    bounds of all of them."""
    keys = override_keys()
    names = [key.removeprefix("slo.tpot_s.") for key in keys if key.startswith("slo.tpot_s.")]
    if not names:
        return
    classes = OmegaConf.select(config, "slo.classes")
    if not isinstance(classes, DictConfig):
        return  # told where they are built
    stated = str(OmegaConf.to_container(classes, resolve=False))
    asked = set(re.findall(r"slo\.tpot_s\.(\$\{model\.name\}|\w+)", stated))
    read = sorted(str(config.model.name) if name == "${model.name}" else name for name in asked)
    run = HydraConfig.get()
    several = run.mode == RunMode.MULTIRUN and "model" in keys and "${model.name}" in asked
    for name in names:
        if name not in read and not (several and name in _models()):
            own = [f"slo.tpot_s.{other}" for other in read]
            own = own or [f"slo.classes.{other}.tpot_s" for other in map(str, classes)]
            raise ValueError(f"slo.tpot_s.{name} is read by no SLO class; their bounds are {', '.join(own)}")


ADAPTERS = "workload.adapters.count"


def check_effects(config: DictConfig) -> None:
    """ValueError for an override of a key that changes nothing for want of adapters or, in a cluster, of a second
    pipeline, and for a cluster that is none. A sweep may give it for those of its runs that have them."""
    keys = override_keys()
    several = HydraConfig.get().mode == RunMode.MULTIRUN
    if OmegaConf.select(config, ADAPTERS) == 0 and not (several and ADAPTERS in keys):
        _refuse_below("workload.adapters", keys, ADAPTERS, f"{ADAPTERS} is 0")
    cluster = config.get("cluster")
    if cluster is None:
        return
    settings = build(ClusterSettings, cluster, "cluster")
    groups = settings.groups
    counts = [settings.pipelines] if groups is None else [group.pipelines for group in groups]
    if counts == [1] and not (several and {"cluster", "cluster.pipelines", "cluster.groups"} & set(keys)):
        _refuse_below("cluster.router", keys, None, "the cluster has 1 pipeline")


def _refuse_below(node: str, keys: Sequence[str], but: str | None, cause: str) -> None:
    for key in keys:
        if key.startswith(f"{node}.") and key != but:
            raise ValueError(f"{key} changes nothing here: {cause}")


def _models() -> set[str]:
    """Names of the files in `model` on the config search path."""
    folders = [source.path for source in HydraConfig.get().runtime.config_sources if source.schema == "file"]
    return {path.stem for folder in folders for path in Path(folder).glob("model/*.yaml")}
