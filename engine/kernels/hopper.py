"""Compile every kernel as production launches it, for a GPU that need not be there, and read off what
the compiler made of it.

The launchers are run on `meta` tensors: they decide block sizes exactly as they would on the device,
and their `Launch` values are compiled instead of run. Spilled registers, shared memory over the
limit or a matrix product that missed the warp-group instructions show up here in a second each, on
any machine.

    python -m engine.kernels.hopper              # H100, H200
    python -m engine.kernels.hopper --arch 80    # A100
    python -m engine.kernels.hopper --markdown profiles/hopper.md
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.elementwise import liger
from engine.kernels.attention_backward import backward_launches
from engine.kernels.grouped_lora import lora_launches, weight_grad_launch
from engine.kernels.jit import Launch, triton
from engine.kernels.norm_backward import norm_backward_launch
from engine.kernels.paged_attention import attention_launches
from engine.kernels.rotary import rotate_launch
from engine.kernels.swiglu_backward import swiglu_backward_launch
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


class Family(NamedTuple):
    """What kernels see of a model."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int


FAMILIES = (
    Family("llama8b", 32, 8, 128, 4096, 14336),
    Family("qwen14b", 40, 8, 128, 5120, 13824),
    Family("llama1b", 32, 8, 64, 2048, 8192),
)
"""Llama-3.1-8B, Qwen2.5-14B and Llama-3.2-1B: groups of 4 and 5 heads, of 128 and of 64."""


def cases() -> list[Case]:
    """Production launches by name, in bf16."""
    found: list[Case] = []
    for family in FAMILIES:
        name = family.name
        found += [
            (f"decode {name}", _attention(family, [1] * 128, decodes=128, splits=1)),
            (f"decode split {name}", _attention(family, [1] * 8, decodes=8, splits=8)),
            (f"chunk {name}", _attention(family, [2048], decodes=0, splits=1)),
            (f"chunk split {name}", _attention(family, [64], decodes=0, splits=4)),
            (f"backward {name}", _backward(family, 512, 3500)),
            (f"backward small {name}", _backward(family, 32, 3500)),
            (f"write kv {name}", _write_kv(family)),
            (f"rotary {name}", _rotary(family)),
            (f"norm backward {name}", _norm_backward(family)),
            (f"swiglu backward {name}", _swiglu_backward(family)),
            (f"liger {name}", _liger(family)),
        ]
    for rank in (16, 64):
        found += [
            (f"lora decode r{rank}", _lora(rank, 128, 32)),
            (f"lora one decode r{rank}", _lora(rank, 1, 1)),
            (f"lora window r{rank}", _lora(rank, 512, 1)),
            (f"lora chunk r{rank}", _lora(rank, 8192, 1)),
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
    family: Family, lengths: list[int], decodes: int, splits: int
) -> Callable[[], Iterable[Launch]]:
    tokens, sequences, heads, head_dim = sum(lengths), len(lengths), family.heads, family.head_dim
    pages = _empty(8192, 16, family.kv_heads, head_dim)
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


def _backward(family: Family, window: int, start: int) -> Callable[[], Iterable[Launch]]:
    heads, kv_heads, head_dim = family.heads, family.kv_heads, family.head_dim
    rows = _empty(window, heads, head_dim)
    pages = _empty(8192, 16, kv_heads, head_dim)
    total = _empty(8192, kv_heads, head_dim, dtype=torch.float32)
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


def _projection(family: Family) -> list[torch.Tensor]:
    """q, k and v of 640 tokens, views of one product."""
    sizes = [family.heads, family.kv_heads, family.kv_heads]
    fused = _empty(640, sum(sizes) * family.head_dim)
    parts = torch.split(fused, [heads * family.head_dim for heads in sizes], dim=1)
    return [part.view(640, heads, -1) for part, heads in zip(parts, sizes, strict=True)]


def _write_kv(family: Family) -> Callable[[], Iterable[Launch]]:
    _, k, v = _projection(family)
    pages = _empty(8192, 16, family.kv_heads, family.head_dim)
    return lambda: [write_launch(k, v, pages, pages, _empty(640, dtype=torch.int32))]


