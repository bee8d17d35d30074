"""LoRA of many adapters, of different ranks, in one packed batch; forward, and the pieces of backward.

Tokens lie in segments of one adapter. Both kernels find a program's segment on the device, as
`paged_attention` does. The shrink splits the long contraction over programs, whose partial sums the
expand adds when it reads them: a decode token alone would leave the device idle, and no atomics are
needed. The gradient with respect to x is the same pair of products with the factors exchanged and
transposed, so it is the same pair of kernels on transposed views:

    forward    s = x A^T       y += scale * s B^T
    backward   u = dy B        dx += scale * u A          = grouped_lora(dx, dy, B^T, A^T)
               dA += scale * u^T x       dB += scale * dy^T s

Where ranks send something between the two products, each is called alone.

Shapes: T packed tokens, I input and O output features, N adapters, R padded rank (the buffers'), r an
adapter's own rank, G segments, C splits of the contraction. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from engine.kernels.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_index,
    check_rows,
    check_shape,
)
from engine.kernels.jit import (
    Launch,
    by_layout,
    cdiv,
    jit,
    multiprocessors,
    power_of_2_from,
    tl,
    uses_triton,
)

MAX_RANK = 128
"""Of one launch; a larger rank takes several, each with its columns of A^T and B."""
MAX_SPLITS = 16
MAX_PARTS = 8192
"""Partial sums that a program of the expand reads at once: 64 registers of each of its 128 threads.
Eight times as many spilled 3 KB per thread (compiled for sm_90)."""
LARGE_SEGMENT_TOKENS = 32
"""From this mean length on tiles have up to 64 tokens, else 16, the least that the matrix units take."""


def grouped_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> torch.Tensor:
    """y[t] += scales[n] * (x[t] @ A_n^T) @ B_n^T for the tokens of each segment, n its adapter.

    y [T, O] is modified; x [T, I]; a [N, R, I] and b [N, O, R] with one of the last two strides 1, so
    that transposed views do; ranks [N] int32 and scales [N] float32; segment_start [G + 1] and
    segment_adapter [G] int32, all on the device. Adapter -1 is the base model: its tokens are left
    alone, as are those outside of all segments; segments may be empty. Padding beyond an adapter's
    rank is never read.

    Returns s = x A^T [T, R] (float32; float64 for float64 on the CPU), unscaled, defined for the
    first r columns of tokens with an adapter. Raises ValueError for tensors that do not fit together.
    """
    run = grouped_lora_triton if uses_triton(x) else grouped_lora_reference
    return run(y, x, a, b, ranks, scales, segment_start, segment_adapter)


def lora_shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> torch.Tensor:
    """The first product of `grouped_lora` alone: s = x A^T [T, R] (float32; float64 for float64 on the CPU).

    Columns beyond an adapter's rank are 0; tokens without an adapter are undefined. Raises ValueError for
    tensors that do not fit together.
    """
    run = lora_shrink_triton if uses_triton(x) else lora_shrink_reference
    return run(x, a, ranks, segment_start, segment_adapter)


def lora_expand(
    y: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    """The second product alone: y += scale * s B^T, with s [T, >= R] of y's type or that of sums. y is modified.

    Raises ValueError for tensors that do not fit together.
    """
    run = lora_expand_triton if uses_triton(y) else lora_expand_reference
    run(y, s, b, ranks, scales, segment_start, segment_adapter)


def lora_weight_grad(grad: torch.Tensor, small: torch.Tensor, wide: torch.Tensor, scale: float) -> None:
    """grad += scale * small^T @ wide over the tokens of one segment: dA and dB.

    small [T, >= r] (u or s of `grouped_lora`, float32 or kept in wide's type), wide [T, F] (x or dy),
    grad [r, F] float32 is modified and may be a transposed view:

        dA [r, I]: lora_weight_grad(da, u, x, scale)       dB [O, r]: lora_weight_grad(db.T, s, dy, scale)

    One program owns its part of grad, so the sum's order is fixed. float64 works on the CPU. Raises
    ValueError for tensors that do not fit together.
    """
    run = lora_weight_grad_triton if uses_triton(wide) else lora_weight_grad_reference
    run(grad, small, wide, scale)


def grouped_lora_triton(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> torch.Tensor:
    """`grouped_lora` by the kernels of this file."""
    if a.shape[1] > MAX_RANK:
        index = (segment_start, segment_adapter)
        found = [
            grouped_lora_triton(y, x, a[:, part], b[:, :, part], ranks - part.start, scales, *index)
            for part in _rank_parts(a.shape[1])
        ]
        return torch.cat(found, dim=1)
    launches, s = lora_launches(y, x, a, b, ranks, scales, segment_start, segment_adapter)
    for launch in launches:
        launch.run()
    return s


def lora_shrink_triton(
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> torch.Tensor:
    """`lora_shrink` by the kernel of this file."""
    index = (segment_start, segment_adapter)
    if a.shape[1] > MAX_RANK:
        check_shrink(x, a, ranks, *index)
        found = [
            lora_shrink_triton(x, a[:, part], ranks - part.start, *index) for part in _rank_parts(a.shape[1])
        ]
        return torch.cat(found, dim=1)
    shrink, splits = _shrink_alone(x, a, ranks, *index)
    parts = torch.empty((splits, x.shape[0], a.shape[1]), dtype=torch.float32, device=x.device)
    shrink.on(x, a, parts, ranks, *index).run()
    return parts[0] if splits == 1 else parts.sum(0)


def lora_expand_triton(
    y: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    """`lora_expand` by the kernel of this file."""
    index = (segment_start, segment_adapter)
    if b.shape[2] > MAX_RANK:
        check_expand(y, s, b, ranks, scales, *index)
        for part in _rank_parts(b.shape[2]):
            lora_expand_triton(y, s[:, part], b[:, :, part], ranks - part.start, scales, *index)
        return
    expand = _expand_alone(y, s, b, ranks, scales, *index)
    s = s[:, : b.shape[2]].contiguous()
    expand.on(y, b, s, s, ranks, scales, *index).run()


def lora_weight_grad_triton(
    grad: torch.Tensor, small: torch.Tensor, wide: torch.Tensor, scale: float
) -> None:
    """`lora_weight_grad` by the kernel of this file."""
    if grad.shape[0] > MAX_RANK:
        for part in _rank_parts(grad.shape[0]):
            lora_weight_grad_triton(grad[part], small[:, part], wide, scale)
        return
    weight_grad_launch(grad, small, wide, scale).run()


def _rank_parts(rank: int) -> list[slice]:
    """Of the padded rank, one for each launch."""
    return [slice(first, min(first + MAX_RANK, rank)) for first in range(0, rank, MAX_RANK)]


def lora_launches(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> tuple[list[Launch], torch.Tensor]:
    """The shrink and the expand, and s, which the expand writes."""
    index = (segment_start, segment_adapter)
    shrink, expand, splits = _pair(y, x, a, b, ranks, scales, *index)
    size = (x.shape[0], a.shape[1])
    s = x.new_empty(size, dtype=torch.float32)
    parts = s if splits == 1 else x.new_empty((splits, *size), dtype=torch.float32)
    return [shrink.on(x, a, parts, ranks, *index), expand.on(y, b, parts, s, ranks, scales, *index)], s


@by_layout
def _pair(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> tuple[Launch, Launch, int]:
    """Both launches as `Launch.on` takes them, and the splits of the contraction."""
    check_lora(y, x, a, b, ranks, scales, segment_start, segment_adapter)
    check_dtype("x", x, FLOATS)
    shrink, splits = _shrink_launch(x, a, segment_adapter.shape[0])
    return shrink, _expand_launch(y, b, segment_adapter.shape[0], splits), splits


@by_layout
def _shrink_alone(
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> tuple[Launch, int]:
    check_shrink(x, a, ranks, segment_start, segment_adapter)
    check_dtype("x", x, FLOATS)
    return _shrink_launch(x, a, segment_adapter.shape[0])


@by_layout
def _expand_alone(
    y: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> Launch:
    check_expand(y, s, b, ranks, scales, segment_start, segment_adapter)
    check_dtype("y", y, FLOATS)
    return _expand_launch(y, b, segment_adapter.shape[0], 1)


def _shrink_launch(x: torch.Tensor, a: torch.Tensor, segments: int) -> tuple[Launch, int]:
    """The shrink without its tensors, and into how many sums it splits the contraction."""
    (tokens, wide_in), rank = x.shape, a.shape[1]
    tiles = _tiles(tokens, rank, segments)
    programs, block_t, block_r = tiles["programs"], tiles["block_t"], tiles["block_r"]
    block_i = 128 if block_r <= 32 else 64
    splits = choose_splits(
        programs, 4 * multiprocessors(x.device), block_t * block_r, wide_in // (2 * block_i)
    )
    launch = Launch(
        _shrink,
        (programs, splits),
        (
            *(segments, tokens, wide_in, rank, x.stride(0), *a.stride()),
            cdiv(cdiv(wide_in, splits), block_i),
        ),
        {"block_t": block_t, "block_r": block_r, "block_g": tiles["block_g"], "block_i": block_i},
        4,
        4,
    )
    return launch, splits


def _expand_launch(y: torch.Tensor, b: torch.Tensor, segments: int, splits: int) -> Launch:
    """The expand of so many partial sums, without its tensors; their sum goes to s where there are several."""
    (tokens, wide_out), rank = y.shape, b.shape[2]
    tiles = _tiles(tokens, rank, segments)
    block_o = 128
    return Launch(
        _expand,
        (tiles["programs"], cdiv(wide_out, block_o)),
        (segments, tokens, wide_out, rank, y.stride(0), *b.stride()),
        {
            "block_t": tiles["block_t"],
            "block_r": tiles["block_r"],
            "block_g": tiles["block_g"],
            "block_o": block_o,
            "splits": splits,
        },
        4,
        1,
    )


def _tiles(tokens: int, rank: int, segments: int) -> dict[str, int]:
    """What both kernels have in common: their tiles of tokens, and how many there may be."""
    if rank > MAX_RANK:
        raise ValueError(f"the padded rank must be at most {MAX_RANK}, got {rank}")
    large = tokens >= LARGE_SEGMENT_TOKENS * segments
    block_r = max(16, power_of_2_from(rank))
    block_t = min(64, 2048 // block_r) if large else 16
    return {
        "programs": tokens // block_t + segments,
        "block_t": block_t,
        "block_r": block_r,
        "block_g": max(256, power_of_2_from(segments)),
    }


def choose_splits(programs: int, wanted_programs: int, tile: int, limit: int) -> int:
    """Power of two that brings the shrink to about `wanted_programs`, at most `limit`, and few enough
    that a program of the expand holds a tile from each of them."""
    splits = 1
    while (
        2 * splits <= min(limit, MAX_SPLITS)
        and 2 * splits * programs <= wanted_programs
        and 2 * splits * tile <= MAX_PARTS
    ):
        splits *= 2
    return splits


def weight_grad_launch(grad: torch.Tensor, small: torch.Tensor, wide: torch.Tensor, scale: float) -> Launch:
    """One program per block of grad's wide dimension, walking over the tokens."""
    return _weight_grad_launch(grad, small, wide, float(scale)).on(grad, small, wide)


@by_layout
def _weight_grad_launch(grad: torch.Tensor, small: torch.Tensor, wide: torch.Tensor, scale: float) -> Launch:
    check_weight_grad(grad, small, wide)
    check_dtype("wide", wide, FLOATS)
    check_dtype("grad", grad, (torch.float32,))
    rank, features = grad.shape
    if rank > MAX_RANK:
        raise ValueError(f"the rank must be at most {MAX_RANK}, got {rank}")
    block_f = 64
    return Launch(
        _weight_grad,
        (cdiv(features, block_f),),
        (scale, wide.shape[0], features, rank, small.stride(0), wide.stride(0), *grad.stride()),
        {"block_t": 64, "block_r": max(16, power_of_2_from(rank)), "block_f": block_f},
        4,
        3,
    )


def check_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    """Raise ValueError unless the tensors of one grouped LoRA fit together."""
    check_shape("y", y, (x.shape[0], None))
    check_shape("b", b, (a.shape[0], y.shape[1], a.shape[1]))
    check_dtype("y", y, (x.dtype,))
    check_device("y", y, x.device)
    check_shrink(x, a, ranks, segment_start, segment_adapter)
    _check_factor("y", y, "b", b)
    _check_scales(scales, b)


def check_shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    """Raise ValueError unless the tensors of the first product fit together."""
    check_shape("x", x, (None, None))
    check_shape("a", a, (None, None, x.shape[1]))
    _check_factor("x", x, "a", a)
    _check_index(x, a, ranks, segment_start, segment_adapter)


def check_expand(
    y: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    """Raise ValueError unless the tensors of the second product fit together."""
    check_shape("y", y, (None, None))
    check_shape("s", s, (y.shape[0], None))
    check_shape("b", b, (None, y.shape[1], None))
    if s.shape[1] < b.shape[2]:
        raise ValueError(f"s must have at least {b.shape[2]} columns, got {s.shape[1]}")
    check_rows("s", s)
    check_dtype("s", s, (y.dtype, torch.float32, torch.float64))
    check_device("s", s, y.device)
    _check_factor("y", y, "b", b)
    _check_scales(scales, b)
    _check_index(y, b, ranks, segment_start, segment_adapter)


def _check_factor(name: str, wide: torch.Tensor, factor_name: str, factor: torch.Tensor) -> None:
    check_rows(name, wide)
    check_dtype(factor_name, factor, (wide.dtype,))
    if 1 not in factor.stride()[1:]:
        raise ValueError(f"{factor_name} must be contiguous along one side, got strides {factor.stride()}")
    check_device(factor_name, factor, wide.device)


def _check_scales(scales: torch.Tensor, factor: torch.Tensor) -> None:
    check_shape("scales", scales, (factor.shape[0],))
    check_dtype("scales", scales, (torch.float32,))
    check_device("scales", scales, factor.device)


def _check_index(
    wide: torch.Tensor,
    factor: torch.Tensor,
    ranks: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    check_index("ranks", ranks, (factor.shape[0],))
    check_index("segment_adapter", segment_adapter, (None,))
    if segment_adapter.shape[0] == 0:
        raise ValueError("segment_adapter must have at least one segment, got none")
    check_index("segment_start", segment_start, (segment_adapter.shape[0] + 1,))
    for name, tensor in (
        ("ranks", ranks),
        ("segment_start", segment_start),
        ("segment_adapter", segment_adapter),
    ):
        check_device(name, tensor, wide.device)


def check_weight_grad(grad: torch.Tensor, small: torch.Tensor, wide: torch.Tensor) -> None:
    """Raise ValueError unless grad is [r, F], small [T, >= r] and wide [T, F]."""
    check_shape("wide", wide, (None, None))
    check_shape("small", small, (wide.shape[0], None))
    check_shape("grad", grad, (None, wide.shape[1]))
    if small.shape[1] < grad.shape[0]:
        raise ValueError(f"small must have at least {grad.shape[0]} columns, got {small.shape[1]}")
    check_dtype("grad", grad, (torch.float32, torch.float64))
    check_dtype("small", small, (grad.dtype, wide.dtype))
    check_rows("small", small)
    check_rows("wide", wide)
    check_device("grad", grad, wide.device)
    check_device("small", small, wide.device)


@jit()
def _locate(
    segment_start: tl.tensor,
    segments: tl.tensor,
    pid: tl.tensor,
    block_t: tl.constexpr,
    block_g: tl.constexpr,
) -> tl.tensor:
    """Segment of tile `pid` with its first token and its end: segment g owns the tiles from
    (start_g - start_0) // block_t + g."""
    index = tl.arange(0, block_g)
    origin = tl.load(segment_start)
    starts = tl.load(segment_start + index, mask=index < segments, other=0) - origin
    owned = (starts // block_t + index <= pid) & (index < segments)
    segment = tl.sum(owned.to(tl.int32), 0) - 1
    start = tl.load(segment_start + segment)
    first = start + (pid - ((start - origin) // block_t + segment)) * block_t
    return segment, first, tl.load(segment_start + segment + 1)


@jit("segment_start", "segment_adapter", "segments", "tokens", "blocks")
def _shrink(
    x: tl.tensor,
    a: tl.tensor,
    parts: tl.tensor,
    ranks: tl.tensor,
    segment_start: tl.tensor,
    segment_adapter: tl.tensor,
    segments: tl.tensor,
    tokens: tl.tensor,
    wide_in: tl.tensor,
    padded_rank: tl.tensor,
    stride_x: tl.tensor,
    stride_a: tl.tensor,
    stride_ar: tl.tensor,
    stride_ai: tl.tensor,
    blocks: tl.tensor,
    block_t: tl.constexpr,
    block_r: tl.constexpr,
    block_g: tl.constexpr,
    block_i: tl.constexpr,
) -> None:
    """Grid (tiles, C): parts[c, t, :] = x[t, c-th part] @ A[:, c-th part]^T."""
    segment, first, end = _locate(segment_start, segments, tl.program_id(0), block_t, block_g)
    adapter = tl.load(segment_adapter + segment)
    if (first >= end) | (adapter < 0):
        return
    part = tl.program_id(1)
    token = first + tl.arange(0, block_t)
    r = tl.arange(0, block_r)
    has_token = token < end
    has_rank = r < tl.load(ranks + adapter)
    x_row = (token.to(tl.int64) * stride_x)[:, None]
    a_row = adapter.to(tl.int64) * stride_a + (r * stride_ar)[:, None]
    acc = tl.zeros((block_t, block_r), dtype=tl.float32)
    # A count of blocks, not of features: so it is known that rows are read from aligned addresses.
    for i in range(part * blocks * block_i, tl.minimum((part + 1) * blocks * block_i, wide_in), block_i):
        feature = i + tl.arange(0, block_i)
        has_feature = (feature < wide_in)[None, :]
        x_tile = tl.load(x + x_row + feature[None, :], mask=has_token[:, None] & has_feature, other=0.0)
        a_tile = tl.load(
            a + a_row + (feature * stride_ai)[None, :], mask=has_rank[:, None] & has_feature, other=0.0
        )
        acc = tl.dot(x_tile, tl.trans(a_tile), acc, input_precision="ieee")
    row = (part * tokens + token).to(tl.int64) * padded_rank
    mask = has_token[:, None] & (r < padded_rank)[None, :]
    tl.store(parts + row[:, None] + r[None, :], acc, mask=mask)


@jit("segment_start", "segment_adapter", "segments", "tokens")
def _expand(
    y: tl.tensor,
    b: tl.tensor,
    parts: tl.tensor,
    s: tl.tensor,
    ranks: tl.tensor,
    scales: tl.tensor,
    segment_start: tl.tensor,
    segment_adapter: tl.tensor,
    segments: tl.tensor,
    tokens: tl.tensor,
    wide_out: tl.tensor,
    padded_rank: tl.tensor,
    stride_y: tl.tensor,
    stride_b: tl.tensor,
    stride_bo: tl.tensor,
    stride_br: tl.tensor,
    block_t: tl.constexpr,
    block_r: tl.constexpr,
    block_g: tl.constexpr,
    block_o: tl.constexpr,
    splits: tl.constexpr,
) -> None:
    """Grid (tiles, blocks of O): y[t, block] += scale * sum_c parts[c, t] @ B[block]^T."""
    segment, first, end = _locate(segment_start, segments, tl.program_id(0), block_t, block_g)
    adapter = tl.load(segment_adapter + segment)
    if (first >= end) | (adapter < 0):
        return
    token = first + tl.arange(0, block_t)
    r = tl.arange(0, block_r)
    feature = tl.program_id(1) * block_o + tl.arange(0, block_o)
    has_token = (token < end)[:, None]
    has_feature = (feature < wide_out)[None, :]
    has_rank = r < tl.load(ranks + adapter)
    s_at = (token.to(tl.int64) * padded_rank)[:, None] + r[None, :]
    s_mask = has_token & (r < padded_rank)[None, :]
    s_tile = tl.load(parts + s_at, mask=s_mask, other=0.0)
    for part in tl.static_range(1, splits):
        offset = tl.cast(part * padded_rank, tl.int64) * tokens
        s_tile += tl.load(parts + offset + s_at, mask=s_mask, other=0.0)
    if splits > 1:  # noqa: SIM102 - decided by the compiler, the next by the program
        if tl.program_id(1) == 0:
            tl.store(s + s_at, s_tile, mask=s_mask)
    b_at = adapter.to(tl.int64) * stride_b + (feature * stride_bo)[None, :] + (r * stride_br)[:, None]
    b_tile = tl.load(b + b_at, mask=has_rank[:, None] & has_feature, other=0.0)
    update = tl.dot(s_tile.to(b_tile.dtype), b_tile, input_precision="ieee") * tl.load(scales + adapter)
    y_at = y + (token.to(tl.int64) * stride_y)[:, None] + feature[None, :]
    old = tl.load(y_at, mask=has_token & has_feature, other=0.0).to(tl.float32)
    tl.store(y_at, (old + update).to(y.dtype.element_ty), mask=has_token & has_feature)


@jit("tokens")
def _weight_grad(
    grad: tl.tensor,
    small: tl.tensor,
    wide: tl.tensor,
    scale: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    rank: tl.tensor,
    stride_small: tl.tensor,
    stride_wide: tl.tensor,
    stride_gr: tl.tensor,
    stride_gf: tl.tensor,
    block_t: tl.constexpr,
    block_r: tl.constexpr,
    block_f: tl.constexpr,
) -> None:
    """Grid (blocks of F,): grad[:, block] += scale * small^T @ wide[:, block]."""
    feature = tl.program_id(0) * block_f + tl.arange(0, block_f)
    r = tl.arange(0, block_r)
    has_feature = feature < features
    has_rank = r < rank
    acc = tl.zeros((block_f, block_r), dtype=tl.float32)
    for t in range(0, tokens, block_t):
        token = t + tl.arange(0, block_t)
        has_token = (token < tokens)[:, None]
        row = token.to(tl.int64)
        wide_tile = tl.load(
            wide + (row * stride_wide)[:, None] + feature[None, :],
            mask=has_token & has_feature[None, :],
            other=0.0,
        )
        small_tile = tl.load(
            small + (row * stride_small)[:, None] + r[None, :], mask=has_token & has_rank[None, :], other=0.0
        )
        acc = tl.dot(tl.trans(wide_tile), small_tile.to(wide_tile.dtype), acc, input_precision="ieee")
    at = grad + (feature.to(tl.int64) * stride_gf)[:, None] + (r * stride_gr)[None, :]
    mask = has_feature[:, None] & has_rank[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + acc * scale, mask=mask)


def grouped_lora_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> torch.Tensor:
    """`grouped_lora` in torch, segment by segment; s is 0 where it is undefined."""
    check_lora(y, x, a, b, ranks, scales, segment_start, segment_adapter)
    s = lora_shrink_reference(x, a, ranks, segment_start, segment_adapter)
    lora_expand_reference(y, s, b, ranks, scales, segment_start, segment_adapter)
    return s


def lora_shrink_reference(
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> torch.Tensor:
    """`lora_shrink` in torch; s is 0 where it is undefined."""
    check_shrink(x, a, ranks, segment_start, segment_adapter)
    check_dtype("x", x, (*FLOATS, torch.float64))
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = torch.zeros((x.shape[0], a.shape[1]), dtype=compute, device=x.device)
    for own, n, r in _segments(ranks, segment_start, segment_adapter):
        s[own, :r] = x[own].to(compute) @ a[n, :r].to(compute).T
    return s


def lora_expand_reference(
    y: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    """`lora_expand` in torch."""
    check_expand(y, s, b, ranks, scales, segment_start, segment_adapter)
    check_dtype("y", y, (*FLOATS, torch.float64))
    compute = torch.float64 if y.dtype == torch.float64 else torch.float32
    scale_of = scales.tolist()
    for own, n, r in _segments(ranks, segment_start, segment_adapter):
        update = s[own, :r].to(compute) @ b[n, :, :r].to(compute).T
        y[own] = (y[own].to(compute) + update * scale_of[n]).to(y.dtype)


def _segments(
    ranks: torch.Tensor, segment_start: torch.Tensor, segment_adapter: torch.Tensor
) -> Iterator[tuple[slice, int, int]]:
    """Tokens, adapter and rank of each segment with an adapter."""
    starts, rank_of = segment_start.tolist(), ranks.tolist()
    for (first, end), n in zip(pairwise(starts), segment_adapter.tolist(), strict=True):
        if n >= 0 and first < end and rank_of[n]:
            yield slice(first, end), n, rank_of[n]


def lora_weight_grad_reference(
    grad: torch.Tensor, small: torch.Tensor, wide: torch.Tensor, scale: float
) -> None:
    """`lora_weight_grad` in torch."""
    check_weight_grad(grad, small, wide)
    grad.add_(small.to(grad.dtype)[:, : grad.shape[0]].T @ wide.to(grad.dtype), alpha=scale)
