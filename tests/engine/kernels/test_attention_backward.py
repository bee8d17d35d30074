from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from engine.kernels.attention_backward import (
    attention_backward,
    attention_backward_triton,
    backward_launches,
)
from engine.kernels.paged_attention import paged_attention_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}
"""Of |gradient - exact| / |exact|."""


class Sample(NamedTuple):
    """One sample's attention: inputs, forward results, and autograd's gradients of the whole."""

    dout: torch.Tensor
    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    block_table: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def make_sample(
    tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str
) -> Sample:
    """Pages in random order, NaN behind the sample's end; gradients by torch's attention in float64."""
    draw = torch.Generator().manual_seed(tokens + head_dim)
    pages_used = -(-tokens // 16)
    table = torch.randperm(pages_used + 2, generator=draw)[:pages_used]
    q, dout = (torch.randn(tokens, heads[0], head_dim, generator=draw).to(dtype) for _ in range(2))
    leaves, pages = [q.double().clone().requires_grad_()], []
    for _ in range(2):
        rows = torch.randn(tokens, heads[1], head_dim, generator=draw).to(dtype)
        page = torch.full((pages_used + 2, 16, heads[1], head_dim), float("nan"), dtype=dtype)
        slot = torch.arange(tokens)
        page[table[slot // 16], slot % 16] = rows
        pages.append(page)
        leaves.append(rows.double().clone().requires_grad_())
    F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in leaves), is_causal=True, enable_gqa=True
    )[0].transpose(0, 1).backward(dout.double())
    index = table.int()
    out, lse = paged_attention_reference(
        q,
        pages[0],
        pages[1],
        index[None],
        torch.tensor([0, tokens], dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        scale=head_dim**-0.5,
    )
    inputs = (x.to(device) for x in (dout, q, out, lse, *pages, index))
    return Sample(*inputs, *(x.grad for x in leaves))  # type: ignore[arg-type]


def run_windows(
    sample: Sample, cuts: list[int], scale: float, splits: int | None = None, triton: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All windows right to left; the accumulators start at 1 and have rows behind the sample."""
    dout, q, out, lse = sample[:4]
    shape = (q.shape[0] + 3, *sample.k_pages.shape[2:])
    dk, dv = (torch.ones(shape, dtype=lse.dtype, device=q.device) for _ in range(2))
    dq = torch.full_like(q, float("nan"))
    for first, last in reversed(list(pairwise(cuts))):
        part = slice(first, last)
        window = (dout[part], q[part], out[part], lse[part], *sample[4:7], dk, dv)
        if triton:
            dq[part] = attention_backward_triton(*window, start=first, scale=scale, splits=splits)
        else:
            dq[part] = attention_backward(*window, start=first, scale=scale)
        for total in (dk, dv):
            assert bool((total[last:] == 1).all()) or last < q.shape[0]
    for total in (dk, dv):
        assert bool((total[q.shape[0] :] == 1).all())
    return dq, dk[: q.shape[0]] - 1, dv[: q.shape[0]] - 1


def check(sample: Sample, found: tuple[torch.Tensor, ...]) -> None:
    for name, grad, wanted in zip(("dq", "dk", "dv"), found, sample[7:], strict=True):
        error = float((grad.cpu().double() - wanted).norm() / wanted.norm())
        assert error < TOLERANCE[sample.q.dtype], f"{name}: {error}"


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize(
    "cuts", [[0, 37], [0, 1, 37], [0, 36, 37], [0, 5, 6, 23, 37], list(range(38)), [0, 16, 32, 37]]
)
def test_windows_from_right_to_left_equal_autograd_on_the_whole(
    cuts: list[int], heads: tuple[int, int]
) -> None:
    sample = make_sample(37, heads, 16, torch.float64, "cpu")
    check(sample, run_windows(sample, cuts, 0.25))


def test_torch_has_one_thread() -> None:
    """With more, the first `exp` of a process need not be exact: tests/conftest.py."""
    assert torch.get_num_threads() == 1


def test_gradients_of_a_windows_own_keys_are_final_once_it_has_passed() -> None:
    sample = make_sample(37, (4, 2), 16, torch.float64, "cpu")
    dk, dv = (torch.zeros(37, 2, 16, dtype=torch.float64) for _ in range(2))
    attention_backward(*(x[20:] for x in sample[:4]), *sample[4:7], dk, dv, start=20, scale=0.25)
    torch.testing.assert_close(dk[20:], sample.dk[20:])
    torch.testing.assert_close(dv[20:], sample.dv[20:])
    assert float((dk[:20] - sample.dk[:20]).norm()) > 0.1


@pytest.mark.parametrize(
    ("heads", "head_dim", "splits"),
    [((4, 2), 64, None), ((4, 2), 64, 2), ((3, 3), 64, None), ((5, 1), 128, 4)],
)
@pytest.mark.parametrize("share", [(0, 1), (0, 0.02, 0.5, 0.58, 1), (0, 0.46, 0.92, 1)])
def test_kernels_from_right_to_left_equal_autograd_on_the_whole(
    share: tuple[float, ...],
    heads: tuple[int, int],
    head_dim: int,
    splits: int | None,
    dtype_name: str,
    size: str,
    native: str,
) -> None:
    tokens = 1100 if size == "large" else 70
    sample = make_sample(tokens, heads, head_dim, getattr(torch, dtype_name), native)
    cuts = [round(s * tokens) for s in share]
    check(sample, run_windows(sample, cuts, head_dim**-0.5, splits, triton=True))


def test_kernels_in_half_precision(native: str) -> None:
    sample = make_sample(70, (4, 2), 64, torch.float16, native)
    check(sample, run_windows(sample, [0, 32, 64, 70], 0.125, triton=True))


@pytest.mark.gpu
def test_pages_behind_2_to_the_31_numbers_are_found(native: str) -> None:
    if native != "cuda":
        pytest.skip("takes 9 GB")
    sample = make_sample(70, (4, 2), 64, torch.float16, native)
    k, v = (
        torch.cat((pages.new_empty(2**31 // pages[0].numel(), *pages.shape[1:]), pages))
        for pages in sample[4:6]
    )
    table = sample.block_table + len(k) - len(sample.k_pages)
    moved = sample._replace(k_pages=k, v_pages=v, block_table=table)
    runs = [run_windows(given, [0, 30, 70], 0.125, triton=True) for given in (sample, moved)]
    for near, found in zip(*runs, strict=True):
        assert torch.equal(near, found)


def test_rows_that_32_bits_do_not_reach_are_refused() -> None:
    tokens, kind = 2**20 + 16, {"dtype": torch.bfloat16, "device": "meta"}
    rows, pages = torch.empty(tokens, 16, 128, **kind), torch.empty(tokens // 16, 16, 2, 128, **kind)
    lse, total = torch.empty(tokens, 16, device="meta"), torch.empty(tokens, 2, 128, device="meta")
    table = torch.empty(tokens // 16, dtype=torch.int32, device="meta")

    def launches(tokens: int) -> object:
        window = (*[rows[:tokens]] * 3, lse[:tokens], pages, pages, table, total, total)
        return backward_launches(*window, start=0, scale=1.0, splits=None)

    launches(2**20)
    with pytest.raises(ValueError, match="dout must span at most 2147483648 numbers"):
        launches(2**20 + 1)


def test_results_repeat_to_the_bit(native: str) -> None:
    sample = make_sample(70, (4, 2), 64, torch.float16, native)
    runs = [run_windows(sample, [0, 30, 70], 0.125, triton=True) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dout": lambda x: x[:-1]}, "dout must have shape"),
        ({"out": lambda x: x.half()}, "out must be of type"),
        ({"dout": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)}, "dout must be contiguous"),
        ({"lse": lambda x: x.T.contiguous().T}, "lse must be contiguous"),
        ({"lse": lambda x: x.half()}, "lse must be of type"),
        ({"block_table": lambda x: x[:1]}, "pages"),
        ({"block_table": lambda x: x.long()}, "block_table must be of type"),
        ({"dk": lambda x: x[:-1], "dv": lambda x: x[:-1]}, "must hold 20 tokens"),
        ({"dv": lambda x: x[:, :1]}, "dv must have shape"),
        (
            dict.fromkeys(
                ("dout", "q", "out", "k_pages", "v_pages", "dk", "dv"), lambda x: x[..., :24].contiguous()
            ),
            "head_dim must be one of",
        ),
        (
            dict.fromkeys(("dout", "q", "out", "lse"), lambda x: x.repeat(1, 17, *[1] * (x.dim() - 2))),
            "per key head must be at most 32, got 34",
        ),
        ({"dk": lambda x: x.half(), "dv": lambda x: x.half()}, "dk must be of type"),
        ({"k_pages": lambda x: x.half(), "v_pages": lambda x: x.half()}, "k_pages must be of type"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict, match: str) -> None:  # type: ignore[type-arg]
    sample = make_sample(20, (4, 2), 64, torch.float32, "cpu")
    names = (*Sample._fields[:7], "dk", "dv")
    window = dict(zip(names, (*sample[:7], sample.dk.float(), sample.dv.float()), strict=True))
    window |= {name: f(window[name]) for name, f in change.items()}
    with pytest.raises(ValueError, match=match):
        backward_launches(**window, start=0, scale=1.0, splits=None)


@pytest.mark.parametrize("wrong", [{"start": -1}, {"start": 13}, {"splits": 0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    sample = make_sample(20, (4, 2), 64, torch.float32, "cpu")
    numbers = {"start": 0, "splits": None} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        backward_launches(*sample[:7], sample.dk.float(), sample.dv.float(), scale=1.0, **numbers)
