"""A run as a folder: write it whole, read it back, find it.

    config.yaml        the resolved config
    manifest.json      commit, seed, device, versions, command line, wall time
    requests.parquet, iterations.parquet, steps.parquet, ticks.parquet, segments.parquet
    summary.json       `sim.metrics.summarize`; null is a missing number

`summary.json` comes last and at once (written beside, then renamed), so a folder that has it is
complete and a folder without it is a run that was cut short. The tables have the columns of
`sim.core.rows` and a column `source`; the same rows give the same bytes.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sim.checked import check
from sim.core.rows import WORK_COLUMNS, Outcome, Recorder, Table
from sim.json_file import read_object
from sim.metrics import DEFINITIONS, Floats, column_views

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SOURCES = ("sim", "engine")
TABLES = ("requests", "iterations", "steps", "ticks", "segments")
LABELS = ("slo", "adapter", "job", "outcome", "source")
"""Columns of names."""
ALWAYS = (*WORK_COLUMNS, "start_s", "end_s")
"""Columns of `iterations` that every row has."""
MOST = 10**15
"""Of anything that is counted."""
SUMMARY = "summary.json"
CONFIG = "config.yaml"
SWEEP = "multirun.yaml"
"""What the sweeper writes beside the runs of a sweep."""
MOST_NAMED = 2
"""Of the settings in which two runs differ."""
NUMBERS = ("rate_rps", "duration_s")
"""Of a summary, above 0 where they are known."""

_ROWS_PER_GROUP = 1 << 16
"""Rows converted and written at a time: bounds the memory of writing, 5 MB for each ten columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A complete run folder. Tables are read when asked for, each time anew."""

    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    manifest: dict[str, Any]

    def table(self, name: str) -> pd.DataFrame:
        """One of TABLES as a DataFrame; ValueError if its file is missing or damaged, or of other columns."""
        import pandas as pd

        if name not in TABLES:
            raise ValueError(f"a run has the tables {', '.join(TABLES)}, not {name!r}")
        path = self.folder / f"{name}.parquet"
        try:
            frame = pd.read_parquet(path)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not readable as Parquet: {_one_line(error)}") from None
        _check_columns(path, name, frame)
        return frame


def write_run(
    folder: str | Path,
    recorder: Recorder,
    summary: Mapping[str, object],
    *,
    config: Mapping[str, object],
    manifest: Mapping[str, object],
    source: str,
) -> Path:
    """Write one run and return its folder, made if needed.

    `config` and `manifest` are plain containers. Raises ValueError if the folder already holds a run, and OSError,
    with the folder in its one line, if it cannot be written.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    stated = summary.get("source", source)
    if stated != source:
        raise ValueError(f"summary says source {stated!r}, the run is written as {source!r}")
    folder = Path(folder)
    if (folder / SUMMARY).exists():
        raise ValueError(f"{folder} already holds a run; choose another folder")
    texts = {
        CONFIG: _yaml(config),
        "manifest.json": _json(manifest),
    }
    last = _json({**summary, "source": source})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name in TABLES:
            _write_table(folder / f"{name}.parquet", getattr(recorder, name), recorder, source)
        partial = folder / f".{SUMMARY}.partial"
        partial.write_text(last, encoding="utf-8")
        os.replace(partial, folder / SUMMARY)
    except OSError as error:
        raise OSError(f"cannot write run folder {folder}: {_one_line(error)}") from error
    return folder


def read_run(folder: str | Path) -> Run:
    """Read a complete run folder; ValueError names what is missing or damaged. Null becomes NaN."""
    import yaml

    folder = Path(folder)
    _check_folder(folder)
    if not (folder / SUMMARY).is_file():
        raise ValueError(f"{folder} has no {SUMMARY}: not a run folder, or a run that was cut short")
    summary = _with_nans(read_object(folder / SUMMARY), folder / SUMMARY)
    manifest = read_object(folder / "manifest.json")
    path = folder / CONFIG
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {_one_line(error)}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(config).__name__}")
    return Run(folder=folder, summary=summary, config=config, manifest=manifest)


