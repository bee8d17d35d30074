"""Weights onto the device: from a Hugging Face folder, or random ones of any config.

Matrices are allocated once, in the form that the model uses them, and filled tensor by tensor from the
mapped files: at no time is there a second copy of more than one tensor. A rank of several reads its share
alone, and draws of a random tensor what the others have as well, so that the model is the same on any number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from engine.config import ModelConfig, read_config
from engine.files import whole_file
from engine.model import LayerWeights, Model, Weights
from engine.parallel import ALONE, Group, parts_of, share_of, splits_input
from sim.checked import check
from sim.core.specs import ModelShape
from sim.json_file import read_object

INDEX = "model.safetensors.index.json"
NUMBERS = ("BF16", "F16", "F32", "F64")
"""Kinds of numbers of a tensor, as safetensors names them; a quantised one has scales beside it."""


def check_model_folder(folder: str) -> None:
    """Before anything else is tried with it: `model_name_or_path` of a command."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"model_name_or_path must be a folder with a Hugging Face model and its config.json, got {folder!r}"
        )


def load_model(
    folder: str | Path, dtype: torch.dtype, device: torch.device | str, group: Group = ALONE
) -> Model:
    """The model of a Hugging Face folder (safetensors, sharded or not).

    ValueError names the file and the tensor that is missing, has another shape or kind, or is not known.
    """
    config = read_config(folder)
    weights = _empty(config.shape, dtype, torch.device(device), group)
    with ExitStack() as stack:
        tensors = _open(Path(folder), stack)
        left = set(tensors)
        for place in _places(config.shape, weights, group):
            if place.name not in tensors:
                raise ValueError(f"{folder}: tensor {place.name} is missing")
            source = tensors[place.name](place.name)
            found = tuple(source.get_shape())
            if found != place.whole:
                raise ValueError(
                    f"{folder}: tensor {place.name} must have shape {list(place.whole)}, got {list(found)}"
                )
            if source.get_dtype() not in NUMBERS:
                raise ValueError(
                    f"{folder}: tensor {place.name} must be of {', '.join(NUMBERS)}, got {source.get_dtype()}"
                )
            place.target.copy_(source[place.at])
            left.discard(place.name)
        # Old exports carry the rotary table, tied ones a copy of the embedding.
        unknown = [n for n in sorted(left) if not n.endswith("rotary_emb.inv_freq") and n != "lm_head.weight"]
        if unknown:
            raise ValueError(f"{folder}: tensor {unknown[0]} belongs to no layer of {config.family}")
    return Model(config, weights, group)


def random_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
    spread: float = 0.02,
    group: Group = ALONE,
) -> Model:
    """Normal weights of standard deviation `spread` made on the device; norms are 1, biases normal."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    weights = _empty(config.shape, dtype, device, group)
    for name, target, whole, at in _places(config.shape, weights, group):
        if "norm" in name:
            target.fill_(1.0)
        elif target.shape == whole:
            target.normal_(0.0, spread, generator=generator)
        else:
            drawn = torch.empty(whole, dtype=dtype, device=device)
            target.copy_(drawn.normal_(0.0, spread, generator=generator)[at])
    return Model(config, weights, group)


def named_tensors(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under Hugging Face's name, as a view of the model's own. Of a whole model alone."""
    assert model.group.size == 1
    for place in _places(model.config.shape, model.weights, ALONE):
        yield place.name, place.target
    if model.config.shape.tied_embeddings:
        yield "lm_head.weight", model.weights.embed


def _empty(whole: ModelShape, dtype: torch.dtype, device: torch.device, group: Group) -> Weights:
    s = share_of(whole, group.size)
    vocab = group.share(whole.vocab)
    rows = vocab.stop - vocab.start

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
    embed = new(rows, s.hidden)
    head = embed if s.tied_embeddings else new(rows, s.hidden)
    return Weights(embed=embed, layers=layers, norm=new(s.hidden), head=head)


class _Place(NamedTuple):
    """Where a tensor of a checkpoint goes."""

    name: str
    """Hugging Face's."""
    target: torch.Tensor
    """The view that it fills."""
    whole: tuple[int, ...]
    """Its shape in the checkpoint."""
    at: tuple[slice, ...]
    """This rank's part of it."""


def _places(shape: ModelShape, weights: Weights, group: Group) -> Iterator[_Place]:
    """Every tensor of a model of this (whole) shape."""
    vocab = group.share(shape.vocab)

    def plain(name: str, target: torch.Tensor) -> _Place:
        return _Place(name, target, tuple(target.shape), (slice(None),))

    def rows(name: str, target: torch.Tensor) -> _Place:
        return _Place(name, target, (shape.vocab, shape.hidden), (vocab,))

    def own_of(name: str) -> slice:
        length = shape.linears[name][0 if splits_input(name) else 1]
        return group.share(length, parts_of(name, shape, group.size))

    def linear(prefix: str, name: str, weight: torch.Tensor) -> _Place:
        wide_in, wide_out = shape.linears[name]
        at = (slice(None), own_of(name)) if splits_input(name) else (own_of(name),)
        return _Place(f"{prefix}{name}.weight", weight, (wide_out, wide_in), at)

    yield rows("model.embed_tokens.weight", weights.embed)
    yield plain("model.norm.weight", weights.norm)
    if not shape.tied_embeddings:
        yield rows("lm_head.weight", weights.head)
    own = share_of(shape, group.size)
    parts = [own.q_dim, own.kv_dim, own.kv_dim]
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        names = ("q_proj", "k_proj", "v_proj")
        for name, weight in zip(names, torch.split(layer.qkv, parts), strict=True):
            yield linear(f"{prefix}self_attn.", name, weight)
        if layer.qkv_bias is not None:
            for name, bias in zip(names, torch.split(layer.qkv_bias, parts), strict=True):
                whole = (shape.linears[name][1],)
                yield _Place(f"{prefix}self_attn.{name}.bias", bias, whole, (own_of(name),))
        yield linear(f"{prefix}self_attn.", "o_proj", layer.o)
        for name, weight in zip(("gate_proj", "up_proj"), layer.gate_up.chunk(2), strict=True):
            yield linear(f"{prefix}mlp.", name, weight)
        yield linear(f"{prefix}mlp.", "down_proj", layer.down)
        yield plain(f"{prefix}input_layernorm.weight", layer.input_norm)
        yield plain(f"{prefix}post_attention_layernorm.weight", layer.mlp_norm)


def _open(folder: Path, stack: ExitStack) -> dict[str, Callable[[str], Any]]:
    """Tensor name -> what gives its slices; files are mapped, not read."""
    tensors: dict[str, Callable[[str], Any]] = {}
    for name in _files(folder):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        with whole_file(path):
            opened: Any = stack.enter_context(safe_open(path, framework="pt"))
        tensors |= dict.fromkeys(opened.keys(), opened.get_slice)
    return tensors


def _files(folder: Path) -> list[str]:
    """Names of those that hold the tensors."""
    index = folder / INDEX
    if not index.is_file():
        return ["model.safetensors"]
    names = check(read_object(index).get("weight_map"), dict[str, str], f"{index}: weight_map")
    for tensor, name in names.items():
        if not name or Path(name).name != name:
            raise ValueError(f"{index}: weight_map.{tensor} must name a file of the folder, got {name!r}")
    return sorted({*names.values()})
