"""Profiles of whole iterations: one row is `Work`, flat, and the seconds that it took.

A profile is a Parquet or CSV file with WORK_COLUMNS and the 20th, 50th and 80th percentile of repeated
measurements. Its provenance travels in the Parquet metadata, or beside a CSV as NAME.json. A group of
columns that is zero in every row was not measured: `profiles.fit` derives it and says so.

What `coserve profile collect` writes has more (MORE_COLUMNS): which point of the design a row is, how often it
was repeated, the host's share of it, and its time when the next iteration is launched before it ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from profiles.named import device_named, model_named
from profiles.rows import check_numbers, read_frame
from sim.checked import build
from sim.core.rows import WORK_COLUMNS
from sim.errors import nearest
from sim.json_file import parse
from sim.workload.readers.columns import numbers

Floats = NDArray[np.float64]

SECONDS_COLUMNS = ("seconds_p20", "seconds_p50", "seconds_p80")
COLUMNS = (*WORK_COLUMNS, *SECONDS_COLUMNS)
MORE_COLUMNS = ("point", "repeats", "host_s", "ahead_s")
"""Only in collected profiles. `host_s` is the part of `seconds_p50` in which the device did not work; `ahead_s`
the seconds of an iteration with one launched ahead, NaN where it was not measured."""
TABLES = Path(__file__).resolve().parent / "tables"
PATHS = "cost=table cost.world.of.path=FILE cost.predictor.of.path=FILE"
"""How a file of one's own is simulated with."""
METADATA = b"coserve.profile"
COLLECTED = b"coserve.collected"
SLACK = 1.0
"""How much longer less work may take than more work before the two rows contradict each other. The
columns do not say all: a window of few tokens after a long context has fewer pairs than one of many after none, and
may take a third longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a profile comes from."""

    device: str
    model: str
    tp: int
    source: str
    date: str
    how: str
    """How it was measured: repeats, what was synchronised, which kernels."""
    licence: str
    versions: str
    """Of the engine, torch, driver."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if not getattr(self, item.name):
                raise ValueError(f"provenance.{item.name} must not be empty")
        # Known by other names too, but compared by these.
        object.__setattr__(self, "device", device_named(self.device).name)
        model = model_named(self.model)
        object.__setattr__(self, "model", model.name)
        model.check_tp(self.tp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Rows and where they come from."""

    file: str
    columns: dict[str, Floats]
    """COLUMNS, and in a collected profile MORE_COLUMNS, each of shape (rows,)."""
    provenance: Provenance | None
    collected: dict[str, Any] | None = None
    """On what, with what and by which command `coserve profile collect` made it."""

    @property
    def seconds(self) -> Floats:
        return self.columns["seconds_p50"]

    @property
    def work(self) -> dict[str, Floats]:
        return {name: self.columns[name] for name in WORK_COLUMNS}


def is_profile(columns: list[str]) -> bool:
    """Whether a file with these columns means to be a profile, complete or not."""
    return len(set(WORK_COLUMNS) & set(columns)) > len(WORK_COLUMNS) // 2


