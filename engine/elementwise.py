"""Norms, rotary embedding and SwiGLU of a packed batch, forward and backward.

One place for all that is neither a matrix product nor attention. Everything computes in float32 (float64 for
float64). The device of the tensors decides what runs: torch on the CPU; on CUDA Liger-Kernel's operators where
they take our layout without a copy (the norm; SwiGLU of the fused product), else kernels of our own, which say
why. Shapes as in `engine.model`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from engine.kernels.jit import uses_triton
from engine.kernels.norm_backward import rms_norm_backward_triton
from engine.kernels.rotary import rotate_triton
from engine.kernels.swiglu_backward import swiglu_backward_triton
from sim.errors import install_command


class Liger(NamedTuple):
    """What is used of Liger-Kernel: functions, not its autograd classes."""

    rms_norm: Callable[..., Any]
    swiglu: Callable[..., Any]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that elementwise steps and sums over `dtype` compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_kernels(device: torch.device) -> None:
    """Load what tensors on `device` need, so that what is missing shows before the first iteration.

    Raises ValueError when `device` is CUDA and liger-kernel cannot be imported.
    """
    if device.type == "cuda":
        liger()


@cache
def liger() -> Liger:
    """Liger-Kernel's operators; it takes seconds to import."""
    try:
        from liger_kernel.ops.rms_norm import rms_norm_forward
        from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward
    except ImportError as error:
        raise ValueError(
            f"a model on CUDA needs liger-kernel 0.8.5 or later; {install_command('engine')} brings it ({error})"
        ) from error
    return Liger(rms_norm_forward, swiglu_fused_gate_up_forward)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, E] * r * weight [E], r = 1 / sqrt(mean x^2 + eps)."""
    if uses_triton(x):
        # Its mode "gemma" rounds once, as torch does; "llama" would round before the weight as well.
        y: torch.Tensor = liger().rms_norm(x, weight, eps, 0.0, "gemma", None)[0]
        return y
    return F.rms_norm(x, (x.shape[1],), weight, eps)


def rms_norm_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Gradient at x [T, E] of `rms_norm`; with n = x r and g = dy weight: dx = r (g - n mean(g n))."""
    if uses_triton(x):
        return rms_norm_backward_triton(dy, x, weight, eps)
    compute = compute_dtype(x.dtype)
    wide = x.to(compute)
    r = (wide.square().mean(1, keepdim=True) + eps).rsqrt()
    n = wide * r
    g = dy.to(compute) * weight.to(compute)
    return (r * (g - n * (g * n).mean(1, keepdim=True))).to(x.dtype)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotary embedding of x [T, heads, D]: its first half against its second. With -sin, its backward.

    Goes to `out`, if there is one, in its type; its rows may be parts of longer ones.
    """
    if uses_triton(x):
        return rotate_triton(x, cos, sin, out)
    first, second = x.to(cos.dtype).chunk(2, dim=2)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=2)
    return rotated.to(x.dtype) if out is None else out.copy_(rotated)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, all [T, F]; on CUDA gate and up are the halves of one product [T, 2 F]."""
    if uses_triton(gate):
        active: torch.Tensor = liger().swiglu(_whole(gate, up))[1]
        return active
    return F.silu(gate) * up


def swiglu_backward(d_active: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Gradient at [gate, up] [T, 2 F] of `swiglu`: silu' = s (1 + gate (1 - s)), s the sigmoid."""
    if uses_triton(gate):
        return swiglu_backward_triton(d_active, gate, up)
    compute = compute_dtype(gate.dtype)
    d, g, u = d_active.to(compute), gate.to(compute), up.to(compute)
    s = g.sigmoid()
    return torch.cat((d * u * s * (1 + g * (1 - s)), d * g * s), dim=1).to(gate.dtype)


def _whole(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The tensor that these are the halves of."""
    tokens, width = gate.shape
    assert gate.stride() == up.stride() == (2 * width, 1)
    assert up.storage_offset() == gate.storage_offset() + width
    return gate.as_strided((tokens, 2 * width), (2 * width, 1))