def finished_run(folder: str | Path, config: Mapping[str, Any], *, resume: bool) -> Run | None:
    """The complete run that a folder holds already, to be resumed: a sweep goes on where it was cut short.

    Raises ValueError when it is not to be resumed, or is a run of other settings; `run.resume` itself may differ.
    """
    if not (Path(folder) / SUMMARY).is_file():
        return None
    if not resume:
        raise ValueError(
            f"{shown_path(folder)} holds a run already: choose another folder, or, where it is the same run, "
            "run.resume=true takes it as it is"
        )
    found = read_run(folder)
    absent = [key for key in DEFINITIONS if key not in found.summary and not key.endswith("_bound_s")]
    if absent:
        raise ValueError(f"{found.folder / SUMMARY} has no {absent[0]}: damaged, or of another version")
    if _settings(config) != _settings(found.config):
        others = ", ".join(_differing(config, found.config))
        rule = (
            "; a sweep is resumed with all values of its axes, in their order"
            if (found.folder.parent / SWEEP).is_file()
            else ""
        )
        raise ValueError(
            f"{shown_path(folder)} holds a run of other settings ({others}); choose another folder{rule}"
        )
    return found


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> value in JSON, of all that decides what a run is."""
    found = {key: json.dumps(value, sort_keys=True, default=str) for key, value in _leaves(config, "")}
    return {key: value for key, value in found.items() if key != "run.resume"}


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differing(asked: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Some keys with the value that a run has and the one that is asked for; first those that both have."""
    new, old = _settings(asked), _settings(there)
    keys = sorted(key for key in {*new, *old} if new.get(key) != old.get(key))
    keys.sort(key=lambda key: (key not in new or key not in old, key.endswith("_target_")))
    few = [
        f"{key} {old.get(key, 'not set')}, asked for {new.get(key, 'not set')}" for key in keys[:MOST_NAMED]
    ]
    return [*few, f"{len(keys) - len(few)} more"] if len(keys) > len(few) else few


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Complete run folders among and below `paths`, each once, sorted within each path.

    A path that does not exist or holds no complete run is a ValueError; runs that were cut short
    below a path are passed over.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        _check_folder(path)
        below = sorted((file.parent for file in path.rglob(SUMMARY)), key=_natural)
        if not below:
            raise ValueError(f"no {SUMMARY} in or below {path}: no run there, or it was cut short")
        found.update(dict.fromkeys(below))
    return list(found)


def _check_folder(path: Path) -> None:
    """ValueError for what is no folder, a run's or one that holds runs."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give the folder of a run, or one that holds runs")
    if not path.exists():
        raise ValueError(f"run folder {path} does not exist")


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key under which run 2 comes before run 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.parts]


def shown_path(path: str | Path) -> Path:
    """Relative to the working directory where it lies below it."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def distinction(overrides: Sequence[str]) -> str | None:
    """The name of a run that was given none: its overrides, without what tables show anyway."""
    shown = (
        "policy",
        "seed",
        "workload",
        "workload.rate_rps",
        "model",
        "device",
        "cluster/router",
        "run.resume",
        "run.bounds",
    )
    return ", ".join(o for o in overrides if o.partition("=")[0] not in shown) or None


def make_manifest(
    *, seed: int | None, device: str | None, wall_s: float, command: Sequence[str] | None = None
) -> dict[str, object]:
    """What a run needs to be repeated. `command` is by default this process's own.

    `commit` is None and `dirty` missing knowledge (None) outside a git checkout. `dirty` says that
    tracked files differ from the commit.
    """
    commit, dirty = _git_state(Path(__file__).resolve().parents[1])
    versions = {name: _version(name) for name in ("numpy", "simpy", "pandas", "pyarrow")}
    torch = sys.modules.get("torch")
    if torch is not None:
        versions["torch"] = str(torch.__version__)
    return {
        "commit": commit,
        "dirty": dirty,
        "seed": seed,
        "device": device,
        "versions": {"python": platform.python_version(), **versions},
        "wall_s": wall_s,
        "command": list(sys.argv if command is None else command),
    }


