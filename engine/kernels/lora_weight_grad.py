"""Gradients of the factors of one LoRA adapter: a product over the tokens of one segment.

Shapes as in `engine.kernels.grouped_lora`; F features, I for A and O for B.
"""

from __future__ import annotations

import torch

from engine.kernels.checks import FLOATS, check_device, check_dtype, check_rows, check_shape
from engine.kernels.jit import Launch, by_layout, cdiv, jit, power_of_2_from, tl, uses_triton
from engine.kernels.lora_segments import MAX_RANK, rank_parts


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


def lora_weight_grad_triton(
    grad: torch.Tensor, small: torch.Tensor, wide: torch.Tensor, scale: float
) -> None:
    """`lora_weight_grad` by the kernel of this file."""
    if grad.shape[0] > MAX_RANK:
        for part in rank_parts(grad.shape[0]):
            lora_weight_grad_triton(grad[part], small[:, part], wide, scale)
        return
    weight_grad_launch(grad, small, wide, scale).run()


def weight_grad_launch(grad: torch.Tensor, small: torch.Tensor, wide: torch.Tensor, scale: float) -> Launch:
    """One program per block of grad's wide dimension, walking over the tokens."""
    return _launch(grad, small, wide, float(scale)).on(grad, small, wide)


@by_layout
def _launch(grad: torch.Tensor, small: torch.Tensor, wide: torch.Tensor, scale: float) -> Launch:
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


def lora_weight_grad_reference(
    grad: torch.Tensor, small: torch.Tensor, wide: torch.Tensor, scale: float
) -> None:
    """`lora_weight_grad` in torch."""
    check_weight_grad(grad, small, wide)
    grad.add_(small.to(grad.dtype)[:, : grad.shape[0]].T @ wide.to(grad.dtype), alpha=scale)
