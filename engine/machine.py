"""The machine that a program runs on: where tensors live, the model there, and the memory beside it.

A sweep runs its configurations one after the other in one process, and weights of billions of parameters take
longer to make than a short run: the last model stays until another one is asked for.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from omegaconf import DictConfig

from engine.config import ModelConfig, RopeScaling, read_config
from engine.load import load_model, random_model
from engine.model import Model
from engine.parallel import ALONE
from engine.replica import Replica
from sim.checked import build, check
from sim.core.specs import DeviceSpec, ModelShape
from sim.unread import override_keys

DTYPE_BY_BYTES = {2: torch.bfloat16, 4: torch.float32}
LLAMA_3_1 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
"""From config.json of meta-llama/Llama-3.1-8B."""
T = TypeVar("T")


class Last(Generic[T]):
    """The last thing made, for as long as the same is asked for."""

    def __init__(self) -> None:
        self._key: object = None
        self._value: T | None = None

    def get(self, key: object, make: Callable[[], T]) -> T:
        """What was made under `key`, or `make()`; what was kept before is gone by then."""
        if self._value is None or key != self._key:
            self.forget()
            self._value = make()
            self._key = key
        return self._value

    def forget(self) -> None:
        self._value = None
        release()


_MODEL: Last[Model] = Last()


def release() -> None:
    """Give back what nobody refers to any more; two sets of pages never fit beside each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def place_of(device: DeviceSpec) -> str:
    """`cpu` or `cuda`. ValueError when the device needs a GPU and there is none."""
    if device.name == "cpu":
        # The operations are small: on a busy machine two threads were 3 to 10 times slower than one.
        torch.set_num_threads(1)
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError(f"device {device.name} needs a CUDA device, and torch finds none; try device=cpu")
    return "cuda"


def take_model_of_folder(config: DictConfig) -> None:
    """`config.model` becomes the model of the folder `config.weights` if there is one and no other model was asked for.
    Keys of it that were given stay; of the rest, numbers are float32 on a CPU and bfloat16 on a GPU, on one device."""
    if config.weights is None or "model" in (keys := override_keys()):
        return
    read = read_config(check(config.weights, str, "weights")).shape
    given = {key: value for key, value in config.model.items() if f"model.{key}" in keys}
    own = {
        "name": Path(config.weights).resolve().name,
        "dtype_bytes": 4 if config.device.name == "cpu" else 2,
    }
    config.model = {**asdict(read), **own, "tp": 1, **given}


def shape_of(node: object, weights: str | None) -> ModelShape:
    """The model's shape, checked against the folder of its weights, if they come from one."""
    check(weights, str | None, "weights")
    shape: ModelShape = build(ModelShape, node, "model")
    shape.check_tp(shape.tp)
    if shape.dtype_bytes not in DTYPE_BY_BYTES:
        raise ValueError(f"model.dtype_bytes must be 2 (bfloat16) or 4 (float32), got {shape.dtype_bytes}")
    if weights is not None:
        read = read_config(weights).shape
        found = replace(read, name=shape.name, dtype_bytes=shape.dtype_bytes, tp=shape.tp)
        if found != shape:
            own, other = asdict(shape), asdict(found)
            differ = [f"{key} {other[key]} (model.{key}={own[key]})" for key in own if own[key] != other[key]]
            raise ValueError(f"weights: {weights} holds a model of another shape: {', '.join(differ)}")
    return shape


def model_of(
    shape: ModelShape, device: DeviceSpec, weights: str | None, ranks: Replica | None = None
) -> Model:
    """The model of a folder, or random weights of the shape, which are the same for every seed.

    On several ranks it is made anew each time, since the other ranks end with their replica.
    """
    place, dtype = place_of(device), DTYPE_BY_BYTES[shape.dtype_bytes]
    own = Replica(ALONE, torch.device(place)) if ranks is None else ranks

    def make() -> Model:
        if weights is None:
            return own.load(random_model, random_config(shape), dtype)
        return own.load(load_model, weights, dtype)

    if own.group.size > 1:
        _MODEL.forget()
        return make()
    return _MODEL.get((shape, place, weights), make)


def random_config(shape: ModelShape) -> ModelConfig:
    """The architecture that a shape belongs to, with the rotary embedding that its models were trained with."""
    if shape.qkv_bias:
        return ModelConfig(family="qwen2", shape=shape, rope_theta=1e6)
    stretched = shape.max_context_tokens > LLAMA_3_1.original_max_position_embeddings
    scaling = LLAMA_3_1 if stretched else None
    return ModelConfig(family="llama", shape=shape, norm_eps=1e-5, rope_theta=5e5, rope_scaling=scaling)


def free_bytes(place: Any) -> int:
    """Device memory that this process could still allocate."""
    release()
    free, _ = torch.cuda.mem_get_info(place)
    return int(free)
