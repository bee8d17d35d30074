"""Attention of one packed token batch over paged keys and values: decodes, prefill chunks and
finetuning windows alike.

One kernel serves all of them. A program takes one KV head and a tile of packed rows, token x query
head of the group, so that keys are read once for the whole group. Keys may be split over programs
(flash-decoding), whose partial results a second kernel joins. Which sequence a program belongs to is
found on the device from `query_start`: the grid has T // tile + S programs, an upper bound that needs
no knowledge of the lengths, and the surplus leaves at once. Nothing is read back by the host.

Shapes: T packed tokens, S sequences, H query heads, K key/value heads, G = H / K, D head size,
P pages of B tokens, M pages per table row.

For token i of a sequence with c cached tokens before the chunk, and its query at position p = c + i:

    s_j = scale * q . k_j,  j <= p       lse = log sum_j exp(s_j)       out = sum_j exp(s_j - lse) v_j

The online softmax and its base-2 form are those of FlashAttention-2 (arXiv 2307.08691, section 3.1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.kernels.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_heads,
    check_index,
    check_out,
    check_pages,
    check_rows,
    check_shape,
)
from engine.kernels.jit import Launch, by_layout, jit, multiprocessors, power_of_2_from, tl, uses_triton
from engine.kernels.paged_keys import (
    LOG2_E,
    MAX_SPLITS,
    Tile,
    choose_splits,
    gather_pages,
    load_keys,
    share_of_keys,
)


def decode_tile(dtype: torch.dtype, group: int) -> Tile:
    """One token: its G rows, padded to the 16 that the matrix units want. Bound by memory.

    Five stages hold two tiles in flight: the page number is loaded two stages before its page.
    """
    rows = max(16, power_of_2_from(group))
    return Tile(rows, 32, 4, 2) if dtype == torch.float32 else Tile(rows, 64, 4, 5)


def chunk_tile(dtype: torch.dtype) -> Tile:
    """Two warp groups of 64 rows. Registers allow one program per multiprocessor, so the shared memory
    of a deep pipeline is free. float32 is for tests."""
    return Tile(32, 32, 4, 2) if dtype == torch.float32 else Tile(128, 64, 8, 5)


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    max_keys: int,
    decodes: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of S packed sequences over their pages.

    q [T, H, D]; k_pages, v_pages [P, B, K, D], already holding the batch's own keys and values;
    block_tables [S, M], query_start [S + 1], context_lens [S] int32 on the device. `context_lens`
    counts the tokens cached before this batch; -1 with one query marks padding, whose output is 0 and
    lse -inf. The first `decodes` sequences have exactly one query each (query_start[i] == i) and take
    the path for decoding. `max_keys` bounds context + chunk of every sequence; it only decides how
    the keys are split.

    Returns out [T, H, D] of q's type and lse [T, H] (float32; float64 for float64 on the CPU). Rows
    from query_start[S] on are undefined. Raises ValueError for tensors that do not fit together.
    """
    given = (q, k_pages, v_pages, block_tables, query_start, context_lens)
    if uses_triton(q):
        return paged_attention_triton(*given, scale=scale, max_keys=max_keys, decodes=decodes)
    return paged_attention_reference(*given, scale=scale)


