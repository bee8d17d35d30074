"""A `peft` configuration, `adapter_config.json`, as the compiler's `PeftSpec`.

Options that would change the graph in a way that the compiler does not know are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sim.compile.peft import PeftSpec
from sim.core.specs import LINEARS
from sim.json_file import read_object

REFUSED: dict[str, dict[str, Any]] = {
    "LORA": {
        "bias": "none",
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "modules_to_save": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "lora_bias": False,
        "fan_in_fan_out": False,
        "exclude_modules": None,
        "alora_invocation_tokens": None,
        "use_qalora": False,
        "layer_replication": None,
        "use_bdlora": None,
        "kasa_config": None,
        "arrow_config": None,
        "monteclora_config": None,
        "velora_config": None,
    },
    "IA3": {"modules_to_save": None, "fan_in_fan_out": False, "exclude_modules": None},
}
"""Type of configuration -> option -> the only value that is supported; empty and null are alike."""
DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
"""What `peft` takes for a key that is not in the file."""


def read_peft(path: str | Path) -> PeftSpec:
    """The spec of an `adapter_config.json`, or of the one in a folder.

    Raises ValueError naming the file for another type of configuration, an option in REFUSED, or a target that is
    no linear layer.
    """
    path = Path(path)
    if path.is_dir():
        path /= "adapter_config.json"
    config = read_object(path, "not a PEFT adapter")
    try:
        return _spec({**DEFAULTS, **config})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _spec(config: Mapping[str, Any]) -> PeftSpec:
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in REFUSED:
        raise ValueError(f"peft_type must be one of {', '.join(REFUSED)}, got {kind!r}")
    for option, allowed in REFUSED[kind].items():
        value = config.get(option, allowed)
        if value != allowed and (value or allowed):
            raise ValueError(f"{option} must be {allowed!r}, got {value!r}")
    targets = _targets(config.get("target_modules"))
    if kind == "IA3":
        feedforward = config.get("feedforward_modules") or []
        wanted = ["down_proj"] if "down_proj" in targets else []
        if feedforward != wanted:
            raise ValueError(
                f"feedforward_modules must be {wanted} beside these targets, got {feedforward!r}"
            )
        return PeftSpec(method="ia3", targets=targets)
    return PeftSpec(
        method="lora",
        targets=targets,
        rank=_number(config, "r", int),
        alpha=float(_number(config, "lora_alpha", int, float)),
        rslora=_flag(config, "use_rslora"),
        dropout=float(_number(config, "lora_dropout", int, float)),
    )


def _number(config: Mapping[str, Any], key: str, *kinds: type) -> Any:
    value = config[key]
    if type(value) not in kinds:
        raise ValueError(f"{key} must be a number, got {value!r}")
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config[key]
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value


def _targets(modules: object) -> tuple[str, ...]:
    if modules == "all-linear":
        return LINEARS
    if not isinstance(modules, list) or not modules:
        raise ValueError(f"target_modules must be a list of layers or all-linear, got {modules!r}")
    unknown = [name for name in modules if name not in LINEARS]
    if unknown:
        raise ValueError(f"target_modules must be among {', '.join(LINEARS)}, got {unknown[0]}")
    return tuple(modules)
