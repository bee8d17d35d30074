"""Compile every kernel as production launches it, for a GPU that need not be there, and read off what
the compiler made of it.

The launchers are run on `meta` tensors: they decide block sizes exactly as they would on the device,
and their `Launch` values are compiled instead of run. Spilled registers, shared memory over the
limit or a matrix product that missed the warp-group instructions show up here in a second each, on
any machine.

    python -m engine.kernels.hopper              # H100, H200
    python -m engine.kernels.hopper --arch 80    # A100
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.kernels.attention_backward import backward_launches
from engine.kernels.grouped_lora import lora_launches, weight_grad_launch
from engine.kernels.jit import Launch, triton
from engine.kernels.paged_attention import attention_launches
from engine.kernels.write_kv import write_launch

SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Of one block (CUDA C++ programming guide, technical specifications per compute capability)."""

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiled(NamedTuple):
    """What the compiler made of one launch."""

    case: str
    kernel: str
    constants: str
    warps: int
    stages: int
    registers: int
    """Per thread; 255 is the limit."""
    stack_bytes: int
    """Per thread: spilled registers and arrays that had to go to local memory."""
    shared_bytes: int
    wgmma: int
    """Warp-group matrix instructions in the PTX."""
    mma: int
    """Warp matrix instructions in the PTX."""
    async_copies: int
    """cp.async (Ampere's asynchronous copies, which gathered pages need) in the PTX."""


Case = tuple[str, Callable[[], Iterable[Launch]]]


def cases() -> list[Case]:
    """Production launches by name, bf16: Llama-3.1-8B (32 heads on 8), Qwen2.5-14B (40 on 8) and
    Llama-3.2-1B (32 on 8 of size 64)."""
    found: list[Case] = []
    for name, heads, head_dim in (("llama8b", 32, 128), ("qwen14b", 40, 128), ("llama1b", 32, 64)):
        found += [
            (f"decode {name}", _attention(heads, head_dim, [1] * 128, decodes=128, splits=1)),
            (f"chunk {name}", _attention(heads, head_dim, [2048], decodes=0, splits=1)),
            (f"backward {name}", _backward(heads, head_dim, 512, 3500)),
        ]
    found += [
        ("decode split llama8b", _attention(32, 128, [1] * 8, decodes=8, splits=8)),
        ("chunk split llama8b", _attention(32, 128, [64], decodes=0, splits=4)),
        ("backward small llama8b", _backward(32, 128, 32, 3500)),
    ]
    found.append(("write kv", _write_kv))
    for rank in (16, 64):
        found += [
            (f"lora decode r{rank}", _lora(rank, 128, 32)),
            (f"lora window r{rank}", _lora(rank, 512, 1)),
            (f"lora dx r{rank}", _lora(rank, 512, 1, transposed=True)),
            (f"lora weight grad r{rank}", _weight_grad(rank)),
        ]
    return found