def _write_table(path: Path, table: Table, recorder: Recorder, source: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = column_views(table)
    labels = {
        "slo": recorder.slos.names,
        "adapter": recorder.adapters.names,
        "job": recorder.jobs.names,
        "outcome": [o.name.lower() for o in Outcome],
        "source": [source],
    }
    writer: pq.ParquetWriter | None = None
    try:
        for start in range(0, max(len(table), 1), _ROWS_PER_GROUP):
            part = {name: column[start : start + _ROWS_PER_GROUP] for name, column in columns.items()}
            part["source"] = np.zeros(min(_ROWS_PER_GROUP, len(table) - start))
            arrays = [_column(name, values, labels) for name, values in part.items()]
            group = pa.Table.from_arrays(arrays, names=list(part))
            if writer is None:
                # Times are all different: a dictionary of them only costs time.
                repeating = [f.name for f in group.schema if not pa.types.is_floating(f.type)]
                writer = pq.ParquetWriter(path, group.schema, compression="zstd", use_dictionary=repeating)
            writer.write_table(group)
    finally:
        if writer is not None:
            writer.close()


def _column(name: str, values: Floats, labels: Mapping[str, list[str]]) -> pa.Array:
    """Doubles as what they mean: labels, truth values, times, and otherwise whole numbers."""
    import pyarrow as pa

    if name.endswith("_s"):
        return _from_numpy(pa.float64(), np.ascontiguousarray(values))
    unknown = np.isnan(values)
    whole = np.where(unknown, 0, values).astype(np.int64)
    known = None if not unknown.any() else np.packbits(~unknown, bitorder="little")
    if name in labels:
        codes = _from_numpy(pa.int32(), whole.astype(np.int32), known)
        return pa.DictionaryArray.from_arrays(codes, _strings(labels[name]))
    assert (whole == values)[~unknown].all(), f"column {name} must hold whole numbers"
    if name in ("overlap", "failed"):
        bits = np.packbits(whole.astype(bool), bitorder="little")
        return _from_numpy(pa.bool_(), bits, known, length=whole.size)
    return _from_numpy(pa.int64(), whole, known)


def _from_numpy(
    kind: pa.DataType, values: NDArray[Any], known: NDArray[np.uint8] | None = None, length: int | None = None
) -> pa.Array:
    """An Arrow array of a numpy buffer. `pa.array` would import pandas, 0.35 s that a run can save."""
    import pyarrow as pa

    buffers = [None if known is None else pa.py_buffer(known), pa.py_buffer(values)]
    return pa.Array.from_buffers(kind, values.size if length is None else length, buffers)


def _strings(names: list[str]) -> pa.Array:
    import pyarrow as pa

    texts = [name.encode() for name in names]
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


def _check_columns(path: Path, name: str, frame: pd.DataFrame) -> None:
    """ValueError for a table that `write_run` does not write."""
    import pandas as pd

    for column in getattr(Recorder(), name).columns:
        if column not in frame:
            raise ValueError(f"{path} has no column {column}: damaged, or of another version")
        if column in LABELS:
            continue
        if not pd.api.types.is_numeric_dtype(frame[column]):
            raise ValueError(f"{path}: column {column} must hold numbers")
        values = frame[column].to_numpy(np.float64, na_value=np.nan)
        if column.endswith("_s") and np.isinf(values).any():
            raise ValueError(f"{path}: column {column} must hold finite times")
        if name == "iterations" and column in ALWAYS and not ((values >= 0) & (values <= MOST)).all():
            raise ValueError(f"{path}: column {column} must hold a number from 0 to {MOST:,} in every row")


def _with_nans(row: object, path: Path) -> dict[str, Any]:
    """A row of numbers and labels, and those of its classes; ValueError names the file where it is none."""
    if not isinstance(row, dict):
        raise ValueError(f"{path}: each of classes must be an object, got {row!r}")
    out: dict[str, Any] = {}
    for key, value in row.items():
        if key in DEFINITIONS or key in NUMBERS:
            known = check(value, float | None, f"{path}: {key}")
            if known is not None and not (abs(known) < math.inf and (known > 0 or key not in NUMBERS)):
                least = " above 0" if key in NUMBERS else ""
                raise ValueError(f"{path}: {key} must be a finite number{least}, got {value}")
        elif isinstance(value, int) and key != "seed":
            check(value, float, f"{path}: {key}")
        out[key] = math.nan if value is None and key in DEFINITIONS else value
    if "classes" in out:
        if not isinstance(out["classes"], list):
            raise ValueError(f"{path}: classes must be a list, got {out['classes']!r}")
        out["classes"] = [_with_nans(child, path) for child in out["classes"]]
    if "notes" in out:
        check(out["notes"], tuple[str, ...], f"{path}: notes")
    return out


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    """`value` in JSON's own types: numpy numbers as Python's, NaN as None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return value


def _yaml(config: Mapping[str, object]) -> str:
    import yaml

    try:
        return str(yaml.safe_dump(dict(config), sort_keys=False))
    except yaml.YAMLError as error:
        raise ValueError(f"config holds a value that is not plain data: {_one_line(error)}") from None


def _git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout whose top is `root`, and whether its tracked files differ from it."""
    if not (root / ".git").exists():
        return None, None
    command = ["git", "-C", str(root), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None, None
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), None)
    return commit, any(not line.startswith("#") for line in lines)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
