"""Host time of a layer in an iteration that no graph replays: what Python, views and torch cost beside the kernels.

    python tests/benchmarks/launching.py            # needs no GPU, a minute

Iterations with finetuning launch their kernels one by one; where windows are small, the host takes longer for
that than the device. Here the engine runs such iterations on the CPU as it would on a GPU, with every check and
allocation, of a Llama with a hidden size of 32. Kernels do nothing, and Liger's operators are replaced by
allocations of what they return. torch's own operations do run, on tensors so small that most of their time is the
call. They are float32: of bf16 the CPU takes 25 us for the smallest product.

The time of a layer is the difference between models of two depths, each the fastest of many repetitions, taken in
turns: what happens once in an iteration (packing, loss, upload) is not in it. `engine us` is without Triton's
launcher; `and Triton` runs all of its Python as well, with a driver that does nothing. A GPU adds the driver's call
for each launch and each operation of torch, and what Liger's two norms and SwiGLU do on their way.
`sim.cost.roofline` takes 5 us for a launch in all.

Checks, grids and block sizes are decided once for each layout, views are made once for each window or for good,
queries and keys are rotated at once, gradients are written where the next product reads them, and the kernel that
Triton has found for a layout is launched without looking it up again. A layer with LoRA on all linear layers before
all that and with it, in turns (Triton 3.7.1, torch 2.13):

                            launches      torch        views       engine us         and Triton
    forward, kept           18    17    13    13     85    31     554     241       936     343
    backward, kept          35    35    27    19    162    47   1,050     447     1,750     646
    forward, run again      18    17     6     6     78    24     490     203       810     310
    backward, run again     52    51    38    30    252    85   1,560     685     2,550     997

What Triton binds and looks up for a launch takes 14 to 17 us, the launch itself without the driver's call 6. The
rest is spread: 0.5 us for each tensor of a launch to know its layout, 6 us for each tensor that a window keeps (two
views and a copy), 7 us for each low-rank product that is made again. Seconds vary by half on a busy machine, so two
checkouts are compared in turns; the counts do not vary.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine.elementwise
from engine.assemble import TrainingJob, assemble_engine
from engine.config import ModelConfig
from engine.elementwise import Liger
from engine.finetune import Sample
from engine.kernels.jit import Launch, triton
from engine.load import random_model
from engine.lora import new_adapter
from engine.optimizer import OptimizerSettings
from sim.core.finetune import Backward, Forward
from sim.core.plan import Limits, Plan
from sim.core.specs import LoraSpec, ModelShape

DEPTHS = (8, 24)
TOKENS = 64
REPETITIONS = 60
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
JOBS = {
    "kept": ("layer_major", "stash"),
    "run again": ("window_major", "recompute"),
}
"""What the backward needs of the forward: order and memory of a job."""


class Made(NamedTuple):
    """What an iteration calls."""

    launches: int
    """Of Triton kernels."""
    operations: int
    """torch's own, on a GPU a kernel or a copy each."""
    views: int
    """And allocations: nothing of the device."""