def paged_attention_triton(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    max_keys: int,
    decodes: int = 0,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_attention` by the kernels of this file. `splits` (a power of two) overrides the choice."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[0], q.shape[1]), dtype=torch.float32)
    given = (q, k_pages, v_pages, block_tables, query_start, context_lens, out, lse)
    for launch in attention_launches(*given, scale=scale, max_keys=max_keys, decodes=decodes, splits=splits):
        launch.run()
    return out, lse


def attention_launches(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    max_keys: int,
    decodes: int,
    splits: int | None,
) -> list[Launch]:
    """Launches that write `out` and `lse`: the decodes, then the chunks, each with its joining."""
    launches = []
    given = (q, k_pages, v_pages, block_tables, query_start, context_lens)
    for attend, join, partial_shape in _parts(*given, out, lse, scale, max_keys, decodes, splits):
        partial, partial_lse = out, lse
        if join is not None:
            partial = q.new_empty(partial_shape, dtype=torch.float32)
            partial_lse = q.new_empty(partial_shape[:-1], dtype=torch.float32)
        launches.append(attend.on(*given, partial, partial_lse))
        if join is not None:
            launches.append(join.on(partial, partial_lse, out, lse))
    return launches


class _Part(NamedTuple):
    """The decodes or the chunks of a batch; launches as `Launch.on` takes them."""

    attend: Launch
    join: Launch | None
    """None where one program has all keys."""
    partial_shape: tuple[int, int, int, int]
    """[splits, width, H, D] of what is joined."""


@by_layout
def _parts(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    max_keys: int,
    decodes: int,
    splits: int | None,
) -> list[_Part]:
    check_batch(q, k_pages, v_pages, block_tables, query_start, context_lens)
    check_dtype("q", q, FLOATS)
    check_out("out", out, tuple(q.shape), q)
    check_out("lse", lse, tuple(q.shape[:2]), q, torch.float32)
    (tokens, heads, head_dim), sequences = q.shape, context_lens.shape[0]
    kv_heads = k_pages.shape[2]
    check_heads(heads, kv_heads, head_dim)
    if not 0 <= decodes <= min(sequences, tokens):
        raise ValueError(f"decodes must be 0..{min(sequences, tokens)}, got {decodes}")
    if max_keys < 1:
        raise ValueError(f"max_keys must be at least 1, got {max_keys}")
    if splits is not None and (splits < 1 or splits > MAX_SPLITS or splits & (splits - 1)):
        raise ValueError(f"splits must be a power of two of 1..{MAX_SPLITS}, got {splits}")
    group = heads // kv_heads

    def part(tile: Tile, tile_tokens: int, programs: int, first: int, decode: bool) -> _Part:
        """Of the sequences from `first` on, which is their first token too: all before them decode."""
        width = decodes if decode else tokens
        wanted_programs = (4 if decode else 1) * multiprocessors(q.device)
        count = splits or choose_splits(programs * kv_heads, wanted_programs, max_keys)
        strides = (q.stride(0), *k_pages.stride()[:3], block_tables.stride(0))
        attend = Launch(
            _attend,
            (programs, kv_heads, count),
            (scale * LOG2_E, first, sequences, width, *strides, heads, count),
            {
                "group": group,
                "block_size": k_pages.shape[1],
                "head_dim": head_dim,
                "block_m": tile.rows,
                "block_q": tile_tokens,
                "block_n": tile.keys,
                # Decodes look for no sequence, and how many there are compiles no kernel anew.
                "block_s": 1 if decode else max(256, power_of_2_from(sequences - first)),
                "decode": decode,
            },
            tile.warps,
            tile.stages,
        )
        grid, numbers = (width - first, heads), (first, width, heads)
        join = Launch(_join, grid, numbers, {"head_dim": head_dim, "splits": count}, 1, 1)
        return _Part(attend, join if count > 1 else None, (count, width, heads, head_dim))

    parts = []
    if decodes:
        parts.append(part(decode_tile(q.dtype, group), 1, decodes, first=0, decode=True))
    if decodes < sequences and decodes < tokens:
        tile = chunk_tile(q.dtype)
        if group > tile.rows:
            raise ValueError(f"query heads per key head must be at most {tile.rows}, got {group}")
        tile_tokens = tile.rows // group
        programs = (tokens - decodes) // tile_tokens + sequences - decodes
        parts.append(part(tile, tile_tokens, programs, first=decodes, decode=False))
    return parts


def check_batch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
) -> None:
    """Raise ValueError unless the tensors of one batch fit together."""
    check_shape("q", q, (None, None, None))
    check_pages(k_pages, v_pages)
    check_shape("k_pages", k_pages, (None, None, None, q.shape[2]))
    check_dtype("k_pages", k_pages, (q.dtype,))
    check_rows("q", q)
    check_index("context_lens", context_lens, (None,))
    check_index("query_start", query_start, (context_lens.shape[0] + 1,))
    check_shape("block_tables", block_tables, (context_lens.shape[0], None))
    check_dtype("block_tables", block_tables, (torch.int32,))
    if block_tables.stride(1) != 1:
        raise ValueError(f"block_tables must have contiguous rows, got strides {block_tables.stride()}")
    for name, tensor in (
        ("k_pages", k_pages),
        ("v_pages", v_pages),
        ("block_tables", block_tables),
        ("query_start", query_start),
        ("context_lens", context_lens),
    ):
        check_device(name, tensor, q.device)


@jit()
def _attend_keys(
    acc: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    q_tile: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    table: tl.tensor,
    kv_head_offset: tl.tensor,
    position: tl.tensor,
    n: tl.tensor,
    end: tl.tensor,
    scale_log2: tl.tensor,
    stride_page: tl.tensor,
    stride_slot: tl.tensor,
    masked: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    block_n: tl.constexpr,
) -> tl.tensor:
    """Take keys n .. n + block_n into the running (acc [M, D], peak [M], total [M])."""
    key = n + tl.arange(0, block_n)
    k, v = load_keys(
        k_pages,
        v_pages,
        table,
        kv_head_offset,
        key,
        end,
        stride_page,
        stride_slot,
        masked,
        block_size,
        head_dim,
    )
    s = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale_log2
    if masked:
        s = tl.where((key[None, :] <= position[:, None]) & (key < end)[None, :], s, float("-inf"))
    higher = tl.maximum(peak, tl.max(s, 1))
    # A row without any key yet keeps peak -inf; -inf - -inf would be NaN.
    shift = tl.where(higher == float("-inf"), 0.0, higher) if masked else higher
    p = tl.exp2(s - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, higher, total


@jit(
    "block_tables",
    "query_start",
    "context_lens",
    "first_sequence",
    "sequences",
    "width",
    "stride_table",
    "splits",
)
def _attend(
    q: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    block_tables: tl.tensor,
    query_start: tl.tensor,
    context_lens: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    scale_log2: tl.tensor,
    first_sequence: tl.tensor,
    sequences: tl.tensor,
    width: tl.tensor,
    stride_q: tl.tensor,
    stride_page: tl.tensor,
    stride_slot: tl.tensor,
    stride_kv_head: tl.tensor,
    stride_table: tl.tensor,
    heads: tl.tensor,
    splits: tl.tensor,
    group: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    block_m: tl.constexpr,
    block_q: tl.constexpr,
    block_n: tl.constexpr,
    block_s: tl.constexpr,
    decode: tl.constexpr,
) -> None:
    """Grid (tiles, K, splits). Writes out [splits, width, H, D] and lse [splits, width, H]."""
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if decode:
        sequence = tl.program_id(0)
        first = sequence
        token = 0
        count = 1
    else:
        # The last tiles of a sequence see most keys: the longest programs start first.
        pid = tl.num_programs(0) - 1 - tl.program_id(0)
        # Sequence s, counted from the first that is not a decode, owns the tiles from
        # (start_s - start_0) // block_q + s: at least as many as it needs, and strictly increasing
        # in s, whatever the lengths.
        index = tl.arange(0, block_s)
        here = index < sequences - first_sequence
        origin = tl.load(query_start + first_sequence)
        starts = tl.load(query_start + first_sequence + index, mask=here, other=0) - origin
        owned = (starts // block_q + index <= pid) & here
        ordinal = tl.sum(owned.to(tl.int32), 0) - 1
        sequence = first_sequence + ordinal
        first = tl.load(query_start + sequence)
        token = (pid - ((first - origin) // block_q + ordinal)) * block_q
        count = tl.load(query_start + sequence + 1) - first
    if token >= count:
        return
    row = tl.arange(0, block_m)
    query = token + row // group
    valid = (row < block_q * group) & (query < count)
    head = kv_head * group + row % group
    dim = tl.arange(0, head_dim)
    context = tl.load(context_lens + sequence)
    position = context + query
    q_row = (first + query).to(tl.int64) * stride_q + head * head_dim
    q_tile = tl.load(q + q_row[:, None] + dim[None, :], mask=valid[:, None], other=0.0)

    keys = context + tl.minimum(token + block_q, count)
    begin, end = share_of_keys(keys, split, splits, block_n)
    # Keys up to the first query's position need no mask in whole tiles.
    whole = tl.minimum(end, context + token + 1) // block_n * block_n
    whole = tl.maximum(whole, begin)
    table = block_tables + sequence.to(tl.int64) * stride_table
    acc = tl.zeros((block_m, head_dim), dtype=tl.float32)
    peak = tl.full((block_m,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((block_m,), dtype=tl.float32)
    for masked in tl.static_range(2):
        for n in range(whole if masked else begin, end if masked else whole, block_n):
            acc, peak, total = _attend_keys(
                acc,
                peak,
                total,
                q_tile,
                k_pages,
                v_pages,
                table,
                kv_head * stride_kv_head,
                position,
                n,
                end,
                scale_log2,
                stride_page,
                stride_slot,
                masked,
                block_size,
                head_dim,
                block_n,
            )

    some = total > 0
    safe = tl.where(some, total, 1.0)
    acc = acc / safe[:, None]
    row_lse = tl.where(some, (peak + tl.log2(safe)) * 0.6931471805599453, float("-inf"))
    out_row = (split.to(tl.int64) * width + first + query) * heads + head
    out_at = out + (out_row * head_dim)[:, None] + dim[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=valid[:, None])
    tl.store(lse + out_row, row_lse, mask=valid)


@jit("offset", "width")
def _join(
    partial: tl.tensor,
    partial_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    offset: tl.tensor,
    width: tl.tensor,
    heads: tl.tensor,
    head_dim: tl.constexpr,
    splits: tl.constexpr,
) -> None:
    """Grid (tokens, H): out = sum_s exp(lse_s - lse) partial_s, lse = log sum_s exp(lse_s)."""
    row = (tl.program_id(0) + offset).to(tl.int64) * heads + tl.program_id(1)
    split = tl.arange(0, splits)
    dim = tl.arange(0, head_dim)
    rows = split.to(tl.int64) * width * heads + row
    parts = tl.load(partial_lse + rows)
    peak = tl.max(parts, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(parts - shift)
    total = tl.sum(weight, 0)
    some = total > 0
    safe = tl.where(some, total, 1.0)
    values = tl.load(partial + (rows * head_dim)[:, None] + dim[None, :])
    joined = tl.sum(values * (weight / safe)[:, None], 0)
    tl.store(out + row * head_dim + dim, joined.to(out.dtype.element_ty))
    tl.store(lse + row, tl.where(some, shift + tl.log(safe), float("-inf")))


def paged_attention_reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_attention` in torch, sequence by sequence in float32 (float64 stays). All decodes are one
    batch: a loop over hundreds of them would cost more than their arithmetic."""
    check_batch(q, k_pages, v_pages, block_tables, query_start, context_lens)
    check_dtype("q", q, (*FLOATS, torch.float64))
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=compute, device=q.device)
    starts, contexts = query_start.tolist(), context_lens.tolist()
    singles = []
    for s, context in enumerate(contexts):
        first, last = starts[s], starts[s + 1]
        if last - first == 1:
            if context >= 0:
                singles.append(s)
        elif last > first:
            keys = context + last - first
            k, v = (gather_pages(pages, block_tables[s], keys)[None] for pages in (k_pages, v_pages))
            position = torch.arange(context, keys, device=q.device)
            rows, row_lse = attend_reference(q[None, first:last], k, v, position[None], scale)
            out[first:last], lse[first:last] = rows[0].to(q.dtype), row_lse[0]
    if singles:
        index = torch.tensor(singles, device=q.device)
        position = context_lens[index].long()
        pages = block_tables[index][:, : int(position.max()) // k_pages.shape[1] + 1].long()
        own = torch.arange(pages.shape[1], device=q.device) * k_pages.shape[1] <= position[:, None]
        pages = pages.where(own, 0)  # what follows a sequence's own pages in its row may be anything
        k, v = (p[pages].flatten(1, 2) for p in (k_pages, v_pages))
        tokens = query_start[index].long()
        rows, row_lse = attend_reference(q[tokens][:, None], k, v, position[:, None], scale)
        out[tokens], lse[tokens] = rows[:, 0].to(q.dtype), row_lse[:, 0]
    return out, lse


def attend_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of q [S, N, H, D] at `position` [S, N] over k, v [S, J, K, D].

    Returns out [S, N, H, D] and lse [S, N, H] in the type of computation.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    (sequences, tokens, _, head_dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    # [S, K, N * G, D] against [S, K, J, D]: one batched product, keys not repeated per query head.
    rows = q.to(compute).view(sequences, tokens, kv_heads, -1, head_dim).transpose(1, 2).flatten(2, 3)
    k_rows, v_rows = (x.to(compute).transpose(1, 2) for x in (k, v))
    s = (rows @ k_rows.transpose(2, 3)).mul_(scale).view(sequences, kv_heads, tokens, -1, keys)
    hidden = torch.arange(keys, device=q.device) > position[..., None]
    s.masked_fill_(hidden[:, None, :, None], float("-inf"))
    lse = s.logsumexp(-1)
    p = s.sub_(lse[..., None]).exp_().flatten(2, 3)
    # Hidden slots may hold anything, NaN included: 0 * NaN would spread it.
    v_rows = v_rows.masked_fill(hidden.all(1)[:, None, :, None], 0.0)
    out = (p @ v_rows).view(sequences, kv_heads, tokens, -1, head_dim).transpose(1, 2).flatten(2, 3)
    return out, lse.transpose(1, 2).flatten(2, 3)
