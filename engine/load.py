"""Weights onto the device: from a Hugging Face folder, or random ones of any config.

Matrices are allocated once, in the form that the model uses them, and filled tensor by tensor from the
mapped files: at no time is there a second copy of more than one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from engine.config import ModelConfig, read_config
from engine.model import LayerWeights, Model, Weights

INDEX = "model.safetensors.index.json"


def load_model(folder: str | Path, dtype: torch.dtype, device: torch.device | str) -> Model:
    """The model of a Hugging Face folder (safetensors, sharded or not).

    ValueError names the file and the tensor that is missing, has another shape, or is not known.
    """
    config = read_config(folder)
    weights = _empty(config, dtype, torch.device(device))
    with ExitStack() as stack:
        tensors = _open(Path(folder), stack)
        left = set(tensors)
        for name, target in _places(config, weights):
            if name not in tensors:
                raise ValueError(f"{folder}: tensor {name} is missing")
            source = tensors[name](name)
            if source.shape != target.shape:
                raise ValueError(
                    f"{folder}: tensor {name} must have shape {list(target.shape)}, got {list(source.shape)}"
                )
            target.copy_(source)
            left.discard(name)
        # Old exports carry the rotary table, tied ones a copy of the embedding.
        unknown = [n for n in sorted(left) if not n.endswith("rotary_emb.inv_freq") and n != "lm_head.weight"]
        if unknown:
            raise ValueError(f"{folder}: tensor {unknown[0]} belongs to no layer of {config.family}")
    return Model(config, weights)


def random_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, seed: int = 0, spread: float = 0.02
) -> Model:
    """Normal weights of standard deviation `spread` made on the device; norms are 1, biases normal."""
    place = torch.device(device)
    generator = torch.Generator(place).manual_seed(seed)
    weights = _empty(config, dtype, place)
    for name, target in _places(config, weights):
        if "norm" in name:
            target.fill_(1.0)
        else:
            target.normal_(0.0, spread, generator=generator)
    return Model(config, weights)


def named_tensors(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under Hugging Face's name, as a view of the model's own."""
    yield from _places(model.config, model.weights)
    if model.config.shape.tied_embeddings:
        yield "lm_head.weight", model.weights.embed


def save_model(model: Model, folder: str | Path) -> None:
    """Write weights and config as a Hugging Face folder that `transformers` loads."""
    from safetensors.torch import save_file

    from engine.config import hf_config

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in _places(model.config, model.weights)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(hf_config(model.config) | {"dtype": str(model.dtype).removeprefix("torch.")}, indent=2)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")


def _empty(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    s = config.shape

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    qkv = s.q_dim + 2 * s.kv_dim
    layers = tuple(
        LayerWeights(
            input_norm=new(s.hidden),
            qkv=new(qkv, s.hidden),
            qkv_bias=new(qkv) if s.qkv_bias else None,
            o=new(s.hidden, s.q_dim),
            mlp_norm=new(s.hidden),
            gate_up=new(2 * s.ffn, s.hidden),
            down=new(s.hidden, s.ffn),
        )
        for _ in range(s.layers)
    )
    embed = new(s.vocab, s.hidden)
    head = embed if s.tied_embeddings else new(s.vocab, s.hidden)
    return Weights(embed=embed, layers=layers, norm=new(s.hidden), head=head)


def _places(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face's name of every tensor, and the view that it fills."""
    s = config.shape
    yield "model.embed_tokens.weight", weights.embed
    yield "model.norm.weight", weights.norm
    if not s.tied_embeddings:
        yield "lm_head.weight", weights.head
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        parts = [s.q_dim, s.kv_dim, s.kv_dim]
        names = [f"{prefix}self_attn.{n}_proj" for n in "qkv"]
        yield from zip([f"{n}.weight" for n in names], torch.split(layer.qkv, parts), strict=True)
        if layer.qkv_bias is not None:
            yield from zip([f"{n}.bias" for n in names], torch.split(layer.qkv_bias, parts), strict=True)
        yield f"{prefix}self_attn.o_proj.weight", layer.o
        yield from zip(
            [f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"],
            layer.gate_up.chunk(2),
            strict=True,
        )
        yield f"{prefix}mlp.down_proj.weight", layer.down
        yield f"{prefix}input_layernorm.weight", layer.input_norm
        yield f"{prefix}post_attention_layernorm.weight", layer.mlp_norm


def _open(folder: Path, stack: ExitStack) -> dict[str, Callable[[str], torch.Tensor]]:
    """Tensor name -> how to read it; files are mapped, not read."""
    index = folder / INDEX
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    tensors: dict[str, Callable[[str], torch.Tensor]] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        opened: Any = stack.enter_context(safe_open(path, framework="pt"))
        tensors |= dict.fromkeys(opened.keys(), opened.get_tensor)
    return tensors
