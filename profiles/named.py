"""Devices and models of `configs/` and of the engine, by name or by the path of a file of the same form, and
devices described by datasheet numbers alone.

A name may be written as Hugging Face, the driver or the projects that publish measurements write it:
`meta-llama/Llama-2-70b-hf` is llama_2_70b, `NVIDIA A100-SXM4-80GB` and `a100_sxm` are a100_80gb.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sim.assemble import CONFIGS
from sim.checked import build
from sim.core.specs import DeviceSpec, ModelShape
from sim.cost.efficiency import Efficiency
from sim.errors import nearest

FOLDERS = (CONFIGS, *(CONFIGS.parent / package / "configs" for package in ("engine", "profiles")))
"""Those of `profiles` are of models that have been measured and are not simulated."""
NEEDED = ("peak_flops", "memory_bandwidth_bytes_s", "sms")

SILENT = {
    "model": ("instruct", "chat", "hf", "base", "meta"),
    "device": (
        "nvidia",
        "geforce",
        "sxm",
        "sxm4",
        "sxm5",
        "dgx",
        "hgx",
        "hbm3",
        "80gb",
        "blackwell",
        "edition",
    ),
}
"""Words of a name that change neither a model's shapes nor what a card is, where the rest is a name already."""
SAME = {
    "llama33_70b": "llama_3_1_70b",
    "qwen2_7b": "qwen2_5_7b",
    "qwen2_72b": "qwen2_5_72b",
    "a100": "a100_80gb",
    "a6000": "rtx_a6000",
    "rtxpro6000workstation": "rtx_pro_6000",
}
"""Other names -> the model with the same shapes, or the card."""


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
        if not own["sms"].is_integer():
            raise ValueError(f"device.sms must be a whole number, got {numbers['sms']!r}")
        own["sms"] = int(own["sms"])
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
        unsaid = {"name": "described", "source": "given", "memory_bytes": 1e9, "link_bandwidth_bytes_s": 0.0}
        device = DeviceSpec(**{**unsaid, **own}, extras=extras)
    Efficiency.of(device)
    return device


def model_named(name: str) -> ModelShape:
    model: ModelShape = _named(ModelShape, "model", name)
    return model


def card_named(name: str) -> str | None:
    """The device that a driver calls `name`; None if it is not known."""
    return known_name("device", name, _files("device"))


def known_name(group: str, name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` means, letters, punctuation, owner and SILENT words aside; None if none."""
    names = {_plain(config): config for config in known}
    others = {_plain(other): config for other, config in SAME.items() if config in names.values()}
    for text in ("".join(_words(name)), bare(group, name)):
        if text in names or text in others:
            return names.get(text) or others[text]
    return None


def bare(group: str, name: str) -> str:
    """`name` without owner, punctuation and SILENT words: 'meta-llama/Llama-3.1-8B-Instruct' is 'llama318b'."""
    return "".join(word for word in _words(name) if word not in SILENT[group])


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.rstrip("/").rpartition("/")[2].lower())


def _plain(name: str) -> str:
    return name.replace("_", "")


def _named(kind: Any, group: str, name: str) -> Any:
    files = _files(group)
    if name.endswith(".yaml"):
        path = Path(name)
        found = path if path.is_file() else None
    else:
        found = files.get(known_name(group, name, files) or "")
    if found is None:
        known = sorted(files)
        raise ValueError(
            f"no {group} named {name!r}{nearest(name, known)}; known: {', '.join(known)}; "
            f"or the path of a YAML file of the form of configs/{group}"
        )
    return build(kind, OmegaConf.load(found), f"{group} {name}")


def _files(group: str) -> dict[str, Path]:
    return {path.stem: path for folder in FOLDERS for path in (folder / group).glob("*.yaml")}
