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

from sim.core.specs import ModelShape
from sim.json_file import read_object

FAMILIES = {"llama": False, "qwen2": True}
"""`model_type` -> whether the query, key and value projections have a bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretched rotary frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


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
    if family not in FAMILIES:
        raise ValueError(f"{where}: model_type must be one of {', '.join(FAMILIES)}, got {family!r}")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if values.get(key):
            raise ValueError(f"{where}: {key} must be false, got {values[key]!r}")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act must be silu, got {values['hidden_act']!r}")
    heads = values["num_attention_heads"]
    theta, scaling = _rope(values, where)
    shape = ModelShape(
        name=name,
        layers=values["num_hidden_layers"],
        hidden=values["hidden_size"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        ffn=values["intermediate_size"],
        vocab=values["vocab_size"],
        qkv_bias=FAMILIES[family],
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        max_context_tokens=values.get("max_position_embeddings", 2048),
    )
    return ModelConfig(
        family=family,
        shape=shape,
        norm_eps=values.get("rms_norm_eps", 1e-6),
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
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_context_tokens,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": shape.tied_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
    }


def _rope(values: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and stretching, under the names of transformers 5 or those before."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = float(given.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{where}: rope_type must be default or llama3, got {kind!r}")
    return theta, RopeScaling(
        factor=given["factor"],
        low_freq_factor=given["low_freq_factor"],
        high_freq_factor=given["high_freq_factor"],
        original_max_position_embeddings=given["original_max_position_embeddings"],
    )