class Counted(TorchDispatchMode):
    """Counts what reaches torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.views = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        free = func.is_view or "empty" in func.overloadpacket.__name__
        self.views += free
        self.operations += not free
        return func(*args, **(kwargs or {}))


class Iteration:
    """One finetuning job in an engine of `layers` layers, and a plan to launch time and again."""

    def __init__(self, layers: int, targets: tuple[str, ...], order: str, memory: str, forward: bool) -> None:
        shape = ModelShape(
            name="llama", layers=layers, hidden=32, heads=4, kv_heads=2, head_dim=16, ffn=48, vocab=96,
            max_context_tokens=512,
        )  # fmt: skip
        model = random_model(ModelConfig(family="llama", shape=shape), torch.float32, "cpu")
        spec = LoraSpec(rank=16, alpha=32, targets=targets)
        tokens = np.arange(TOKENS) % shape.vocab
        self._sample = Sample(tokens.astype(np.int32), tokens)
        job = TrainingJob(
            id="job",
            samples=[self._sample],
            max_sample_tokens=TOKENS,
            adapter=new_adapter(spec, shape, torch.float32, "cpu", seed=0),
            optimizer=OptimizerSettings(schedule="constant"),
            order=order,
            memory=memory,
        )
        limits = Limits(kv_tokens=TOKENS, max_tokens=TOKENS, max_sequences=4)
        self._engine, _ = assemble_engine(model, limits, [job])
        self._forward = forward
        piece = Forward("job", TOKENS) if forward else Backward("job", TOKENS * layers)
        self._plan = Plan(finetune=(piece,))

    def seconds(self) -> float:
        """Of one launch."""
        self._engine.stand("job", self._sample, 0 if self._forward else TOKENS, 0, fresh=False)
        start = time.perf_counter()
        self._engine.launch(self._plan)
        seconds = time.perf_counter() - start
        self._engine.collect()
        return seconds

    def made(self) -> Made:
        """By one launch."""
        launched: list[Launch] = []
        Launch.run = lambda launch: launched.append(launch)  # type: ignore[method-assign]
        with Counted() as counted:
            self.seconds()
        return Made(len(launched), counted.operations, counted.views)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    options = parser.parse_args()
    if options.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, got {options.repetitions}")
    torch.set_num_threads(1)
    runs = [lambda launch: None] if triton is None else [lambda launch: None, Launch.run]
    take_for_a_gpu()
    print(f"{'per layer':62} {'launches':>8} {'torch':>6} {'views':>6} {'engine us':>9} {'and Triton':>10}")
    for targets in (ALL, ("down_proj",)):
        for what, (order, memory) in JOBS.items():
            for forward in (True, False):
                direction = "forward" if forward else "backward"
                named = "all linear layers" if len(targets) > 1 else targets[0]
                iterations = [Iteration(depth, targets, order, memory, forward) for depth in DEPTHS]
                few, many = (iteration.made() for iteration in iterations)
                counts = [(b - a) / (DEPTHS[1] - DEPTHS[0]) for a, b in zip(few, many, strict=True)]
                seconds = layer_seconds(iterations, runs, options.repetitions)
                print(
                    f"{f'{direction}, activations {what}, LoRA of {named}':62} {counts[0]:8.0f} {counts[1]:6.0f} "
                    f"{counts[2]:6.0f} " + " ".join(f"{1e6 * each:9.0f}" for each in seconds),
                    flush=True,
                )


def layer_seconds(
    iterations: Sequence[Iteration], runs: Sequence[Callable[[Launch], None]], repetitions: int
) -> list[float]:
    """Of one layer, with each of the `runs` for `Launch.run`."""
    taken: list[list[list[float]]] = [[[] for _ in iterations] for _ in runs]
    for _ in range(repetitions):
        for run, columns in zip(runs, taken, strict=True):
            Launch.run = run  # type: ignore[method-assign]
            for iteration, column in zip(iterations, columns, strict=True):
                column.append(iteration.seconds())
    least = [[min(column) for column in columns] for columns in taken]
    return [(many - few) / (DEPTHS[1] - DEPTHS[0]) for few, many in least]


def take_for_a_gpu() -> None:
    """From now on the CPU has kernels, which do nothing."""

    def uses_triton(tensor: torch.Tensor) -> bool:
        return True

    for name, module in list(sys.modules.items()):
        if name.startswith("engine.") and hasattr(module, "uses_triton"):
            module.uses_triton = uses_triton  # type: ignore[attr-defined]
    results = Liger(_normed, _activated)
    engine.elementwise.liger = lambda: results  # type: ignore[assignment]
    if triton is None:
        return
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    from triton.compiler import CompiledKernel

    class Nothing:
        """A compiled kernel that does nothing."""

        function = packed_metadata = None
        __getitem__ = CompiledKernel.__getitem__
        _init_handles = launch_metadata = run = staticmethod(lambda *_: None)

    nothing = Nothing()

    def compile(kernel: Any, key: Any, *given: object) -> object:
        kernel.device_caches[0][0][key] = nothing
        return nothing

    triton.runtime.JITFunction._do_compile = compile


def _normed(x: torch.Tensor, *given: object) -> tuple[torch.Tensor]:
    return (torch.empty_like(x),)


def _activated(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return gate_up, gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


if __name__ == "__main__":
    main()
