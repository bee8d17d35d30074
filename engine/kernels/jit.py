"""Triton where it is installed, and kernel launches as values.

A launcher checks its tensors and returns `Launch`es; whoever asked runs them. The same values are
compiled for a GPU that is not there (`engine.kernels.hopper`), so the table of registers and shared
memory is about exactly what production launches. Kernels are plain functions where Triton is missing,
so this package imports without it.

Checks, grids and block sizes follow from the layout of the tensors, and the layers of an iteration have
equal layouts: so a launcher does all that once for each layout (`by_layout`) and then only adds the tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ModuleNotFoundError:
        triton = tl = None

__all__ = [
    "CARDS",
    "Launch",
    "by_layout",
    "cdiv",
    "jit",
    "multiprocessors",
    "power_of_2_from",
    "pretend",
    "shared_bytes",
    "tl",
    "triton",
    "uses_triton",
]

P = ParamSpec("P")
R = TypeVar("R")

ALIGNED_BYTES = 16
"""Triton has a faster kernel for pointers to a multiple of so many."""
MOST_LAYOUTS = 512
"""Of one function that are remembered; an iteration has about ten."""


def jit(*varying: str) -> Callable[[Any], Any]:
    """`triton.jit`, or the function itself where Triton is missing.

    `varying` names what changes from one iteration to the next: integers, and index tensors, which lie
    anywhere in the one buffer that an iteration uploads (`engine.packing`). Triton would compile a kernel
    anew for each pattern of which integers are 1 or multiples of 16 and which tensors begin at a multiple of
    16 bytes: a second's pause while serving.
    """
    if triton is None:
        return lambda function: function
    return lambda function: triton.jit(function, do_not_specialize=list(varying))


@dataclass(slots=True)
class Launch:
    """One kernel launch: everything that decides what is compiled and what runs."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    """Tensors, then numbers, in the order of the kernel's parameters, before the constants."""
    constants: dict[str, Any]
    """In the order of the kernel's last parameters."""
    warps: int
    stages: int
    """Depth of software pipelining of the kernel's loops."""
    compiled: dict[tuple[bool, ...], Any] = field(default_factory=dict)
    """Which of the tensors begin at a multiple of 16 bytes -> the kernel for these, of launches that look the same."""

    def on(self, *given: torch.Tensor | int) -> Launch:
        """The launch of these tensors and of numbers that vary, where `args` are its other numbers alone."""
        args = (*given, *self.args)
        return Launch(self.kernel, self.grid, args, self.constants, self.warps, self.stages, self.compiled)

    def run(self) -> None:
        """Launch on the current stream. An empty grid is no work.

        Triton looks a kernel up by the types, values and alignments of all arguments, which takes twice as long as
        launching it. Of launches that look the same only alignments differ, so what was found is kept by these.
        """
        if triton is None:
            raise RuntimeError("Triton kernels need the package triton, which is not installed")
        if 0 in self.grid:
            return
        aligned = tuple([a.data_ptr() % ALIGNED_BYTES == 0 for a in self.args if isinstance(a, torch.Tensor)])
        compiled = self.compiled.get(aligned)
        if compiled is not None:
            compiled[(*self.grid, 1, 1)[:3]](*self.args, *self.constants.values())
            return
        compiled = self.kernel[self.grid](
            *self.args, **self.constants, num_warps=self.warps, num_stages=self.stages
        )
        # The interpreter compiles nothing.
        if compiled is not None:
            self.compiled[aligned] = compiled


def by_layout(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, called once for all arguments that look the same and not for every launch.

    Tensors look the same where shape, strides, type and device are equal; other arguments are hashable
    values, equal and of one type: 1, 1.0 and True are three. What is computed must follow from that alone; who
    changes what else it follows from calls its `cache_clear`. An error is raised anew each time. A `Launch` keeps
    the kernels that it has run, so what it is launched `on` is among the arguments, or always made alike.
    """
    known: dict[tuple[Any, ...], R] = {}

    @wraps(function)
    def remembered(*args: P.args, **kwargs: P.kwargs) -> R:
        assert not kwargs
        layout = tuple(
            [
                (a.shape, a.stride(), a.dtype, a.device) if isinstance(a, torch.Tensor) else (a.__class__, a)
                for a in args
            ]
        )
        found = known.get(layout)
        if found is None:
            if len(known) >= MOST_LAYOUTS:
                known.clear()
            found = known[layout] = function(*args, **kwargs)
        return found

    remembered.cache_clear = known.clear  # type: ignore[attr-defined]
    return remembered


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether operators on this tensor's device are Triton kernels: cuda yes, cpu no (reference).

    Raises ValueError for any other device.
    """
    if not (tensor.is_cuda or tensor.is_cpu):
        raise ValueError(f"kernels run on cuda (Triton) or cpu (reference), got {tensor.device}")
    return tensor.is_cuda


class Card(NamedTuple):
    """What launchers decide by."""

    multiprocessors: int
    shared_bytes: int
    """Of one block."""


CARDS = {80: Card(108, 163 * 1024), 89: Card(128, 99 * 1024), 90: Card(132, 227 * 1024)}
"""Compute capability -> A100, RTX 4090, H100 and H200 (datasheets; CUDA C++ programming guide, technical
specifications per compute capability)."""
_off_gpu = CARDS[90]


def pretend(arch: int) -> None:
    """Off a GPU, decide as on a card of CARDS. To be called before anything is launched: decisions are kept."""
    global _off_gpu
    _off_gpu = CARDS[arch]


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors to fill; off a GPU those of a Hopper, unless another card is pretended."""
    if device.type != "cuda":
        return _off_gpu.multiprocessors
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have; off a GPU as `multiprocessors`."""
    if device.type != "cuda":
        return _off_gpu.shared_bytes
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2_from(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()
