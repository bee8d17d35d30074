"""The modules in which a simulation spends its time, as machine code. `make native` and `make interpreted` are

    python -m sim.native build       # half a minute; needs mypy, setuptools and a C compiler
    python -m sim.native remove

mypyc translates typed Python to C as it stands: the same sources, the same results to the last bit, co-serving
2.9 times as fast. What is built goes to the site-packages of the Python that builds it, never beside the sources,
and is used only while these are what was built (`sim.native_finder`).

Policies, cost builders, workloads and routers stay Python, and whatever meets their protocols works with either. A
class of MODULES cannot have subclasses that are not in MODULES, nor attributes that it does not declare.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from sim import native_finder

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "sim/core/answers.py",
    "sim/core/deadlines.py",
    "sim/core/finetune.py",
    "sim/core/jobs.py",
    "sim/core/kv.py",
    "sim/core/lateness.py",
    "sim/core/legality.py",
    "sim/core/queue.py",
    "sim/core/rows.py",
    "sim/core/sequence.py",
    "sim/core/state.py",
    "sim/cost/backward.py",
    "sim/cost/fitted.py",
    "sim/cost/inverse.py",
    "sim/cost/iteration.py",
    "sim/policies/packing.py",
    "sim/policies/slices.py",
    "sim/vllm/state.py",
)
NAME = "coserve_native"
"""Of the folder in site-packages, and of the `.pth` file beside it."""


LAST_LINES, LINE_LETTERS = 12, 200
"""How much of what a compiler has said is shown."""


class BuildFailed(Exception):
    """In one line, below which stand the compiler's last ones."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m sim.native", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=("build", "remove"))
    action = parser.parse_args(argv).action
    site = Path(sysconfig.get_path("purelib"))
    if action == "remove":
        remove(site)
        return 0
    try:
        if (lacking := lacks()) is not None:
            raise BuildFailed(lacking)
        build(ROOT, MODULES, site)
    except BuildFailed as error:
        print(f"python -m sim.native: error: {error}", file=sys.stderr)
        return 1
    print(
        f"built {len(MODULES)} modules into {site / NAME}; they are used while their sources stay as they are"
    )
    return 0


def lacks() -> str | None:
    """What is missing for a build, if something is."""
    missing = [name for name in ("mypyc", "setuptools") if importlib.util.find_spec(name) is None]
    if missing:
        return f"cannot import {', '.join(missing)}"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        return f"there is no C compiler ({compiler})"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.exists():
        return f"there are no headers of Python ({headers})"
    return None


def remove(site: Path) -> None:
    """Take away what `build` has put into `site`."""
    (site / f"{NAME}.pth").unlink(missing_ok=True)
    shutil.rmtree(site / NAME, ignore_errors=True)


def build(root: Path, modules: Sequence[str], site: Path) -> None:
    """Translate `modules` (paths below the checkout `root`) and put them into `site`, with their finder, in place
    of what was built before.

    Raises BuildFailed if they cannot be, and then changes nothing.
    """
    folder = site / NAME
    with tempfile.TemporaryDirectory() as scratch:
        # A process of its own: setuptools and mypyc use the working directory, the arguments and `sys.exit`.
        program = f"from sim.native import translate; translate({scratch!r}, {list(modules)!r})"
        # Fused products and sums would round differently; where there are none this changes nothing.
        flags = f"{os.environ.get('CFLAGS', '')} -ffp-contract=off"
        environment = {**os.environ, "CFLAGS": flags.strip(), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(
            command,
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
        )
        if done.returncode:
            last = [line[:LINE_LETTERS] for line in done.stdout.splitlines()[-LAST_LINES:]]
            raise BuildFailed("\n  ".join(["the build failed and changed nothing; it said last:", *last]))
        built = sorted((Path(scratch) / "lib").rglob("*" + sysconfig.get_config_var("EXT_SUFFIX")))
        remove(site)
        extensions = {}
        for path in built:
            relative = path.relative_to(Path(scratch) / "lib")
            extensions[".".join([*relative.parts[:-1], relative.name.partition(".")[0]])] = str(relative)
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)
    digests = {
        path: hashlib.sha256((root / path).read_bytes()).hexdigest() for path in sources(root, modules)
    }
    manifest = {"sources": digests, "extensions": extensions}
    (folder / native_finder.MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    shutil.copyfile(Path(native_finder.__file__), folder / "__init__.py")
    (site / f"{NAME}.pth").write_text(f"import {NAME}; {NAME}.install()\n", encoding="utf-8")


def sources(root: Path, modules: Sequence[str]) -> list[str]:
    """`modules` and all of the checkout that they import, directly or not: what a translation depends on."""
    found: set[str] = set()
    todo = list(modules)
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *[f"{node.module}.{alias.name}" for alias in node.names]]
            paths = [name.replace(".", "/") + ".py" for name in names]
            todo += [other for other in paths if (root / other).is_file()]
    return sorted(found)


def translate(scratch: str, modules: Sequence[str]) -> None:
    """C and extensions of `modules` below `scratch`; for a process of its own, whose working directory is the
    checkout."""
    from mypyc.build import mypycify
    from setuptools import setup  # type: ignore[import-untyped, unused-ignore]

    options = ["--config-file", "pyproject.toml", "--cache-dir", f"{scratch}/cache"]
    places = ["--build-lib", f"{scratch}/lib", "--build-temp", f"{scratch}/objects"]
    setup(
        name=NAME,
        script_args=["--quiet", "build_ext", *places],
        ext_modules=mypycify([*options, *modules], target_dir=f"{scratch}/c", group_name=NAME),
    )


if __name__ == "__main__":
    sys.exit(main())