def _rotary(family: Family) -> Callable[[], Iterable[Launch]]:
    """Of queries and keys at once forward, and of their gradients, those of keys float32, into one tensor."""
    q, k, _ = _projection(family)
    both = _empty(640, family.heads + 2 * family.kv_heads, family.head_dim)[:, : -family.kv_heads]
    d_keys = torch.empty_like(k, dtype=torch.float32)
    angle = _empty(640, 1, family.head_dim // 2, dtype=torch.float32)
    pairs = ((both, torch.empty_like(both)), (torch.empty_like(q), q), (d_keys, k))
    return lambda: [rotate_launch(x, angle, angle, out) for x, out in pairs]


def _norm_backward(family: Family) -> Callable[[], Iterable[Launch]]:
    x = _empty(512, family.hidden)
    return lambda: [norm_backward_launch(x, x, _empty(family.hidden), x, 1e-5)]


def _swiglu_backward(family: Family) -> Callable[[], Iterable[Launch]]:
    """Of the halves of one product, and of two tensors."""
    gate, up = _empty(512, 2 * family.ffn).chunk(2, dim=1)
    d, out = _empty(512, family.ffn), _empty(512, 2 * family.ffn)
    return lambda: [swiglu_backward_launch(d, gate, up, out), swiglu_backward_launch(d, d, d, out)]


def _liger(family: Family) -> Callable[[], Iterable[Launch]]:
    """What Liger-Kernel launches for us."""

    def launches() -> list[Launch]:
        ops = liger()
        with _recorded() as found:
            ops.rms_norm(_empty(512, family.hidden), _empty(family.hidden), 1e-5, 0.0, "gemma", None)
            ops.swiglu(_empty(512, 2 * family.ffn))
        return found

    return launches


@contextmanager
def _recorded() -> Iterator[list[Launch]]:
    """Kernels that are launched inside are only noted."""
    found: list[Launch] = []
    kernels = triton.runtime.JITFunction
    before = kernels.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, **more: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | more
        values = tuple(given[p.name] for p in kernel.params if not p.is_constexpr)
        # A constant that the call leaves out has a default, which the compiler takes by itself.
        constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr and p.name in given}
        found.append(Launch(kernel, tuple(grid), values, constants, num_warps, 3))

    kernels.run = run
    try:
        yield found
    finally:
        kernels.run = before


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
    """Of A, from a sum, and of B, from what is kept in the model's type."""
    return lambda: [
        weight_grad_launch(
            _empty(rank, 4096, dtype=torch.float32),
            _empty(512, rank, dtype=torch.float32),
            _empty(512, 4096),
            2.0,
        ),
        weight_grad_launch(
            _empty(4096, rank, dtype=torch.float32).T,
            _empty(512, rank),
            _empty(512, 4096),
            2.0,
        ),
    ]


COLUMNS = ("case", "kernel", "warps", "stages", "regs", "stack", "shared", "wgmma", "mma", "cp.async")


def _cells(c: Compiled) -> tuple[object, ...]:
    return (
        *(c.case, c.kernel, c.warps, c.stages, c.registers, c.stack_bytes, c.shared_bytes),
        *(c.wgmma, c.mma, c.async_copies),
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
        "stack are per thread (255 registers is the limit, a stack is spilled registers), shared memory is in "
        "bytes per block",
        f"(limit {SHARED_LIMIT_BYTES[arch]}); the last three count instructions in the PTX: warp-group and warp "
        "matrix products, asynchronous copies.",
        "",
        f"| {' | '.join(COLUMNS)} | constants |",
        f"|---|---|{'---:|' * (len(COLUMNS) - 2)}---|",
    ]
    lines += [f"| {' | '.join(map(str, _cells(c)))} | {c.constants} |" for c in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the production kernels without a GPU.")
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_LIMIT_BYTES), default=90)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    arguments = parser.parse_args()
    rows = compile_all(arguments.arch, arguments.only)
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(rows, arguments.arch), encoding="ascii")
        return
    form = "{:28} {:38} {:>5} {:>6} {:>4} {:>5} {:>7} {:>5} {:>4} {:>8}"
    print(form.format(*COLUMNS), " constants")
    for c in rows:
        print(form.format(*_cells(c)), "", c.constants)


if __name__ == "__main__":
    main()
