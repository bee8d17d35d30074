from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from engine.kernels.grouped_lora import grouped_lora, grouped_lora_triton, lora_launches
from engine.kernels.lora_expand import lora_expand_reference, lora_expand_triton
from engine.kernels.lora_shrink import lora_shrink_reference, lora_shrink_triton
from engine.kernels.lora_weight_grad import lora_weight_grad, lora_weight_grad_triton, weight_grad_launch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}

MIXES = {
    # name: (tokens, adapter) of each segment; ranks by adapter are 8, 16, 64, 3
    "decodes": [(1, 0), (1, 1), (1, 2), (1, 3), (2, -1)],
    "window beside decodes": [(2, -1), (1, 1), (0, 0), (70, 2), (3, 0)],
    "one window": [(130, 1)],
    "base model only": [(9, -1)],
}
LARGE = {
    "decodes": [(1, i % 4) for i in range(100)] + [(30, -1)],
    "window beside decodes": [(1, i % 4) for i in range(50)] + [(0, 3), (512, 2)],
    "one window": [(2048, 1)],
    "base model only": [(99, -1)],
}


class Batch(NamedTuple):
    y: torch.Tensor
    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    ranks: torch.Tensor
    scales: torch.Tensor
    segment_start: torch.Tensor
    segment_adapter: torch.Tensor


def make_batch(
    segments: list[tuple[int, int]],
    wide_in: int,
    wide_out: int,
    dtype: torch.dtype,
    device: str,
    padded_rank: int = 64,
) -> Batch:
    """Two tokens lie in no segment; padding beyond a rank holds NaN. In memory a real adapter lies
    before the first, where a kernel that takes -1 for an index would find it."""
    draw = torch.Generator().manual_seed(wide_in)
    lengths, adapters = zip(*segments, strict=True)
    tokens, ranks = sum(lengths) + 2, [8, 8, 16, padded_rank, 3]
    y, x = torch.randn(tokens, wide_out, generator=draw), torch.randn(tokens, wide_in, generator=draw)
    a = torch.randn(5, padded_rank, wide_in, generator=draw) / wide_in**0.5
    b = torch.randn(5, wide_out, padded_rank, generator=draw) / padded_rank**0.5
    for n, rank in enumerate(ranks):
        a[n, rank:] = float("nan")
        b[n, :, rank:] = float("nan")
    return Batch(
        *(z.to(device, dtype) for z in (y, x)),
        *(z.to(device, dtype)[1:] for z in (a, b)),
        torch.tensor(ranks, dtype=torch.int32, device=device)[1:],
        torch.tensor([3.0, 2.0, 0.5, 1.0, -1.0], device=device)[1:],
        torch.tensor([0, *lengths]).cumsum(0).int().to(device),
        torch.tensor(adapters, dtype=torch.int32, device=device),
    )