def write_profile(
    path: Path,
    columns: Mapping[str, Floats],
    provenance: Provenance,
    collected: Mapping[str, Any] | None = None,
) -> None:
    """A Parquet file with its provenance, there as a whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [name for name in (*COLUMNS, *MORE_COLUMNS) if name in COLUMNS or name in columns]
    table = pa.table({name: np.asarray(columns[name], dtype=np.float64) for name in names})
    metadata = {METADATA: json.dumps(asdict(provenance)).encode()}
    if collected is not None:
        metadata[COLLECTED] = json.dumps(collected).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table.replace_schema_metadata(metadata), partial)
    os.replace(partial, path)


def read_profile(path: Path) -> Profile:
    """Read and check; ValueError in one line that names the file, the row and what is allowed."""
    frame = read_frame(path)
    missing = [name for name in COLUMNS if name not in frame]
    if missing:
        raise ValueError(
            f"{path}: row 0 (header): column {missing[0]} is missing; a profile needs {', '.join(COLUMNS)}"
        )
    more = [name for name in MORE_COLUMNS if name in frame]
    if more and len(more) < len(MORE_COLUMNS):
        raise ValueError(
            f"{path}: row 0 (header): of {', '.join(MORE_COLUMNS)}, which a collected profile has, there are only "
            f"{', '.join(more)}"
        )
    check_numbers(str(path), frame, (*COLUMNS, *more[:-1]), SECONDS_COLUMNS, ())
    columns = {name: numbers(frame[name]) for name in (*COLUMNS, *more)}
    _check_order(str(path), columns)
    _check_repeats(str(path), frame)
    _check_monotone(str(path), columns)
    return Profile(file=str(path), columns=columns, provenance=_provenance(path), collected=_collected(path))


def find_profile(name: str) -> Path:
    """`name` as a path, or as <device>-<model> among the shipped tables."""
    for path in (Path(name), TABLES / f"{name}.parquet", TABLES / f"{name}.csv"):
        if path.is_file():
            return path
    known = profile_names()
    there = f"there are {', '.join(known)}" if known else "no profile of whole iterations is shipped"
    raise ValueError(
        f"no profile named {name!r}{nearest(name, known)}; {there}; `coserve profile collect` measures one "
        "on the device itself (needs a GPU)"
    )


def profile_names() -> list[str]:
    return sorted(path.stem for path in TABLES.glob("*.parquet"))


def _provenance(path: Path) -> Provenance | None:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        text = (pq.read_schema(path).metadata or {}).get(METADATA)
    else:
        beside = path.with_suffix(".json")
        text = beside.read_bytes() if beside.is_file() else None
    if text is None:
        return None
    try:
        found: Provenance = build(Provenance, parse(text.decode()), "provenance")
    except ValueError as error:
        raise ValueError(f"{path}: provenance: {error}") from None
    return found


def _collected(path: Path) -> dict[str, Any] | None:
    if path.suffix != ".parquet":
        return None
    import pyarrow.parquet as pq

    text = (pq.read_schema(path).metadata or {}).get(COLLECTED)
    if text is None:
        return None
    try:
        return dict(parse(text.decode()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: what was collected: no JSON object: {error}") from None


def _check_order(file: str, c: dict[str, Floats]) -> None:
    low, mid, high = (c[name] for name in SECONDS_COLUMNS)
    wrong = (low > mid) | (mid > high)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{file}: row {row + 1}: seconds_p20, p50, p80 are {low[row]:g}, {mid[row]:g}, {high[row]:g}; "
            "allowed: never decreasing"
        )


def _check_repeats(file: str, frame: pd.DataFrame) -> None:
    again = frame.duplicated(list(WORK_COLUMNS)).to_numpy()
    if again.any():
        row = int(np.argmax(again))
        same = (frame[list(WORK_COLUMNS)] == frame[list(WORK_COLUMNS)].iloc[row]).all(axis=1)
        first = int(np.argmax(same.to_numpy()))
        raise ValueError(
            f"{file}: row {row + 1}: the same work as row {first + 1}; allowed: one row per work, "
            "repeats go into the percentiles"
        )


def _check_monotone(file: str, c: dict[str, Floats]) -> None:
    found = contradiction(c)
    if found is not None:
        row, other = found
        raise ValueError(
            f"{file}: row {row + 1}: not monotone: takes {c['seconds_p50'][row]:g} s, row {other + 1} "
            f"does no more in any column and takes {c['seconds_p50'][other]:g} s; "
            f"allowed: {SLACK:.0%} longer"
        )


def contradiction(c: Mapping[str, Floats]) -> tuple[int, int] | None:
    """The first row, and one that does no more in any column and yet takes longer by more than SLACK and both
    spreads: what is fitted never decreases, so one of the two is wrong. The longest such one; None if none."""
    work = np.column_stack([c[name] for name in WORK_COLUMNS])
    low, high = c["seconds_p20"], c["seconds_p80"]
    for row in range(len(work)):
        less = (work <= work[row]).all(axis=1) & (low > high[row] * (1 + SLACK))
        if less.any():
            return row, int(np.argmax(np.where(less, low, 0.0)))
    return None