def compile_launch(case: str, launch: Launch, arch: int) -> Compiled:
    """Compile `launch` for compute capability `arch` (80, 90) without a device.

    Raises ValueError when Triton interprets its kernels: there is nothing to compile then.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.kernel
    if not isinstance(kernel, triton.runtime.JITFunction):
        raise ValueError("compiling needs Triton's compiler: unset TRITON_INTERPRET")
    signature, constants, attributes = specialise(launch)
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    ptx = compiled.asm["ptx"]
    registers, stack_bytes = resources(compiled.asm["cubin"])
    return Compiled(
        case=case,
        kernel=kernel.__name__,
        constants=" ".join(f"{k}={v}" for k, v in launch.constants.items()),
        warps=launch.warps,
        stages=launch.stages,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=compiled.metadata.shared,
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        async_copies=len(re.findall(r"cp\.async\.c[ag]", ptx)),
    )


def specialise(
    launch: Launch,
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes as Triton's launcher makes them: an integer 1 becomes a
    constant, pointers and multiples of 16 are known to be aligned, unless the kernel declines."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    names = launch.kernel.arg_names
    for parameter, value in zip(launch.kernel.params, launch.args, strict=False):
        name, index, aligned = parameter.name, (parameter.num,), False
        if isinstance(value, torch.Tensor):
            signature[name], aligned = POINTERS[value.dtype], True
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name] = "constexpr"
            constants[index] = 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[index] = [["tt.divisibility", 16]]
    for name, value in launch.constants.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    return signature, constants, attributes


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) per thread, from the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump reports no resource usage: {text!r}")
    return int(found[1]), int(found[2])


def compile_all(arch: int, only: str = "") -> list[Compiled]:
    """Every launch of the cases whose name contains `only`."""
    return [
        compile_launch(name, launch, arch)
        for name, launches in cases()
        if only in name
        for launch in launches()
    ]


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(
    heads: int, head_dim: int, lengths: list[int], decodes: int, splits: int
) -> Callable[[], Iterable[Launch]]:
    tokens, sequences = sum(lengths), len(lengths)
    pages = _empty(8192, 16, 8, head_dim)
    index = torch.int32
    return lambda: attention_launches(
        _empty(tokens, heads, head_dim),
        pages,
        pages,
        _empty(sequences, 512, dtype=index),
        _empty(sequences + 1, dtype=index),
        _empty(sequences, dtype=index),
        _empty(tokens, heads, head_dim),
        _empty(tokens, heads, dtype=torch.float32),
        scale=head_dim**-0.5,
        max_keys=8192,
        decodes=decodes,
        splits=splits,
    )


def _backward(heads: int, head_dim: int, window: int, start: int) -> Callable[[], Iterable[Launch]]:
    rows = _empty(window, heads, head_dim)
    pages = _empty(8192, 16, 8, head_dim)
    total = _empty(8192, 8, head_dim, dtype=torch.float32)
    return lambda: backward_launches(
        rows,
        rows,
        rows,
        _empty(window, heads, dtype=torch.float32),
        pages,
        pages,
        _empty(512, dtype=torch.int32),
        total,
        total,
        start=start,
        scale=head_dim**-0.5,
        splits=None,
    )[0]


def _write_kv() -> Iterable[Launch]:
    new = torch.empty((640, 6144), dtype=torch.bfloat16, device="meta")
    pages = _empty(8192, 16, 8, 128)
    k, v = (new[:, i : i + 1024].view(640, 8, 128) for i in (4096, 5120))
    return [write_launch(k, v, pages, pages, _empty(640, dtype=torch.int32))]


def _lora(rank: int, tokens: int, segments: int, transposed: bool = False) -> Callable[[], Iterable[Launch]]:
    a, b = _empty(33, rank, 4096), _empty(33, 4096, rank)
    if transposed:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return lambda: lora_launches(
        _empty(tokens, 4096),
        _empty(tokens, 4096),
        a,
        b,
        _empty(33, dtype=torch.int32),
        _empty(33, dtype=torch.float32),
        _empty(segments + 1, dtype=torch.int32),
        _empty(segments, dtype=torch.int32),
    )[0]


def _weight_grad(rank: int) -> Callable[[], Iterable[Launch]]:
    return lambda: [
        weight_grad_launch(
            _empty(rank, 4096, dtype=torch.float32),
            _empty(512, rank, dtype=torch.float32),
            _empty(512, 4096),
            2.0,
        ),
        weight_grad_launch(
            _empty(4096, rank, dtype=torch.float32).T,
            _empty(512, rank, dtype=torch.float32),
            _empty(512, 4096),
            2.0,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the production kernels without a GPU.")
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_LIMIT_BYTES), default=90)
    parser.add_argument("--only", default="", help="part of a case's name")
    arguments = parser.parse_args()
    print(
        f"{'case':28} {'kernel':10} {'warps':>5} {'stages':>6} {'regs':>5} {'stack':>6} {'shared':>8} "
        f"{'wgmma':>6} {'mma':>5} {'cp.async':>8}  constants"
    )
    for c in compile_all(arguments.arch, arguments.only):
        print(
            f"{c.case:28} {c.kernel:10} {c.warps:5} {c.stages:6} {c.registers:5} {c.stack_bytes:6} "
            f"{c.shared_bytes:8} {c.wgmma:6} {c.mma:5} {c.async_copies:8}  {c.constants}"
        )


if __name__ == "__main__":
    main()
