"""Folders in which nothing was run.

Hydra makes a run's folder, and writes into it what was asked for, before the run is looked at. One that was refused
or stopped before its first result would leave that alone, or in the place of what a complete run was asked for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from sim.results import SUMMARY, SWEEP

RUN = ".hydra"
HYDRAS = (RUN, SWEEP)
"""What Hydra and the sweeper write of every run and sweep."""


def there(folder: Path) -> frozenset[Path]:
    """`folder` and those above it, as far as they exist."""
    folder = folder.absolute()
    return frozenset(path for path in (folder, *folder.parents) if os.path.exists(path))


def remove_unused(folder: Path, kept: Collection[Path]) -> None:
    """Remove `folder` if it has only what Hydra writes and empty logs, and those above it that are empty then; none
    of `kept`."""
    folder = folder.absolute()
    if folder in kept or not _holds_nothing(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    for above in folder.parents:
        if above in kept:
            return
        try:
            above.rmdir()
        except OSError:
            return  # it holds something


@contextmanager
def complete_as_they_were(folder: Path, *, sweep: bool = False) -> Iterator[None]:
    """Inside, runs may be asked for in `folder`, or a `sweep` below it, that are there already: such a run is refused
    or taken as it is, and at the end has what Hydra wrote of it before. So has the sweep to which none was added."""
    before = _complete(folder, sweep)
    texts = {run: _written(run) for run in (*before, folder)}
    try:
        yield
    finally:
        now = _complete(folder, sweep)
        same = [run for run, written in before.items() if now.get(run) == written]
        for run in [*same, folder] if sweep and before and now == before else same:
            written = _written(run)
            for path in written.keys() - texts[run].keys():
                path.unlink()
            for path, text in texts[run].items():
                if written.get(path) != text:
                    path.write_bytes(text)


def _complete(folder: Path, sweep: bool) -> dict[Path, int]:
    """The complete runs, and when each was written."""
    found = folder.rglob(SUMMARY) if sweep else [folder / SUMMARY]
    return {path.parent: path.stat().st_mtime_ns for path in found if path.is_file()}


def _written(run: Path) -> dict[Path, bytes]:
    """What Hydra wrote of a run or sweep."""
    paths = [run / SWEEP, *(run / RUN).glob("*")]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def _holds_nothing(folder: Path) -> bool:
    entries = list(folder.iterdir()) if folder.is_dir() else []
    empty = [path for path in entries if path.suffix == ".log" and path.lstat().st_size == 0]
    own = [path for path in entries if path.name in HYDRAS]
    return len(own) > 0 and len(own) + len(empty) == len(entries)
