"""Checks of the launchers: a kernel trusts its pointers, so shapes, strides and types are refused here.

Launchers run them once for each layout of their tensors (`engine.kernels.jit.by_layout`), references each time.
"""

from __future__ import annotations

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What the Triton kernels read."""
HEAD_DIMS = (16, 32, 64, 128)


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has `shape`; None allows any length."""
    have = tensor.shape
    if len(have) == len(shape):
        for n, want in zip(have, shape, strict=True):
            if want is not None and n != want:
                break
        else:
            return
    wanted = ", ".join("any" if n is None else str(n) for n in shape)
    raise ValueError(f"{name} must have shape [{wanted}], got {list(have)}")


def check_dtype(name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless `tensor` has one of the `allowed` types."""
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} must be of type {' or '.join(str(d) for d in allowed)}, got {tensor.dtype}")


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raise ValueError unless `tensor` is on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless `tensor` is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless everything after the first dimension is contiguous."""
    if tensor.is_contiguous():
        return
    want = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != want:
            raise ValueError(
                f"{name} must be contiguous after its first dimension, got strides {tensor.stride()} "
                f"for shape {list(tensor.shape)}"
            )
        want *= size


def check_narrow_rows(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless offsets of all rows fit 32 bits, for kernels that have no registers for more."""
    if tensor.shape[0] * tensor.stride(0) > 2**31:
        raise ValueError(
            f"{name} must span at most {2**31} numbers, got {tensor.shape[0]} rows of {tensor.stride(0)}"
        )


def check_out(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    like: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise ValueError unless `tensor` is contiguous, of `shape`, beside `like` and of its type, or of `dtype`."""
    check_shape(name, tensor, shape)
    check_dtype(name, tensor, (like.dtype if dtype is None else dtype,))
    check_device(name, tensor, like.device)
    check_contiguous(name, tensor)


def check_index(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` is a contiguous int32 tensor of `shape`."""
    check_shape(name, tensor, shape)
    check_dtype(name, tensor, (torch.int32,))
    check_contiguous(name, tensor)


def check_pages(k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    """Raise ValueError unless both are [P, B, K, D] of equal layout with contiguous heads."""
    check_shape("k_pages", k_pages, (None, None, None, None))
    check_shape("v_pages", v_pages, tuple(k_pages.shape))
    check_dtype("v_pages", v_pages, (k_pages.dtype,))
    if k_pages.stride() != v_pages.stride() or k_pages.stride(3) != 1:
        raise ValueError(
            "k_pages and v_pages must have equal strides and a contiguous last dimension, "
            f"got {k_pages.stride()} and {v_pages.stride()}"
        )


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise ValueError unless query heads come in groups and the kernels know the head size."""
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS}, got {head_dim}")
