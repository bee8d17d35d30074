"""What would make a configuration possible that its devices cannot hold or keep up with: settings that were tried."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sim.checked import build
from sim.core.finetune import AUTO
from sim.core.specs import ModelShape

Changes = Mapping[str, object]
"""Key -> value, as overrides have them; of `model` the node."""
DEGREES = (2, 4, 8, 16)
PARTS = (2, 4, 8, 16, 32)
"""By which the longest sample is divided."""


def ways_out(
    config: DictConfig, refused: Callable[[DictConfig], object], models: Path, bound: Changes
) -> str:
    """Which changes of `config` are each enough for `refused` not to raise ValueError: a larger `cluster.tp`, K/V
    room that is not set by hand, jobs that hold less, a smaller one of `models`, or `bound`."""
    return _tried(config, refused, _candidates(config, models, bound), "cluster.tp")


def ways_to_fit(config: DictConfig, refused: Callable[[DictConfig], object], models: Path) -> str:
    """The same for a sample that `coserve compile` plans: a larger `tp`, less of it kept, a shorter one, or a
    smaller one of `models`."""
    return _tried(config, refused, _candidates_to_fit(config, models), "tp")


def _tried(
    config: DictConfig,
    refused: Callable[[DictConfig], object],
    choices: Iterator[list[Changes]],
    tp_key: str,
) -> str:
    found: list[Changes] = []
    for candidates in choices:
        for changes in candidates:
            if any(enough.items() <= changes.items() for enough in found):
                continue  # what was told, and more
            changed = copy.deepcopy(config)
            for key, value in changes.items():
                OmegaConf.update(changed, key, value, merge=False)
            try:
                refused(changed)
            except ValueError:
                continue
            found.append(changes)
            break
    return (
        f"possible with {' or '.join(map(_said, found))}"
        if found
        else f"no {tp_key} up to {DEGREES[-1]} and no smaller model would do"
    )


def _candidates(config: DictConfig, models: Path, bound: Changes) -> Iterator[list[Changes]]:
    """Lists of which the first that does is told. Two changes at once come after all single ones."""
    own = build(ModelShape, config.model, "model")
    tp = own.tp if config.cluster.tp is None else config.cluster.tp
    jobs = config.finetune.get("jobs") or {}
    auto = _for_jobs("memory", AUTO, [n for n, job in jobs.items() if job.get("memory") != AUTO])
    least = {
        **auto,
        **_for_jobs(
            "order", "window_major", [n for n, job in jobs.items() if job.get("order") == "layer_major"]
        ),
    }
    wider: list[Changes] = [{"cluster.tp": degree} for degree in DEGREES if degree > tp]
    yield [*wider, *({**changes, **least} for changes in wider)]
    if config.cluster.limits.kv_tokens is not None:
        yield [{"cluster.limits.kv_tokens": None}]
    yield [changes for changes in (auto, least) if changes]
    longest = max((job.cutoff_len for job in jobs.values()), default=0)
    yield [
        _for_jobs(
            "cutoff_len", longest // part, [n for n, job in jobs.items() if job.cutoff_len > longest // part]
        )
        for part in PARTS
        if longest >= part
    ]
    smaller = _smaller(config, models)
    yield [*smaller, *({**changes, **least} for changes in smaller)]
    if bound:
        yield [bound]


def _candidates_to_fit(config: DictConfig, models: Path) -> Iterator[list[Changes]]:
    own = build(ModelShape, config.model, "model")
    tp = own.tp if config.tp is None else config.tp
    recompute: Changes = {} if config.finetune.mode == "recompute" else {"finetune.mode": "recompute"}
    wider: list[Changes] = [{"tp": degree} for degree in DEGREES if degree > tp]
    yield wider
    if recompute:
        yield [recompute, *({**changes, **recompute} for changes in wider)]
    yield [{"finetune.seq_len": config.finetune.seq_len // part} for part in PARTS]
    smaller = _smaller(config, models)
    yield [*smaller, *({**changes, **recompute} for changes in smaller)]


def _smaller(config: DictConfig, models: Path) -> list[Changes]:
    """Those of `models` that are smaller than the config's, the largest first. What was changed in the config's model,
    as by `model.tp=16`, is changed in them too: it stays when another is chosen."""
    nodes = {str(node.name): node for node in map(OmegaConf.load, models.glob("*.yaml"))}
    params = {name: build(ModelShape, node, "model").params for name, node in nodes.items()}
    file = nodes.get(config.model.name, config.model)
    changed = {key: value for key, value in config.model.items() if key not in file or value != file[key]}
    own = build(ModelShape, config.model, "model").params
    less = sorted((name for name in nodes if params[name] < own), key=lambda name: (-params[name], name))
    return [{"model": OmegaConf.merge(nodes[name], changed)} for name in less]


def _for_jobs(key: str, value: object, names: Sequence[str]) -> Changes:
    return {f"finetune.jobs.{name}.{key}": value for name in names}


def _said(changes: Changes) -> str:
    values = {
        key: value.name if isinstance(value, DictConfig) else "null" if value is None else value
        for key, value in changes.items()
    }
    return " ".join(f"{key}={value}" for key, value in values.items())
