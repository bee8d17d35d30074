"""Everything that is to be measured on a GPU, in order, within the time that there is.

    python -m profiles.session OUT --model llama_3_1_8b --minutes 9
    python -m profiles.session OUT --device cpu --model tiny

Each step is a command of its own with a time limit; one that fails or runs over it is recorded and the next
one starts. The same call again goes on where the last one ended, so a session can be split over several calls:
what is done is not repeated, a profile goes on with its next point, a sweep with its next run. What cannot go on
in the middle is not begun in a call that has too little time left for it. OUT/gathered holds everything worth
keeping in at most eight files, anew after every step; `coserve results OUT/gathered` is its page. It is also all
that the next call needs of OUT, which may run on another machine.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import json
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from analysis.results_page import BENCH, FIDELITY, KERNELS, REFERENCE, SESSION, page
from profiles.session_steps import LEAST_S, PROFILE, Step, steps_of
from sim.errors import message, nearest, report
from sim.results import SUMMARY, find_runs, make_manifest, read_run

ROOT = Path(__file__).resolve().parents[1]
PAGE = "RESULTS.md"
RUNS = "runs.tar.xz"
KEPT = (
    ("reference/reference.parquet", REFERENCE),
    ("kernels/kernels.json", KERNELS),
    (PROFILE, PROFILE),
    ("fidelity/metrics.parquet", FIDELITY),
)
"""Below OUT, and in OUT/gathered."""
LARGEST_BYTES = 15 * 2**20
"""A larger archive of runs is left out, and the session says so."""
DIE_WITH_PARENT = 1
"""prctl(2): PR_SET_PDEATHSIG."""
GRACE_S = 15.0
TAIL_LINES = 30
FAILED_LINES = 200
"""Of a step that failed: the machine may be gone when somebody reads what it said."""
NEEDED: tuple[str, ...] = ("antlr4", "hydra", "omegaconf", "rich", "simpy", "tqdm", "yaml")
NEEDED += ("matplotlib", "numpy", "pandas", "peft", "pyarrow", "safetensors", "torch", "transformers")
NEEDED_ON_A_GPU = ("liger_kernel", "pytest", "triton")
CACHES = {"TRITON_CACHE_DIR": "triton", "MPLCONFIGDIR": "matplotlib"}
"""Where programs keep what they have made once, by default in a home that need not be writable."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left of a session; 0 when every step is done or left out, 1 otherwise, 2 for a mistake."""
    start_s = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m profiles.session", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--device", help="of configs/device, or cpu (default: what the GPU is)")
    parser.add_argument("--model", default="llama_3_1_8b")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time of this call (default: no end)")
    parser.add_argument("--only", help="names of steps, with commas between them")
    parser.add_argument("--retry", action="store_true", help="also run again what has failed")
    options = parser.parse_args(argv)
    folder = options.folder.resolve()
    for group in ("device", "model"):
        name = getattr(options, group)
        wrong = None if name is None else _unknown(group, name)
        if wrong is not None:
            parser.error(wrong)
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    reason = unready(options.device)
    if reason is not None:
        parser.error(reason)
    device = options.device or _own_device()
    assert device is not None
    steps = steps_of(folder, device, options.model)
    if options.only is not None:
        wanted = options.only.split(",")
        unknown = [name for name in wanted if name not in [step.name for step in steps]]
        if unknown:
            parser.error(f"no step named {unknown[0]}; known: {', '.join(step.name for step in steps)}")
        steps = [step for step in steps if step.name in wanted]
    try:
        session = Session(folder, device, options.model)
        # Asking a machine that has just started what it has takes it half a minute.
        left_s = 60 * options.minutes - (time.perf_counter() - start_s)
        done = session.run(steps, left_s, retry=options.retry)
    except KeyboardInterrupt as stop:
        print("the same call again goes on with the step that was interrupted", file=sys.stderr)
        return report(parser.prog, stop, None)
    except (ValueError, OSError) as error:
        return report(parser.prog, error, message(error))
    print(f"page:   {session.gather()}")
    return 0 if done else 1


def unready(device: str | None) -> str | None:
    """What this machine lacks for any step on `device`, or on the GPU that it has, before time goes into finding out;
    None if nothing."""
    names = NEEDED if device == "cpu" else (*NEEDED, *NEEDED_ON_A_GPU)
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        return f"cannot import {', '.join(missing)}; engine/README.md (On a GPU) says what to bring"
    if device == "cpu":
        return None
    gpu = _gpu_versions()["gpu"]
    if gpu is None:
        return "torch finds no GPU; --device cpu --model tiny needs none"
    if device is None:
        return None if _own_device() else f"the GPU is {gpu}: choose one of configs/device as --device"
    if device.partition("_")[0] not in gpu.lower():
        return f"--device {device}, but the GPU is {gpu}"
    return None


