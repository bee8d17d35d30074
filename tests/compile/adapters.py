"""Real models with bypasses: those of `peft`, and bottleneck adapters (Houlsby et al. 2019), which it lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sim.compile.peft import PeftSpec


def apply_peft(model: Any, spec: PeftSpec) -> Any:
    """The model with `spec`'s bypasses: `peft` for LoRA and (IA)^3, our own module for adapters."""
    if spec.method == "adapter":
        return add_adapters(model, spec)
    import peft

    if spec.method == "ia3":
        feedforward = [t for t in spec.targets if t == "down_proj"]
        config: Any = peft.IA3Config(target_modules=list(spec.targets), feedforward_modules=feedforward)
    else:
        config = peft.LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,  # type: ignore[arg-type]  # any number works
            lora_dropout=spec.dropout,
            use_rslora=spec.rslora,
            target_modules=list(spec.targets),
        )
    wide = spec.adapter_dtype == "float32"
    return peft.get_peft_model(model, config, autocast_adapter_dtype=wide)


class BottleneckAdapter(nn.Module):
    """y + U act(D y) behind a linear layer, y its output; D, U without biases.

    A float32 adapter behind a bf16 layer computes in float32 and casts its sum back, as `peft` does.
    """

    def __init__(self, base_layer: nn.Linear, spec: PeftSpec) -> None:
        super().__init__()
        weight = base_layer.weight
        dtype = torch.float32 if spec.adapter_dtype == "float32" else weight.dtype
        wide, device = base_layer.out_features, weight.device
        self.base_layer = base_layer
        self.down = nn.Linear(wide, spec.rank, bias=False, dtype=dtype, device=device)
        self.up = nn.Linear(spec.rank, wide, bias=False, dtype=dtype, device=device)
        self.activation = getattr(nn.functional, spec.activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        low = self.activation(self.down(y.to(self.down.weight.dtype)))
        total: torch.Tensor = y + self.up(low)
        return total.to(y.dtype)


def add_adapters(model: Any, spec: PeftSpec) -> Any:
    """Freeze `model` and put an adapter behind every linear layer named in `spec.targets`; modifies
    and returns it. Raises ValueError for a target that no layer has."""
    model.requires_grad_(False)
    found = set()
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for target in spec.targets:
                if isinstance(getattr(block, target, None), nn.Linear):
                    setattr(block, target, BottleneckAdapter(getattr(block, target), spec))
                    found.add(target)
    missing = sorted(set(spec.targets) - found)
    if missing:
        raise ValueError(f"peft.targets: the model has no linear layer {missing[0]!r}")
    return model
