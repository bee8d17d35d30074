"""The elementwise kernels of our own, and on a GPU those of Liger, give what torch gives on the CPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from engine.elementwise import (
    liger,
    require_kernels,
    rms_norm,
    rms_norm_backward,
    rotate,
    swiglu,
    swiglu_backward,
)
from engine.kernels.norm_backward import norm_backward_launch, rms_norm_backward_triton
from engine.kernels.rotary import rotate_launch, rotate_triton
from engine.kernels.swiglu_backward import swiglu_backward_launch, swiglu_backward_triton

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
}
"""Two roundings of the type; torch rounds once more in places."""

WIDE = {"small": 48, "large": 4096}


def draw(seed: int, *shape: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def angles(tokens: int, half: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    angle = draw(9, tokens, 1, half, device="cpu", dtype=torch.float32) * 3
    return angle.cos().to(device), angle.sin().to(device)


@pytest.mark.parametrize("head_dim", [16, 64])
def test_rotation_of_a_slice_of_a_projection(head_dim: int, dtype_name: str, native: str) -> None:
    dtype, heads = getattr(torch, dtype_name), 3
    fused = draw(0, 5, heads * head_dim + 24, device=native, dtype=dtype)
    x = fused[:, 24:].view(5, heads, head_dim)
    cos, sin = angles(5, head_dim // 2, native)
    found = rotate_triton(x, cos, sin)
    assert found.is_contiguous()
    assert found.dtype == dtype
    wanted = rotate(x.cpu(), cos.cpu(), sin.cpu())
    torch.testing.assert_close(found.cpu(), wanted, **TOLERANCE[dtype])
    back = rotate_triton(found, cos, -sin)
    torch.testing.assert_close(back, x.contiguous(), **TOLERANCE[dtype])


def test_rotation_goes_to_a_slice_of_another_type(native: str) -> None:
    """Of keys' gradients, which are float32, to their part of the gradient of the projection."""
    x, (cos, sin) = draw(0, 5, 2, 16, device=native, dtype=torch.float32), angles(5, 8, native)
    fused = torch.zeros(5, 56, device=native, dtype=torch.float16)
    rotate_triton(x, cos, sin, fused[:, 16:48].view(5, 2, 16))
    wanted = torch.zeros(5, 56, dtype=torch.float16)
    rotate(x.cpu(), cos.cpu(), sin.cpu(), wanted[:, 16:48].view(5, 2, 16))
    assert wanted[:, 16:48].any(1).all()
    torch.testing.assert_close(fused.cpu(), wanted, rtol=1e-3, atol=1e-5)


def test_backward_of_the_norm_needs_only_its_input(dtype_name: str, size: str, native: str) -> None:
    dtype, width = getattr(torch, dtype_name), WIDE[size]
    fused = draw(1, 6, width + 8, device=native, dtype=dtype)
    x, dy = fused[:, :width], draw(2, 6, width, device=native, dtype=dtype)
    weight = draw(3, width, device=native, dtype=dtype)
    found = rms_norm_backward_triton(dy, x, weight, 1e-5)
    wanted = rms_norm_backward(dy.cpu(), x.cpu(), weight.cpu(), 1e-5)
    torch.testing.assert_close(found.cpu(), wanted, **TOLERANCE[dtype])


@pytest.mark.parametrize("fused", [True, False])
def test_backward_of_swiglu_in_either_layout(fused: bool, dtype_name: str, size: str, native: str) -> None:
    dtype, width = getattr(torch, dtype_name), WIDE[size]
    both = draw(7, 6, 2 * width, device=native, dtype=dtype) * 3
    gate, up = both.chunk(2, dim=1) if fused else (part.contiguous() for part in both.chunk(2, dim=1))
    d_active, before = draw(8, 6, width, device=native, dtype=dtype), both.clone()
    found = swiglu_backward_triton(d_active, gate, up)
    assert torch.equal(torch.cat((gate, up), dim=1), before)
    wanted = swiglu_backward(d_active.cpu(), gate.cpu(), up.cpu())
    torch.testing.assert_close(found.cpu(), wanted, **TOLERANCE[dtype])


