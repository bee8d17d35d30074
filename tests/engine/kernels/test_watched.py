"""What would be found in interpreted kernels, which are all watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.kernels.jit import jit, tl


@jit()
def _copy(
    source: tl.tensor, target: tl.tensor, length: tl.tensor, step: tl.tensor, block: tl.constexpr
) -> None:
    """Each program copies `block` numbers from where it is to `step` numbers behind."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < length
    tl.store(target + at + step, tl.load(source + at, mask=inside), mask=inside)


@jit()
def _fill(target: tl.tensor, apart: tl.tensor, step: tl.tensor, block: tl.constexpr) -> None:
    at = tl.program_id(0) * apart + tl.arange(0, block) * step
    tl.store(target + at, at.to(tl.float32))


def run(native: str, kernel: Any, programs: int, *given: Any) -> None:
    if native == "cuda":
        pytest.skip("on a GPU nothing is interpreted")
    kernel[(programs,)](*given)


def test_programs_that_keep_to_their_own_are_left_alone(native: str) -> None:
    numbers = torch.arange(10.0)
    other = torch.zeros(10)
    run(native, _copy, 3, numbers, other, 10, 0, 4)
    assert torch.equal(other, numbers)
    run(native, _copy, 3, numbers, numbers, 10, 0, 4)
    run(native, _fill, 2, other, 5, 1, 4)
    assert other[8] == 8.0


@pytest.mark.parametrize(
    ("kernel", "numbers", "says"),
    [
        ("copy", (3, 11, 0, 4), "outside"),  # one number too far
        ("copy", (3, 10, -1, 4), "outside"),  # and before the first
        ("copy", (1, 3, 6, 4), None),
        ("copy", (3, 6, 4, 4), "reads what another one writes"),
        ("fill", (2, 3, 1, 4), "two programs write the same place"),
        ("fill", (1, 0, 0, 4), "a store writes a place twice"),
    ],
)
def test_accesses_of_others_are_found(
    kernel: str, numbers: tuple[int, ...], says: str | None, native: str
) -> None:
    target = torch.zeros(10)
    programs, *given = numbers
    launch = (_copy, programs, target, target) if kernel == "copy" else (_fill, programs, target)
    if says is None:
        run(native, *launch, *given)
        return
    with pytest.raises(Exception, match=says):
        run(native, *launch, *given)


def test_what_was_read_may_not_be_written_by_another(native: str) -> None:
    numbers = torch.zeros(12)
    with pytest.raises(Exception, match="writes what another one reads"):
        run(native, _copy, 2, numbers[4:], numbers, 8, 0, 4)
