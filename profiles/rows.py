"""Rows of a measured operator, and what its file looks like: what the readers of all public layouts share."""

from __future__ import annotations

import gzip
import math
import warnings
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.workload.readers.columns import numbers

Floats = NDArray[np.float64]
MOST = 10**15
"""Of a size: more has no meaning, and its square is no whole number of floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Rows of one operator."""

    file: str
    operator: str
    """Shown in tables; `kind` is the formula that predicts it."""
    kind: str
    columns: dict[str, Floats]
    """Shape by name, each of shape (rows,)."""
    seconds: Floats
    rows: NDArray[np.int64]
    """Row of each in the file, from 1, without the header."""

    def where(self, keep: NDArray[np.bool_]) -> Measured:
        return Measured(
            file=self.file,
            operator=self.operator,
            kind=self.kind,
            columns={name: values[keep] for name, values in self.columns.items()},
            seconds=self.seconds[keep],
            rows=self.rows[keep],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One kind of public file."""

    name: str
    keys: tuple[str, ...]
    """Columns of numbers that, with `texts`, tell one row from another."""
    seconds: tuple[str, ...]
    """Columns of times, milliseconds."""
    read: Callable[[str, pd.DataFrame], list[Measured]]
    texts: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    mark: frozenset[str] = frozenset()
    """Columns that no other layout has: a file with them and without others misses a column."""
    several: bool = False
    """Whether each shape is measured several times as a matter of course."""
    twice: Callable[[pd.DataFrame], pd.Series[bool]] | None = None
    """Rows that are written twice as a matter of course; None: none is."""


def read_frame(path: Path) -> pd.DataFrame:
    """A CSV or Parquet file; ValueError naming it when it cannot be read or is empty. A CSV file with semicolons has
    decimal commas."""
    if path.is_dir():
        files = sorted(found.name for found in path.iterdir() if found.suffix in (".csv", ".parquet", ".txt"))
        raise ValueError(
            f"{path}: is a folder; give a file" + (f": there are {', '.join(files)}" if files else "")
        )
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        frame = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: not a readable CSV or Parquet file: {str(error).splitlines()[0]}"
        ) from None
    if not len(frame):
        raise ValueError(f"{path}: has no rows")
    return frame.rename(columns=lambda name: str(name).strip())


def _read_parquet(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path).reset_index(drop=True)  # rows are counted, whatever their writer called them


def _read_csv(path: Path) -> pd.DataFrame:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        header = file.readline()
    if header.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS in place of the data, which `git lfs pull` fetches")
    separator = next((sep for sep in (",", ";", "\t") if sep.encode() in header), ",")
    decimal = "," if separator == ";" else "."
    frame = pd.read_csv(path, encoding="utf-8-sig", sep=separator, decimal=decimal)
    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError("row 1 has more fields than the header")
    return frame


def left_out(file: str, rows: int, what: str) -> None:
    """Warn of them."""
    warnings.warn(f"{file}: {rows} row{'s' * (rows > 1)} {what} left out", stacklevel=3)


def check_numbers(
    file: str,
    frame: pd.DataFrame,
    names: Sequence[str],
    times: Collection[str],
    positive: Collection[str],
) -> None:
    """ValueError for the first value that is no number, a time not above 0, or a size below 0 (or 1)."""
    for name in names:
        values = numbers(frame[name])
        # A time is above 0, a size at least 0 (a window of 0 is none), and both are numbers.
        least = math.ulp(0.0) if name in times else 1.0 if name in positive else 0.0
        bad = ~np.isfinite(values) | (values < least) | (values > (np.inf if name in times else MOST))
        if bad.any():
            row = int(np.argmax(bad))
            allowed = "above 0" if name in times else f"at least {least:.0f} and at most {MOST:,}"
            raise ValueError(
                f"{file}: row {frame.index[row] + 1}: {name} is {frame[name].iloc[row]}; "
                f"allowed: a number {allowed}"
            )


def some_of(file: str, frame: pd.DataFrame, name: str, known: Collection[str]) -> pd.DataFrame:
    """The rows whose `name` is known; ValueError when none is."""
    keep = frame[name].isin(known)
    if not keep.any():
        raise ValueError(f"{file}: {name} is {frame[name].iloc[0]}; allowed: some of {', '.join(known)}")
    if not keep.all():
        others = ", ".join(map(str, frame[name][~keep].unique()[:4]))
        left_out(file, int((~keep).sum()), f"of {name} {others}")
    return frame[keep]


def floats(frame: pd.DataFrame, name: str, default: float | None = None) -> Floats:
    """A column; `default` where it may be missing."""
    if name not in frame:
        assert default is not None
        return np.full(len(frame), default)
    return frame[name].to_numpy(dtype=np.float64)


def measured_rows(
    file: str, frame: pd.DataFrame, operator: str, kind: str, columns: dict[str, Any], time: str
) -> Measured:
    """All of `frame`, whose column `time` is in milliseconds."""
    rows = frame.index.to_numpy(dtype=np.int64) + 1
    seconds = floats(frame, time) / 1e3
    return Measured(file=file, operator=operator, kind=kind, columns=columns, seconds=seconds, rows=rows)
