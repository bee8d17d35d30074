"""Text files of runs and profiles: what cannot be read is named."""

from __future__ import annotations

import csv
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


def table_of(path: Path) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """Names of the columns of a CSV file, and (file and line, row) of each. ValueError names a line that is no CSV,
    such as one with a field without an end."""
    reader = csv.DictReader(text_of(path).splitlines(), strict=True)
    try:
        return list(reader.fieldnames or ()), [(f"{path} line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.reader.line_num}: not CSV: {error}") from None
