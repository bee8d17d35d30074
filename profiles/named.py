"""Devices and models of `configs/` and of the engine, by name or by the path of a file of the same form, and
devices described by datasheet numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sim.assemble import CONFIGS
from sim.checked import build
from sim.core.specs import DeviceSpec, ModelShape
from sim.cost.efficiency import Efficiency
from sim.errors import nearest

FOLDERS = (CONFIGS, CONFIGS.parent / "engine" / "configs")
NEEDED = ("peak_flops", "memory_bandwidth_bytes_s", "sms")


def device_named(name: str) -> DeviceSpec:
    device: DeviceSpec = _named(DeviceSpec, "device", name)
    return device


def device_described(name: str | None, numbers: Mapping[str, str]) -> DeviceSpec:
    """The device `name` with some fields or efficiencies replaced, or a new one of the numbers given.

    A new one needs NEEDED; its efficiencies are those of `architecture`, an Ampere's unless it is given.
    """
    known = [item.name for item in fields(DeviceSpec) if item.name not in ("name", "source", "extras")]
    efficiencies = [item.name for item in fields(Efficiency)]
    values: dict[str, Any] = {}
    for key, text in numbers.items():
        if key == "architecture":
            values[key] = text
            continue
        if key not in (*known, *efficiencies):
            raise ValueError(f"device.{key} is not known{nearest(key, (*known, *efficiencies))}")
        try:
            values[key] = float(text)
        except ValueError:
            raise ValueError(f"device.{key} must be a number, got {text!r}") from None
    own: dict[str, Any] = {key: value for key, value in values.items() if key in known}
    extras = {key: value for key, value in values.items() if key not in known}
    if "sms" in own:
        own["sms"] = round(own["sms"])
    if name is not None:
        base = device_named(name)
        device = replace(base, **own, extras={**base.extras, **extras})
    else:
        missing = [key for key in NEEDED if key not in own]
        if missing:
            raise ValueError(
                f"a device without a name needs device.{missing[0]}; needed: "
                + ", ".join(f"device.{key}" for key in NEEDED)
            )
        unsaid = {"name": "described", "source": "given", "memory_bytes": 1.0, "link_bandwidth_bytes_s": 0.0}
        device = DeviceSpec(**{**unsaid, **own}, extras=extras)
    Efficiency.of(device)
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
