from __future__ import annotations

import pytest
import torch

from engine.kernels.write_kv import write_kv, write_kv_triton, write_launch


def make(device: str, dtype: torch.dtype, kv_heads: int, head_dim: int) -> list[torch.Tensor]:
    """k and v as slices of one projection, and pages of ones."""
    draw = torch.Generator().manual_seed(kv_heads)
    fused = torch.randn(5, 2 * kv_heads * head_dim + 8, generator=draw).to(device, dtype)
    k, v = (
        fused[:, i * kv_heads * head_dim :][:, : kv_heads * head_dim].unflatten(1, (kv_heads, head_dim))
        for i in range(2)
    )
    pages = torch.ones(2, 4, 16, kv_heads, head_dim, device=device, dtype=dtype)
    return [k, v, pages[0], pages[1]]


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
def test_the_reference_fills_the_named_slots_and_no_other(index_type: torch.dtype) -> None:
    k, v, k_pages, v_pages = make("cpu", torch.float64, 3, 16)
    slots = [17, 0, 63, -1, 31]
    write_kv(k, v, k_pages, v_pages, torch.tensor(slots, dtype=index_type))
    for new, pages in ((k, k_pages), (v, v_pages)):
        for slot in range(64):
            wanted = new[slots.index(slot)] if slot in slots else torch.ones_like(new[0])
            assert torch.equal(pages[slot // 16, slot % 16], wanted)


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(3, 64), (1, 128)])
def test_the_kernel_writes_what_the_reference_writes(
    kv_heads: int, head_dim: int, dtype_name: str, native: str
) -> None:
    tensors = make(native, getattr(torch, dtype_name), kv_heads, head_dim)
    slots = torch.tensor([17, 0, 63, -1, 31], dtype=torch.int32, device=native)
    copies = [x.cpu() for x in tensors]
    write_kv_triton(*tensors, slots)
    write_kv(*copies, slots.cpu())
    for found, wanted in zip(tensors, copies, strict=True):
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.gpu
def test_slots_behind_2_to_the_31_numbers_are_found(native: str) -> None:
    if native != "cuda":
        pytest.skip("takes 4 GB")
    k, *_ = make(native, torch.float16, 1, 128)
    pages = torch.ones(2**31 // 2048 + 2, 16, 1, 128, dtype=k.dtype, device=native)
    last = 16 * len(pages)
    slots = torch.tensor([last - 1, 0, last - 17, -1, 31], dtype=torch.int32, device=native)
    write_kv_triton(k, k, pages, pages, slots)
    for token, slot in ((0, last - 1), (2, last - 17), (4, 31)):
        assert torch.equal(pages[slot // 16, slot % 16], k[token])
    assert int((pages[-2:] != 1).any(-1).sum()) == 2


@pytest.mark.parametrize("which", ["k", "v", "pages", "slots", "type"])
def test_tensors_that_do_not_fit_are_refused(which: str) -> None:
    k, v, k_pages, v_pages = make("cpu", torch.float32, 2, 16)
    slots = torch.zeros(5, dtype=torch.int32)
    wrong = {
        "k": (k.transpose(1, 2), v, k_pages, v_pages, slots),
        "v": (k, v[:4], k_pages, v_pages, slots),
        "pages": (k, v, k_pages[..., :8], v_pages[..., :8], slots),
        "slots": (k, v, k_pages, v_pages, torch.zeros(10, dtype=torch.int32)[::2]),
        "type": (k.half(), v, k_pages, v_pages, slots),
    }[which]
    with pytest.raises(ValueError, match="must"):
        write_launch(*wrong)
