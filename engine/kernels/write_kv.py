"""Write the new keys and values of a packed batch into their pages.

Shapes: T packed tokens, K key/value heads, D head size, P pages of B tokens.
"""

from __future__ import annotations

import torch

from engine.kernels.checks import check_device, check_dtype, check_pages, check_rows, check_shape
from engine.kernels.jit import Launch, by_layout, jit, power_of_2_from, tl, uses_triton


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """k_pages[slot // B, slot % B] = k[t] and the same for v, for every token with slot >= 0.

    k, v [T, K, D], which may be slices of one fused projection; k_pages, v_pages [P, B, K, D],
    modified; slots [T] int32 or int64, all different; a negative slot is padding and is skipped.
    Raises ValueError for tensors that do not fit together.
    """
    if uses_triton(k):
        write_kv_triton(k, v, k_pages, v_pages, slots)
    else:
        write_kv_reference(k, v, k_pages, v_pages, slots)


def write_kv_triton(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """`write_kv` by the kernel of this file."""
    write_launch(k, v, k_pages, v_pages, slots).run()


def write_launch(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
) -> Launch:
    """One program per token."""
    return _launch(k, v, k_pages, v_pages, slots).on(k, v, k_pages, v_pages, slots)


@by_layout
def _launch(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> Launch:
    _check(k, v, k_pages, v_pages, slots)
    tokens, kv_heads, head_dim = k.shape
    return Launch(
        _write,
        (tokens,),
        (k.stride(0), v.stride(0), k_pages.stride(0), k_pages.stride(1), k_pages.stride(2)),
        {
            "block_size": k_pages.shape[1],
            "head_dim": head_dim,
            "size": kv_heads * head_dim,
            "block": power_of_2_from(kv_heads * head_dim),
        },
        4,
        1,
    )


def write_kv_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """`write_kv` in torch."""
    _check(k, v, k_pages, v_pages, slots)
    used = slots >= 0
    slot = slots[used].long()
    index = (slot // k_pages.shape[1], slot % k_pages.shape[1])
    k_pages[index] = k[used]
    v_pages[index] = v[used]


def _check(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    check_shape("k", k, (None, None, None))
    check_shape("v", v, tuple(k.shape))
    check_pages(k_pages, v_pages)
    check_shape("k_pages", k_pages, (None, None, *k.shape[1:]))
    check_dtype("k", k, (k_pages.dtype,))
    check_dtype("v", v, (k_pages.dtype,))
    check_rows("k", k)
    check_rows("v", v)
    check_shape("slots", slots, (k.shape[0],))
    check_dtype("slots", slots, (torch.int32, torch.int64))
    if slots.numel() > 1 and slots.stride(0) != 1:
        raise ValueError(f"slots must be contiguous, got strides {slots.stride()}")
    for name, tensor in (("v", v), ("k_pages", k_pages), ("v_pages", v_pages), ("slots", slots)):
        check_device(name, tensor, k.device)


@jit("slots")
def _write(
    k: tl.tensor,
    v: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    slots: tl.tensor,
    stride_k: tl.tensor,
    stride_v: tl.tensor,
    stride_page: tl.tensor,
    stride_slot: tl.tensor,
    stride_head: tl.tensor,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Grid (T,): copies the K * D numbers of one token, twice."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    index = tl.arange(0, block)
    mask = index < size
    target = (
        slot // block_size * stride_page
        + slot % block_size * stride_slot
        + index // head_dim * stride_head
        + index % head_dim
    )
    tl.store(k_pages + target, tl.load(k + token * stride_k + index, mask=mask), mask=mask)
    tl.store(v_pages + target, tl.load(v + token * stride_v + index, mask=mask), mask=mask)
