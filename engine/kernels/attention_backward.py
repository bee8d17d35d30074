"""Backward of causal attention for one window of a finetuning sample.

Windows go right to left. Queries of a window reach all keys to their left, so a window adds to dK and
dV of the whole prefix; once it has passed, the gradients of its own keys are final. Keys and values
are read from the same pages that the forward used beside inference: a contiguous copy would cost the
sample's K/V a second time, and paging only costs an index per key. The accumulators are contiguous
float32, one pair per layer in flight.

No atomics: a program owns a block of keys of one KV head and walks over the window's queries, all
query heads of the group included, so that results are the same in every run.

Shapes: N window tokens, L sample tokens, H query heads, K key/value heads, G = H / K, D head size,
P pages of B tokens, M pages of the sample.

With s, lse and out of `paged_attention` and positions start .. start + N:

    p_ij = exp(s_ij - lse_i)          delta_i = do_i . out_i        ds_ij = p_ij (do_i . v_j - delta_i)
    dv_j += sum_i p_ij do_i           dk_j += scale sum_i ds_ij q_i     dq_i = scale sum_j ds_ij k_j

(FlashAttention-2, arXiv 2307.08691, algorithm 2.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.kernels.checks import (
    FLOATS,
    check_contiguous,
    check_device,
    check_dtype,
    check_heads,
    check_index,
    check_narrow_rows,
    check_pages,
    check_rows,
    check_shape,
)
from engine.kernels.jit import Launch, by_layout, cdiv, jit, multiprocessors, shared_bytes, tl, uses_triton
from engine.kernels.paged_keys import (
    LOG2_E,
    MAX_SPLITS,
    Tile,
    choose_splits,
    gather_pages,
    load_keys,
    share_of_keys,
)


class Tiles(NamedTuple):
    """Block sizes of the two kernels of one backward."""

    dq: Tile
    dkv: Tile
    """Here `rows` are tokens of one query head, walked over, `keys` the block that a program owns."""


def backward_tiles(dtype: torch.dtype, shared: int) -> Tiles:
    """For programs with so many bytes of shared memory. float32 is for tests.

    128 keys of `_dkv` are 16 for each warp: of 64 both warp groups would compute the same products, half again as many
    in all. Then 14 registers spill at D = 128, outside of the loop. Three stages take 161 KiB; two take 97, which
    cards without HBM have, and an A100 spills in the loop with three.
    """
    if dtype == torch.float32:
        return Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 1))
    return Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 3 if shared > 200 * 1024 else 2))


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    start: int,
    scale: float,
) -> torch.Tensor:
    """Gradients of a window at positions start .. start + N.

    dout, q, out [N, H, D]; lse [N, H]; k_pages, v_pages [P, B, K, D]; block_table [M] int32 of the
    sample; dk, dv [L, K, D] float32 with L >= start + N. Adds to dk[: start + N] and dv[: start + N]
    and leaves the rest alone. Returns dq [N, H, D] of q's type. On the CPU float64 works as well, with
    lse, dk and dv of float64. Raises ValueError for tensors that do not fit together.
    """
    run = attention_backward_triton if uses_triton(q) else attention_backward_reference
    return run(dout, q, out, lse, k_pages, v_pages, block_table, dk, dv, start=start, scale=scale)


def attention_backward_triton(
    dout: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    start: int,
    scale: float,
    splits: int | None = None,
) -> torch.Tensor:
    """`attention_backward` by the kernels of this file. `splits` overrides how many programs share
    the keys of a dq tile."""
    launches, parts = backward_launches(
        dout, q, out, lse, k_pages, v_pages, block_table, dk, dv, start=start, scale=scale, splits=splits
    )
    for launch in launches:
        launch.run()
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(q.dtype)


def backward_launches(
    dout: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    start: int,
    scale: float,
    splits: int | None,
) -> tuple[list[Launch], torch.Tensor]:
    """Launches for dq (which also writes lse and delta as the other reads them) and for dk, dv; and dq in
    [splits, N, H, D] parts."""
    given = (dout, q, out, lse, k_pages, v_pages, block_table, dk, dv)
    pair = _pair(*given, start, scale, splits)
    parts = q.new_empty(pair.parts_shape, dtype=pair.parts_type)
    row_stats = q.new_zeros(pair.stats_shape, dtype=torch.float32)
    launches = [
        pair.dq.on(dout, q, out, lse, row_stats, k_pages, v_pages, block_table, parts),
        pair.dkv.on(dout, q, row_stats, k_pages, v_pages, block_table, dk, dv),
    ]
    return launches, parts


class _Pair(NamedTuple):
    """Both launches as `Launch.on` takes them, and what they hand on."""

    dq: Launch
    dkv: Launch
    parts_shape: tuple[int, int, int, int]
    """[splits, N, H, D] of dq."""
    parts_type: torch.dtype
    stats_shape: tuple[int, int, int]
    """[2, H, >= N] of what is said of each row: whole tiles, so that reading it takes no mask."""


@by_layout
def _pair(
    dout: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    start: int,
    scale: float,
    splits: int | None,
) -> _Pair:
    check_window(dout, q, out, lse, k_pages, v_pages, block_table, dk, dv, start)
    check_dtype("q", q, FLOATS)
    check_dtype("lse", lse, (torch.float32,))
    check_dtype("dk", dk, (torch.float32,))
    for name, tensor in (("dout", dout), ("q", q), ("out", out)):
        check_narrow_rows(name, tensor)
    tokens, heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    check_heads(heads, kv_heads, head_dim)
    group, keys = heads // kv_heads, start + tokens
    tiles = backward_tiles(q.dtype, shared_bytes(q.device))
    if group > tiles.dq.rows:
        raise ValueError(f"query heads per key head must be at most {tiles.dq.rows}, got {group}")
    dq_tokens = tiles.dq.rows // group
    programs = cdiv(tokens, dq_tokens)
    if splits is None:
        splits = choose_splits(programs * kv_heads, multiprocessors(q.device), keys)
    if not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits must be 1..{MAX_SPLITS}, got {splits}")
    sizes = {"group": group, "block_size": k_pages.shape[1], "head_dim": head_dim}
    padded = cdiv(tokens, tiles.dkv.rows) * tiles.dkv.rows
    numbers = (scale, scale * LOG2_E, start, tokens, padded, heads, dout.stride(0), q.stride(0))
    strides = (k_pages.stride(0), k_pages.stride(1), k_pages.stride(2))
    for_dq = Launch(
        _dq,
        (programs, kv_heads, splits),
        (*numbers, out.stride(0), *strides, splits),
        {**sizes, "block_m": tiles.dq.rows, "block_q": dq_tokens, "block_n": tiles.dq.keys},
        tiles.dq.warps,
        tiles.dq.stages,
    )
    for_dkv = Launch(
        _dkv,
        (cdiv(keys, tiles.dkv.keys), kv_heads),
        (*numbers, dk.stride(0), *strides),
        {**sizes, "block_m": tiles.dkv.rows, "block_n": tiles.dkv.keys},
        tiles.dkv.warps,
        tiles.dkv.stages,
    )
    return _Pair(
        for_dq,
        for_dkv,
        parts_shape=(splits, tokens, heads, head_dim),
        parts_type=q.dtype if splits == 1 else torch.float32,
        stats_shape=(2, heads, padded),
    )


def check_window(
    dout: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    start: int,
) -> None:
    """Raise ValueError unless the tensors of one window fit together."""
    check_shape("q", q, (None, None, None))
    check_pages(k_pages, v_pages)
    check_shape("k_pages", k_pages, (None, None, None, q.shape[2]))
    check_dtype("k_pages", k_pages, (q.dtype,))
    for name, tensor in (("dout", dout), ("out", out), ("q", q)):
        check_shape(name, tensor, tuple(q.shape))
        check_dtype(name, tensor, (q.dtype,))
        check_rows(name, tensor)
    check_shape("lse", lse, tuple(q.shape[:2]))
    check_contiguous("lse", lse)
    check_index("block_table", block_table, (None,))
    keys = start + q.shape[0]
    if start < 0 or keys > block_table.shape[0] * k_pages.shape[1]:
        raise ValueError(
            f"the window's end must lie in the sample's {block_table.shape[0]} pages of "
            f"{k_pages.shape[1]}, got start {start} and {q.shape[0]} tokens"
        )
    check_shape("dk", dk, (None, *k_pages.shape[2:]))
    check_shape("dv", dv, tuple(dk.shape))
    check_dtype("dv", dv, (dk.dtype,))
    if dk.shape[0] < keys:
        raise ValueError(f"dk and dv must hold {keys} tokens, got {dk.shape[0]}")
    if not (dk.is_contiguous() and dv.is_contiguous()):
        raise ValueError(f"dk and dv must be contiguous, got strides {dk.stride()} and {dv.stride()}")
    for name, tensor in (
        ("dout", dout),
        ("out", out),
        ("lse", lse),
        ("k_pages", k_pages),
        ("v_pages", v_pages),
        ("block_table", block_table),
        ("dk", dk),
        ("dv", dv),
    ):
        check_device(name, tensor, q.device)


@jit()
def _dq_keys(
    acc: tl.tensor,
    q_tile: tl.tensor,
    do_tile: tl.tensor,
    row_lse: tl.tensor,
    row_delta: tl.tensor,
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
    """acc [M, D] plus ds @ k over keys n .. n + block_n, without the scale."""
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
    p = tl.exp2(s - row_lse[:, None])
    if masked:
        p = tl.where((key[None, :] <= position[:, None]) & (key < end)[None, :], p, 0.0)
    dp = tl.dot(do_tile, tl.trans(v), input_precision="ieee")
    ds = p * (dp - row_delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@jit("start", "tokens", "splits")
def _dq(
    dout: tl.tensor,
    q: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    row_stats: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    table: tl.tensor,
    dq: tl.tensor,
    scale: tl.tensor,
    scale_log2: tl.tensor,
    start: tl.tensor,
    tokens: tl.tensor,
    padded: tl.tensor,
    heads: tl.tensor,
    stride_do: tl.tensor,
    stride_q: tl.tensor,
    stride_out: tl.tensor,
    stride_page: tl.tensor,
    stride_slot: tl.tensor,
    stride_kv_head: tl.tensor,
    splits: tl.tensor,
    group: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    block_m: tl.constexpr,
    block_q: tl.constexpr,
    block_n: tl.constexpr,
) -> None:
    """Grid (tiles of tokens, K, splits). Writes dq [splits, N, H, D] and row_stats [2, H, >= N]: lse, base 2, delta."""
    # The last queries see most keys: the longest programs start first.
    token = (tl.num_programs(0) - 1 - tl.program_id(0)) * block_q
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.arange(0, block_m)
    query = token + row // group
    valid = (row < block_q * group) & (query < tokens)
    head = kv_head * group + row % group
    dim = tl.arange(0, head_dim)
    inner = (head * head_dim)[:, None] + dim[None, :]
    q_tile = tl.load(q + (query * stride_q)[:, None] + inner, mask=valid[:, None], other=0.0)
    do_tile = tl.load(dout + (query * stride_do)[:, None] + inner, mask=valid[:, None], other=0.0)
    out_tile = tl.load(out + (query * stride_out)[:, None] + inner, mask=valid[:, None], other=0.0)
    row_delta = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    row_at = query * heads + head
    row_lse = tl.load(lse + row_at, mask=valid, other=0.0) * 1.4426950408889634
    if split == 0:
        stats_at = row_stats + head * padded + query
        tl.store(stats_at, row_lse, mask=valid)
        tl.store(stats_at + heads * padded, row_delta, mask=valid)

    position = start + query
    keys = start + tl.minimum(token + block_q, tokens)
    begin, end = share_of_keys(keys, split, splits, block_n)
    # Keys up to the first query's position need no mask in whole tiles.
    whole = tl.minimum(end, start + token + 1) // block_n * block_n
    whole = tl.maximum(whole, begin)
    acc = tl.zeros((block_m, head_dim), dtype=tl.float32)
    for masked in tl.static_range(2):
        for n in range(whole if masked else begin, end if masked else whole, block_n):
            acc = _dq_keys(
                acc,
                q_tile,
                do_tile,
                row_lse,
                row_delta,
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
    out_row = (split.to(tl.int64) * tokens * heads + row_at) * head_dim
    tl.store(dq + out_row[:, None] + dim[None, :], (acc * scale).to(dq.dtype.element_ty), mask=valid[:, None])


@jit("start", "tokens")
def _dkv(
    dout: tl.tensor,
    q: tl.tensor,
    row_stats: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    table: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    scale: tl.tensor,
    scale_log2: tl.tensor,
    start: tl.tensor,
    tokens: tl.tensor,
    padded: tl.tensor,
    heads: tl.tensor,
    stride_do: tl.tensor,
    stride_q: tl.tensor,
    stride_dk: tl.tensor,
    stride_page: tl.tensor,
    stride_slot: tl.tensor,
    stride_kv_head: tl.tensor,
    group: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
) -> None:
    """Grid (blocks of keys, K). Adds to dk, dv [L, K, D] of its keys."""
    # The first keys are seen by most queries: the longest programs start first.
    block = tl.program_id(0) * block_n
    kv_head = tl.program_id(1)
    key = block + tl.arange(0, block_n)
    dim = tl.arange(0, head_dim)
    end = start + tokens
    offset = kv_head * stride_kv_head
    k, v = load_keys(
        k_pages, v_pages, table, offset, key, end, stride_page, stride_slot, True, block_size, head_dim
    )

    # One query head at a time: packing the group into the rows, as the other kernels do, costs a
    # division per row for the addresses, and registers are scarce here with two accumulators.
    row = tl.arange(0, block_m)
    acc_k = tl.zeros((block_n, head_dim), dtype=tl.float32)
    acc_v = tl.zeros((block_n, head_dim), dtype=tl.float32)
    first = tl.maximum(block - start, 0) // block_m
    tiles = tl.cdiv(tokens, block_m) - first
    for i in range(tiles * group):
        head = kv_head * group + i // tiles
        query = (first + i % tiles) * block_m + row
        valid = query < tokens
        inner = (head * head_dim + dim)[None, :]
        q_tile = tl.load(q + (query * stride_q)[:, None] + inner, mask=valid[:, None], other=0.0)
        do_tile = tl.load(dout + (query * stride_do)[:, None] + inner, mask=valid[:, None], other=0.0)
        stats_at = row_stats + head * padded + query
        row_lse = tl.load(stats_at)
        row_delta = tl.load(stats_at + heads * padded)
        s = tl.dot(k, tl.trans(q_tile), input_precision="ieee") * scale_log2
        # Rows without a query have q = do = lse = delta = 0 and need no mask: they add 0 to both sums.
        p = tl.where(key[:, None] <= (start + query)[None, :], tl.exp2(s - row_lse[None, :]), 0.0)
        acc_v = tl.dot(p.to(do_tile.dtype), do_tile, acc_v, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do_tile), input_precision="ieee")
        ds = p * (dp - row_delta[None, :])
        acc_k = tl.dot(ds.to(q_tile.dtype), q_tile, acc_k, input_precision="ieee")
    at = (key.to(tl.int64) * stride_dk + kv_head * head_dim)[:, None] + dim[None, :]
    mask = (key < end)[:, None]
    tl.store(dk + at, tl.load(dk + at, mask=mask, other=0.0) + acc_k * scale, mask=mask)
    tl.store(dv + at, tl.load(dv + at, mask=mask, other=0.0) + acc_v, mask=mask)


def attention_backward_reference(
    dout: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    start: int,
    scale: float,
) -> torch.Tensor:
    """`attention_backward` in torch: the formulas above on whole matrices."""
    check_window(dout, q, out, lse, k_pages, v_pages, block_table, dk, dv, start)
    check_dtype("q", q, (*FLOATS, torch.float64))
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    check_dtype("lse", lse, (compute,))
    check_dtype("dk", dk, (compute,))
    tokens, heads, head_dim = q.shape
    keys, kv_heads = start + tokens, k_pages.shape[2]

    def rows(x: torch.Tensor) -> torch.Tensor:
        """[N, H, D] -> [K, N * G, D]."""
        return x.to(compute).view(tokens, kv_heads, -1, x.shape[2]).transpose(0, 1).flatten(1, 2)

    k, v = (gather_pages(p, block_table, keys).to(compute).transpose(0, 1) for p in (k_pages, v_pages))
    q_rows, do_rows = rows(q), rows(dout)
    position = torch.arange(start, keys, device=q.device).repeat_interleave(heads // kv_heads)
    hidden = torch.arange(keys, device=q.device) > position[:, None]
    p = (q_rows @ k.transpose(1, 2)).mul_(scale).sub_(rows(lse[..., None])).exp_()
    p.masked_fill_(hidden, 0.0)
    dv[:keys] += (p.transpose(1, 2) @ do_rows).transpose(0, 1)
    delta = (do_rows * rows(out)).sum(-1, keepdim=True)
    ds = (do_rows @ v.transpose(1, 2)).sub_(delta).mul_(p).mul_(scale)
    dk[:keys] += (ds.transpose(1, 2) @ q_rows).transpose(0, 1)
    dq = (ds @ k).view(kv_heads, tokens, -1, head_dim).transpose(0, 1)
    return dq.reshape(tokens, heads, head_dim).to(q.dtype)
