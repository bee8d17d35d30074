"""A number's fate under dropout depends on where it lies, not on what is asked for beside it; the kernel drops what
the reference drops."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.dropout import dropout, dropout_launch, dropout_triton

KEYS = (0, 7, 0x7FFFFFFF, 0xF0000001)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("rate", [0.05, 0.75])
def test_the_kernel_drops_what_the_reference_drops(
    rate: float, key: int, dtype_name: str, native: str
) -> None:
    dtype = getattr(torch, dtype_name)
    whole = torch.randn((3, 1100), generator=torch.Generator().manual_seed(1)).to(native, dtype)
    x = whole[:, :1030]
    found = dropout_triton(x, rate, key, 50, 20)
    wanted = dropout(x.cpu(), rate, key, 50, 20)
    assert torch.equal(found.cpu() == 0, wanted == 0)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-2 if dtype.itemsize < 4 else 1e-6, atol=0)


def test_rows_and_columns_may_be_cut_anywhere() -> None:
    x = torch.randn(40, 64)
    whole = dropout(x, 0.4, 11, 100, 0)
    for rows, columns in (
        (slice(7, 23), slice(0, 64)),
        (slice(0, 40), slice(48, 64)),
        (slice(39, 40), slice(5, 6)),
    ):
        part = dropout(x[rows, columns], 0.4, 11, 100 + rows.start, columns.start)
        assert torch.equal(part, whole[rows, columns])


@pytest.mark.parametrize("key", KEYS)
def test_masks_are_those_of_chance(key: int) -> None:
    """Their mean, and that of the products of neighbours and of other keys, as far as a million draws tell."""
    rate, shape = 0.2, (1024, 1024)
    ones = torch.ones(shape, dtype=torch.float64)
    kept = dropout(ones, rate, key, 0) > 0
    others = [
        kept.roll(1, 0),
        kept.roll(1, 1),
        kept.roll((3, 5), (0, 1)),
        dropout(ones, rate, key ^ 1, 0) > 0,
    ]
    deviation = (rate * (1 - rate) / ones.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - rate)) < 5 * deviation
    for other in others:
        both = (kept.double() - 0.8) * (other.double() - 0.8)
        assert abs(float(both.mean())) < 5 * rate * (1 - rate) / 1024
    assert torch.equal(
        dropout(ones, rate, key, 0)[kept], torch.full((int(kept.sum()),), 1.25, dtype=torch.float64)
    )


@pytest.mark.parametrize("which", ["rank", "columns", "type", "out"])
def test_what_the_kernel_cannot_read_is_refused(which: str) -> None:
    x = torch.zeros(4, 16)
    given = {"rank": x[0], "columns": torch.zeros(16, 4).T, "type": x.double(), "out": x}[which]
    with pytest.raises(ValueError, match="must"):
        dropout_launch(given, x[:, ::2] if which == "out" else torch.empty_like(given), 0.5, 1, 0)
