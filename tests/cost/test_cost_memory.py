"""KV room: against sums done by hand, a real engine's figure, and the signs of every argument."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sim.core.specs import DeviceSpec, ModelShape
from sim.cost.memory import (
    activation_bytes,
    free_bytes,
    kv_bytes_per_token,
    kv_room_tokens,
    weight_bytes,
)

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("COSERVE_DATA", ROOT.parent / "shared" / "data"))
DEVICES = sorted(path.stem for path in (ROOT / "configs" / "device").glob("*.yaml"))
MODELS = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))


def device(name: str) -> DeviceSpec:
    return DeviceSpec(**OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "device" / f"{name}.yaml")))


def model(name: str) -> ModelShape:
    return ModelShape(**OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "model" / f"{name}.yaml")))


@pytest.mark.parametrize("card", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_the_room_fills_the_memory_and_no_more(card: str, name: str) -> None:
    spec, shape = device(card), model(name)
    held = 3.0 * 2**30
    tp = shape.tp if spec.memory_bytes > 64 * 2**30 else 8 if shape.heads % 8 == 0 else 4
    tokens = kv_room_tokens(device=spec, model=shape, tp=tp, finetune_bytes=held)
    used = weight_bytes(shape, tp) + activation_bytes(shape, tp, 2048, 256) + 551 * 2**20
    assert free_bytes(device=spec, model=shape, tp=tp) == 0.9 * spec.memory_bytes - used
    used += held
    each = kv_bytes_per_token(shape, tp)
    assert used + tokens * each <= 0.9 * spec.memory_bytes < used + (tokens + 1) * each


def test_the_room_agrees_with_a_real_engines() -> None:
    """vLLM 0.19.0 on an RTX 4090 measured its own room after a profiling pass: 41,408 tokens."""
    path = DATA / "vllm-runs" / "RTX4090" / "Llama-3.1-8B" / "meta.json"
    if not path.exists():
        pytest.skip(f"no engine runs under {DATA}")
    meta = json.loads(path.read_text())
    spec = replace(device("a100_80gb"), memory_bytes=meta["hardware"]["device_total_memory_bytes"])
    tokens = kv_room_tokens(
        device=spec,
        model=model("llama_3_1_8b"),
        tp=1,
        utilization=meta["kv_cache"]["gpu_memory_utilization"],
        batch_tokens=meta["engine_kwargs"]["max_num_batched_tokens"],
        batch_sequences=meta["engine_kwargs"]["max_num_seqs"],
    )
    assert tokens == pytest.approx(meta["kv_cache"]["num_kv_tokens"], rel=0.05)


def test_kv_heads_replicate_beyond_their_number() -> None:
    shape = model("llama_3_1_8b")
    assert kv_bytes_per_token(shape, 1) == shape.kv_bytes_per_token
    assert kv_bytes_per_token(shape, 8) == shape.kv_bytes_per_token / 8
    assert kv_bytes_per_token(shape, 16) == kv_bytes_per_token(shape, 8)
    assert weight_bytes(shape, 8) == pytest.approx(shape.weight_bytes / 8)
    assert weight_bytes(shape, 16) > shape.weight_bytes / 16


def test_more_of_anything_else_leaves_less_room() -> None:
    spec, shape = device("h100"), model("llama_3_1_8b")

    def room(**changes: object) -> int:
        settings: dict[str, object] = {"device": spec, "model": shape, "tp": 1}
        return kv_room_tokens(**{**settings, **changes})  # type: ignore[arg-type]

    assert room() > room(finetune_bytes=2.0**30) > room(finetune_bytes=2.0**31)
    assert room() > room(batch_tokens=8192)
    assert room() > room(batch_sequences=1024)
    assert room() > room(utilization=0.8)
    assert room(tp=2) > 2 * room()


def test_weights_that_do_not_fit_are_named_with_their_size() -> None:
    with pytest.raises(ValueError, match=r"llama_3_1_70b on tp 1 .* weights 131.4 GiB"):
        kv_room_tokens(device=device("h100"), model=model("llama_3_1_70b"), tp=1)
    with pytest.raises(ValueError, match="utilization"):
        kv_room_tokens(device=device("h100"), model=model("llama_3_1_8b"), tp=1, utilization=1.2)
