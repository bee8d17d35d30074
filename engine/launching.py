"""How iterations are launched on a device: captured or kernel by kernel, on one stream or on two.

The second stream is for plans that ask for it (`overlap`): their windows and backward run beside inference. It
starts after the optimizer steps, and the iteration ends when both have ended. So whatever one iteration leaves
behind (kept activations, pages, gradients, weights in the bank) is there for the next on either stream, and
temporary tensors never cross from one to the other within an iteration: the allocator, which reuses memory in
the order of the stream that it was taken on, needs no word about it. Iterations do not overlap each other,
which is also how the simulator charges them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from engine.graphs import Capture, CudaCapture
from engine.model import Model

GRAPHS = ("auto", "on", "off")


class SecondStream:
    """Work beside the current stream."""

    def __init__(self, runtime: Any = torch.cuda) -> None:
        """`runtime` is `torch.cuda`, or something that has its streams and events."""
        self._runtime = runtime
        self._stream = runtime.Stream()

    def from_here(self) -> AbstractContextManager[None]:
        """What is launched inside runs on the second stream, from where the current one is now on; what comes
        after waits for it."""
        start = self._runtime.Event()
        start.record()
        return self._after(start)

    @contextmanager
    def _after(self, start: Any) -> Iterator[None]:
        self._stream.wait_event(start)
        try:
            with self._runtime.stream(self._stream):
                yield
        finally:
            self._runtime.current_stream().wait_stream(self._stream)


@cache
def second_stream() -> SecondStream:
    """One for the process: each stream that multiplies has a workspace of its own (32 MiB on Hopper) and keeps
    it, and a sweep that took a new stream for each run would give up a GiB of pages."""
    return SecondStream()


class Launching(NamedTuple):
    """What an engine launches with; by default one kernel after the other."""

    captures: Callable[[], Capture] | None = None
    second: SecondStream | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSettings:
    """The choices of a program."""

    graphs: str = "auto"
    """auto captures on a CUDA device where it can, on insists, off launches every kernel."""
    streams: int = 1
    """2 runs windows and backward beside inference where a plan asks for it and the model lies on one GPU, 1
    after it: the same passes in either case."""

    def __post_init__(self) -> None:
        if self.graphs not in GRAPHS:
            raise ValueError(f"launch.graphs must be one of {', '.join(GRAPHS)}, got {self.graphs!r}")
        if self.streams not in (1, 2):
            raise ValueError(f"launch.streams must be 1 or 2, got {self.streams}")

    def on(self, model: Model) -> Launching:
        """These choices for `model`. Without graphs and streams the results are the same.

        Raises ValueError when graphs are insisted on and cannot be.
        """
        reason = one_by_one(model)
        if reason is not None:
            if self.graphs == "on":
                raise ValueError(f"launch.graphs=on: {reason}; auto or off goes without")
            return Launching()
        captures = None if self.graphs == "off" else CudaCapture
        return Launching(captures, second_stream() if self.streams == 2 else None)


def one_by_one(model: Model) -> str | None:
    """Why the kernels of `model` can only be launched one after the other; None if they need not."""
    if model.device.type != "cuda":
        return f"graphs need a CUDA device, the model is on {model.device.type}"
    if model.group.size > 1:
        return (
            f"the model is spread over {model.group.size} GPUs, whose collective calls must come in one "
            "order on all of them, and a capture of one waits for the others"
        )
    return None
