"""Kernels with what nobody thought of: random shapes, layouts, types and magnitudes, against float64 on the CPU.

Tensors lie apart in memory that is NaN, results begin as NaN, and nothing but results may have changed afterwards.
Errors are held against the sums of the magnitudes of what is added up, number by number. Now and then a tensor has
another layout or type than it should: then the launcher refuses it, or what comes out is right all the same.

`python -m tests.engine.kernels.test_random_kernels FIRST COUNT` tries other seeds, of the kernels named behind these
or of all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from threading import Barrier, Thread
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from engine.elementwise import rms_norm_backward, rotate, swiglu_backward
from engine.kernels.attention_backward import attention_backward_reference, attention_backward_triton
from engine.kernels.dropout import dropout, dropout_triton
from engine.kernels.grouped_lora import grouped_lora_reference, grouped_lora_triton
from engine.kernels.lora_expand import lora_expand_triton
from engine.kernels.lora_shrink import lora_shrink_triton
from engine.kernels.lora_weight_grad import lora_weight_grad_triton
from engine.kernels.loss import IGNORE_LABEL, linear_cross_entropy
from engine.kernels.norm_backward import norm_backward_launch
from engine.kernels.paged_attention import paged_attention_reference, paged_attention_triton
from engine.kernels.rotary import rotate_triton
from engine.kernels.swiglu_backward import swiglu_backward_launch
from engine.kernels.write_kv import write_kv_reference, write_kv_triton
from engine.parallel import ALONE, Group
from tests.engine.kernels.watched import watch

CUDA = torch.cuda.is_available()
SUMS = 2.0**-20
"""Of the magnitudes of what is added up in float32: 16 of its roundings."""
ROUNDING = {
    torch.float64: 2.0**-45,
    torch.float32: SUMS,
    torch.float16: 2.0**-9,
    torch.bfloat16: 2.0**-6,
}
"""Up to four roundings of the type, of operands and of the result; the interpreter's bfloat16 is cut off instead."""
SMALLEST, LARGEST = 2.0**-24, 65504.0
"""Of float16: what rounds to a multiple of the one is off by half as much, however small; behind the other is inf."""
TYPES = (torch.float32, torch.float16, torch.bfloat16)
PRODUCTS = TYPES if CUDA else TYPES[:2]
"""The interpreter multiplies bfloat16 as if it were whole numbers."""
HEADS = ((1, 1), (4, 2), (3, 3), (5, 1), (7, 1), (6, 2), (10, 2), (14, 2), (8, 1), (12, 1))


class Draw:
    """Random choices and tensors of one case."""

    def __init__(self, seed: Sequence[int], device: str) -> None:
        self.random = np.random.default_rng(list(seed))
        self.device = device
        self.spoiled = False
        self._blocks: list[tuple[torch.Tensor, torch.Tensor, tuple[Any, ...] | None]] = []
        self._until_spoiled = int(self.random.integers(10)) if self.chance(0.15) else -1

    def some(self, *choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def upto(self, most: int) -> int:
        """0 .. most, the ends more often than others."""
        return int(self.some(0, most, *self.random.integers(0, most + 1, 6)))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.random.standard_normal(shape))

    def numbers(self, *shape: int) -> torch.Tensor:
        """Large ones, small ones, none but 0, or rows that are all alike."""
        drawn = self.normal(*shape) * self.some(1, 1, 1, 8, 0.01, 0)
        return drawn[:1].expand(shape).clone() if shape[0] and self.chance(0.1) else drawn

    def put(
        self,
        values: torch.Tensor,
        dtype: torch.dtype | None = None,
        *,
        order: Sequence[int] | None = None,
        apart: Sequence[int] = (),
        written: bool = False,
    ) -> torch.Tensor:
        """`values` in a block of NaN (of numbers out of reach where they are whole), with the dimensions in `order`
        from outer to inner and gaps between what lies along those of `apart`."""
        dtype = dtype or values.dtype
        order = list(range(values.dim()) if order is None else order)
        if self._until_spoiled == 0:
            self.spoiled = True
            if self.chance(0.3):
                others = (
                    (torch.float16, torch.float32, torch.float64)
                    if dtype.is_floating_point
                    else (torch.int64,)
                )
                dtype = self.some(*others)
            else:
                self.random.shuffle(order)
                apart = [d for d in order if self.chance(0.5)]
        self._until_spoiled -= 1
        strides, step = [0] * values.dim(), 1
        for d in reversed(order):
            if d in apart:
                step += int(self.some(0, 1, 8, 24))
            strides[d] = step
            step *= max(1, values.shape[d])
        place = (tuple(values.shape), tuple(strides), int(self.some(0, 0, 1, 3, 16)))
        poison = float("nan") if dtype.is_floating_point else 2**30
        block = torch.full((step + place[2] + 9,), poison, dtype=dtype, device=self.device)
        view = block.as_strided(*place)
        view.copy_(values)
        self._blocks.append((block, block.clone(), place if written else None))
        return view

    def result(self, *shape: int, dtype: torch.dtype, apart: Sequence[int] = ()) -> torch.Tensor:
        """NaN, to be written."""
        return self.put(torch.full(shape, float("nan")), dtype, apart=apart, written=True)

    def check_rest(self) -> None:
        """Nothing but results was written."""
        for block, before, place in self._blocks:
            after = block.clone()
            if place is not None:
                after.as_strided(*place).copy_(before.as_strided(*place))
            assert torch.equal(after.view(torch.uint8), before.view(torch.uint8)), (
                "what is no result was written"
            )


def exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double()


def close(name: str, found: torch.Tensor, wanted: torch.Tensor, allowed: torch.Tensor) -> None:
    """Each number within what is `allowed` of it."""
    assert found.shape == wanted.shape, f"{name}: {list(found.shape)} instead of {list(wanted.shape)}"
    error = (exact(found) - wanted).abs()
    if found.dtype == torch.float16:
        infinite = exact(found) == wanted.sign() * float("inf")
        error[infinite & (wanted.abs() + allowed > LARGEST)] = 0.0
    if not bool((error <= allowed + 1e-30).all()):
        worst = int((error / (allowed + 1e-30)).nan_to_num(nan=float("inf")).argmax())
        at = tuple(int(i) for i in np.unravel_index(worst, found.shape))
        raise AssertionError(
            f"{name}{list(at)} of {list(found.shape)}: {float(found[at])} instead of {float(wanted[at])}, "
            f"allowed are {float(allowed[at])}"
        )


def same(name: str, found: torch.Tensor, before: torch.Tensor) -> None:
    """To the bit, NaN included."""
    assert torch.equal(exact(found).nan_to_num(nan=9e9), exact(before).nan_to_num(nan=9e9)), (
        f"{name} was changed"
    )


class Attended(NamedTuple):
    """Attention of one sequence; the last three in magnitudes."""

    out: torch.Tensor
    lse: torch.Tensor
    p: torch.Tensor
    """[H, N, J]"""
    logits: torch.Tensor
    """[H, N]: the largest sum of a row's products."""
    seen: torch.Tensor
    """[N, J]"""


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: int, scale: float) -> Attended:
    """Query by query as it is written: q [N, H, D] behind `context` of the keys k, v [J, K, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril(context)
    s = (torch.einsum("nhd,jhd->hnj", q, k) * scale).masked_fill(~seen, float("-inf"))
    sums = torch.einsum("nhd,jhd->hnj", q.abs(), k.abs()) * abs(scale) * seen
    p = s.softmax(-1)
    out, lse = torch.einsum("hnj,jhd->nhd", p, v).contiguous(), s.logsumexp(-1).T.contiguous()
    return Attended(out, lse, p.detach(), sums.amax(-1).detach(), seen)


class Paged(NamedTuple):
    """Keys and values of some sequences."""

    k: torch.Tensor
    v: torch.Tensor
    tables: torch.Tensor
    keys: list[list[torch.Tensor]]
    """[sequence] k and v [J, K, D], float64."""


def paged(draw: Draw, lengths: Sequence[int], kv_heads: int, head_dim: int, dtype: torch.dtype) -> Paged:
    """Pages in some order, some of them of several sequences; NaN in all slots that no sequence has."""
    size = int(draw.some(1, 3, 4, 16, 16, 32, 64))
    used = [-(-n // size) for n in lengths]
    count = sum(used) + int(draw.some(1, 3))
    order = draw.some(draw.random.permutation(count), np.arange(count), np.arange(count)[::-1]).tolist()
    rows: list[list[int]] = []
    pages = torch.full((2, count, size, kv_heads, head_dim), float("nan"), dtype=torch.float64)
    whole: list[list[int]] = [[]]
    for n, blocks in zip(lengths, used, strict=True):
        row = list(draw.some(*whole))[: n // size] if draw.chance(0.4) else []
        begin = len(row) * size
        row += [order.pop() for _ in range(blocks - len(row))]
        slot = torch.arange(begin, n)
        at = torch.tensor(row, dtype=torch.long)[slot // size]
        pages[:, at, slot % size] = draw.numbers(2, n - begin, kv_heads, head_dim)
        rows.append(row)
        whole.append(row[: n // size])
    tables = torch.full(
        (len(rows), max(used, default=0) + int(draw.some(0, 0, 2)) or 1), 10**6, dtype=torch.int32
    )
    for table, row in zip(tables, rows, strict=True):
        table[: len(row)] = torch.tensor(row, dtype=torch.int32)
    nesting = draw.some((0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (0, 1, 3, 2, 4), (1, 3, 0, 2, 4), (0, 3, 1, 2, 4))
    k, v = draw.put(pages, dtype, order=nesting, apart=(0, 1, 2, 3))
    known = [
        [exact(x)[torch.tensor(row, dtype=torch.long)].flatten(0, 1)[:n] for x in (k, v)]
        for row, n in zip(rows, lengths, strict=True)
    ]
    return Paged(k, v, draw.put(tables, apart=(0,)), known)


def attention(draw: Draw) -> None:
    dtype, (heads, kv_heads) = draw.some(*PRODUCTS), draw.some(*HEADS)
    head_dim = int(draw.some(16, 16, 32, 64, 128))
    decodes = draw.upto(5)
    lengths = [1] * decodes + [
        int(draw.some(0, 1, 16, draw.upto(45), draw.upto(45))) for _ in range(draw.upto(4))
    ]
    if draw.chance(0.02):  # more than a program looks through at once
        lengths += [0] * 300 + [5]
    lengths = lengths or [1]
    near = 64 + int(draw.random.integers(-2, 3))
    contexts = [int(draw.some(0, near, near // 2, 2 * near, draw.upto(150))) for _ in lengths]
    for s, n in enumerate(lengths):
        if n == 1 and draw.chance(0.15):
            contexts[s] = -1
    totals = [n + c if n else 0 for n, c in zip(lengths, contexts, strict=True)]
    cache = paged(draw, totals, kv_heads, head_dim, dtype)
    tokens, start = sum(lengths), np.cumsum([0, *lengths])
    rows = torch.full((tokens + int(draw.some(0, 0, 3)), heads, head_dim), float("nan"), dtype=torch.float64)
    rows[:tokens] = draw.numbers(tokens, heads, head_dim)
    q = draw.put(rows, dtype, apart=(0,))
    index = [draw.put(torch.tensor(x, dtype=torch.int32)) for x in (start, np.array(contexts))]
    scale = float(draw.some(head_dim**-0.5, 1.0, 0.1))
    bound = max(1, *totals)
    # Joining takes a program for each row, and the interpreter milliseconds for each program.
    splits, more = (
        draw.some((None, 600), (None, 9000), (1, 0), (2, 0), (4, 0), (32, 0))
        if tokens * heads < 300
        else (None, 0)
    )
    found = paged_attention_triton(
        *(q, cache.k, cache.v, cache.tables, *index),
        scale=scale,
        max_keys=bound + more,
        decodes=int(draw.some(decodes, decodes, 0, draw.upto(decodes))),
        splits=splits,
    )
    again = paged_attention_reference(
        *(
            x.cpu().double() if x.is_floating_point() else x.cpu()
            for x in (q, cache.k, cache.v, cache.tables)
        ),
        *(x.cpu() for x in index),
        scale=scale,
    )
    for s, (first, last) in enumerate(pairwise(start.tolist())):
        own = slice(first, last)
        if totals[s] == 0:
            for out, lse in (found, again):
                assert not bool(out[own].any()) and bool((lse[own] == float("-inf")).all()), "padding"
            continue
        k, v = cache.keys[s]
        wanted = attended(exact(q)[own], k, v, contexts[s], scale)
        logits = SUMS * (1 + wanted.logits.T)
        magnitude = v.abs().repeat_interleave(heads // kv_heads, 1)
        summed = torch.einsum("hnj,jhd->nhd", wanted.p, magnitude)
        allowed = (ROUNDING[q.dtype] + 2 * logits[..., None]) * summed
        if q.dtype == torch.float16:
            allowed += SMALLEST * (1 + torch.einsum("nj,jhd->nhd", wanted.seen.double(), magnitude))
        close("out", found[0][own], wanted.out, allowed)
        close("lse", found[1][own], wanted.lse, logits + SUMS * wanted.lse.abs())
        close("reference out", again[0][own], wanted.out, 1e-11 * (1 + wanted.logits.T[..., None]) * summed)
        close("reference lse", again[1][own], wanted.lse, 1e-12 * (1 + wanted.logits.T + wanted.lse.abs()))


def backward(draw: Draw) -> None:
    """Windows of several jobs from right to left, in turns."""
    dtype, (heads, kv_heads) = draw.some(*PRODUCTS), draw.some(*HEADS)
    head_dim, jobs = int(draw.some(16, 16, 32, 64, 128)), int(draw.some(1, 2))
    lengths = [1 + draw.upto(int(draw.some(20, 89))) for _ in range(jobs)]
    cache, scale = paged(draw, lengths, kv_heads, head_dim, dtype), float(draw.some(head_dim**-0.5, 0.7))
    samples = [_Sample(draw, cache, j, n, heads, dtype, scale) for j, n in enumerate(lengths)]
    splits = draw.some(None, 1, 2, 4)
    turns = [j for j, sample in enumerate(samples) for _ in sample.windows]
    draw.random.shuffle(turns)
    for j in turns:
        samples[j].step(splits)
    for sample in samples:
        sample.check()


class _Sample:
    """One job's attention, with accumulators that hold something already and go on behind the sample."""

    def __init__(
        self, draw: Draw, cache: Paged, job: int, tokens: int, heads: int, dtype: torch.dtype, scale: float
    ) -> None:
        self.k, self.v = k, v = cache.keys[job]
        kv_heads, head_dim = k.shape[1:]
        self.cache, self.table, self.tokens, self.scale = cache, cache.tables[job], tokens, scale
        q, dout = (draw.put(draw.numbers(tokens, heads, head_dim), dtype, apart=(0,)) for _ in range(2))
        leaves = [exact(q).requires_grad_(), *(x.clone().requires_grad_() for x in (k, v))]
        self.known = attended(*leaves, 0, scale)  # type: ignore[arg-type]
        self.known.out.backward(exact(dout))
        out = draw.put(self.known.out.detach(), dtype, apart=(0,))
        lse = draw.put(self.known.lse.detach(), torch.float32)
        self.rows = (dout, q, out, lse)
        self.grads = [x.grad for x in leaves]
        rest = torch.full((int(draw.some(0, 2)), kv_heads, head_dim), float("nan"), dtype=torch.float64)
        self.before = [torch.cat((draw.numbers(tokens, kv_heads, head_dim), rest)) for _ in range(2)]
        self.sums = [draw.put(x, torch.float32, written=True) for x in self.before]
        self.before = [exact(x).clone() for x in self.sums]
        self.dq = torch.full((tokens, heads, head_dim), float("nan"), dtype=torch.float64)
        inner = draw.random.integers(0, tokens + 1, draw.upto(4)).tolist()
        cuts = sorted({0, tokens, *inner})
        self.windows = list(pairwise(cuts))
        self.left = self.windows.copy()
        self.reference = [x.clone() for x in self.before]

    def step(self, splits: int | None) -> None:
        first, last = self.left.pop()
        part, behind = slice(first, last), [x[last:].clone() for x in self.sums]
        window = [x[part] for x in self.rows]
        pages = (self.cache.k, self.cache.v, self.table)
        self.dq[part] = exact(
            attention_backward_triton(
                *window, *pages, *self.sums, start=first, scale=self.scale, splits=splits
            )
        )
        for total, before in zip(self.sums, behind, strict=True):
            same("what is behind the window", total[last:], before)
        given = (self.known.out.detach()[part], self.known.lse.detach()[part])
        dq = attention_backward_reference(
            *(exact(x) for x in window[:2]),
            *given,
            *(x.cpu().double() for x in pages[:2]),
            pages[2].cpu(),
            *self.reference,
            start=first,
            scale=self.scale,
        )
        close("reference dq", dq, self.grads[0][part], torch.full_like(dq, 1e-8))  # type: ignore[index]

    def check(self) -> None:
        """Against autograd on the whole."""
        dout, q, out, _ = (exact(x).abs() for x in self.rows)
        k, v = (x.abs().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (self.k, self.v))
        known, half = self.known, self.rows[1].dtype == torch.float16
        error = ROUNDING[self.rows[1].dtype] + 4 * SUMS * (1 + known.logits + known.lse.detach().T.abs())
        delta = torch.einsum("nhd,nhd->hn", dout, out)
        p = known.p * error[..., None]
        ds = p * (torch.einsum("nhd,jhd->hnj", dout, v) + delta[..., None])
        if half:
            p, ds = (x + SMALLEST * known.seen for x in (p, ds))
        heads = self.before[0].shape[1]

        def grouped(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(1, (heads, -1)).sum(2)

        dq = self.scale * torch.einsum("hnj,jhd->nhd", ds, k) + (SMALLEST if half else 0)
        dk = self.scale * grouped(torch.einsum("hnj,nhd->jhd", ds, q))
        dv = grouped(torch.einsum("hnj,nhd->jhd", p, dout))
        close("dq", self.dq, self.grads[0], dq)  # type: ignore[arg-type]
        for name, total, before, reference, grad, allowed in zip(
            ("dk", "dv"), self.sums, self.before, self.reference, self.grads[1:], (dk, dv), strict=True
        ):
            wanted, end = before.clone(), self.tokens
            wanted[:end] += grad
            allowed += 2 * SUMS * (before[:end].abs() + wanted[:end].abs())
            close(name, total[:end], wanted[:end], allowed)
            close(f"reference {name}", reference[:end], wanted[:end], torch.full_like(grad, 1e-8))
            same(f"{name} behind the sample", total[end:], before[end:])


class Bypass(NamedTuple):
    """Adapters in a bank, and a batch in segments of them."""

    a: torch.Tensor
    b: torch.Tensor
    ranks: torch.Tensor
    scales: torch.Tensor
    start: torch.Tensor
    adapters: torch.Tensor
    tokens: int
    pieces: list[tuple[slice, int, int]]
    """Tokens, adapter and rank, of what has one."""


def bypass(draw: Draw, wide_in: int, wide_out: int, dtype: torch.dtype) -> Bypass:
    """Everything that belongs to no adapter, beyond their ranks included, is NaN."""
    bank, padded = 1 + draw.upto(5), int(draw.some(1, 5, 8, 12, 16, 24, 33, 64, 64, 160, 160))
    ranks = [int(draw.some(0, padded, 1 + draw.random.integers(padded))) for _ in range(bank)]
    segments = 1 + draw.upto(7) if draw.chance(0.97) else 300
    adapters = [int(draw.random.integers(-1, bank)) for _ in range(segments)]
    long = segments > 8
    lengths = [
        int(draw.some(0, 0, 1)) if long else int(draw.some(0, 1, 2, 17, draw.upto(80))) for _ in adapters
    ]
    start = np.cumsum([int(draw.some(0, 0, 3)), *lengths])
    a, b = (
        torch.full(shape, float("nan"), dtype=torch.float64)
        for shape in ((bank, padded, wide_in), (bank, wide_out, padded))
    )
    for n, rank in enumerate(ranks):
        a[n, :rank] = draw.normal(rank, wide_in) / wide_in**0.5
        b[n, :, :rank] = draw.normal(wide_out, rank)
    pieces = [
        (slice(first, last), n, ranks[n])
        for (first, last), n in zip(pairwise(start.tolist()), adapters, strict=True)
        if n >= 0
    ]
    transposed = draw.some((0, 1, 2), (0, 2, 1))
    index = (ranks, start, adapters)
    ranks_, start_, adapters_ = (draw.put(torch.from_numpy(np.array(x, np.int32))) for x in index)
    return Bypass(
        draw.put(a, dtype, order=transposed, apart=transposed[:2]),
        draw.put(b, dtype, order=draw.some((0, 1, 2), (0, 2, 1)), apart=(0,)),
        ranks_,
        draw.put(draw.numbers(bank), torch.float32),
        start_,
        adapters_,
        int(start[-1]) + int(draw.some(0, 2)),
        pieces,
    )


def lora(draw: Draw) -> None:
    """Both products, together or one after the other."""
    dtype, wide_in, wide_out = (
        draw.some(*PRODUCTS),
        1 + draw.upto(int(draw.some(150, 600, 1300))),
        1 + draw.upto(300),
    )
    have = bypass(draw, wide_in, wide_out, dtype)
    rows, old = draw.normal(have.tokens, wide_in), draw.numbers(have.tokens, wide_out)
    adapted = torch.zeros(have.tokens, dtype=torch.bool)
    for own, _, _ in have.pieces:
        adapted[own] = True
    rows[~adapted] = float("nan")
    x, y = draw.put(rows, dtype, apart=(0,)), draw.put(old, dtype, apart=(0,), written=True)
    before, index = exact(y).clone(), (have.start, have.adapters)
    together = draw.chance(0.6)
    if together:
        s = grouped_lora_triton(y, x, have.a, have.b, have.ranks, have.scales, *index)
        given = s
    else:
        s = lora_shrink_triton(x, have.a, have.ranks, *index)
        given = draw.put(s.cpu().double(), draw.some(torch.float32, dtype), apart=(0,))
        lora_expand_triton(y, given, have.b, have.ranks, have.scales, *index)
    assert s.dtype == torch.float32
    rounding = ROUNDING[y.dtype]
    again = before.clone()
    low = grouped_lora_reference(
        again,
        *(exact(z) for z in (x, have.a, have.b)),
        have.ranks.cpu(),
        have.scales.cpu(),
        *(z.cpu() for z in index),
    )
    same("rows without an adapter", y[~adapted.to(y.device)], before[~adapted])
    for own, n, r in have.pieces:
        x_own, a, b = exact(x[own]), exact(have.a[n, :r]), exact(have.b[n, :, :r])
        wanted = x_own @ a.T
        magnitude = x_own.abs() @ a.abs().T
        close("s", s[own, :r], wanted, SUMS * magnitude)
        close("reference s", low[own, :r], wanted, 1e-12 * magnitude)
        if not together:
            assert not bool(s[own, r:].any()), "columns beyond a rank"
        scale = float(have.scales[n])
        total = before[own] + scale * wanted @ b.T
        magnitude = before[own].abs() + abs(scale) * magnitude @ b.abs().T
        launches = -(-have.a.shape[1] // 128)
        allowed = launches * rounding * magnitude
        if y.dtype == torch.float16:
            allowed += SMALLEST * (launches + abs(scale) * b.abs().sum(1))
        close("y", y[own], total, allowed)
        close("reference y", again[own], total, 1e-12 * magnitude)


def weight_grad(draw: Draw) -> None:
    dtype, rank = draw.some(*PRODUCTS), int(draw.some(1, 3, 8, 16, 17, 48, 64, 150))
    tokens, features, scale = draw.upto(150), 1 + draw.upto(200), float(draw.normal(1)[0])
    small = torch.full((tokens, rank + int(draw.some(0, 0, 5))), float("nan"), dtype=torch.float64)
    small[:, :rank] = draw.numbers(tokens, rank)
    low = draw.put(small, draw.some(torch.float32, dtype), apart=(0,))
    wide = draw.put(draw.numbers(tokens, features), dtype, apart=(0,))
    order = draw.some((0, 1), (1, 0))
    grad = draw.put(draw.numbers(rank, features), torch.float32, order=order, apart=(0, 1), written=True)
    before, l_rows, w_rows = exact(grad).clone(), exact(low)[:, :rank], exact(wide)
    lora_weight_grad_triton(grad, low, wide, scale)
    allowed = SUMS * before.abs() + ROUNDING[wide.dtype] * abs(scale) * (l_rows.abs().T @ w_rows.abs())
    if wide.dtype == torch.float16:
        allowed += SMALLEST * abs(scale) * w_rows.abs().sum(0)
    close("grad", grad, before + scale * l_rows.T @ w_rows, allowed)


def rotary(draw: Draw) -> None:
    dtype, (tokens, heads) = draw.some(*TYPES), (draw.upto(6), int(draw.some(1, 2, 3, 5, 8, 12)))
    half = int(draw.some(1, 3, 8, 16, 32, 64, 128))
    x = draw.put(draw.numbers(tokens, heads, 2 * half), dtype, apart=(0,))
    angle = draw.normal(tokens, 1, half) * draw.some(1, 1000)
    cos, sin = (draw.put(z, torch.float32) for z in (angle.cos(), angle.sin()))
    into = draw.some(None, x.dtype, *TYPES)
    out = None if into is None else draw.result(*x.shape, dtype=into, apart=(0,))
    found = rotate_triton(x, cos, sin, out)
    assert out is None or found is out
    wide, c, s = (exact(z) for z in (x, cos, sin))
    first, second = wide.abs().chunk(2, dim=2)
    magnitude = torch.cat((first * c.abs() + second * s.abs(), second * c.abs() + first * s.abs()), dim=2)
    allowed = ROUNDING[found.dtype] * magnitude + (SMALLEST if found.dtype == torch.float16 else 0)
    close("out", found, rotate(wide, c, s), allowed)


def norm(draw: Draw) -> None:
    tokens, width = draw.upto(6), int(draw.some(1, 2, 7, 16, 48, 100, 576, 1024, 1500, 2560))
    dtype, other = draw.some(*TYPES), draw.some(*TYPES)
    x = draw.put(draw.numbers(tokens, width) * draw.some(1, 1, 1e3), dtype, apart=(0,))
    dy = draw.put(draw.numbers(tokens, width), draw.some(dtype, other), apart=(0,))
    weight = draw.put(draw.normal(width), draw.some(dtype, other))
    eps = float(draw.some(1e-5, 1e-6))
    dx = draw.result(tokens, width, dtype=x.dtype)
    norm_backward_launch(dy, x, weight, dx, eps).run()
    wide, g = exact(x), exact(dy) * exact(weight)
    wanted = rms_norm_backward(exact(dy), wide, exact(weight), eps)
    r = (wide.square().mean(1, keepdim=True) + eps).rsqrt()
    n = (wide * r).abs()
    magnitude = r * (g.abs() + n * (g.abs() * n).mean(1, keepdim=True))
    close("dx", dx, wanted, ROUNDING[dx.dtype] * magnitude + (SMALLEST if dx.dtype == torch.float16 else 0))


def swiglu(draw: Draw) -> None:
    tokens, width = draw.upto(5), int(draw.some(1, 5, 48, 100, 1000, 1024, 1025, 2100))
    dtype = draw.some(*TYPES)
    both = draw.numbers(tokens, 2 * width) * draw.some(1, 1, 12)
    if draw.chance(0.5):
        gate, up = draw.put(both, dtype, apart=(0,)).chunk(2, dim=1)
    else:
        gate, up = (draw.put(part, dtype, apart=(0,)) for part in both.chunk(2, dim=1))
    d = draw.put(draw.numbers(tokens, width), draw.some(dtype, torch.float32), apart=(0,))
    out = draw.result(tokens, 2 * width, dtype=gate.dtype)
    swiglu_backward_launch(d, gate, up, out).run()
    wide, g, u = exact(d), exact(gate), exact(up)
    wanted = swiglu_backward(wide, g, u)
    s = g.sigmoid()
    magnitude = torch.cat(((wide * u * s).abs() * (1 + (g * (1 - s)).abs()), (wide * g * s).abs()), dim=1)
    # Far below 0 the sigmoid is an exponential, whose error grows with the gate.
    far = 1 + g.abs().repeat(1, 2)
    allowed = (ROUNDING[out.dtype] + SUMS * far) * magnitude + (SMALLEST if out.dtype == torch.float16 else 0)
    close("out", out, wanted, allowed)


def drops(draw: Draw) -> None:
    dtype, (rows, width) = draw.some(*TYPES), (draw.upto(5), int(draw.some(1, 7, 300, 1024, 1030, 2500)))
    x = draw.put(draw.normal(rows, width) + 10, dtype, apart=(0,))
    rate = float(draw.some(0.0, 1e-3, 0.1, 0.5, 0.9, 0.999))
    key = int(draw.some(0, 1, 2**31 - 1, 2**31, 2**32 - 1, draw.random.integers(2**32)))
    position, column = int(draw.some(0, 1, 4095, 10**6)), int(draw.some(0, 1, 4096))
    found = dropout_triton(x, rate, key, position, column)
    wanted = dropout(exact(x), rate, key, position, column)
    assert torch.equal(found.cpu() == 0, wanted == 0), "other numbers are dropped"
    close("kept", found, wanted, ROUNDING[found.dtype] * wanted.abs())


def writes(draw: Draw) -> None:
    dtype, (tokens, kv_heads) = draw.some(*TYPES), (draw.upto(12), int(draw.some(1, 2, 3, 5, 8)))
    head_dim, size = int(draw.some(1, 16, 24, 64, 80, 128)), int(draw.some(1, 3, 16, 32))
    count = -(-tokens // size) + int(draw.some(1, 4))
    slots = torch.from_numpy(draw.random.permutation(count * size)[:tokens].copy())
    slots[torch.from_numpy(draw.random.random(tokens) < 0.2)] = -int(draw.some(1, 7))
    k, v = (draw.put(draw.normal(tokens, kv_heads, head_dim), dtype, apart=(0,)) for _ in range(2))
    nesting = draw.some((0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (0, 1, 3, 2, 4), (1, 3, 0, 2, 4))
    pages = draw.put(
        draw.normal(2, count, size, kv_heads, head_dim),
        dtype,
        order=nesting,
        apart=(0, 1, 2, 3),
        written=True,
    )
    wanted = pages.cpu().clone()
    index = draw.put(slots, draw.some(torch.int32, torch.int64))
    write_kv_triton(k, v, *pages, index)
    write_kv_reference(k.cpu(), v.cpu(), *wanted, index.cpu())
    assert torch.equal(pages.cpu(), wanted)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(pages[0, slot // size, slot % size], k[token])
            assert torch.equal(pages[1, slot // size, slot % size], v[token])


class _Ranks:
    """Groups of threads, which meet in their collectives."""

    def __init__(self, size: int) -> None:
        self.size, self.given = size, [torch.empty(0)] * size
        self._barrier = Barrier(size)

    def meet(self, rank: int, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape]"""
        self.given[rank] = x
        self._barrier.wait(60)
        every = torch.stack(self.given)
        self._barrier.wait(60)
        return every

    def run(self, function: Callable[[Group], Any]) -> list[Any]:
        found: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            found[rank] = function(_Rank(rank, self))

        threads = [Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class _Rank(Group):
    def __init__(self, rank: int, ranks: _Ranks) -> None:
        super().__init__(rank, ranks.size)
        self._ranks = ranks

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self._ranks.meet(self.rank, x).sum(0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._ranks.meet(self.rank, x)


def loss(draw: Draw) -> None:
    """Of the whole vocabulary, and split over ranks."""
    dtype = draw.some(torch.float64, torch.float32, torch.bfloat16)
    tokens, width, vocabulary = draw.upto(40), 1 + draw.upto(70), int(draw.some(5, 33, 400))
    # Between numbers, not NaN: of bfloat16 the product on the CPU multiplies what lies behind a row by 0.
    hidden, weight = (
        draw.numbers(rows, width + 8).to(draw.device, dtype)[:, :width] for rows in (tokens, vocabulary)
    )
    labels = torch.from_numpy(draw.random.integers(0, vocabulary, tokens))
    labels[torch.from_numpy(draw.random.random(tokens) < draw.some(0, 0.3, 1))] = IGNORE_LABEL
    targets = draw.put(labels)
    chunk, size = int(draw.some(1, 3, 16, 512)), int(draw.some(1, 1, 2, 4))
    wanted = exact(hidden) @ exact(weight).T
    sums = exact(hidden).abs() @ exact(weight).abs().T
    used = labels != IGNORE_LABEL
    p = wanted.softmax(1)
    target = torch.nn.functional.one_hot(labels.clamp(min=0), vocabulary).double()
    losses = (-wanted.log_softmax(1) * target).sum(1)[used]
    if size == 1:
        found = [linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk, group=ALONE)]
    else:

        def part(group: Group) -> Any:
            own = group.share(vocabulary)
            return linear_cross_entropy(
                hidden, weight[own], targets, chunk_tokens=chunk, group=group, first_row=own.start
            )

        found = _Ranks(size).run(part)
    logits = 2 * ROUNDING[hidden.dtype] * (1 + sums.amax(1))
    allowed = (ROUNDING[hidden.dtype] + logits[:, None].expm1()) * ((p + target) @ exact(weight).abs())
    for total, count, d_hidden in found:
        assert int(count) == int(used.sum())
        close("loss", total, losses.sum(), logits[used].sum() + SUMS * losses.sum())
        close("d_hidden", d_hidden[used], ((p - target) @ exact(weight))[used], allowed[used])
        assert not bool(d_hidden[~used].any())


KERNELS: dict[str, Callable[[Draw], None]] = {
    f.__name__: f for f in (attention, backward, lora, weight_grad, rotary, norm, swiglu, drops, writes, loss)
}


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """What kernels are given to write has NaN in it, and whole numbers the largest."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(kernel: str, seed: int, device: str) -> None:
    draw = Draw((list(KERNELS).index(kernel), seed), device)
    with fresh_memory_is_nan():
        try:
            KERNELS[kernel](draw)
        except ValueError:
            if not draw.spoiled:
                raise
    draw.check_rest()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_with_what_nobody_thought_of(kernel: str, seed: int, native: str) -> None:
    check(kernel, seed, native)


def main() -> None:
    first, count = map(int, sys.argv[1:3])
    for number in range(first, first + count):
        for kernel in sys.argv[3:] or KERNELS:
            try:
                check(kernel, number, "cuda" if CUDA else "cpu")
            except Exception as error:
                print(f"{kernel} {number}: {type(error).__name__}: {str(error)[-600:]}", flush=True)


if __name__ == "__main__":
    if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
        # It must be chosen before Triton is imported.
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "TRITON_INTERPRET": "1"})
    if not CUDA:
        watch()
    main()
