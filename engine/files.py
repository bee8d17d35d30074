"""Files of a model's or an adapter's folder: what cannot be read is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def read_json(path: Path, without: str = "") -> dict[str, Any]:
    """The object in a file. ValueError names the file, and says `without` when it is missing."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing" + (f": {without}" if without else "")) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got {type(values).__name__}")
    return values


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A safetensors file to open inside. ValueError names it when it is missing, cut short or damaged."""
    try:
        yield path
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from None