def _own_device() -> str | None:
    """The one of configs/device that the GPU is; None if it is not among them."""
    from profiles.named import card_named

    gpu = _gpu_versions()["gpu"]
    return None if gpu is None else card_named(gpu)


def _unknown(group: str, name: str) -> str | None:
    """What to say of a name that neither the simulator's configs nor the engine's have; None if one has it."""
    folders = (ROOT / "configs" / group, ROOT / "engine" / "configs" / group)
    known = sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))
    if name in known:
        return None
    return f"no {group} named {name!r}{nearest(name, known)}; known: {', '.join(known)}"


class Session:
    """A folder with the record of what was run in it: OUT/session.json."""

    def __init__(self, folder: Path, device: str, model: str) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / SESSION
        self._gathered = folder / "gathered"
        if not self._path.exists() and (self._gathered / SESSION).exists():
            self._restore()
        self._record = self._begun(device, model)
        if (self._record["device"], self._record["model"]) != (device, model):
            before = f"{self._record['model']} on {self._record['device']}"
            raise ValueError(
                f"{folder} is a session of {before}, got {model} on {device}; take another folder"
            )

    def run(self, steps: Sequence[Step], seconds: float, *, retry: bool = False) -> bool:
        """Run the steps that are left within `seconds`; whether all are done or left out."""
        end_s, waiting, ran = time.perf_counter() + seconds, set[str](), set[str]()
        for step in steps:
            before = self._record["steps"].get(step.name, {"status": "", "seconds": 0.0})
            ended = before["status"] in ("done", "left out") or (before["status"] == "failed" and not retry)
            if ended and ran.isdisjoint(step.after):
                continue
            left_s = end_s - time.perf_counter()
            # A call that is short altogether begins what comes first.
            if left_s < (step.least_s if ran else LEAST_S) or not waiting.isdisjoint(step.after):
                print(f"{step.name}: waits for another call, {left_s:.0f} s are left", file=sys.stderr)
                waiting.add(step.name)
                continue
            self._note(step, self._run(step, min(step.limit_s, left_s), before["seconds"]))
            if self._status(step) == "left out":
                continue
            ran.add(step.name)
            try:
                self.gather()
            except Exception as error:  # the next steps do not rest on it, and the last call of it tells all
                print(f"gathered: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return all(self._status(step) in ("done", "left out") for step in steps)

    def _status(self, step: Step) -> str:
        return str(self._record["steps"].get(step.name, {"status": ""})["status"])

    def gather(self) -> Path:
        """Collect what is worth keeping into OUT/gathered, with its page; the page's path."""
        kept, to = self._gathered, self._folder / ".gathered.partial"
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir()
        for source, name in KEPT:
            if (self._folder / source).exists():
                shutil.copyfile(self._folder / source, to / name)
        self._gather_runs(to)
        record = {**self._record, "steps": list(self._record["steps"].values())}
        (to / SESSION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(kept, ignore_errors=True)
        to.rename(kept)
        (kept / PAGE).write_text(page(kept), encoding="utf-8")
        return kept / PAGE

    def _restore(self) -> None:
        """Lay out again what was gathered elsewhere. The record comes last: without it all of this is repeated."""
        for target, name in KEPT:
            if (self._gathered / name).exists():
                path = self._folder / target
                path.parent.mkdir(exist_ok=True)
                shutil.copyfile(self._gathered / name, path)
        try:
            if (self._gathered / RUNS).exists():
                with tarfile.open(self._gathered / RUNS) as tar:
                    tar.extractall(self._folder, filter="data")
            record = json.loads((self._gathered / SESSION).read_text(encoding="utf-8"))
            self._record = {**record, "steps": {one["name"]: one for one in record["steps"]}}
        except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._gathered} is damaged ({error}); take another folder") from None
        self._write()

    def _gather_runs(self, to: Path) -> None:
        """The summaries as one file; the rows, and what a sweep goes on with, as an archive without adapters."""
        runs = self._folder / "runs"
        if not any(runs.rglob(SUMMARY)):
            return
        folders = find_runs([runs])
        rows = [
            {k: v for k, v in read_run(folder).summary.items() if k != "classes"}
            | {"run": str(folder.relative_to(runs))}
            for folder in folders
        ]
        (to / BENCH).write_text(json.dumps({"rows": _without_nans(rows)}, indent=1) + "\n", encoding="utf-8")
        archive = to / RUNS
        with tarfile.open(archive, "w:xz") as tar:
            for folder in folders:
                for path in sorted(folder.iterdir()):
                    if path.suffix in (".parquet", ".json", ".yaml"):
                        tar.add(path, path.relative_to(self._folder))
            for path in sorted(runs.glob("*/*.json")):
                if path.parent not in folders:
                    tar.add(path, path.relative_to(self._folder))
        if archive.stat().st_size > LARGEST_BYTES:
            size = archive.stat().st_size
            archive.unlink()
            print(f"{RUNS}: left out, it would have {size / 2**20:.0f} MiB", file=sys.stderr)

    def _run(self, step: Step, limit_s: float, before_s: float) -> dict[str, Any]:
        """Run one command in a process group of its own, which ends at the limit."""
        known: dict[str, Any] = {"name": step.name, "command": _shown(step.command, self._folder)}
        if step.gpu and self._record["device"] == "cpu":
            return {**known, "status": "left out", "seconds": 0.0, "tail": ["needs a GPU"]}
        print(f"{step.name}: {known['command']}", file=sys.stderr, flush=True)
        log = self._folder / f"{step.name}.log"
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
        caches = {name: str(self._folder / "cache" / folder) for name, folder in CACHES.items()}
        # One thread: what a GPU leaves to the processor is small, and tests run side by side.
        asked = {**caches, "OMP_NUM_THREADS": "1", **os.environ}
        environment = {**asked, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        start_s = time.perf_counter()
        with log.open("ab") as out:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=out, stderr=out, preexec_fn=_own_group
            )
            code = _ended(process, limit_s)
        seconds = before_s + time.perf_counter() - start_s
        cut_short = code is None and (step.goes_on or limit_s < step.limit_s)
        status = "cut short" if cut_short else "done" if code == 0 else "failed"
        lines = FAILED_LINES if status == "failed" else TAIL_LINES
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        print(f"{step.name}: {status} after {seconds:.0f} s", file=sys.stderr, flush=True)
        if status != "done":
            print("\n".join(tail), file=sys.stderr, flush=True)
        return {**known, "status": status, "seconds": round(seconds, 1), "tail": tail}

    def _note(self, step: Step, outcome: dict[str, Any]) -> None:
        self._record["steps"][step.name] = outcome
        self._write()

    def _write(self) -> None:
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self._path)

    def _begun(self, device: str, model: str) -> dict[str, Any]:
        if self._path.exists():
            return _read(self._path)
        manifest = make_manifest(seed=None, device=device, wall_s=0.0)
        versions = {**dict(_mapping(manifest["versions"])), **_gpu_versions()}
        return {
            "date": datetime.date.today().isoformat(),
            "device": device,
            "model": model,
            "gpu": versions.pop("gpu", None),
            "commit": manifest["commit"],
            "dirty": manifest["dirty"],
            "versions": {name: version for name, version in versions.items() if version is not None},
            "steps": {},
        }


