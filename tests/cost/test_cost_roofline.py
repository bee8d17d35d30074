"""The roofline against physics, its own straight lines, and what tensor parallelism must do."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sim.compile.compiler import Analysis
from sim.compile.peft import PeftSpec
from sim.core.specs import DeviceSpec, LoraSpec, ModelShape
from sim.core.work import Chunk, LayerChunk, Work
from sim.cost.architectures import NCCL_LATENCY_S, NCCL_TABLE, NVLINK_BYTES_S, measured_on
from sim.cost.attention import (
    _filling_splits,
    cache_write_s,
    chunk_cost,
    decode_cost,
    decode_s,
    prefill_s,
)
from sim.cost.collective import allreduce_s, custom_s, nccl_s
from sim.cost.context import CostContext
from sim.cost.efficiency import Efficiency
from sim.cost.elementwise import SHORT, elementwise_s
from sim.cost.gemm import wave_s
from sim.cost.gemm_table import GEMMS, product_rows_s, product_s
from sim.cost.roofline import Roofline

ROOT = Path(__file__).parents[2]
DEVICES = sorted(path.stem for path in (ROOT / "configs" / "device").glob("*.yaml"))
MODELS = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))
SIZES = ("llama_3_1_8b", "qwen2_5_14b", "qwen2_5_32b", "llama_3_1_70b")
PAIRS = [(device, model) for device in DEVICES for model in MODELS if model in SIZES or device == "a100_80gb"]
"""Four sizes on every device, and every model on one."""
PARAMS = {
    "llama_3_1_8b": 8.03e9, "qwen2_5_14b": 14.77e9, "qwen2_5_32b": 32.76e9, "llama_3_1_70b": 70.55e9,
    "llama_2_7b": 6.74e9, "llama_2_13b": 13.02e9, "llama_2_70b": 68.98e9, "llama_3_8b": 8.03e9,
    "llama_3_70b": 70.55e9, "llama_3_2_1b": 1.236e9, "llama_3_2_3b": 3.213e9, "codellama_34b": 33.74e9,
    "qwen2_5_7b": 7.616e9, "qwen2_5_72b": 72.71e9, "qwen_72b": 72.29e9, "internlm_20b": 20.09e9,
    "internlm2_20b": 19.86e9,
}  # fmt: skip
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
    assert shape.tp == DEGREES.get(model, shape.tp)


def test_the_loss_is_charged_for_in_the_chunks_that_plans_count() -> None:
    context = load("a100_80gb", "llama_3_1_8b")
    chunk = Analysis(context.model, PeftSpec(), seq_tokens=8192).plan().loss_chunk_tokens
    cost = Roofline().build(context)
    loss_s = [cost.parts(Work(forward=(Chunk(tokens, 0),)))["loss"] for tokens in range(1, 3 * chunk + 1)]
    for tokens in (1, chunk // 2, chunk, 2 * chunk):
        assert loss_s[chunk + tokens - 1] == pytest.approx(loss_s[chunk - 1] + loss_s[tokens - 1], rel=1e-12)
    half_s = 2 * loss_s[chunk // 2 - 1]
    assert loss_s[chunk - 1] < 0.99 * half_s, "half as many tokens at a time take longer"


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
    collective_s, backward_collective_s = curves.collective_s[tokens], curves.backward_collective_s[tokens]
    # Furthest from the roof is a batch of a few hundred tokens on four H100: half of its time is GEMMs
    # at half their rate, the rest short kernels. What links take is another roof.
    assert floor_s < curves.token_s[tokens] - collective_s < 4 * floor_s
    backward_s = curves.backward_layer_s[tokens] - backward_collective_s
    assert floor_s / shape.layers < backward_s < 4 * floor_s / shape.layers


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
    work = Work(prefill=(Chunk(4096, 0),), sampled_tokens=1, backward=(LayerChunk(2, 4096, 0),))
    degrees = [tp for tp in (1, 2, 4, 8) if load(device, model, 1).model.heads % tp == 0]
    parts = {tp: Roofline().build(load(device, model, tp)).parts(work) for tp in degrees}
    assert parts[1]["collective"] == 0
    for tp in degrees[1:]:
        half, whole = parts[tp], parts[tp // 2]
        assert half["collective"] > whole["collective"]
        for name in ("forward_pass", "attention_prefill", "backward"):
            assert 0.45 < half[name] / whole[name] < 0.75, name


@pytest.mark.parametrize("device", DEVICES)
def test_backward_costs_about_a_forward_plus_its_attention(device: str) -> None:
    """A frozen layer has dX and no dW: its GEMMs have the FLOPs of the forward, attention 2.5 times. Its short
    kernels read the saved tensors as well."""
    context = load(device, "llama_3_1_8b")
    curves, layers = Roofline().curves(context), context.model.layers
    assert 0.95 < curves.backward_layer_s[4096] * layers / curves.token_s[4096] < 1.25
    ratio = curves.backward.pair_s / (curves.forward.pair_s / layers)
    assert ratio == pytest.approx(2.5 * 73 / 63)


def test_an_extra_tile_costs_an_extra_wave(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one row more than fills the multiprocessors once, the arithmetic of large tiles doubles."""
    context = load("a100_80gb", "llama_3_1_8b")
    spec = context.device
    monkeypatch.setattr("sim.cost.gemm.TILES", ((256, 128),))
    fed = Efficiency(gemm_l2_bandwidth=1e9, gemm_tile_steps=1e-12, gemm_split_k_s=1e-15)
    columns = 128 * spec.sms
    one, two = wave_s(np.array([256.0, 257.0]), 4096, columns, spec, fed)
    assert one == pytest.approx(2 * 256 * 4096 * columns / (spec.peak_flops * fed.gemm_flops))
    # Split-k lets the second wave be half empty and no less.
    assert 1.5 * one <= two <= 2 * one


