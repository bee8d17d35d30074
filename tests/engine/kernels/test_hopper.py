from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.kernels
from engine.kernels.production import cases

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="compiling needs triton")

SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024}
SPILL_LIMIT_BYTES = {80: 64, 90: 16}
"""Per thread. Block sizes are chosen for Hopper: there Triton 3.9 spills nothing and 3.6 two registers
of one kernel; on an A100 some kernels may spill a little more."""

COMPILE = """
import json, sys
from engine.kernels.hopper import compile_all
print(json.dumps([c._asdict() for c in compile_all(int(sys.argv[1]), sys.argv[2])]))
"""


@pytest.fixture(scope="module", params=[(90, ""), (80, "llama8b")], ids=str)
def compiled(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Any]]]:
    """Compiled in a process of its own: Triton may have been told to interpret in this one."""
    arch, only = request.param
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(arch), only],
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return arch, json.loads(done.stdout)


def test_no_kernel_spills_or_asks_for_too_much_shared_memory(
    compiled: tuple[int, list[dict[str, Any]]],
) -> None:
    arch, rows = compiled
    assert rows
    for row in rows:
        assert row["shared_bytes"] <= SHARED_LIMIT_BYTES[arch], row
        assert row["stack_bytes"] <= SPILL_LIMIT_BYTES[arch], row


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
        else:
            assert row["mma"] > 0, row
            assert row["wgmma"] == 0, row


def test_walks_over_keys_and_features_are_pipelined(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    for row in compiled[1]:
        if row["kernel"] in ("_attend", "_dq", "_dkv", "_shrink", "_weight_grad"):
            assert row["async_copies"] > 0, row


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
