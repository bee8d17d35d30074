"""Folders that hold nothing of a run.

Hydra makes a run's folder, and writes into it what was asked for, before the run is looked at. One that was refused
or stopped before its first result would leave that alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

HYDRAS = (".hydra", "multirun.yaml")
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


def _holds_nothing(folder: Path) -> bool:
    entries = list(folder.iterdir()) if folder.is_dir() else []
    empty = [path for path in entries if path.suffix == ".log" and path.lstat().st_size == 0]
    own = [path for path in entries if path.name in HYDRAS]
    return len(own) > 0 and len(own) + len(empty) == len(entries)