def exact(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """y and s token by token, in float64; s is NaN where it is undefined."""
    y, x, a, b, ranks, scales, start, adapters = (z.cpu() for z in batch)
    y, s = y.double(), torch.full((x.shape[0], a.shape[1]), torch.nan).double()
    for g, n in enumerate(adapters.tolist()):
        for t in range(int(start[g]), int(start[g + 1])):
            if n >= 0:
                r = int(ranks[n])
                s[t, :r] = a[n, :r].double() @ x[t].double()
                y[t] += float(scales[n]) * (b[n, :, :r].double() @ s[t, :r])
    return y, s


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, of what is defined."""
    defined = ~wanted.isnan()
    wanted = wanted[defined]
    return float((found.cpu().double()[defined] - wanted).norm() / wanted.norm().clamp(min=1.0))


@pytest.mark.parametrize("mix", MIXES)
def test_the_reference_is_each_tokens_own_adapter(mix: str) -> None:
    batch = make_batch(MIXES[mix], 40, 24, torch.float64, "cpu")
    wanted_y, wanted_s = exact(batch)
    s = grouped_lora(*batch)
    assert error(batch.y, wanted_y) < 1e-12
    torch.testing.assert_close(s, wanted_s, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(("wide_in", "wide_out", "padded_rank"), [(300, 130, 64), (1100, 48, 16)])
@pytest.mark.parametrize("mix", MIXES)
def test_kernels_are_each_tokens_own_adapter(
    mix: str, wide_in: int, wide_out: int, padded_rank: int, dtype_name: str, size: str, native: str
) -> None:
    dtype = getattr(torch, dtype_name)
    segments = (LARGE if size == "large" else MIXES)[mix]
    factor = 4 if size == "large" else 1
    batch = make_batch(segments, wide_in * factor, wide_out * factor, dtype, native, padded_rank)
    untouched = batch.y.clone()
    wanted_y, wanted_s = exact(batch)
    s = grouped_lora_triton(*batch)
    assert error(batch.y, wanted_y) < TOLERANCE[dtype]
    start = batch.segment_start.tolist()
    for g, (_, n) in enumerate(segments):
        part = slice(start[g], start[g + 1])
        if n < 0:
            assert torch.equal(batch.y[part], untouched[part])
        else:
            rank = int(batch.ranks[n])
            assert error(s[part, :rank], wanted_s[part, :rank]) < TOLERANCE[dtype]
    assert torch.equal(batch.y[start[-1] :], untouched[start[-1] :])


@pytest.mark.parametrize("rank", [5, 12])
def test_ranks_that_fill_no_access_are_read_within_the_buffers(rank: int, native: str) -> None:
    """Of the last adapter: what lies beyond it belongs to somebody else."""
    batch = make_batch([(3, 3), (2, 0)], 40, 24, torch.float32, native)
    batch = batch._replace(
        a=batch.a[:, :rank].nan_to_num().clone(),
        b=batch.b[:, :, :rank].nan_to_num().clone(),
        ranks=torch.full_like(batch.ranks, rank),
    )
    wanted_y, wanted_s = exact(batch)
    s = grouped_lora_triton(*batch)
    assert error(batch.y, wanted_y) < TOLERANCE[torch.float32]
    assert error(s[:5], wanted_s[:5]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("padded_rank", [16, 160])
@pytest.mark.parametrize("mix", ["decodes", "window beside decodes"])
def test_products_alone_and_ranks_of_several_launches_are_each_tokens_own_adapter(
    mix: str, padded_rank: int, native: str
) -> None:
    batch = make_batch(MIXES[mix], 300, 130, torch.float32, native, padded_rank)
    y, x, a, b, ranks, scales, *index = batch
    wanted_y, wanted_s = exact(batch)
    adapted = torch.zeros(len(x), dtype=torch.bool)
    for (first, end), n in zip(pairwise(index[0].tolist()), index[1].tolist(), strict=True):
        adapted[first:end] = n >= 0
    for shrink, expand in (
        (lora_shrink_triton, lora_expand_triton),
        (lora_shrink_reference, lora_expand_reference),
    ):
        s = shrink(x, a, ranks, *index)
        assert error(s[adapted.to(s.device)], wanted_s[adapted]) < TOLERANCE[torch.float32]
        out = y.clone()
        expand(out, s, b, ranks, scales, *index)
        assert error(out, wanted_y) < TOLERANCE[torch.float32]
    fused = y.clone()
    s = grouped_lora_triton(fused, x, a, b, ranks, scales, *index)
    assert error(s[adapted.to(s.device)], wanted_s[adapted]) < TOLERANCE[torch.float32]
    assert error(fused, wanted_y) < TOLERANCE[torch.float32]


def test_weight_gradients_of_a_rank_of_several_launches(native: str) -> None:
    small, wide = torch.randn(50, 160), torch.randn(50, 90)
    grad = torch.ones(150, 90, device=native)
    lora_weight_grad_triton(grad, small.to(native), wide.to(native), 0.5)
    assert error(grad, 1 + 0.5 * small[:, :150].double().T @ wide.double()) < TOLERANCE[torch.float32]


def test_weight_gradients_of_what_is_kept_in_the_type_of_the_other_factor(native: str) -> None:
    small, wide = torch.randn(50, 16).half(), torch.randn(50, 90).half()
    wanted = torch.randn(16, 90)
    grad, reference = wanted.to(native), wanted.clone()
    wanted = wanted.double() + 0.5 * small.double().T @ wide.double()
    lora_weight_grad_triton(grad, small.to(native), wide.to(native), 0.5)
    assert error(grad, wanted) < TOLERANCE[torch.float32]
    lora_weight_grad(reference, small, wide, 0.5)
    assert error(reference, wanted) < TOLERANCE[torch.float32]


def test_kernels_in_half_precision(native: str) -> None:
    test_kernels_are_each_tokens_own_adapter(
        "window beside decodes", 300, 130, 64, "float16", "small", native
    )


def gradients(batch: Batch, dy: torch.Tensor, triton: bool) -> list[torch.Tensor]:
    """dx, dA and dB of the only segment."""
    n, tokens = int(batch.segment_adapter[0]), int(batch.segment_start[1])
    rank, scale = int(batch.ranks[n]), float(batch.scales[n])
    lora, weight_grad = (
        (grouped_lora_triton, lora_weight_grad_triton) if triton else (grouped_lora, lora_weight_grad)
    )
    s = lora(*batch)
    dx = torch.zeros_like(batch.x)
    u = lora(dx, dy, batch.b.transpose(1, 2), batch.a.transpose(1, 2), *batch[4:])
    da = torch.ones(rank, batch.x.shape[1], dtype=s.dtype, device=s.device)
    db = torch.ones(batch.y.shape[1], rank, dtype=s.dtype, device=s.device)
    weight_grad(da, u[:tokens], batch.x[:tokens], scale)
    weight_grad(db.T, s[:tokens], dy[:tokens], scale)
    return [dx[:tokens], da - 1, db - 1]


def autograd(batch: Batch, dy: torch.Tensor) -> list[torch.Tensor]:
    n, tokens = int(batch.segment_adapter[0]), int(batch.segment_start[1])
    rank = int(batch.ranks[n])
    leaves = [
        z.detach().cpu().double().clone().requires_grad_()
        for z in (batch.x[:tokens], batch.a[n, :rank], batch.b[n, :, :rank])
    ]
    x, a, b = leaves
    (float(batch.scales[n]) * (x @ a.T) @ b.T).backward(dy[:tokens].cpu().double())
    return [z.grad for z in leaves]  # type: ignore[misc]


@pytest.mark.parametrize("adapter", [0, 1, 2, 3])
def test_pieces_of_backward_equal_autograd(adapter: int) -> None:
    batch = make_batch([(21, adapter)], 40, 24, torch.float64, "cpu")
    dy = torch.randn(batch.y.shape, dtype=torch.float64)
    for found, wanted in zip(gradients(batch, dy, False), autograd(batch, dy), strict=True):
        assert error(found, wanted) < 1e-12


@pytest.mark.parametrize("adapter", [0, 2, 3])
def test_kernels_of_backward_equal_autograd(adapter: int, dtype_name: str, size: str, native: str) -> None:
    dtype = getattr(torch, dtype_name)
    tokens, wide = (700, 2048) if size == "large" else (75, 150)
    batch = make_batch([(tokens, adapter)], wide + 10, wide, dtype, native)
    dy = torch.randn(batch.y.shape, generator=torch.Generator().manual_seed(1)).to(native, dtype)
    for found, wanted in zip(gradients(batch, dy, True), autograd(batch, dy), strict=True):
        assert error(found, wanted) < 2 * TOLERANCE[dtype]


def test_results_repeat_to_the_bit(native: str) -> None:
    runs = []
    for _ in range(2):
        batch = make_batch(MIXES["window beside decodes"], 300, 130, torch.float16, native)
        grouped_lora_triton(*batch)
        runs.append(batch.y)
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"y": lambda z: z[:-1]}, "y must have shape"),
        ({"x": lambda z: z.T.contiguous().T}, "x must be contiguous"),
        ({"y": lambda z: z.half()}, "y must be of type"),
        ({"a": lambda z: z[..., :-1]}, "a must have shape"),
        ({"b": lambda z: z[:, :, :8]}, "b must have shape"),
        ({"b": lambda z: z.repeat(1, 2, 2)[:, ::2, ::2]}, "one side"),
        ({"ranks": lambda z: z.long()}, "ranks must be of type"),
        ({"scales": lambda z: z.double()}, "scales must be of type"),
        ({"scales": lambda z: z.repeat(2)[::2]}, "scales must be contiguous"),
        ({"segment_start": lambda z: z[:-1]}, "segment_start must have shape"),
        (
            {"segment_start": lambda z: z[:1], "segment_adapter": lambda z: z[:0]},
            "segment_adapter must have at least one segment",
        ),
        ({"a": lambda z: z.repeat(1, 4, 1), "b": lambda z: z.repeat(1, 1, 4)}, "padded rank"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict, match: str) -> None:  # type: ignore[type-arg]
    batch = make_batch(MIXES["decodes"], 40, 24, torch.float32, "cpu")
    batch = batch._replace(**{name: f(getattr(batch, name)) for name, f in change.items()})
    with pytest.raises(ValueError, match=match):
        lora_launches(*batch)


@pytest.mark.parametrize(
    ("grad", "small", "wide", "match"),
    [
        ((4, 30), (9, 8), (9, 31), "grad must have shape"),
        ((4, 30), (8, 8), (9, 30), "small must have shape"),
        ((16, 30), (9, 8), (9, 30), "at least 16 columns"),
        ((200, 30), (9, 200), (9, 30), "rank"),
    ],
)
def test_weight_gradients_that_do_not_fit_are_refused(
    grad: tuple[int, int], small: tuple[int, int], wide: tuple[int, int], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        weight_grad_launch(torch.zeros(grad), torch.zeros(small), torch.zeros(wide), 1.0)


@pytest.mark.parametrize(
    ("grad", "small", "match"),
    [
        (torch.bfloat16, torch.float32, "grad must be of type"),
        (torch.float64, torch.float64, "grad must be of type"),
        (torch.float32, torch.float16, "small must be of type"),
        (torch.float32, torch.float64, "small must be of type"),
    ],
)
def test_types_of_weight_gradients_that_do_not_fit_are_refused(
    grad: torch.dtype, small: torch.dtype, match: str
) -> None:
    wide = torch.zeros(9, 30, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=match):
        weight_grad_launch(torch.zeros(4, 30, dtype=grad), torch.zeros(9, 8, dtype=small), wide, 1.0)
