"""Devices and models of `configs/` and of the engine, by name or by the path of a file of the same form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sim.assemble import CONFIGS
from sim.checked import build
from sim.core.specs import DeviceSpec, ModelShape
from sim.errors import nearest

FOLDERS = (CONFIGS, CONFIGS.parent / "engine" / "configs")


def device_named(name: str) -> DeviceSpec:
    device: DeviceSpec = _named(DeviceSpec, "device", name)
    return device


def model_named(name: str) -> ModelShape:
    model: ModelShape = _named(ModelShape, "model", name)
    return model


def _named(kind: Any, group: str, name: str) -> Any:
    files = {path.stem: path for folder in FOLDERS for path in (folder / group).glob("*.yaml")}
    path = Path(name) if name.endswith(".yaml") else files.get(name)
    if path is None or not path.is_file():
        known = sorted(files)
        raise ValueError(f"no {group} named {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return build(kind, OmegaConf.load(path), f"{group} {name}")
