"""Seconds of attention, by kind: the kernels' formulas, and the straight lines that iterations use.

Prefill of B chunks of n tokens after c cached ones, H query and G key-value heads of size d on the device,
by query tiles of 128 rows of one head (generation 3 of FlashAttention packs a group's heads, and has tiles of
192 rows for small heads) and key tiles of 64:

    mean    W = N/S (t_tile + K f) + 4 d B (n H + (c + n) G) / (S h e)
    longest C = t_tile + x K_last f / s
    total   t = t_fixed + (W^p + C^p)^(1/p) + y (K_last - K) f / s + t_write

N tiles on S multiprocessors, K the keys that a tile reads on average (causal, or within the window), f =
128 S (4 d / P + v / (16 S h)) seconds per key: the products run at the tensor cores' peak P, the softmax takes
the time of v exponentials per score, of which a multiprocessor of any of these generations has 16 per clock (CUDA
C++ Programming Guide, throughput of native instructions). One v explains the rates of heads of 64, 128 and 256;
generation 2 takes 2.6 on an A100 and 2.95 on an RTX 4090, generation 3 hides all but one. Queries, keys, values
and results come through the L2 at e bytes per multiprocessor and clock h. s are the splits of the keys when there
are few tiles. Tiles run side by side, so the longest and all of them together are nearly a maximum (p = 6); what
the causal triangle adds is its unequal tiles, of which the longest come last. A chunk after a long context has
equal ones. W is at least the time of reading a context that the L2 cannot hold from the memory, as decodes read
theirs: few tokens with many key-value heads, on a card whose memory is slow.

What is measured as attention first writes the new keys and values to the cache, one block of min(G d, 512)
threads per token, 2,048 threads at a time on a multiprocessor; a block takes w clocks however little it
moves (vLLM's reshape_and_cache_flash), so that many tokens of few heads cost more than few tokens of many:

    t_write = ((B n min(G d, 512) / (2048 S h) w)^3 + (8 B n G d / B_mem)^3)^(1/3)

Decodes are bound by reading the cache, few of them by how fast one multiprocessor reads:

    mean    W = ((N s/S t_tile)^q + (4 d G sum(L) / (B_mem e))^q)^(1/q)
    longest C = L/s 4 d S / (B_mem e_sm)
    total   t = t_fixed + (W^4 + C^4)^(1/4) + y 4 d H B / B_mem + t_split + t_write

Generation 2 keeps several tiles on a multiprocessor, whose latencies and reads overlap (q = 3); generation 3 hardly
does (1.1). Queries and results, which nothing overlaps, take y times their bytes, and twice that where generation
2 copies them into another order. How many splits: `_splits`, and for the decodes of generation 2 the rule of its
source.

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
from sim.cost.elementwise import HELD
from sim.cost.gemm import smooth_maximum
from sim.cost.nnls import nnls

Floats = NDArray[np.float64]

FORWARD_FLOPS = 4.0
BACKWARD_FLOPS = 10.0
BACKWARD_SHARE = 63.0 / 73.0
QUERY_TILE, SMALL_HEAD_TILE = 128, 192
"""Rows of a query tile; the latter for heads of 64 at most, in generation 3 (its hopper/tile_size.h)."""
KEY_TILE = 64
PAGED_TILE = 64
"""Rows of a query tile of generation 2's kernel for paged keys (run_mha_fwd_splitkv_dispatch)."""
MIXED_TILE_S, EMPTY_TILE_S = 4.5e-6, 0.35e-6
"""Of a decode's tile among chunks, and of one that ends at once, on a multiprocessor."""
MIXED_LONGEST, MIXED_READ = 2.0, 3.0
"""p of the longest tile, and of reading the cache, against all tiles together. These four are fitted to the rows
of the RTX 4090's profile that have both (casys-kaist/LLMServingSim 5daddb2)."""
EXPONENTIALS = 16.0
"""Of a multiprocessor per clock."""
SMOOTHNESS = 6.0
"""p: between a sum (1) and a maximum. Rows with contexts, which tell it from y, are those of the RTX 4090's
profile alone (casys-kaist/LLMServingSim 5daddb2); there it is a maximum."""
LATENCIES_OVERLAP = 4.0
"""p of decodes."""
WRITE_THREADS, RESIDENT_THREADS = 512, 2048
"""Of a block that writes one token to the cache, at most, and of all blocks on a multiprocessor."""
WRITES_OVERLAP = 3.0
BUSY = 0.8
"""FlashAttention splits the keys when tiles fill less than this of the multiprocessors."""
ENOUGH = 0.85
"""Of the best filling of the last wave, with which the fewest splits are taken (flash_api.cpp)."""
MOST_SPLITS = 128
PREPARED = 992
"""Sequences up to which generation 3 finds the splits of each beforehand (use_dynamic_split of its flash_api.cpp)."""

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
    tile_rows = np.where(packs & (head_dim <= 64), SMALL_HEAD_TILE, QUERY_TILE)
    per_head = np.ceil(rows / tile_rows)
    tiles = batch * (kv_heads if packs else heads) * per_head
    mean, longest = _keys(tokens, per_head, context, reach)
    wide = np.where(head_dim > 256, e.attention_wide_head, 1.0)
    products_s = FORWARD_FLOPS * head_dim / (device.peak_flops * wide)
    softmax_s = e.attention_exponentials / (EXPONENTIALS * device.sm_clocks_hz)
    key_s = tile_rows * device.sms * (products_s + softmax_s)
    moved = 4.0 * head_dim * batch * (heads * tokens + kv_heads * (tokens + np.minimum(context, reach)))
    splits = np.ones_like(tiles)
    if packs:
        splits = _splits(tiles, np.ceil(longest / KEY_TILE), device.sms)
    mean_s = tiles / device.sms * (splits * e.attention_tile_s + mean * key_s)
    mean_s += moved / (device.sm_clocks_hz * e.attention_clock_bytes)
    mean_s = np.maximum(mean_s, _missed_s(batch * kv_heads * np.minimum(context, reach), head_dim, device, e))
    longest_s = e.attention_tile_s + longest * key_s * e.attention_critical / splits
    seconds = e.attention_fixed_s + smooth_maximum(mean_s, longest_s, SMOOTHNESS)
    seconds += (longest - mean) * key_s * e.attention_tail / splits
    seconds += np.where(splits > 1, e.attention_split_s, 0.0)
    seconds += cache_write_s(batch * tokens, kv_heads, head_dim, device, e)
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
    if e.attention_generation == 2:
        splits = np.where(group > 1, _filling_splits(tiles, blocks, 2 * sms), 1.0)
    else:
        splits = _splits(tiles, blocks, sms)
    size = np.where(
        head_dim < 128, e.decode_head64, e.decode_head256 ** np.maximum(0.0, np.log2(head_dim / 128))
    )
    bandwidth = device.memory_bandwidth_bytes_s
    read_s = 4.0 * head_dim * batch * kv_heads * keys / (bandwidth * e.decode_bandwidth)
    mean_s = smooth_maximum(tiles * splits / sms * (e.decode_tile_s * size), read_s, e.decode_smoothness)
    block_s = 128 * 4.0 * head_dim * sms / (bandwidth * e.decode_sm_bandwidth)
    longest_s = np.ceil(blocks / splits) * block_s
    seconds = e.decode_fixed_s + smooth_maximum(mean_s, longest_s, LATENCIES_OVERLAP)
    seconds += np.where(splits > 1, e.decode_split_s + e.decode_each_split_s * splits, 0.0)
    query_s = 4.0 * head_dim * batch * heads * (e.decode_query / bandwidth)
    if e.attention_generation == 2:
        regrouped = (group > 1) & (kv_heads > 1) & (batch > 1)
        seconds += np.where(regrouped, e.decode_regroup_s + 2 * query_s, query_s)
    else:
        seconds += query_s + np.where(batch <= PREPARED, batch * e.decode_sequence_s, 0.0)
    return seconds + cache_write_s(batch, kv_heads, head_dim, device, e)


