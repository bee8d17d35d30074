"""Launches with Triton's own launcher and a driver that only notes what it is given; prints what is wrong.

Run by test_launches as a program of its own, since the driver is one for the process.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from engine.kernels.jit import Launch
from engine.kernels.production import cases
from engine.kernels.swiglu_backward import swiglu_backward_launch

Call = tuple["Kernel", tuple[int, ...], tuple[Any, ...]]
CALLS: list[Call] = []


class Kernel:
    """A compiled kernel whose launches are noted."""

    function = packed_metadata = None
    __getitem__ = CompiledKernel.__getitem__

    def _init_handles(self) -> None:
        """Nothing to load."""

    def launch_metadata(self, *given: object) -> None:
        """None, as without hooks."""

    def run(self, *given: Any) -> None:
        """Grid, then the stream, the function, two kinds of metadata and two hooks, then the arguments."""
        CALLS.append((self, given[:3], given[9:]))


def compile(kernel: Any, key: Any, *given: object) -> Kernel:
    made = kernel.device_caches[0][0][key] = Kernel()
    return made


def noted(launch: Launch) -> Call:
    CALLS.clear()
    launch.run()
    (call,) = CALLS
    return call


def same(first: Call, second: Call) -> bool:
    """The same kernel, grid and arguments: tensors one by one, and numbers of one type."""
    (kernel, grid, args), (other, other_grid, others) = first, second
    return (
        kernel is other
        and grid == other_grid
        and len(args) == len(others)
        and all(
            a is b if isinstance(a, torch.Tensor) else (type(a), a) == (type(b), b)
            for a, b in zip(args, others, strict=True)
        )
    )


def main() -> None:
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    triton.runtime.JITFunction._do_compile = compile
    launched = 0
    for name, launches in cases():
        if name.startswith("liger"):
            continue  # Liger launches its kernels itself
        for launch in launches():
            launch.compiled.clear()
            looked_up, known = noted(launch), noted(launch)
            assert len(launch.compiled) == 1
            assert same(looked_up, known), f"{name}: {looked_up} and {known}"
            launched += 1
    assert launched > 20

    rows = torch.zeros(4 * 24 + 1)
    aligned, not_aligned = rows[:-1].view(4, 24), rows[1:].view(4, 24)
    assert aligned.data_ptr() % 16 == 0 and not_aligned.data_ptr() % 16 != 0
    out = torch.zeros(4, 48)
    kernels = {}
    for _ in range(2):
        for first in (aligned, not_aligned):
            for second in (aligned, not_aligned):
                kernel, _, args = noted(swiglu_backward_launch(first, second, aligned, out))
                assert args[0] is first and args[1] is second
                place = first is aligned, second is aligned
                assert kernels.setdefault(place, kernel) is kernel
    assert len({id(kernel) for kernel in kernels.values()}) == 4, "alignments have kernels of their own"
    print(f"{launched} launches")


if __name__ == "__main__":
    main()
