"""Seconds of attention, by kind: the kernels' formulas, and the straight lines that iterations use.

Prefill of B chunks of n tokens after c cached ones, H query and G key-value heads of size d on the device,
by query tiles of 128 rows (of one head; generation 3 of FlashAttention packs a group's heads) and key
tiles of 64:

    mean    W = N/S (t_tile + K f) + 2 d B (2 n H q + 2 (c + n) G v) / (S h e)
    longest C = t_tile + x K_last f / s
    total   t = t_fixed + (W^p + C^p)^(1/p) + y (K_last - K) f / s

N tiles on S multiprocessors, K the keys that a tile reads on average (causal, or within the window), f =
128 S (4 d / P + v / P_32) seconds per key: the products run at the tensor cores' peak P, the softmax takes v
operations per score at P_32, in single precision; one v explains the rates of heads of 64, 128 and 256, and an
Ada card's by an Ampere's. Queries, keys, values and results come through the L2 at e bytes per multiprocessor
and clock h: 6.0 on an A100, 5.9 on an H200. s are the splits of the keys when there are few tiles. Tiles run
side by side, so the longest and all of them together are nearly a maximum (p = 6); what the causal triangle
adds is its unequal tiles, of which the longest come last. A chunk after a long context has equal ones.

Decodes are bound by reading the cache, few of them by how fast one multiprocessor reads:

    mean    W = N s/S t_tile + 4 d (G sum(L) + H B) / (B_mem e)
    longest C = t_tile + L/s 4 d S / (B_mem e_sm)

`chunk_cost` and `decode_cost` are non-negative least squares (of the relative error) of straight lines to
these: time per chunk, token, query-key pair and key; per iteration, sequence and cached token. The backward
has five products per query-key pair where the forward has two (recomputed scores, dV, dP, dQ, dK) and
reaches 63/73 of its share of peak: FlashAttention-2 (Dao, 2023, arXiv 2307.08691, section 4.1) reports up
to 63 % and 73 % on an A100. Nothing measured. Constants: `sim.cost.efficiency`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.core.specs import DeviceSpec, ModelShape
from sim.cost.curves import ChunkCost, DecodeCost
from sim.cost.efficiency import Efficiency
from sim.cost.gemm import smooth_maximum
from sim.cost.nnls import nnls

Floats = NDArray[np.float64]

FORWARD_FLOPS = 4.0
BACKWARD_FLOPS = 10.0
BACKWARD_SHARE = 63.0 / 73.0
QUERY_TILE = 128
KEY_TILE = 64
SMOOTHNESS = 6.0
"""p: between a sum (1) and a maximum. Rows with contexts, which tell it from y, are those of the RTX 4090's
profile alone (casys-kaist/LLMServingSim 5daddb2); there it is a maximum."""
BUSY = 0.8
"""FlashAttention splits the keys when tiles fill less than this of the multiprocessors."""

CHUNK_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CHUNK_CONTEXTS = (0, 512, 1024, 2048, 4096, 8192, 16384)
UNHIDDEN = (0.0, 0.25, 0.5, 0.75, 1.0)
DECODES = (1, 4, 16, 48, 128, 256)
DECODE_CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)


def prefill_s(
    batch: Floats,
    tokens: Floats,
    heads: Floats,
    kv_heads: Floats,
    head_dim: Floats,
    window: Floats,
    device: DeviceSpec,
    efficiency: Efficiency,
    context: Floats | float = 0.0,
) -> Floats:
    """Seconds of one layer's causal attention over `batch` equal chunks after `context` cached tokens each.

    Arrays of one shape. `window` 0 is none. A chunk of one token is a decode.
    """
    e, packs = efficiency, efficiency.attention_generation == 3
    group = heads / kv_heads
    reach = np.where(window > 0, window, np.inf)
    rows = tokens * group if packs else tokens
    per_head = np.ceil(rows / QUERY_TILE)
    tiles = batch * (kv_heads if packs else heads) * per_head
    mean, longest = _keys(tokens, per_head, context, reach)
    wide = np.where(head_dim > 256, e.attention_wide_head, 1.0)
    products_s = FORWARD_FLOPS * head_dim / (device.peak_flops * wide)
    softmax_s = e.attention_softmax_flops / device.softmax_flops
    key_s = QUERY_TILE * device.sms * (products_s + softmax_s)
    grouped = group > 1
    query = np.where(grouped, e.attention_query_weight, 1.0) * heads * tokens
    kv = np.where(grouped, e.attention_kv_weight, 1.0) * kv_heads * (tokens + np.minimum(context, reach))
    rate = device.sm_clocks_hz * e.attention_clock_bytes
    splits = np.ones_like(tiles)
    if packs:
        splits = _splits(tiles, np.ceil(longest / KEY_TILE), device.sms)
    mean_s = tiles / device.sms * (splits * e.attention_tile_s + mean * key_s)
    mean_s += 4.0 * head_dim * batch * (query + kv) / rate
    longest_s = e.attention_tile_s + longest * key_s * e.attention_critical / splits
    seconds = e.attention_fixed_s + smooth_maximum(mean_s, longest_s, SMOOTHNESS)
    seconds += (longest - mean) * key_s * e.attention_tail / splits
    seconds += np.where(splits > 1, e.attention_split_s, 0.0)
    alone = decode_s(batch, context + tokens, heads, kv_heads, head_dim, window, device, efficiency)
    return np.where(tokens == 1, alone, seconds)


def decode_s(
    batch: Floats,
    context: Floats,
    heads: Floats,
    kv_heads: Floats,
    head_dim: Floats,
    window: Floats,
    device: DeviceSpec,
    efficiency: Efficiency,
) -> Floats:
    """Seconds of one layer's attention of `batch` tokens, each to `context` keys (its own included)."""
    e, sms = efficiency, device.sms
    group = heads / kv_heads
    keys = np.minimum(context, np.where(window > 0, window + 1, np.inf))
    tiles = batch * kv_heads * np.ceil(group / 64)
    blocks = np.ceil(keys / 128)
    can_split = (group > 1) | (e.attention_generation == 3)
    splits = np.where(can_split, _splits(tiles, blocks, sms), 1.0)
    size = np.where(
        head_dim < 128, e.decode_head64, e.decode_head256 ** np.maximum(0.0, np.log2(head_dim / 128))
    )
    bandwidth = device.memory_bandwidth_bytes_s
    read_s = 4.0 * head_dim * batch * (kv_heads * keys + heads) / (bandwidth * e.decode_bandwidth)
    mean_s = tiles * splits / sms * (e.decode_tile_s * size) + read_s
    block_s = 128 * 4.0 * head_dim * sms / (bandwidth * e.decode_sm_bandwidth)
    longest_s = e.decode_tile_s * size + np.ceil(blocks / splits) * block_s
    seconds = e.decode_fixed_s + smooth_maximum(mean_s, longest_s, e.decode_smoothness)
    seconds += np.where(splits > 1, e.decode_split_s + e.decode_each_split_s * splits, 0.0)
    if e.attention_generation == 2:
        seconds += np.where((group > 1) & (kv_heads > 1) & (batch > 1), e.decode_regroup_s, 0.0)
    return seconds


