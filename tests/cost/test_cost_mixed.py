"""Attention of chunks and decodes in one kernel: bounds that hold whatever its constants are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from profiles.named import device_named
from sim.cost.attention import decode_s, mixed_s, prefill_s
from sim.cost.efficiency import Efficiency

Floats = NDArray[np.float64]

DEVICES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "device").glob("*.yaml"))
HEADS, KV_HEADS, HEAD_DIM = 32.0, 8.0, 128.0
SIZES = (16, 100, 512, 2048)


def mixed(device: str, tokens: float, context: float, decodes: float, keys: float) -> float:
    """Llama-3.1-8B's heads."""
    values = (tokens, context, decodes, keys, HEADS, KV_HEADS, HEAD_DIM)
    spec = device_named(device)
    return float(mixed_s(*(np.array([float(v)]) for v in values), spec, Efficiency.of(spec))[0])


def alone(device: str, tokens: float, context: float) -> float:
    spec = device_named(device)
    values = (1.0, tokens, HEADS, KV_HEADS, HEAD_DIM, 0.0)
    return float(prefill_s(*(np.array([float(v)]) for v in values), spec, Efficiency.of(spec), context)[0])


@given(
    st.sampled_from(DEVICES),
    st.tuples(st.sampled_from(SIZES), st.integers(0, 8192), st.integers(1, 128), st.integers(1, 16384)),
    st.integers(1, 3),
    st.integers(1, 4096),
)
def test_more_of_anything_takes_no_less(
    device: str, point: tuple[int, int, int, int], what: int, more: int
) -> None:
    larger = [value + more * (n == what) for n, value in enumerate(point)]
    assert mixed(device, *larger) >= mixed(device, *point) * (1 - 1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_decodes_beside_a_chunk_take_longer_than_the_chunk_and_their_bytes(device: str) -> None:
    spec = device_named(device)
    for tokens in SIZES:
        for decodes, keys in ((1, 64), (64, 1024), (128, 16384)):
            both = mixed(device, tokens, 1024, decodes, keys)
            read_s = 4 * HEAD_DIM * KV_HEADS * decodes * keys / spec.memory_bandwidth_bytes_s
            assert both > read_s
            assert both > 0.95 * alone(device, tokens, 1024)


def test_a_kernel_for_chunks_takes_longer_over_many_decodes_than_one_made_for_them() -> None:
    spec = device_named("rtx_4090")
    values = (64.0, 2048.0, HEADS, KV_HEADS, HEAD_DIM, 0.0)
    decodes = float(decode_s(*(np.array([v]) for v in values), spec, Efficiency.of(spec))[0])
    assert mixed("rtx_4090", 16, 0, 64, 2048) > 1.5 * (decodes + alone("rtx_4090", 16, 0))


def test_heads_of_a_group_read_again_what_the_cache_does_not_hold() -> None:
    """128 sequences of one head fill an Ada's L2 from 1,152 keys on; then all four heads of a group read them."""
    inside, outside = (mixed("rtx_4090", 16, 0, 128, keys) for keys in (1088, 1216))
    spec = device_named("rtx_4090")
    four_s = 4 * 4 * HEAD_DIM * KV_HEADS * 128 * 1216 / spec.memory_bandwidth_bytes_s
    assert outside > four_s
    assert inside < 0.75 * outside