def test_the_references_are_the_gradients_of_autograd() -> None:
    kind: Any = {"device": "cpu", "dtype": torch.float64}
    x = draw(4, 5, 12, **kind).requires_grad_()
    weight, dy = draw(5, 12, **kind), draw(6, 5, 12, **kind)
    rms_norm(x, weight, 1e-5).backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(rms_norm_backward(dy, x.detach(), weight, 1e-5), x.grad)
    x.grad = None
    swiglu(*x.chunk(2, dim=1)).backward(dy[:, :6])
    torch.testing.assert_close(swiglu_backward(dy[:, :6], *x.detach().chunk(2, dim=1)), x.grad)


@pytest.mark.parametrize("which", ["shape", "angles", "type", "odd"])
def test_rotations_that_do_not_fit_are_refused(which: str) -> None:
    x, (cos, sin) = torch.zeros(4, 2, 16), angles(4, 8, "cpu")
    wrong = {
        "shape": (x[0], cos, sin),
        "angles": (x, cos[:3], sin),
        "type": (x, cos.double(), sin),
        "odd": (torch.zeros(4, 2, 15), cos, sin),
    }[which]
    with pytest.raises(ValueError, match="must"):
        rotate_launch(*wrong, torch.empty_like(wrong[0]))


@pytest.mark.parametrize("which", ["shape", "columns", "type"])
def test_gates_that_do_not_fit_are_refused(which: str) -> None:
    x = torch.zeros(4, 16)
    wrong = {"shape": (x, x, x[:3]), "columns": (x, x.T.contiguous().T, x), "type": (x, x, x.double())}[which]
    with pytest.raises(ValueError, match="must"):
        swiglu_backward_launch(*wrong, torch.empty(4, 32))


@pytest.mark.parametrize("which", ["rows", "weight", "columns", "type"])
def test_norms_that_do_not_fit_are_refused(which: str) -> None:
    x, weight = torch.zeros(4, 16), torch.ones(16)
    wrong = {
        "rows": (x[:3], x, weight),
        "weight": (x, x, weight[:8]),
        "columns": (x, x, torch.ones(32)[::2]),
        "type": (x, x.double(), weight),
    }[which]
    with pytest.raises(ValueError, match="must"):
        norm_backward_launch(*wrong, torch.empty_like(x), 1e-5)


def test_a_missing_library_is_an_error_before_the_first_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("liger_kernel", "liger_kernel.ops.rms_norm", "liger_kernel.ops.swiglu"):
        monkeypatch.setitem(sys.modules, name, None)
    liger.cache_clear()
    require_kernels(torch.device("cpu"))
    with pytest.raises(ValueError, match="liger-kernel"):
        require_kernels(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 16, 512])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_what_runs_on_cuda_equals_what_runs_on_the_cpu(dtype: torch.dtype, rows: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    kind: Any = {"device": "cuda", "dtype": dtype}
    x, dy, weight = draw(0, rows, 96, **kind), draw(1, rows, 96, **kind), draw(2, 96, **kind)
    pairs = [
        (rms_norm(x, weight, 1e-5), rms_norm(x.cpu(), weight.cpu(), 1e-5)),
        (rms_norm_backward(dy, x, weight, 1e-5), rms_norm_backward(dy.cpu(), x.cpu(), weight.cpu(), 1e-5)),
        (swiglu(*x.chunk(2, dim=1)), swiglu(*x.cpu().chunk(2, dim=1))),
        (
            swiglu_backward(dy[:, :48], *x.chunk(2, dim=1)),
            swiglu_backward(dy[:, :48].cpu(), *x.cpu().chunk(2, dim=1)),
        ),
    ]
    before = x.clone()
    for found, wanted in pairs:
        torch.testing.assert_close(found.cpu(), wanted, **TOLERANCE[dtype])
    assert torch.equal(x, before)
