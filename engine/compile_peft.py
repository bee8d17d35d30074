"""A `peft` configuration as the compiler's `PeftSpec`; options that would change the graph in a way that
the compiler does not know are refused by name."""

from __future__ import annotations

from typing import Any

from sim.compile.peft import LINEARS, PeftSpec

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
    },
    "IA3": {"modules_to_save": None, "fan_in_fan_out": False, "exclude_modules": None},
}
"""Type of configuration -> option -> the only value that is supported; empty and None are alike."""


def spec_from_peft(config: Any, adapter_dtype: str = "model") -> PeftSpec:
    """The spec of a `peft.LoraConfig` or `peft.IA3Config`.

    `adapter_dtype` is "float32" for adapters as `peft` loads them by default. Raises ValueError for
    another type of configuration or an option in REFUSED.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in REFUSED:
        raise ValueError(f"peft_type must be one of {', '.join(REFUSED)}, got {kind}")
    for option, allowed in REFUSED[kind].items():
        value = getattr(config, option, allowed)
        if value != allowed and (value or allowed):
            raise ValueError(f"peft option {option} must be {allowed!r}, got {value!r}")
    targets = _targets(config)
    if kind == "IA3":
        feedforward = set(config.feedforward_modules or ())
        if feedforward != set(targets) & {"down_proj"}:
            raise ValueError(
                f"peft option feedforward_modules must be down_proj alone, got {sorted(feedforward)}"
            )
        return PeftSpec(method="ia3", targets=targets, adapter_dtype=adapter_dtype)
    return PeftSpec(
        method="lora",
        targets=targets,
        rank=config.r,
        alpha=float(config.lora_alpha),
        rslora=config.use_rslora,
        dropout=config.lora_dropout,
        adapter_dtype=adapter_dtype,
    )


def _targets(config: Any) -> tuple[str, ...]:
    modules = config.target_modules
    if modules == "all-linear":
        return LINEARS
    if isinstance(modules, str) or not modules:
        raise ValueError(
            f"peft option target_modules must be a list of layers or all-linear, got {modules!r}"
        )
    unknown = sorted(set(modules) - set(LINEARS))
    if unknown:
        raise ValueError(f"peft option target_modules must be among {', '.join(LINEARS)}, got {unknown[0]}")
    return tuple(modules)