def _read(path: Path) -> dict[str, Any]:
    """The record of a session. ValueError for a file that is damaged."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = record["device"], record["model"]
        _ = [(one["status"], one["seconds"]) for one in record["steps"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); take another folder") from None
    return record


def _own_group() -> None:
    """In a step's process: a group to be ended with its children, and by itself when this one is killed, which
    can tell nobody. What is left of a step would hold the device when the next call begins."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def _ended(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The exit code, or None when it ran over the limit and was ended. Who ends this process ends it too."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return None
    except BaseException:
        # A group of its own hears nothing of Ctrl-C.
        _end(process)
        raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask its group to end, then kill what is left of it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with suppress(ProcessLookupError):
        # Also what it has started: nothing may hold the device when the next step begins.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@cache
def _gpu_versions() -> dict[str, str | None]:
    """Of the packages that a GPU's numbers hang on, and the GPU's name, without loading them here."""
    from importlib import metadata

    found: dict[str, str | None] = {}
    for name in ("torch", "triton", "transformers", "peft", "liger-kernel"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    query = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name(0))"]
    asked = subprocess.run(query, capture_output=True, text=True)
    found["gpu"] = asked.stdout.strip() if asked.returncode == 0 else None
    return found


def _shown(command: Sequence[str], folder: Path) -> str:
    """As somebody would type it, with OUT for the session's folder."""
    text = " ".join("python" if part == sys.executable else part for part in command)
    return text.replace("python -m sim.cli", "coserve").replace(str(folder), "OUT")


def _mapping(value: object) -> Mapping[str, Any]:
    assert isinstance(value, Mapping)
    return value


def _without_nans(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
