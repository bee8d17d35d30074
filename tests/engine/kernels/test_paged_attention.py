from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from engine.kernels.paged_attention import (
    attention_launches,
    paged_attention,
    paged_attention_reference,
    paged_attention_triton,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of |out - exact| / |exact|: operands are rounded to the type, sums are float32."""

MIXES = {
    # name: (query tokens, cached tokens) of each sequence, decodes first
    "decodes": ([1, 1, 1], [0, 15, 40]),
    "mixed": ([1, 1, 33, 7, 20], [3, 31, 0, 50, 16]),
    "window after a long prefix": ([5], [90]),
    "empty sequences between": ([1, 0, 17, 0], [8, 0, 2, 0]),
    "chunk ends on tiles": ([32, 16], [32, 16]),
}
LARGE = {
    "decodes": ([1] * 40, [17 * i + 3 for i in range(40)]),
    "mixed": ([1] * 9 + [513, 130, 64], [100 * i for i in range(9)] + [0, 1000, 64]),
    "window after a long prefix": ([512], [3500]),
    "empty sequences between": ([1, 0, 300, 0], [2000, 0, 7, 0]),
    "chunk ends on tiles": ([128, 256], [128, 64]),
}


class Batch(NamedTuple):
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor


def make_batch(
    lengths: list[int],
    contexts: list[int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: str,
) -> Batch:
    """Random pages in random order; every slot that no query may see holds NaN."""
    draw = torch.Generator().manual_seed(sum(lengths) + head_dim)
    size = 16
    keys = [n + c for n, c in zip(lengths, contexts, strict=True)]
    used = [-(-n // size) for n in keys]
    order = torch.randperm(sum(used) + 2, generator=draw).int()
    tables = torch.full((len(lengths), max(used) + 1), 10**6, dtype=torch.int32)
    pages = [torch.full((sum(used) + 2, size, heads[1], head_dim), float("nan")) for _ in range(2)]
    at = 0
    for row, blocks, n in zip(tables, used, keys, strict=True):
        row[:blocks] = order[at : at + blocks]
        at += blocks
        slot = torch.arange(n)
        for p in pages:
            p[row[slot // size].long(), slot % size] = torch.randn(n, heads[1], head_dim, generator=draw)
    q = torch.randn(sum(lengths), heads[0], head_dim, generator=draw)
    start = torch.tensor([0, *lengths]).cumsum(0).int()
    return Batch(
        *(
            x.to(device) if x.dtype == torch.int32 else x.to(device, dtype)
            for x in (q, *pages, tables, start, torch.tensor(contexts, dtype=torch.int32))
        )
    )


def exact(batch: Batch, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence by sequence with torch's attention and an explicit softmax, in float64 on the CPU."""
    q, k_pages, v_pages, tables, start, contexts = (x.cpu() for x in batch)
    out, lse = torch.zeros(q.shape).double(), torch.zeros(q.shape[:2]).double()
    for s, context in enumerate(contexts.tolist()):
        first, last = start[s : s + 2].tolist()
        n = last - first
        if n == 0:
            continue
        slots = torch.arange(context + n)
        page = tables[s][slots // k_pages.shape[1]].long()
        k, v = (p[page, slots % p.shape[1]].double().transpose(0, 1) for p in (k_pages, v_pages))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[0], 0) for x in (k, v))
        rows = q[first:last].double().transpose(0, 1)
        seen = torch.ones(n, context + n, dtype=torch.bool).tril(context)
        attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=seen, scale=scale)
        out[first:last] = attended.transpose(0, 1)
        logits = (rows @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        lse[first:last] = logits.logsumexp(-1).T
    return out, lse


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.cpu().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize("mix", MIXES)
def test_the_reference_is_causal_attention(mix: str, heads: tuple[int, int]) -> None:
    batch = make_batch(*MIXES[mix], heads, 16, torch.float64, "cpu")
    out, lse = paged_attention(*batch, scale=0.3, max_keys=128)
    wanted_out, wanted_lse = exact(batch, 0.3)
    assert error(out, wanted_out) < 1e-12
    assert error(lse, wanted_lse) < 1e-12


@pytest.mark.parametrize(
    ("heads", "head_dim", "splits"),
    [((4, 2), 64, None), ((4, 2), 64, 4), ((3, 3), 64, None), ((5, 1), 128, 2)],
)
@pytest.mark.parametrize("mix", MIXES)
def test_kernels_are_causal_attention(
    mix: str,
    heads: tuple[int, int],
    head_dim: int,
    splits: int | None,
    dtype_name: str,
    size: str,
    native: str,
) -> None:
    dtype = getattr(torch, dtype_name)
    lengths, contexts = (LARGE if size == "large" else MIXES)[mix]
    batch = make_batch(lengths, contexts, heads, head_dim, dtype, native)
    singles = next((i for i, n in enumerate(lengths) if n != 1), len(lengths))
    wanted_out, wanted_lse = exact(batch, head_dim**-0.5)
    for decodes in {0, singles}:
        out, lse = paged_attention_triton(
            *batch,
            scale=head_dim**-0.5,
            max_keys=8192 if size == "large" else 128,
            decodes=decodes,
            splits=splits,
        )
        assert error(out, wanted_out) < TOLERANCE[dtype]
        assert float((lse.cpu().double() - wanted_lse).abs().max()) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("splits", [1, 2])
def test_kernels_in_half_precision(splits: int, native: str) -> None:
    test_kernels_are_causal_attention("mixed", (4, 2), 64, splits, "float16", "small", native)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_padding_row_gives_zeros(splits: int, native: str) -> None:
    batch = make_batch([1, 1], [20, 4], (4, 2), 64, torch.float32, native)
    batch.context_lens[1] = -1
    out, lse = paged_attention_triton(*batch, scale=0.1, max_keys=64, decodes=2, splits=splits)
    reference_out, reference_lse = paged_attention_reference(*(x.cpu() for x in batch), scale=0.1)
    for o, e in ((out.cpu(), lse.cpu()), (reference_out, reference_lse)):
        assert torch.equal(o[1], torch.zeros_like(o[1]))
        assert torch.equal(e[1], torch.full_like(e[1], float("-inf")))
    torch.testing.assert_close(out.cpu(), reference_out, rtol=1e-5, atol=1e-5)


def test_no_sequences_is_no_work(native: str) -> None:
    batch = make_batch([1], [20], (4, 2), 64, torch.float32, native)
    none = Batch(
        batch.q[:0],
        batch.k_pages,
        batch.v_pages,
        batch.block_tables[:0],
        batch.query_start[:1],
        batch.context_lens[:0],
    )
    for run in (paged_attention_triton, paged_attention):
        out, lse = run(*none, scale=0.1, max_keys=64)
        assert out.shape == (0, 4, 64)
        assert lse.shape == (0, 4)


def far(pages: torch.Tensor) -> torch.Tensor:
    """The same pages with 2**31 numbers before them, which lie where an offset of 32 bits does not reach."""
    before = 2**31 // pages[0].numel()
    whole = torch.empty((before + pages.shape[0], *pages.shape[1:]), dtype=pages.dtype, device=pages.device)
    whole[before:] = pages
    return whole


@pytest.mark.gpu
def test_pages_behind_2_to_the_31_numbers_are_found(native: str) -> None:
    if native != "cuda":
        pytest.skip("takes 9 GB")
    batch = make_batch(*MIXES["mixed"], (4, 2), 64, torch.float16, native)
    k, v = far(batch.k_pages), far(batch.v_pages)
    moved = batch._replace(
        k_pages=k, v_pages=v, block_tables=batch.block_tables + k.shape[0] - len(batch.k_pages)
    )
    near, found = (
        paged_attention_triton(*given, scale=0.1, max_keys=128, decodes=2, splits=2)
        for given in (batch, moved)
    )
    assert torch.equal(near[0], found[0])
    assert torch.equal(near[1], found[1])


def test_results_repeat_to_the_bit(native: str) -> None:
    batch = make_batch(*MIXES["mixed"], (4, 2), 64, torch.float16, native)
    first, second = (
        paged_attention_triton(*batch, scale=0.1, max_keys=128, decodes=2, splits=2)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": lambda x: x[:, :, :32]}, "k_pages must have shape"),
        ({"q": lambda x: x[:, :3]}, "multiple of kv_heads"),
        ({"q": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)}, "q must be contiguous"),
        ({"q": lambda x: x.half()}, "k_pages must be of type"),
        (
            dict.fromkeys(("q", "k_pages", "v_pages"), lambda x: x[..., :24].contiguous()),
            "head_dim must be one of",
        ),
        ({"q": lambda x: x.repeat(1, 17, 1)}, "per key head must be at most 32, got 34"),
        (
            {"q": lambda x: x.double(), "k_pages": lambda x: x.double(), "v_pages": lambda x: x.double()},
            "q must be of type",
        ),
        ({"v_pages": lambda x: x[:1]}, "v_pages must have shape"),
        ({"v_pages": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)}, "equal strides"),
        ({"block_tables": lambda x: x.long()}, "block_tables must be of type"),
        ({"block_tables": lambda x: x.T.contiguous().T}, "contiguous rows"),
        ({"query_start": lambda x: x[:-1]}, "query_start must have shape"),
        ({"context_lens": lambda x: x.long()}, "context_lens must be of type"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict, match: str) -> None:  # type: ignore[type-arg]
    batch = make_batch([1, 5], [20, 4], (4, 2), 64, torch.float32, "cpu")
    batch = batch._replace(**{name: f(getattr(batch, name)) for name, f in change.items()})
    out, lse = torch.empty_like(batch.q), torch.empty(batch.q.shape[:2])
    with pytest.raises(ValueError, match=match):
        attention_launches(*batch, out, lse, scale=1.0, max_keys=64, decodes=0, splits=None)


@pytest.mark.parametrize(
    "wrong", [{"decodes": 3}, {"decodes": -1}, {"max_keys": 0}, {"splits": 3}, {"splits": 64}]
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    batch = make_batch([1, 5], [20, 4], (4, 2), 64, torch.float32, "cpu")
    numbers = {"max_keys": 64, "decodes": 0, "splits": None} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        attention_launches(
            *batch, torch.empty_like(batch.q), torch.empty(batch.q.shape[:2]), scale=1.0, **numbers
        )
