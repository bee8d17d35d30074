"""Files of a model's or an adapter's folder: what cannot be read is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A safetensors file to open inside. ValueError names it when it is missing, cannot be read, cut short or
    damaged."""
    try:
        yield path
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from None
