"""Text files of runs and profiles: what cannot be read is named."""

from __future__ import annotations

from pathlib import Path


def text_of(path: Path) -> str:
    """All of a file, without a byte order mark. ValueError names it when it is missing or no text."""
    if not path.is_file():
        below = ", ".join(sorted(str(found) for found in path.parent.glob(f"*/{path.name}")))
        raise ValueError(f"there is no file {path}" + (f"; there is {below}" if below else ""))
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
