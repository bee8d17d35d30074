"""Machine code of the simulator runs while its sources are those that were built, and never otherwise."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sim import native

ROOT = native.ROOT
MODULES = ("sim/core/deadlines.py", "sim/core/kv.py")
BESIDE = ("sim/core/request.py", "sim/core/sequence.py")
"""What they import."""
PROGRAM = """
import site, sys
site.addsitedir(sys.argv[1])
import sim.core.deadlines, sim.core.kv, sim.core.sequence
needed = sim.core.kv.KvBlocks(64, 4).blocks_for(13)
print(needed, *[name for name in ("deadlines", "kv", "sequence")
                    if not getattr(sim.core, name).__file__.endswith(".py")])
"""


def imported(checkout: Path, site: Path) -> str:
    """What a fresh Python, without any other site-packages, says of the modules of `checkout`."""
    command = [sys.executable, "-S", "-c", PROGRAM, str(site)]
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(native.lacks() is not None, reason=str(native.lacks()))
def test_all_modules_run_as_machine_code_until_a_source_that_they_depend_on_changes(tmp_path: Path) -> None:
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    site.mkdir()
    for path in ("pyproject.toml", *MODULES, *BESIDE):
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, checkout / path)
    assert imported(checkout, site) == "4"
    native.build(checkout, MODULES, site)
    assert imported(checkout, site) == "4 deadlines kv"
    for path in (*MODULES, *BESIDE):
        text = (checkout / path).read_text()
        (checkout / path).write_text(text + "\n")
        assert imported(checkout, site) == "4", path
        (checkout / path).write_text(text)
    assert imported(checkout, site) == "4 deadlines kv"
    native.remove(site)
    assert imported(checkout, site) == "4"
    assert not list(site.iterdir())
    assert sorted(str(path.relative_to(checkout)) for path in checkout.rglob("*.*")) == sorted(
        ["pyproject.toml", *MODULES, *BESIDE]
    )


def test_what_a_module_imports_belongs_to_its_sources() -> None:
    assert native.sources(ROOT, MODULES) == sorted(MODULES + BESIDE)
    assert set(native.MODULES) < set(native.sources(ROOT, native.MODULES))


def test_without_a_compiler_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert native.main(["build"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "python -m sim.native: error: there is no C compiler (no-such-compiler)\n"


def test_without_mypyc_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None if name == "mypyc" else name)
    assert native.main(["build"]) == 1
    assert capsys.readouterr().err == "python -m sim.native: error: cannot import mypyc\n"


@pytest.mark.skipif(native.lacks() is not None, reason=str(native.lacks()))
def test_a_build_that_fails_says_what_the_compiler_said_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nseq 100 >&2\necho 'this compiler cannot compile' >&2\nexit 3\n")
    compiler.chmod(0o755)
    before = tmp_path / native.NAME / "__init__.py"
    before.parent.mkdir()
    before.write_text("")
    get_path = native.sysconfig.get_path
    monkeypatch.setattr(
        native.sysconfig, "get_path", lambda name: str(tmp_path) if name == "purelib" else get_path(name)
    )
    monkeypatch.setattr(native, "MODULES", MODULES)
    monkeypatch.setenv("CC", str(compiler))
    assert native.main(["build"]) == 1
    said = capsys.readouterr()
    lines = said.err.split("\n")
    assert said.out == "" and "this compiler cannot compile" in said.err and "Traceback" not in said.err
    assert lines[0] == "python -m sim.native: error: the build failed and changed nothing; it said last:"
    assert len(lines) == 2 + native.LAST_LINES and max(map(len, lines)) <= 2 + native.LINE_LETTERS
    assert [path.name for path in before.parent.iterdir()] == ["__init__.py"]


def test_no_class_that_is_built_has_a_subclass_that_is_not() -> None:
    classes = {
        path: [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ClassDef)
        ]
        for folder in ("sim", "engine", "profiles", "analysis", "tests")
        for path in (ROOT / folder).rglob("*.py")
    }
    modules = [ROOT / module for module in native.MODULES]
    built = {node.name for module in modules for node in classes[module]}
    assert {"PipelineState", "IterationCost"} <= built
    for path, nodes in classes.items():
        if path not in modules:
            for node in nodes:
                bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                assert not bases & built, f"{path}: {node.name}"
