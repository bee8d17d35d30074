"""Where data files are: below the data folder, or where the user says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sim.workload.public import fetch_hint


def data_dir() -> Path:
    """`COSERVE_DATA`, else `coserve` in the user's cache folder."""
    stated = os.environ.get("COSERVE_DATA")
    if stated:
        return Path(stated).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "coserve"


def find_file(file: str | Sequence[str]) -> Path:
    """The first of `file` that exists, each looked for as given and then below the data folder.

    ValueError names every path tried, and for a public trace the command that fetches it.
    """
    names = [file] if isinstance(file, str) else list(file)
    tried: list[Path] = []
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"a data file must be given by its path, got {name!r}")
        tried += dict.fromkeys([Path(name).expanduser(), data_dir() / name])
    for path in tried:
        if path.is_file():
            return path
    folder = next((path for path in tried if path.is_dir()), None)
    if folder is not None:
        raise ValueError(f"{folder} is a folder, and must be a file")
    hint = next((h for h in map(fetch_hint, names) if h), "")
    raise ValueError(f"no such file: {' or '.join(map(str, tried))}{hint}")