def mixed_s(
    tokens: Floats,
    context: Floats,
    decodes: Floats,
    keys: Floats,
    heads: Floats,
    kv_heads: Floats,
    head_dim: Floats,
    device: DeviceSpec,
    efficiency: Efficiency,
) -> Floats:
    """Seconds of one layer's attention of a chunk of `tokens` after `context`, and `decodes` sequences of `keys`
    keys each, in one kernel for chunks, as vLLM launches FlashAttention 2.

    Arrays of one shape. Kernels that split or pack decodes are not chosen there. In generation 2 every head of a
    decode is a query tile with one row in use, and the grid has as many tiles for each sequence as for the
    longest chunk, of which a decode's others end at once. In generation 3 a tile has the heads of a group.
    """
    e, packs, sms = efficiency, efficiency.attention_generation == 3, device.sms
    group = heads / kv_heads
    per_head = np.ceil(tokens * np.where(packs, group, 1.0) / QUERY_TILE)
    chunk_tiles = np.where(packs, kv_heads, heads) * per_head
    decode_tiles = np.where(packs, kv_heads, heads) * decodes
    products_s = FORWARD_FLOPS * head_dim / device.peak_flops
    key_s = QUERY_TILE * sms * (products_s + e.attention_exponentials / (EXPONENTIALS * device.sm_clocks_hz))
    mean, longest = _keys(tokens, per_head, context, np.full_like(tokens, np.inf))
    decode_keys = np.ceil(keys / KEY_TILE) * KEY_TILE
    rows = QUERY_TILE if packs else PAGED_TILE
    empty = np.where(packs, 0.0, decode_tiles * (np.ceil(tokens / rows) - 1))
    mean_s = chunk_tiles * (e.attention_tile_s + mean * key_s)
    mean_s += decode_tiles * (MIXED_TILE_S + decode_keys * key_s * rows / QUERY_TILE) + empty * EMPTY_TILE_S
    moved = FORWARD_FLOPS * head_dim * (heads * tokens + kv_heads * (tokens + context))
    mean_s = mean_s / sms + moved / (device.sm_clocks_hz * e.attention_clock_bytes)
    longest_s = e.attention_tile_s + np.maximum(longest, decode_keys) * key_s * e.attention_critical
    # Heads of a group read the same keys. They find them in the L2 when it holds those of all sequences, or when
    # they run at the same time: heads follow each other, each with all its sequences.
    one_head = FORWARD_FLOPS * head_dim * (decodes * keys + context + tokens)
    together = sms / (decodes + np.ceil(tokens / rows))
    again = np.where(packs, 1.0, np.clip(group / together, 1.0, group))
    again = np.where(one_head > device.cache_bytes, again, 1.0)
    read = FORWARD_FLOPS * head_dim * kv_heads * decodes * keys * again
    read_s = read / (device.memory_bandwidth_bytes_s * e.decode_bandwidth)
    seconds = smooth_maximum(mean_s, longest_s, MIXED_LONGEST)
    seconds = e.attention_fixed_s + smooth_maximum(seconds, read_s, MIXED_READ)
    seconds += np.maximum(longest - mean, 0.0) * key_s * e.attention_tail
    return seconds + cache_write_s(tokens + decodes, kv_heads, head_dim, device, e)


