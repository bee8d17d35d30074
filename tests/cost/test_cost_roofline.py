"""The roofline against physics, measured kernels, and what tensor parallelism must do."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from omegaconf import OmegaConf

from sim.core.specs import DeviceSpec, LoraSpec, ModelShape
from sim.core.work import Chunk, LayerChunk, Work
from sim.cost.collective import allreduce_s
from sim.cost.context import CostContext
from sim.cost.efficiency import Efficiency
from sim.cost.gemm import gemm_s, wave_s
from sim.cost.roofline import Roofline

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("COSERVE_DATA", ROOT.parent / "shared" / "data"))
DEVICES = sorted(path.stem for path in (ROOT / "configs" / "device").glob("*.yaml"))
MODELS = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))
PAIRS = [(device, model) for device in DEVICES for model in MODELS]
PARAMS = {"llama_3_1_8b": 8.03e9, "qwen2_5_14b": 14.77e9, "qwen2_5_32b": 32.76e9, "llama_3_1_70b": 70.55e9}
DEGREES = {"llama_3_1_8b": 1, "qwen2_5_14b": 2, "qwen2_5_32b": 4, "llama_3_1_70b": 4}


def load(device: str, model: str, tp: int | None = None) -> CostContext:
    configs = ROOT / "configs"
    spec = DeviceSpec(**OmegaConf.to_container(OmegaConf.load(configs / "device" / f"{device}.yaml")))
    shape = ModelShape(**OmegaConf.to_container(OmegaConf.load(configs / "model" / f"{model}.yaml")))
    return CostContext(device=spec, model=shape, tp=tp or shape.tp, lora=LoraSpec(), seed=0)


@pytest.mark.parametrize("model", sorted(PARAMS))
def test_parameter_counts_are_the_published_ones(model: str) -> None:
    shape = load(DEVICES[0], model).model
    assert shape.params == pytest.approx(PARAMS[model], abs=0.005e9)
    assert shape.tp == DEGREES[model]


@pytest.mark.parametrize("folder", ["device", "model", "cost"])
def test_every_config_file_says_what_it_is(folder: str) -> None:
    for path in (ROOT / "configs" / folder).glob("*.yaml"):
        assert path.read_text().startswith("# "), path


@pytest.mark.parametrize(("device", "model"), PAIRS)
@pytest.mark.parametrize("tokens", [1, 33, 256, 700, 4096])
def test_a_pass_is_never_faster_than_its_bytes_and_flops(device: str, model: str, tokens: int) -> None:
    context = load(device, model)
    shape, spec, curves = context.model, context.device, Roofline().curves(context)
    weights = sum(i * o for i, o in shape.linears.values()) / context.tp
    flop_s = 2 * tokens * weights / spec.peak_flops
    byte_s = weights * shape.dtype_bytes / spec.memory_bandwidth_bytes_s
    floor_s = shape.layers * max(flop_s, byte_s)
    # Furthest from the roof is a batch of a few hundred tokens on four H100: a third of its time is GEMMs
    # at half their rate, the rest all-reduces and short kernels.
    assert floor_s < curves.token_s[tokens] < 4 * floor_s
    assert floor_s / shape.layers < curves.backward_layer_s[tokens] < 4 * floor_s / shape.layers


@pytest.mark.parametrize(("device", "model"), PAIRS)
def test_decode_attention_is_never_faster_than_reading_the_cache(device: str, model: str) -> None:
    context = load(device, model)
    cost = Roofline().build(context)
    work = Work(decode_count=64, decode_context_tokens=64 * 2000, sampled_tokens=64)
    cache_bytes = 64 * 2001 * context.model.kv_bytes_per_token / context.tp
    floor_s = cache_bytes / context.device.memory_bandwidth_bytes_s
    assert floor_s < cost.parts(work)["attention_decode"] < 3 * floor_s


@pytest.mark.parametrize(("device", "model"), PAIRS)
def test_tensor_parallelism_divides_the_work_and_adds_collectives(device: str, model: str) -> None:
    work = Work(prefill=(Chunk(2048, 0),), sampled_tokens=1, backward=(LayerChunk(2, 2048, 0),))
    parts = {tp: Roofline().build(load(device, model, tp)).parts(work) for tp in (1, 2, 4, 8)}
    assert parts[1]["collective"] == 0
    for tp in (2, 4, 8):
        half, whole = parts[tp], parts[tp // 2]
        assert half["collective"] > whole["collective"]
        for name in ("forward_pass", "attention_prefill", "backward"):
            assert 0.45 < half[name] / whole[name] < 0.75, name


@pytest.mark.parametrize("device", DEVICES)
def test_backward_costs_about_a_forward_plus_its_attention(device: str) -> None:
    """A frozen layer has dX and no dW: its GEMMs have the FLOPs of the forward, attention 2.5 times."""
    context = load(device, "llama_3_1_8b")
    curves, layers = Roofline().curves(context), context.model.layers
    assert curves.backward_layer_s[4096] == pytest.approx(curves.token_s[4096] / layers, rel=0.15)
    ratio = curves.backward.pair_s / (curves.forward.pair_s / layers)
    assert ratio == pytest.approx(2.5 * 73 / 63)


def test_an_extra_tile_costs_an_extra_wave() -> None:
    """With one row more than fills the multiprocessors once, the arithmetic of large tiles doubles."""
    context = load("a100_80gb", "llama_3_1_8b")
    spec = context.device
    smaller = ("gemm_tile_128x128", "gemm_tile_64x128", "gemm_tile_64x64", "gemm_tile_16x64")
    only_large = Efficiency(**dict.fromkeys(smaller, 1e-9))
    columns = 128 * spec.sms
    one, two = wave_s(np.array([256.0, 257.0]), 4096, columns, spec, only_large)
    assert one == pytest.approx(2 * 256 * 4096 * columns / (spec.peak_flops * only_large.gemm_flops))
    # Split-k lets the second wave be half empty and no less.
    assert 1.5 * one <= two <= 2 * one


@pytest.mark.parametrize(("device", "model"), PAIRS)
def test_without_captured_graphs_a_pass_takes_at_least_its_launches(device: str, model: str) -> None:
    context = load(device, model)
    captured = Roofline().curves(context).token_s
    slow = Roofline(graph_tokens=0, launch_s=1e-3).curves(context).token_s
    assert slow[1] >= 8 * context.model.layers * 1e-3 > captured[1]
    assert Roofline(graph_tokens=0, launch_s=0.0).curves(context).token_s == captured


def rows(name: str) -> list[dict[str, str]]:
    paths = sorted((DATA / "kernels").glob(name))
    if not paths:
        pytest.skip(f"no kernel measurements under {DATA}")
    with paths[0].open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("device", "prefix"), [("a100_80gb", "a100_sxm"), ("h200", "h200_sxm")])
def test_gemms_agree_with_measured_kernels(device: str, prefix: str) -> None:
    spec = load(device, "llama_3_1_8b").device
    efficiency = Efficiency.of(spec)
    errors = []
    for row in rows(f"{prefix}_gemm_*"):
        m, n, k = (int(row[name]) for name in "mnk")
        if min(n, k) >= 512 and max(n, k) <= 20_000 and m <= 8192:
            predicted_s = gemm_s(np.array([float(m)]), k, n, spec, efficiency)[0]
            errors.append(abs(predicted_s / (float(row["latency"]) / 1e3) - 1))
    errors.sort()
    assert median(errors) < 0.08
    assert errors[int(0.9 * len(errors))] < 0.20


@pytest.mark.parametrize(("device", "prefix"), [("a100_80gb", "a100_sxm"), ("h200", "h200_sxm")])
def test_allreduces_agree_with_measured_ones(device: str, prefix: str) -> None:
    spec = load(device, "llama_3_1_8b").device
    efficiency = Efficiency.of(spec)
    errors = []
    for row in rows(f"{prefix}_comm_vllm_*"):
        if row["backend"] == "vllm_graph":
            size = np.array([float(row["message_size"])])
            predicted_s = allreduce_s(size, int(row["num_gpus"]), spec, efficiency)[0]
            errors.append(abs(predicted_s / (float(row["latency"]) / 1e3) - 1))
    assert median(errors) < 0.10


def test_misspelt_efficiencies_are_refused_with_the_nearest_name() -> None:
    spec = load("h100", "llama_3_1_8b").device
    for extras, match in (({"gemm_flop": 0.5}, "gemm_flops"), ({"gemm_flops": 1.5}, "at most 1")):
        wrong = DeviceSpec(
            name="x", peak_flops=1e12, memory_bandwidth_bytes_s=1e12, memory_bytes=1e9,
            link_bandwidth_bytes_s=1e9, sms=10, source="", extras=extras,
        )  # fmt: skip
        with pytest.raises(ValueError, match=match):
            Efficiency.of(wrong)
    assert Efficiency.of(spec).gemm_flops == spec.extras["gemm_flops"]
