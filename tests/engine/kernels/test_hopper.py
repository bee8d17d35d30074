from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.kernels
from engine.kernels.attention_backward import backward_launches
from engine.kernels.grouped_lora import lora_launches
from engine.kernels.jit import CARDS, Launch
from engine.kernels.lora_expand import expand_launch
from engine.kernels.lora_weight_grad import weight_grad_launch
from engine.kernels.paged_attention import attention_launches
from engine.kernels.production import cases

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="compiling needs triton")

STACK_LIMIT_BYTES = 128
"""Per thread."""
LOOP_SPILLS_LIMIT = {80: 16, 89: 16, 90: 0}
"""Block sizes are chosen for Hopper; elsewhere a loop reads some registers again."""

COMPILE = """
import json, sys
from engine.kernels.hopper import compile_all
print(json.dumps([c._asdict() for c in compile_all(int(sys.argv[1]), sys.argv[2])]))
"""
BARRIERS = """
from engine.kernels.hopper import compile_kernel
from tests.engine.kernels.test_hopper import expands
for launch in expands():
    print(launch.constants["splits"], compile_kernel(launch, 90).asm["ptx"].count("bar.sync"))
"""
PTX = """
from engine.kernels.hopper import compile_kernel
from tests.engine.kernels.test_hopper import float32_launches
for launch in float32_launches():
    print(launch.kernel.__name__)
    print(compile_kernel(launch, 90).asm["ptx"])
"""


def compiler(program: str, *given: object) -> str:
    """What the program prints, in a process of its own: Triton may have been told to interpret in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, given)],
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=[(90, ""), (80, "llama8b"), (89, "llama8b")], ids=str)
def compiled(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Any]]]:
    arch, only = request.param
    return arch, json.loads(compiler(COMPILE, arch, only))


def test_no_kernel_spills_in_loops_or_asks_for_too_much_shared_memory(
    compiled: tuple[int, list[dict[str, Any]]],
) -> None:
    arch, rows = compiled
    assert rows
    for row in rows:
        assert row["shared_bytes"] <= CARDS[arch].shared_bytes, row
        assert row["stack_bytes"] <= STACK_LIMIT_BYTES, row
        assert row["loop_spills"] <= LOOP_SPILLS_LIMIT[arch], row


def test_products_of_64_rows_use_warp_groups_on_hopper(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    arch, rows = compiled
    for row in rows:
        sizes = dict(pair.split("=") for pair in row["constants"].split())
        m = {
            "_attend": "block_m",
            "_dq": "block_m",
            "_dkv": "block_n",
            "_shrink": "block_t",
            "_expand": "block_t",
            "_weight_grad": "block_f",
        }.get(row["kernel"])
        if m is None:
            assert row["wgmma"] == row["mma"] == 0, row
        elif arch == 90 and int(sizes[m]) >= 64:
            assert row["wgmma"] > 0, row
            assert row["mma"] == 0, row
            assert int(sizes[m]) % (16 * row["warps"]) == 0, f"warp groups compute the same products: {row}"
        else:
            assert row["mma"] > 0, row
            assert row["wgmma"] == 0, row


def test_walks_over_keys_and_features_are_pipelined(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    for row in compiled[1]:
        if row["kernel"] in ("_attend", "_dq", "_dkv", "_shrink", "_weight_grad"):
            assert row["async_copies"] > 0, row


def test_a_factor_is_walked_over_like_its_transpose(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    """Features beside each other in memory, or ranks: both are copied ahead of the product."""
    copies = {
        (row["case"], row["constants"]): row["async_copies"]
        for row in compiled[1]
        if row["kernel"] == "_shrink"
    }
    for (case, constants), found in copies.items():
        if case.startswith("lora dx"):
            assert found == copies[case.replace("dx", "window"), constants]


def test_no_number_is_read_alone(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    for row in compiled[1]:
        assert row["narrow_loads"] == 0, row


def test_parts_of_a_sum_are_read_at_once() -> None:
    """Read one after the other, each waits for two barriers of the one before."""
    few, many = (tuple(map(int, line.split())) for line in compiler(BARRIERS).splitlines())
    assert many[1] - few[1] < many[0] - few[0]


def expands() -> Iterator[Launch]:
    """Of one decode, from few and many parts of its first product."""
    y = torch.empty(1, 4096, dtype=torch.bfloat16, device="meta")
    b = torch.empty(3, 4096, 16, dtype=torch.bfloat16, device="meta")
    numbers = torch.empty(3, dtype=torch.float32, device="meta")
    index = torch.empty(3, dtype=torch.int32, device="meta")
    s = torch.empty(16, 1, 16, dtype=torch.float32, device="meta")
    for splits in (2, 8):
        yield expand_launch(y, b, 2, splits).on(y, b, s, s, index, numbers, index, index)


def test_float32_is_not_rounded_to_the_matrix_units_own() -> None:
    """Their float32 is tf32, with ten bits of mantissa."""
    found = compiler(PTX)
    for name in PRODUCTS:
        assert name in found.splitlines()
    assert "fma.rn.f32" in found
    assert "tf32" not in found and "mma" not in found


PRODUCTS = {"_attend", "_dq", "_dkv", "_shrink", "_expand", "_weight_grad"}


def float32_launches() -> Iterator[Launch]:
    """Of kernels with products."""

    def new(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    index = torch.int32
    rows, pages, lse = new(40, 4, 64), new(9, 16, 2, 64), new(40, 4)
    batch = (rows, pages, pages, new(9, 4, kind=index), new(10, kind=index), new(9, kind=index))
    yield from attention_launches(*batch, rows, lse, scale=1.0, max_keys=64, decodes=8, splits=1)
    total = new(40, 2, 64)
    window = (rows, rows, rows, lse, pages, pages, new(4, kind=index), total, total)
    yield from backward_launches(*window, start=0, scale=1.0, splits=1)[0]
    factors = (new(3, 16, 128), new(3, 128, 16), new(3, kind=index), new(3))
    x = new(40, 128)
    yield from lora_launches(x, x, *factors, new(3, kind=index), new(2, kind=index))[0]
    yield weight_grad_launch(new(16, 128), new(40, 16), x, 1.0)


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_how_many_sequences_decode_compiles_no_kernel_anew(chunks: int) -> None:
    def constants(decodes: int) -> list[dict[str, Any]]:
        tokens, sequences = decodes + 20 * chunks, decodes + chunks
        q = torch.empty(tokens, 4, 64, device="meta")
        pages = torch.empty(9, 16, 2, 64, device="meta")
        index = [torch.empty(n, dtype=torch.int32, device="meta") for n in (sequences + 1, sequences)]
        table = torch.empty(sequences, 4, dtype=torch.int32, device="meta")
        given = (q, pages, pages, table, *index, q, torch.empty(tokens, 4, device="meta"))
        launches = attention_launches(*given, scale=1.0, max_keys=64, decodes=decodes, splits=1)
        return [launch.constants for launch in launches]

    assert constants(3) == constants(256) == constants(700)


def test_where_an_index_lies_in_an_upload_compiles_no_kernel_anew() -> None:
    """Pieces of one upload begin anywhere: a kernel that asks whether at 16 bytes has two variants for each."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted kernels have no variants")
    asked = {
        (launch.kernel.__name__, parameter.name)
        for _, launches in cases()
        for launch in launches()
        for parameter, value in zip(launch.kernel.params, launch.args, strict=False)
        if isinstance(value, torch.Tensor) and value.dtype == torch.int32 and not parameter.do_not_specialize
    }
    # Tensors of their own: the bank's ranks, and the pages of a sample.
    assert asked == {("_shrink", "ranks"), ("_expand", "ranks"), ("_dq", "table"), ("_dkv", "table")}