def local_kv_heads(model: ModelShape, tp: int) -> int:
    """Key-value heads held by one device; they are replicated when there are more devices than heads."""
    return max(1, model.kv_heads // tp)


def chunk_cost(
    layers: int, model: ModelShape, tp: int, device: DeviceSpec, efficiency: Efficiency
) -> ChunkCost:
    """Forward attention of one prefill chunk or finetuning window through `layers` layers."""
    grid = np.meshgrid(np.array(CHUNK_TOKENS, float), np.array(CHUNK_CONTEXTS, float))
    tokens, context = (axis.ravel() for axis in grid)
    shape = _shape(tokens, model, tp)
    seconds = prefill_s(np.ones_like(tokens), tokens, *shape, device, efficiency, context)
    # The kernels were measured without context alone, so half of the weight is there.
    weight = np.where(context > 0, (len(CHUNK_CONTEXTS) - 1) ** -0.5, 1.0) / seconds
    tried = [_chunk_line(tokens, context, seconds, weight, unhidden) for unhidden in UNHIDDEN]
    return min(tried, key=lambda line: line[0])[1].times(layers)


def _chunk_line(
    tokens: Floats, context: Floats, seconds: Floats, weight: Floats, unhidden: float
) -> tuple[float, ChunkCost]:
    """The best of `ChunkCost` with this `unhidden`, and its squared error.

    Which of the two terms is the larger at a point decides what it says about them, so guess and fit are
    repeated: first as if both counted in full.
    """
    keys = context + tokens
    work = np.column_stack([tokens, tokens * (context + (tokens + 1) / 2)])
    more, less = np.ones_like(tokens), np.ones_like(tokens)
    best_error, best = np.inf, ChunkCost()
    for _ in range(8):
        terms = np.column_stack([np.ones_like(tokens), work * more[:, None], keys * less])
        fixed_s, token_s, pair_s, read_s = nnls(terms * weight[:, None], seconds * weight).tolist()
        compute, reading = work @ (token_s, pair_s), keys * read_s
        longer, shorter = np.maximum(compute, reading), np.minimum(compute, reading)
        off = (fixed_s + longer + unhidden * shorter - seconds) * weight
        error = float(off @ off)
        if error < best_error:
            best_error, best = error, ChunkCost(fixed_s, token_s, pair_s, read_s, unhidden)
        more = np.where(compute > reading, 1.0, unhidden)
        less = np.where(compute > reading, unhidden, 1.0)
    return best_error, best


def backward_cost(model: ModelShape, tp: int, device: DeviceSpec, efficiency: Efficiency) -> ChunkCost:
    """Backward attention of a rectangle, per layer."""
    forward = chunk_cost(1, model, tp, device, efficiency)
    ratio = BACKWARD_FLOPS / FORWARD_FLOPS / BACKWARD_SHARE
    return forward._replace(token_s=ratio * forward.token_s, pair_s=ratio * forward.pair_s)


def decode_cost(model: ModelShape, tp: int, device: DeviceSpec, efficiency: Efficiency) -> DecodeCost:
    """Attention of all decodes of an iteration, all layers."""
    grid = np.meshgrid(np.array(DECODES, float), np.array(DECODE_CONTEXTS, float))
    batch, context = (axis.ravel() for axis in grid)
    seconds = decode_s(batch, context + 1, *_shape(batch, model, tp), device, efficiency)
    terms = np.column_stack([np.ones_like(batch), batch, batch * context])
    x = nnls(terms / seconds[:, None], np.ones(len(batch)))
    return DecodeCost(*(model.layers * x).tolist())


def _keys(tokens: Floats, tiles: Floats, context: Floats | float, reach: Floats) -> tuple[Floats, Floats]:
    """Keys that a query tile reads, on average and at most, rounded up to key tiles."""
    span = tokens / tiles
    """Tokens of a tile. Its last one sees the most keys: tile j ends at j spans."""
    ends = np.minimum(tokens, reach + span)
    ramp = np.minimum(tiles, np.ceil(ends / span))
    grown = span * ramp * (ramp + 1) / 2 + (tiles - ramp) * ends
    before = np.minimum(context, reach)
    one = np.ceil((ends + before) / KEY_TILE) * KEY_TILE
    mean = np.where(tiles > 1, np.minimum(grown / tiles, ends) + before + KEY_TILE / 2, one)
    longest = np.where(tiles > 1, ends + before + KEY_TILE / 2, one)
    return mean, longest


def _splits(tiles: Floats, blocks: Floats, sms: int) -> Floats:
    return np.where(tiles >= BUSY * sms, 1.0, np.clip(np.floor(sms / tiles), 1.0, blocks))


def _shape(like: Floats, model: ModelShape, tp: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Heads, key-value heads, head size and window (none) of one device, each shaped as `like`."""
    values = (model.heads / tp, local_kv_heads(model, tp), model.head_dim, 0.0)
    heads, kv_heads, head_dim, window = (np.full_like(like, value) for value in values)
    return heads, kv_heads, head_dim, window
