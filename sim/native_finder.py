"""Imports modules of the simulator as machine code where it was built from the very sources that are there.

`python -m sim.native build` puts a copy of this file into site-packages, beside what it built, and a `.pth` file
that runs `install` whenever Python starts. The modules call each other without asking who answers, so it is all
of them or none: when `sim` is first imported, their sources, and all that these import, are compared with what
was built. If one differs, the sources run, and a person at a terminal is told so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from types import ModuleType

MANIFEST = "manifest.json"
"""{"sources": {path below the checkout: SHA-256}, "extensions": {module: path below the manifest's folder}}"""


class NativeFinder:
    """An entry of `sys.meta_path`, ahead of the finder of sources."""

    def __init__(self, folder: str) -> None:
        """`folder` holds the manifest and the extensions."""
        self._folder = folder
        self._extensions: dict[str, str] | None = None
        """None before `sim` is first imported, nothing where its sources are not those that were built."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The extension of this name; None leaves it to the next finder."""
        if self._extensions is None:
            if path is None or name.partition(".")[0] != "sim":
                return None
            # The first module below `sim`, so `path` says where its sources are.
            self._extensions = self._usable(
                [os.path.dirname(entry) for entry in path if os.path.isdir(entry)]
            )
        file = self._extensions.get(name)
        return None if file is None else spec_from_file_location(name, os.path.join(self._folder, file))

    def _usable(self, roots: list[str]) -> dict[str, str]:
        """The extensions, if the sources, each below the first of `roots` that has it, are what was built."""
        # Loaded only now: this file is read by every Python that starts.
        import hashlib
        import json

        with open(os.path.join(self._folder, MANIFEST), encoding="utf-8") as file:
            manifest = json.load(file)
        for source, digest in manifest["sources"].items():
            found = next(
                (p for p in (os.path.join(root, source) for root in roots) if os.path.exists(p)), None
            )
            if found is not None:
                with open(found, "rb") as text:
                    if hashlib.sha256(text.read()).hexdigest() == digest:
                        continue
            if sys.stderr is not None and sys.stderr.isatty():
                print(f"note: {source} is not what was built: nothing of it is used", file=sys.stderr)
            return {}
        extensions: dict[str, str] = manifest["extensions"]
        return extensions


def install() -> None:
    """Use what lies beside this file."""
    sys.meta_path.insert(0, NativeFinder(os.path.dirname(os.path.abspath(__file__))))