def kernels() -> set[str]:
    """Names of all kernels in engine/kernels that are launched, not called by another."""
    found, called = set(), set()
    for path in Path(engine.kernels.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            if any(
                isinstance(d, ast.Call) and getattr(d.func, "id", "") == "jit" for d in node.decorator_list
            ):
                found.add(node.name)
                called |= {
                    call.func.id
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                }
    assert "_attend" in found and "_attend_keys" in called
    return found - called


LIGER = {"_rms_norm_forward_kernel", "_swiglu_fused_gate_up_forward_kernel"}


def test_every_kernel_is_compiled_for_heads_of_64_and_128(
    compiled: tuple[int, list[dict[str, Any]]],
) -> None:
    arch, rows = compiled
    if arch == 90:
        assert {row["kernel"] for row in rows} == kernels() | LIGER
        for size in (64, 128):
            found = {row["kernel"] for row in rows if f"head_dim={size}" in row["constants"].split()}
            assert found == {"_attend", "_join", "_dq", "_dkv", "_write"}


def test_the_page_in_profiles_has_the_rows_that_the_command_makes(
    compiled: tuple[int, list[dict[str, Any]]],
) -> None:
    """Registers may differ by the compiler's version; cases, kernels and block sizes may not."""
    arch, rows = compiled
    if arch == 90:
        page = (Path(engine.kernels.__file__).parents[2] / "profiles" / "hopper.md").read_text(
            encoding="ascii"
        )
        cells = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if "=" in line]
        shown = [(line[1], line[2], line[-2]) for line in cells if len(line) > 5]
        assert shown == [(row["case"], row["kernel"], row["constants"]) for row in rows]
