"""What all readers share: columns of a CSV checked at once, and the first bad row named.

Lines are counted from 1, the header included, as an editor shows them. Rows are looked at one by one
only to name a bad one.

Unsorted stamps are sorted, with a warning that says how many: public traces are merged from the logs
of several servers, where the order of lines means nothing and the stamps everything.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sim.errors import nearest
from sim.json_file import parse
from sim.workload.table import Floats, Ints, RequestTable, window_s

if TYPE_CHECKING:
    import pandas as pd

MAX_TOKENS = 2**31 - 1
LONGEST_SHOWN, LONGEST_HEADER = 60, 200
"""Letters of a value, and of the names of columns, in a message."""
SECONDS = "a number of seconds from the start, no date, at least 0"


def read_csv(
    path: Path,
    columns: Sequence[str],
    *,
    text: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> pd.DataFrame:
    """The named columns of a CSV file with a header; those in `text` as strings.

    Where some are `optional`, others are told in a warning, and refused where one of these may be meant: it would be
    lost.
    """
    import pandas as pd

    content = path.read_text(encoding="utf-8-sig", errors="replace").rstrip()
    needed = ", ".join(f"{name} (seconds)" if name.endswith("_s") else name for name in columns)
    if (found := _other_kind(content)) is not None:
        raise ValueError(f"{path}: row 1: found {found}; needed is a CSV with a header of {needed}")
    if "\0" in content:  # numpy's texts end there
        row = content.count("\n", 0, content.index("\0")) + 1
        raise ValueError(f"{path}: row {row}: holds a byte of 0, which is no text")
    header = csv_header(path, content)
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: row 1: column {twice!r} must be there once, got {header.count(twice)}")
    for name in columns:
        if name not in header:
            got = _cut(", ".join(header), LONGEST_HEADER) or "an empty file"
            others = [other for other in header if other not in (*columns, *optional)]
            meant = get_close_matches(name, others, n=1)
            hint = f"; should {meant[0]!r} be {name!r}?" if meant else ""
            raise ValueError(f"{path}: row 1: no column {name!r}, got {got}{hint}; needed are {needed}")
    _check_widths(path, content, len(header))
    known = [*columns, *optional]
    if optional:
        _tell_others(path, [name for name in header if name not in known], columns, optional)
    try:
        frame = pd.read_csv(
            io.BytesIO(content.encode()),  # a StringIO would hold 4 bytes a character
            header=0,
            names=header,
            index_col=False,
            usecols=[name for name in header if name in known],
            dtype=dict.fromkeys(text, str),
            keep_default_na=False,
            na_values={name: [""] for name in columns if name not in text},
            skip_blank_lines=False,
            low_memory=False,
        )
    except pd.errors.ParserError as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
    if len(frame) == 0:
        raise ValueError(f"{path}: the trace is empty: there is no row after the header")
    for name in text:
        if name in frame:
            frame[name] = frame[name].fillna("")
    return frame


def tokens_column(path: Path, frame: pd.DataFrame, column: str, *, at_least: int = 1) -> Ints:
    """Whole numbers of tokens, shape (rows,)."""
    values = numbers(frame[column])
    with np.errstate(invalid="ignore"):
        bad = ~((values >= at_least) & (values <= MAX_TOKENS) & (values == np.floor(values)))
    _refuse(path, frame, column, bad, f"a whole number from {at_least} to {MAX_TOKENS}")
    return values.astype(np.int64)


def seconds_column(path: Path, frame: pd.DataFrame, column: str) -> Floats:
    """Finite times of at least 0, shape (rows,)."""
    values = numbers(frame[column])
    _refuse(path, frame, column, ~(np.isfinite(values) & (values >= 0)), SECONDS)
    return values


def stamps_column(path: Path, frame: pd.DataFrame, column: str) -> Floats:
    """ISO 8601 stamps, with or without fraction and offset from UTC, as seconds after the earliest."""
    import pandas as pd

    stamps = pd.to_datetime(frame[column], format="ISO8601", utc=True, errors="coerce")
    _refuse(path, frame, column, stamps.isna().to_numpy(), "a stamp such as 2023-11-16 18:15:46.680590")
    seconds = (stamps - stamps.min()).dt.total_seconds()
    return np.asarray(seconds, np.float64)


def numbers(column: pd.Series[Any]) -> Floats:
    """A column as numbers, shape (rows,): NaN where it holds none, infinite where one is beyond all floats."""
    import pandas as pd

    try:
        found = pd.to_numeric(column, errors="coerce")
    except (OverflowError, TypeError):  # whole numbers of hundreds of digits, and lists
        found = pd.to_numeric(column.astype(str), errors="coerce")
    return found.to_numpy(dtype=np.float64, na_value=np.nan)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, record) of a file with one JSON object a line; blank lines at the end are allowed."""
    for row, value in json_lines(path):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: row {row}: must be a JSON object, got {str(value)[:60]!r}")
        yield row, value


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of a file with one JSON value a line."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").rstrip().splitlines()
    if not lines:
        raise ValueError(f"{path}: the file is empty")
    for row, line in enumerate(lines, start=1):
        try:
            yield row, parse(line)
        except json.JSONDecodeError:
            raise ValueError(f"{path}: row {row}: must be JSON, got {line[:60]!r}") from None


