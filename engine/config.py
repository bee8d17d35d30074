"""What the engine needs to know of a model: the part of a Hugging Face `config.json` that it computes with.

Everything that would change the result and is not supported is refused here, by key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sim.checked import build, check
from sim.core.specs import ModelShape
from sim.errors import keys_as
from sim.json_file import read_object

FAMILIES = {"llama": False, "qwen2": True}
"""`model_type` -> whether the query, key and value projections have a bias."""
SIZES = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_context_tokens": "max_position_embeddings",
}
"""Size of a shape -> its key in `config.json`."""
OPTIONAL = ("kv_heads", "head_dim", "max_context_tokens")
"""Sizes that may be absent or null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretched rotary frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for key in self.__slots__:
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key} must be above 0 and finite, got {getattr(self, key)}")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor must be below high_freq_factor {self.high_freq_factor}, got {self.low_freq_factor}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A shape and the numbers that are no part of it."""

    family: str
    shape: ModelShape
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        if self.shape.qkv_bias != FAMILIES[self.family]:
            raise ValueError(f"model.qkv_bias of {self.family} must be {FAMILIES[self.family]}")
        if not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"rms_norm_eps must be at least 0 and finite, got {self.norm_eps}")
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be above 0 and finite, got {self.rope_theta}")

    def inverse_frequencies(self, device: torch.device) -> torch.Tensor:
        """Angles per position of the rotary embedding: [head_dim / 2] float32.

        The stretching is that of `transformers` (`_compute_llama3_parameters`): long waves are slowed
        by `factor`, short ones stay, those between are blended.
        """
        dim = self.shape.head_dim
        exponent = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
        inverse = 1.0 / (self.rope_theta**exponent)
        if self.rope_scaling is not None:
            s = self.rope_scaling
            wavelength = 2 * math.pi / inverse
            old = s.original_max_position_embeddings
            smooth = (old / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            blended = (1 - smooth) * inverse / s.factor + smooth * inverse
            long = wavelength > old / s.low_freq_factor
            short = wavelength < old / s.high_freq_factor
            inverse = torch.where(long, inverse / s.factor, torch.where(short, inverse, blended))
        return inverse.to(device)


def read_config(folder: str | Path) -> ModelConfig:
    """The config of a Hugging Face folder. ValueError for what is missing or not supported."""
    path = Path(folder) / "config.json"
    values = read_object(path, "not a Hugging Face model folder")
    try:
        return config_of(values, name=Path(folder).name, where=str(path))
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from None


def config_of(values: Mapping[str, Any], *, name: str, where: str = "config") -> ModelConfig:
    """The config of the keys of a `config.json`."""
    family = values.get("model_type")
    if family not in tuple(FAMILIES):
        raise ValueError(f"{where}: model_type must be one of {', '.join(FAMILIES)}, got {family!r}")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if values.get(key):
            raise ValueError(f"{where}: {key} must be false, got {values[key]!r}")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act must be silu, got {values['hidden_act']!r}")
    sizes = {
        size: check(values[key], int, f"{where}: {key}")
        for size, key in SIZES.items()
        if size not in OPTIONAL or values.get(key) is not None
    }
    heads = sizes["heads"]
    absent = {"kv_heads": heads, "head_dim": sizes["hidden"] // max(1, heads), "max_context_tokens": 2048}
    tied = check(values.get("tie_word_embeddings", False), bool, f"{where}: tie_word_embeddings")
    norm_eps = check(values.get("rms_norm_eps", 1e-6), float, f"{where}: rms_norm_eps")
    theta, scaling = _rope(values, where)
    own = {f"model.{size} ": f"{where}: {key} " for size, key in SIZES.items()}
    own |= {f"{key} ": f"{where}: {key} " for key in ("rms_norm_eps", "rope_theta")}
    with keys_as(own):
        return ModelConfig(
            family=family,
            shape=ModelShape(name=name, qkv_bias=FAMILIES[family], tied_embeddings=tied, **(absent | sizes)),
            norm_eps=norm_eps,
            rope_theta=theta,
            rope_scaling=scaling,
        )


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of a `config.json` that `config_of` reads back as `config`."""
    shape = config.shape
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        s = config.rope_scaling
        rope = {"rope_type": "llama3"} | {key: getattr(s, key) for key in RopeScaling.__slots__}
    return {
        "architectures": ["LlamaForCausalLM" if config.family == "llama" else "Qwen2ForCausalLM"],
        "model_type": config.family,
        **{key: getattr(shape, size) for size, key in SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": shape.tied_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
    }


def _rope(values: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and stretching, under the names of transformers 5 or those before."""
    name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    given = check(values.get(name) or {}, dict[str, Any], f"{where}: {name}")
    theta = next((own["rope_theta"] for own in (given, values) if own.get("rope_theta") is not None), 10000.0)
    theta = check(theta, float, f"{where}: rope_theta")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{where}: rope_type must be default or llama3, got {kind!r}")
    scaling = {key: given[key] for key in RopeScaling.__slots__}
    return theta, build(RopeScaling, scaling, f"{where}: {name}")
