"""Norms, rotary embedding and SwiGLU of a packed batch, forward and backward.

One place for all that is neither a matrix product nor attention. Everything computes in float32 (float64 for
float64) and rounds once. Shapes as in `engine.model`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that elementwise steps and sums over `dtype` compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, E] * r * weight [E], r = 1 / sqrt(mean x^2 + eps)."""
    return F.rms_norm(x, (x.shape[1],), weight, eps)


def rms_norm_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Gradient at x [T, E] of `rms_norm`; with n = x r and g = dy weight: dx = r (g - n mean(g n))."""
    compute = compute_dtype(x.dtype)
    wide = x.to(compute)
    r = (wide.square().mean(1, keepdim=True) + eps).rsqrt()
    n = wide * r
    g = dy.to(compute) * weight.to(compute)
    return (r * (g - n * (g * n).mean(1, keepdim=True))).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [T, heads, D]: its first half against its second. With -sin, its backward."""
    first, second = x.to(cos.dtype).chunk(2, dim=2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=2).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, all [T, F]."""
    return F.silu(gate) * up


def swiglu_backward(d_active: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Gradient at [gate, up] [T, 2 F] of `swiglu`: silu' = s (1 + gate (1 - s)), s the sigmoid."""
    compute = compute_dtype(gate.dtype)
    d, g, u = d_active.to(compute), gate.to(compute), up.to(compute)
    s = g.sigmoid()
    return torch.cat((d * u * s * (1 + g * (1 - s)), d * g * s), dim=1).to(gate.dtype)