def cache_write_s(
    tokens: Floats, kv_heads: Floats, head_dim: Floats, device: DeviceSpec, efficiency: Efficiency
) -> Floats:
    """Seconds of writing the keys and values of one layer to the cache, without a launch."""
    width = kv_heads * head_dim
    waves = tokens * np.minimum(width, WRITE_THREADS) / RESIDENT_THREADS
    latency_s = waves * efficiency.cache_write_clocks / device.sm_clocks_hz
    moved_s = 8.0 * tokens * width / device.memory_bandwidth_bytes_s
    return smooth_maximum(latency_s, moved_s, WRITES_OVERLAP)


def _missed_s(keys: Floats | float, head_dim: Floats, device: DeviceSpec, efficiency: Efficiency) -> Floats:
    """Seconds of reading cached keys and values from the memory: what the L2 cannot hold of them."""
    read = 4.0 * head_dim * keys
    missed = read * np.clip(read / (HELD * device.cache_bytes) - 1.0, 0.0, 1.0)
    return np.asarray(missed / (device.memory_bandwidth_bytes_s * efficiency.decode_bandwidth))


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
    return backward_of(chunk_cost(1, model, tp, device, efficiency))


def backward_of(forward: ChunkCost) -> ChunkCost:
    """The backward of a layer whose forward this is."""
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


def _filling_splits(tiles: Floats, blocks: Floats, slots: int) -> Floats:
    """The fewest splits whose last wave is nearly as full as any choice's: FlashAttention 2's own rule
    (num_splits_heuristic of flash_api.cpp, which counts two tiles to a multiprocessor)."""
    found: Floats = np.ones_like(tiles)
    few = tiles < BUSY * slots
    shapes, which = np.unique(np.column_stack([tiles[few], blocks[few]]), axis=0, return_inverse=True)
    if len(shapes):
        tile, block = shapes[:, :1], shapes[:, 1:]
        splits = np.arange(1.0, MOST_SPLITS + 1)
        waves = tile * splits / slots
        shorter = np.ceil(block / splits) != np.ceil(block / np.maximum(splits - 1, 1))
        allowed = (splits <= np.minimum(block, slots)) & (shorter | (splits == 1))
        filled = np.where(allowed, waves / np.ceil(waves), 0.0)
        first = np.argmax(filled >= ENOUGH * filled.max(axis=1, keepdims=True), axis=1)
        found[few] = splits[first][which.ravel()]
    return found


def _shape(like: Floats, model: ModelShape, tp: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Heads, key-value heads, head size and window (none) of one device, each shaped as `like`."""
    values = (model.heads / tp, local_kv_heads(model, tp), model.head_dim, 0.0)
    heads, kv_heads, head_dim, window = (np.full_like(like, value) for value in values)
    return heads, kv_heads, head_dim, window
