"""The direction of imports, read from every file: what holds the layers apart."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sim", "engine", "profiles", "analysis", "hydra_plugins")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

GPU_PACKAGES = {"torch", "triton", "peft", "transformers", "safetensors", "liger_kernel"}
PEERS = ("sim.policies", "sim.cost", "sim.workload", "sim.compile")
PRICED = ("sim.compile", "sim.cost")
"""The compiler prices its choices with the curves that the simulator charges by."""


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def under(*packages: str) -> list[Path]:
    return [path for path in FILES if any(within(module(path), package) for package in packages)]


@pytest.mark.parametrize("path", under("sim.core"), ids=str)
def test_core_needs_the_standard_library_and_numpy_alone(path: Path) -> None:
    for name in imports(path):
        top = name.partition(".")[0]
        assert top in sys.stdlib_module_names or top == "numpy" or within(name, "sim.core"), name


@pytest.mark.parametrize("path", under(*PEERS), ids=str)
def test_policies_costs_workloads_and_compile_do_not_know_each_other(path: Path) -> None:
    own = next(peer for peer in PEERS if within(module(path), peer))
    for name in imports(path):
        others = [peer for peer in PEERS if peer != own and (own, peer) != PRICED]
        assert not any(within(name, peer) for peer in others), name


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] not in ("engine", "profiles")], ids=str)
def test_only_engine_and_profiles_need_a_gpu_package(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imports(path)} & GPU_PACKAGES


@pytest.mark.parametrize("path", under("sim", "analysis"), ids=str)
def test_simulator_and_analysis_do_not_need_the_engine(path: Path) -> None:
    assert not any(within(name, "engine") for name in imports(path))


@pytest.mark.parametrize("path", under("engine"), ids=str)
def test_the_engine_names_no_policy(path: Path) -> None:
    assert not any(within(name, "sim.policies") for name in imports(path))


def loaded_by(modules: list[str]) -> set[str]:
    program = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules!r}];"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_no_module_of_the_simulator_loads_a_gpu_package() -> None:
    assert not loaded_by([module(path).removesuffix(".__init__") for path in under("sim")]) & GPU_PACKAGES


def test_core_loads_neither_pandas_nor_simpy_nor_hydra() -> None:
    loaded = loaded_by([module(path).removesuffix(".__init__") for path in under("sim.core")])
    assert not loaded & {"pandas", "simpy", "hydra", "omegaconf", "pyarrow", "matplotlib"}
