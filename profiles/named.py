"""Devices and models of `configs/`, by name or by the path of a file of the same form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sim.assemble import CONFIGS
from sim.checked import build
from sim.core.specs import DeviceSpec, ModelShape
from sim.errors import nearest


def device_named(name: str) -> DeviceSpec:
    device: DeviceSpec = _named(DeviceSpec, "device", name)
    return device


def model_named(name: str) -> ModelShape:
    model: ModelShape = _named(ModelShape, "model", name)
    return model


def _named(kind: Any, group: str, name: str) -> Any:
    folder = CONFIGS / group
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ValueError(f"no {group} named {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return build(kind, OmegaConf.load(path), f"{group} {name}")
