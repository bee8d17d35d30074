"""Where data files are: below the data folder, or where the user says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sim.workload.public import fetch_hint


def data_dir() -> Path:
    """`COSERVE_DATA`, else `coserve` in the user's cache folder. A `~` of nobody stays as it is."""
    stated = os.environ.get("COSERVE_DATA")
    if stated:
        return Path(os.path.expanduser(stated))
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "coserve"


def check_file(key: str, file: object) -> None:
    """Raise ValueError unless `file` is a path, or several of which the first that exists is meant."""
    names = list(file) if isinstance(file, (list, tuple)) else [file]
    if not names or not all(isinstance(name, str) and name for name in names):
        shown = names if isinstance(file, (list, tuple)) else file
        raise ValueError(f"{key} must be the path of a file, got {shown!r}")


def find_file(file: str | Sequence[str]) -> Path:
    """The first of `file` that exists, each looked for as given and then below the data folder.

    ValueError names every path tried, and for a public trace the command that fetches it.
    """
    check_file("file", file)
    names = [file] if isinstance(file, str) else list(file)
    tried: list[Path] = []
    for name in names:
        tried += dict.fromkeys([Path(os.path.expanduser(name)), data_dir() / name])
    for path in tried:
        if path.is_file():
            return path
    folder = next((path for path in tried if path.is_dir()), None)
    if folder is not None:
        raise ValueError(f"{folder} is a folder, and must be a file")
    hint = next((h for h in map(fetch_hint, names) if h), "")
    where = ", or COSERVE_DATA names the folder that has it" if hint else ""
    raise ValueError(f"no such file: {' or '.join(map(str, tried))}{hint}{where}")