def csv_header(path: Path, content: str) -> list[str]:
    """Names of the first line's columns, quoted or not."""
    return [name.strip() for name in next(_csv_rows(path, content.partition("\n")[0]), (1, []))[1]]


def json_number(
    path: Path, row: int, record: dict[str, Any], column: str, at_least: int, whole: bool
) -> float:
    """The number under `column`; ValueError names the row. `row` is the line, or the record's place."""
    value: Any = record.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        most = MAX_TOKENS if whole else math.inf
        if at_least <= value <= most and math.isfinite(value) and not (whole and value != int(value)):
            return value
    kind = f"whole number from {at_least} to {MAX_TOKENS}" if whole else f"number of at least {at_least}"
    shown = repr(value) if column in record else "nothing"
    raise ValueError(f"{path}: row {row}, column {column}: must be a {kind}, got {shown}")


def make_table(
    path: Path,
    name: str,
    arrival_s: Floats,
    prompt_tokens: Ints,
    output_tokens: Ints,
    *,
    rebase: bool,
    **more: Any,
) -> RequestTable:
    """A table of the rows in order of arrival; `rebase` counts time from the first one."""
    if (np.diff(arrival_s) < 0).any():
        early = int((arrival_s < np.maximum.accumulate(arrival_s)).sum())
        rows = len(arrival_s)
        warnings.warn(
            f"{path}: {early} of {rows} rows are stamped earlier than a row above; sorted by time",
            stacklevel=2,
        )
        order = np.argsort(arrival_s, kind="stable")
        arrival_s, prompt_tokens, output_tokens = arrival_s[order], prompt_tokens[order], output_tokens[order]
        for key in ("slo", "adapter"):
            if key in more:
                more[key] = more[key][order]
    if rebase:
        arrival_s = arrival_s - arrival_s[0]
    return RequestTable(
        name=name,
        duration_s=window_s(arrival_s),
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        **more,
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _other_kind(content: str) -> str | None:
    """What a file is that is no CSV with commas and a header; None where it may be one."""
    line = content.partition("\n")[0].strip()
    for begin, kind in (("{", "JSON"), ("[", "JSON"), ("PAR1", "Parquet")):
        if line.startswith(begin):
            return kind
    if "," not in line and (separator := next((sep for sep in ";\t|" if sep in line), None)) is not None:
        return f"columns separated by {separator!r}"
    if line and re.fullmatch(r"[\d\s.,eE+-]+", line):
        return f"numbers, {_cut(line, LONGEST_SHOWN)}"
    return None


def _tell_others(path: Path, others: Sequence[str], columns: Sequence[str], optional: Sequence[str]) -> None:
    for name in others:
        if meant := nearest(name.lower(), optional):
            raise ValueError(
                f"{path}: row 1: unknown column {name!r}{meant}; known are {', '.join([*columns, *optional])}"
            )
    if others:
        names = _cut(", ".join(others), LONGEST_HEADER)
        warnings.warn(f"{path}: not read: {names} (known are also {', '.join(optional)})", stacklevel=3)


def _check_widths(path: Path, content: str, width: int) -> None:
    """Refuse a row with more fields than the header: pandas would drop the rest in silence."""
    if content.count(",") == (width - 1) * (content.count("\n") + 1):
        return
    for row, fields in _csv_rows(path, content):
        if len(fields) > width:
            raise ValueError(f"{path}: row {row}: must have {width} fields, got {len(fields)}")


def _csv_rows(path: Path, content: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields); ValueError names the line that is no CSV, such as a field without an end."""
    reader = csv.reader(io.StringIO(content))
    try:
        for fields in reader:
            yield reader.line_num, fields
    except csv.Error as error:
        raise ValueError(f"{path}: row {reader.line_num}: not CSV: {error}") from None


def _refuse(path: Path, frame: pd.DataFrame, column: str, bad: NDArray[np.bool_], allowed: str) -> None:
    if bad.any():
        at = int(np.argmax(bad))
        value = frame[column].tolist()[at]
        shown = "nothing" if value != value or value == "" else repr(value)
        shown = _cut(shown, LONGEST_SHOWN)
        row = int(frame.index[at]) + 2
        raise ValueError(f"{path}: row {row}, column {column}: must be {allowed}, got {shown}")
