"""JSON that people and programs leave in files: whatever is wrong with it is a ValueError that names the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Escapes of which two make a character, and one makes a string that nothing can write."""


def parse(text: str) -> Any:
    """What a text holds. JSONDecodeError, which is a ValueError, for all that is no JSON, also for what is nested
    deeper than Python follows, for whole numbers of thousands of digits and for halves of characters."""
    try:
        value = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise json.JSONDecodeError("half a surrogate pair, which is no text", text, 0) from None
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deep", text, 0) from None
    except ValueError:
        raise json.JSONDecodeError("a number of too many digits", text, 0) from None


def read_object(path: Path, without: str = "") -> dict[str, Any]:
    """The object in a file. ValueError names the file, and says `without` when it is missing."""
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing" + (f": {without}" if without else "")) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got {type(values).__name__}")
    return values


@contextmanager
def taken_apart(path: Path, writer: str) -> Iterator[None]:
    """What only `writer` puts into a file is taken out of it inside; ValueError names the file where it is not there,
    or of another kind."""
    try:
        yield
    except (
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        json.JSONDecodeError,
        UnicodeDecodeError,
    ) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is damaged, or not as this version of {writer} writes it: {what}"
        ) from error
