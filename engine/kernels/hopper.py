"""Compile every kernel as production launches it, for a GPU that need not be there, and read off what
the compiler made of it.

The launchers are run on `meta` tensors: they decide block sizes exactly as they would on the device,
and their `Launch` values are compiled instead of run. Spilled registers, shared memory over the
limit, narrow loads or a matrix product that missed the warp-group instructions show up here in a second
each, on any machine.

    python -m engine.kernels.hopper              # H100, H200
    python -m engine.kernels.hopper --arch 80    # A100; 89: L4, L40S, RTX 4090
    python -m engine.kernels.hopper --markdown profiles/hopper.md
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.kernels.jit import CARDS, Launch, pretend, triton
from engine.kernels.production import cases

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
    loop_spills: int
    """Instructions in loops that read or write it; before and behind the loops it costs nothing."""
    shared_bytes: int
    wgmma: int
    """Warp-group matrix instructions in the PTX."""
    mma: int
    """Warp matrix instructions in the PTX."""
    async_copies: int
    """cp.async (Ampere's asynchronous copies, which gathered pages need) in the PTX."""
    narrow_loads: int
    """Loads of two bytes from global memory in the PTX: eight of them for one of 16 bytes, where neighbours are not
    known to lie beside each other or a mask may part them."""


def compile_launch(case: str, launch: Launch, arch: int) -> Compiled:
    """What the compiler makes of `launch` for compute capability `arch`."""
    compiled = compile_kernel(launch, arch)
    ptx = compiled.asm["ptx"]
    registers, stack_bytes = resources(compiled.asm["cubin"])
    # Taking a kernel apart takes as long as compiling it.
    in_loops = loops(compiled.asm["cubin"]) if stack_bytes else []
    return Compiled(
        case=case,
        kernel=launch.kernel.__name__,
        constants=" ".join(f"{k}={v}" for k, v in launch.constants.items()),
        warps=launch.warps,
        stages=launch.stages,
        registers=registers,
        stack_bytes=stack_bytes,
        loop_spills=sum(name.startswith(("LDL", "STL")) for name in in_loops),
        shared_bytes=compiled.metadata.shared,
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        async_copies=len(re.findall(r"cp\.async\.c[ag]", ptx)),
        narrow_loads=len(re.findall(r"ld\.global[.a-z]*\.b16", ptx)),
    )


def compile_kernel(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel for compute capability `arch` (80, 89, 90), without a device.

    Raises ValueError when Triton interprets its kernels: there is nothing to compile then.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.kernel
    if not isinstance(kernel, triton.runtime.JITFunction):
        raise ValueError("compiling needs Triton's compiler: unset TRITON_INTERPRET")
    signature, constants, attributes = specialise(launch)
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
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
            signature[name], aligned = POINTERS[value.dtype], not parameter.do_not_specialize
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
    """(registers, stack bytes) per thread."""
    text = _dumped("cuobjdump", "--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump reports no resource usage: {text!r}")
    return int(found[1]), int(found[2])


def loops(cubin: bytes) -> list[str]:
    """Machine instructions by name that lie in loops: from a label to a branch back to it."""
    names: list[str] = []
    labels: dict[str, int] = {}
    inside: set[int] = set()
    for line in _dumped("nvdisasm", "-c", cubin).splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z]\S*)(.*)", line):
            names.append(found[1])
            target = re.search(r"\.L_x_\d+", found[2]) if found[1].startswith("BRA") else None
            # What ends a kernel is a branch to itself.
            if target and labels.get(target[0], len(names)) < len(names) - 1:
                inside.update(range(labels[target[0]], len(names)))
    return [names[n] for n in sorted(inside)]


def _dumped(tool: str, option: str, cubin: bytes) -> str:
    """What a tool that comes with Triton says of a kernel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], check=True, capture_output=True, text=True).stdout


def compile_all(arch: int, only: str = "") -> list[Compiled]:
    """Every launch of the cases whose name contains `only`; of one `arch` in a process."""
    pretend(arch)
    return [
        compile_launch(name, launch, arch)
        for name, launches in cases()
        if only in name
        for launch in launches()
    ]


COLUMNS = (
    *("case", "kernel", "warps", "stages", "regs", "stack", "spills", "shared"),
    *("wgmma", "mma", "cp.async", "ld.b16"),
)


def _cells(c: Compiled) -> tuple[object, ...]:
    return (
        *(c.case, c.kernel, c.warps, c.stages, c.registers, c.stack_bytes, c.loop_spills, c.shared_bytes),
        *(c.wgmma, c.mma, c.async_copies, c.narrow_loads),
    )


def markdown(rows: Iterable[Compiled], arch: int) -> str:
    """The table as a page that says how to make it again."""
    lines = [
        f"# Kernels compiled for sm_{arch}",
        "",
        "Made by `python -m engine.kernels.hopper --markdown FILE` with Triton "
        f"{triton.__version__} and its ptxas; no GPU is needed. Every Triton kernel of",
        "`engine/kernels`, and those of Liger-Kernel that the engine calls, as production launches them in "
        "bf16. Registers and",
        "stack are per thread (255 registers is the limit, a stack is spilled registers), spills are the "
        "instructions in loops",
        f"that use it, shared memory is in bytes per block (limit {CARDS[arch].shared_bytes}). The last four "
        "count instructions in",
        "the PTX: warp-group and warp matrix products, asynchronous copies, and loads of two bytes.",
        "",
        f"| {' | '.join(COLUMNS)} | constants |",
        f"|---|---|{'---:|' * (len(COLUMNS) - 2)}---|",
    ]
    lines += [f"| {' | '.join(map(str, _cells(c)))} | {c.constants} |" for c in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the production kernels without a GPU.")
    parser.add_argument("--arch", type=int, choices=sorted(CARDS), default=90)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    arguments = parser.parse_args()
    rows = compile_all(arguments.arch, arguments.only)
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(rows, arguments.arch), encoding="ascii")
        return
    form = "{:28} {:38} {:>5} {:>6} {:>4} {:>5} {:>6} {:>7} {:>5} {:>4} {:>8} {:>6}"
    print(form.format(*COLUMNS), " constants")
    for c in rows:
        print(form.format(*_cells(c)), "", c.constants)


if __name__ == "__main__":
    main()
