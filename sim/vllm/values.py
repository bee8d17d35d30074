"""Values of recorded files, checked as they are asked for: a ValueError names the file, the key and what is allowed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sim.json_file import parse
from sim.vllm.text import text_of

MOST = 100_000_000
"""Of tokens, blocks and sequences; a list of so many is still held."""


class Node:
    """A JSON file, whose values are asked for by dotted key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._root = parse(text_of(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error.msg} in line {error.lineno}") from None

    def get(self, key: str) -> Any:
        node = self._root
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                raise ValueError(f"{self.path} has no key {key!r}")
            node = node[part]
        return node

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        node = self._root
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return node is not None

    def whole(self, key: str, *others: str) -> int:
        """The first of the keys that is there; the error names the first."""
        key = next((name for name in (key, *others) if self.has(name)), key)
        return whole(f"{self.path}: {key}", self.get(key))

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key) if self.has(key) else default
        if not isinstance(value, bool):
            raise ValueError(f"{self.path}: {key} must be true or false, got {value!r}")
        return value

    def number(self, key: str) -> float:
        """Above 0."""
        number = finite(f"{self.path}: {key}", self.get(key))
        if not number > 0:
            raise ValueError(f"{self.path}: {key} must be above 0, got {number}")
        return number

    def expect(self, key: str, *allowed: object) -> None:
        """Refuse a setting that is there and not simulated."""
        value = self.get(key) if self.has(key) else None
        if value is not None and value not in allowed:
            known = " or ".join(map(repr, allowed))
            raise ValueError(f"{self.path}: {key} must be {known} to be simulated, got {value!r}")


def whole(where: str, value: object, least: int = 1) -> int:
    """`value`, a whole number from `least` to MOST; `where` says what it is."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
        raise ValueError(f"{where} must be a whole number from {least} to {MOST}, got {value!r}")
    return value


def finite(where: str, value: object) -> float:
    """`value` as a number, also where it is one in text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} must be a finite number, got {value!r}")
    return number