def test_a_tile_starved_by_the_l2_takes_its_operands_time(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load("a100_80gb", "llama_3_1_8b").device
    monkeypatch.setattr("sim.cost.gemm.TILES", ((128, 128),))
    monkeypatch.setattr("sim.cost.gemm.SPLITS", (1,))
    starved = Efficiency(gemm_l2_bandwidth=1e-3, gemm_tile_steps=1e-12)
    seconds = wave_s(np.array([128.0]), 4096, 128 * spec.sms, spec, starved)[0]
    loaded_bytes = spec.sms * 2 * (128 + 128) * 4096
    assert seconds == pytest.approx(loaded_bytes / (1e-3 * spec.peak_flops))


@pytest.mark.parametrize("device", DEVICES)
@given(k=st.integers(1, 40_000), n=st.integers(1, 70_000), m=st.lists(st.integers(1, 9000), min_size=1))
@settings(max_examples=25)
def test_products_of_one_shape_and_of_rows_agree(device: str, k: int, n: int, m: list[int]) -> None:
    spec = load(device, "llama_3_1_8b").device
    efficiency = Efficiency.of(spec)
    rows = np.array(m, dtype=float)
    for gemm in GEMMS:
        one = product_s(rows, k, n, spec, efficiency, gemm)
        each = product_rows_s(rows, np.full_like(rows, k), np.full_like(rows, n), spec, efficiency, gemm)
        np.testing.assert_allclose(one, each, rtol=1e-12)
        floor = 2 * rows * k * n / spec.peak_flops
        assert (one > 0.9 * floor).all()


@pytest.mark.parametrize(("device", "model"), PAIRS)
def test_lines_of_attention_follow_the_kernels_formulas(device: str, model: str) -> None:
    """The straight lines that iterations use, against the formulas with tiles, waves and splits."""
    context = load(device, model)
    spec, shape, tp = context.device, context.model, context.tp
    efficiency = Efficiency.of(spec)
    chunk = chunk_cost(1, shape, tp, spec, efficiency)
    decode = decode_cost(shape, tp, spec, efficiency)
    heads, kv_heads = shape.heads / tp, max(1, shape.kv_heads // tp)
    whole = np.array([128.0, 256, 512, 1024, 2048, 8192])
    one = np.ones_like(whole)
    of = (heads * one, kv_heads * one, shape.head_dim * one, 0 * one)
    for context_tokens in (0, 1024, 4096, 16384):
        exact = prefill_s(one, whole, *of, spec, efficiency, float(context_tokens))
        line = [chunk.seconds(int(tokens), context_tokens) for tokens in whole]
        np.testing.assert_allclose(line, exact, rtol=0.13)
    for batch in (32.0, 128.0):
        exact = decode_s(batch * one, whole, *of, spec, efficiency)
        line = [decode.fixed_s + batch * (decode.sequence_s + decode.context_s * t) for t in whole]
        # The shortest contexts are mostly latency, which no straight line has.
        assert (np.abs(np.array(line) / shape.layers / exact - 1) < np.where(whole < 256, 0.37, 0.30)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_attention_grows_with_batch_length_and_heads(device: str) -> None:
    spec = load(device, "llama_3_1_8b").device
    efficiency = Efficiency.of(spec)

    def seconds(batch: float, tokens: float, heads: float, window: float = 0.0) -> float:
        size, length, query, kv, dim, reach = (
            np.array([v]) for v in (batch, tokens, heads, 8.0, 128.0, window)
        )
        return float(prefill_s(size, length, query, kv, dim, reach, spec, efficiency)[0])

    base = seconds(4, 4096, 32)
    assert 1.8 < seconds(8, 4096, 32) / base < 2.2
    assert 3 < seconds(4, 8192, 32) / base < 4.5
    assert 1.6 < seconds(4, 4096, 64) / base < 2.2
    assert seconds(4, 4096, 32, 128) < 0.5 * base
    # Causal: half of the square, at no more than the peak.
    pairs = 4 * 32 * 4096 * 4097 / 2
    assert base > 4 * 128 * pairs / spec.peak_flops


@pytest.mark.parametrize(("device", "model"), PAIRS)
def test_without_captured_graphs_a_pass_takes_at_least_its_launches(device: str, model: str) -> None:
    context = load(device, model)
    captured = Roofline().curves(context).token_s
    slow = Roofline(graph_tokens=0, launch_s=1e-3).curves(context).token_s
    assert slow[1] >= 8 * context.model.layers * 1e-3 > captured[1]
    assert Roofline(graph_tokens=0, launch_s=0.0).curves(context).token_s == captured


def test_misspelt_efficiencies_are_refused_with_the_nearest_name() -> None:
    spec = load("h100", "llama_3_1_8b").device
    for extras, match in (
        ({"gemm_flop": 0.5}, "gemm_flops"),
        ({"gemm_flops": 1.5}, "at most 1"),
        ({"attention_tail": 1.5}, "at most 1"),
    ):
        wrong = DeviceSpec(
            name="x", peak_flops=1e12, memory_bandwidth_bytes_s=1e12, memory_bytes=1e9,
            link_bandwidth_bytes_s=1e9, sms=10, source="", extras=extras,
        )  # fmt: skip
        with pytest.raises(ValueError, match=match):
            Efficiency.of(wrong)
    own = replace(spec, extras={"gemm_flops": 0.5})
    assert Efficiency.of(own) == replace(Efficiency.of(spec), gemm_flops=0.5)
    with pytest.raises(ValueError, match=r"device\.architecture of h100 is 'volta'; allowed: ampere, ada"):
        Efficiency.of(replace(spec, architecture="volta"))


@pytest.mark.parametrize("device", DEVICES)
def test_every_constant_was_measured_on_a_card_that_has_a_file(device: str) -> None:
    spec = load(device, "llama_3_1_8b").device
    prefixes = {f"{item.name.partition('_')[0]}_" for item in fields(Efficiency)} - {"elementwise_"}
    for prefix in prefixes:
        cards = measured_on(spec, prefix)
        table = prefix == "nccl_" and spec.link_bandwidth_bytes_s < NVLINK_BYTES_S
        assert cards.endswith(NCCL_TABLE) == table, "latencies through PCIe were not measured"
        assert {*cards.removesuffix(NCCL_TABLE).split(" and ")} <= {*DEVICES}


def test_collectives_through_pcie_take_longer_to_start_than_by_nvlink() -> None:
    spec = load("l40s", "llama_3_1_8b").device
    small = np.array([4096.0])
    by_pcie, by_nvlink = (
        nccl_s(small, 4, "all_reduce", card, Efficiency.of(card))[0]
        for card in (spec, replace(spec, link_bandwidth_bytes_s=3e11))
    )
    assert by_pcie > by_nvlink > NCCL_LATENCY_S


def test_many_tokens_of_few_heads_take_longer_to_write_than_few_tokens_of_many() -> None:
    """The same bytes; a block writes a token, however little that is."""
    spec = load("a100_80gb", "llama_3_1_8b").device
    tokens, heads = np.array([16384.0, 1024]), np.array([2.0, 32])
    many, few = cache_write_s(tokens, heads, np.full(2, 128.0), spec, Efficiency.of(spec))
    assert many > 2 * few
    assert few > 8 * 1024 * 32 * 128 / spec.memory_bandwidth_bytes_s


@given(tiles=st.integers(1, 300), blocks=st.integers(1, 200), sms=st.integers(20, 150))
@settings(max_examples=200)
def test_splits_of_decodes_are_those_of_flash_attentions_loop(tiles: int, blocks: int, sms: int) -> None:
    """Its num_splits_heuristic, written out: the first number of splits within 85 % of the best filling."""
    slots, filled = 2 * sms, {}
    for splits in range(1, min(128, slots, blocks) + 1):
        if splits == 1 or -(-blocks // splits) != -(-blocks // (splits - 1)):
            waves = tiles * splits / slots
            filled[splits] = waves / math.ceil(waves)
    best = max(filled.values())
    expected = 1 if tiles >= 0.8 * slots else next(n for n, f in filled.items() if f >= 0.85 * best)
    assert _filling_splits(np.array([float(tiles)]), np.array([float(blocks)]), slots)[0] == expected


@pytest.mark.parametrize("kind", SHORT)
def test_short_kernels_take_their_latency_or_their_bytes(kind: str) -> None:
    spec = load("h100", "llama_3_1_8b").device
    efficiency = replace(Efficiency.of(spec), **{f"{kind}_missed": 1.0})
    one, thousand, million = elementwise_s(np.array([1.0, 1e3, 1e6]), 8192.0, kind, spec, efficiency)
    fixed_s = getattr(efficiency, f"{kind}_fixed_s")
    assert fixed_s < one < 1.1 * fixed_s < thousand
    # What fits into the L2 costs no memory access; what does not costs one.
    rate = spec.sm_clocks_hz * getattr(efficiency, f"{kind}_clock_bytes")
    assert thousand < fixed_s + 1e3 * 16384 / rate
    assert million == pytest.approx(1e6 * 16384 * (1 / rate + 1 / spec.memory_bandwidth_bytes_s), rel=0.01)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_collectives_are_no_faster_than_their_bytes_and_switch_at_eight_megabytes(
    device: str, tp: int
) -> None:
    spec = load(device, "llama_3_1_8b").device
    efficiency = Efficiency.of(spec)
    size = np.array([2.0**i for i in range(8, 30)])
    floor_s = 2 * (tp - 1) / tp * size / spec.link_bandwidth_bytes_s
    seconds = allreduce_s(size, tp, spec, efficiency)
    assert (seconds > floor_s).all() and (np.diff(seconds) >= 0).all()
    small = size < 8 * 2**20 if tp == 2 or spec.link_bandwidth_bytes_s > 1e11 else size < 0
    np.testing.assert_array_equal(seconds[small], custom_s(size, tp, spec, efficiency)[small])
    nccl = nccl_s(size, tp, "all_reduce", spec, efficiency)
    np.testing.assert_array_equal(seconds[~small], nccl[~small])
    assert (nccl_s(size, tp, "all_gather", spec, efficiency) < nccl).all()
    with pytest.raises(ValueError, match="known: all_reduce"):
        nccl_s(size, tp, "broadcast", spec, efficiency)


@pytest.mark.parametrize("device", DEVICES)
def test_few_tokens_after_a_long_context_take_at_least_its_reading(device: str) -> None:
    """Of a model with as many key-value heads as heads, whose context no L2 holds."""
    spec = load(device, "qwen_72b").device
    context = np.array([16384.0, 32768, 131072])
    one = np.ones_like(context)
    for tokens in (16.0, 64.0, 128.0):
        of = (64 * one, 64 * one, 128 * one, 0 * one)
        seconds = prefill_s(one, tokens * one, *of, spec, Efficiency.of(spec), context)
        read = 4 * 128 * 64 * context
        assert (seconds >= read / spec.memory_bandwidth_bytes_s)[read > 1.2 * spec.cache_bytes].all()
        assert (np.diff(seconds) > 0).all()
