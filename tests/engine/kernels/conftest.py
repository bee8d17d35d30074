"""Kernels run natively where there is a GPU, else in Triton's interpreter, watched (`watched`).

The interpreter must be chosen before Triton is imported, and would then hold for the whole process.
Tests that ask for `native` and find no GPU therefore run in one child process per session (per worker
under xdist), which interprets; everything else stays in the session's own process. With
TRITON_INTERPRET=1 set by hand they run in place, for a debugger.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.kernels.watched import not_interpreted, watch

CUDA = torch.cuda.is_available()
WORKER = pytest.StashKey[ProcessPoolExecutor]()


@pytest.fixture
def native() -> str:
    """The device of Triton kernels. Asking for it marks a test as one of kernels."""
    if CUDA:
        return "cuda"
    if reason := not_interpreted():
        pytest.skip(reason)
    return "cpu"


@pytest.fixture(
    params=["float32", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("float16", "bfloat16"))]
)
def dtype_name(request: pytest.FixtureRequest) -> str:
    """Types that kernels read. The interpreter's bfloat16 arithmetic is wrong: native only."""
    if request.param != "float32" and not CUDA:
        pytest.skip("half precision on every shape is for a GPU")
    return str(request.param)


@pytest.fixture(params=["small", pytest.param("large", marks=pytest.mark.gpu)])
def size(request: pytest.FixtureRequest) -> str:
    """Large shapes are for a GPU: the interpreter takes 80 us for each operation of each program."""
    if request.param == "large" and not CUDA:
        pytest.skip("large shapes need a GPU")
    return str(request.param)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        watch()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, every test of kernels is one that needs it."""
    for item in items:
        if CUDA and "native" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an interpreted test in the child."""
    if "native" not in pyfuncitem.fixturenames or CUDA or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    failure = (
        _worker(pyfuncitem.config)
        .submit(_run, str(pyfuncitem.path), pyfuncitem.originalname, arguments)
        .result()
    )
    if failure is not None:
        pytest.fail(failure, pytrace=False)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    if WORKER in config.stash:
        config.stash[WORKER].shutdown()


def _worker(config: pytest.Config) -> ProcessPoolExecutor:
    if WORKER not in config.stash:
        config.stash[WORKER] = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _interpret, (list(sys.path),)
        )
    return config.stash[WORKER]


def _interpret(path: list[str]) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:] = path
    watch()


def _run(path: str, function: str, arguments: dict[str, Any]) -> str | None:
    """Call `function` of the test file; its failure as text, None if it passed."""
    name = f"interpreted_{Path(path).stem}"
    try:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules[name] = module
        getattr(sys.modules[name], function)(**arguments)
    except BaseException:  # pytest's own outcomes derive from it
        return traceback.format_exc()
    return None
