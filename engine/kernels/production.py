"""What production launches, by name: the launchers run on `meta` tensors, and decide as they would on a GPU.

Every kernel of the engine is among them, those of Liger-Kernel too, in the shapes of three models and in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from engine.elementwise import liger
from engine.kernels.attention_backward import backward_launches
from engine.kernels.dropout import dropout_launch
from engine.kernels.grouped_lora import lora_launches
from engine.kernels.jit import Launch, triton
from engine.kernels.lora_weight_grad import weight_grad_launch
from engine.kernels.norm_backward import norm_backward_launch
from engine.kernels.paged_attention import attention_launches
from engine.kernels.rotary import rotate_launch
from engine.kernels.swiglu_backward import swiglu_backward_launch
from engine.kernels.write_kv import write_launch

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
            (f"dropout {name}", _dropout(family)),
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


def _dropout(family: Family) -> Callable[[], Iterable[Launch]]:
    """Of a window's part of what the down projection reads."""
    x = _empty(512, family.ffn)
    return lambda: [dropout_launch(x, x, 0.1, 0, 0)]


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
