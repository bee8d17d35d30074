"""Reads a card's operator profile: the folder that LLMServingSim's profiler leaves per card, model and dtype.

`meta.yaml` says what was measured; `dense.csv`, `per_sequence.csv`, `attention.csv` and, where `meta.yaml`
says `skew_fit.enabled`, `skew_fit.csv` hold the times, in microseconds. A folder `tpN` holds those of one of N
devices; without such folders the files are those of the only degree in `tp_degrees`. An alpha table that the
profile's own meta does not vouch for is not used.

Later profilers measure several prompts in one kernel as well, and have `prefill_key` in place of the one prompt's
`kv_prefill`: how many keys a query sees on average but for itself, its context and half of its chunk. Their
`attention.csv` says the kernel in `layer` and the queries of a decode in `decode_q_len`, and their alpha table has
other axes, which are not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sim.cost.grid import AttentionGrid, Point
from sim.cost.operators import Curve, OperatorProfile
from sim.cost.skew import Box, Skew
from sim.vllm.text import table_of, text_of

POINT = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
KEY = "prefill_key"
"""Column of later profilers instead of kv_prefill."""
BOX = ("n_label", "skew_rate_label", "kv_big_label", "kp_label")
SKEW_COLUMNS = ("pc", *BOX, "alpha", "n_samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileFolder:
    """A profile and what it was measured on."""

    model: str
    card: str
    tp: int
    """Degree that the times are of: a device has a share of 1 / tp of every split layer."""
    operators: OperatorProfile
    notes: tuple[str, ...] = ()
    """What is not in it, in words."""


def read_profile(folder: Path, tp: int = 1) -> ProfileFolder:
    """The times of one of `tp` devices. Raises ValueError naming file, row and what is allowed."""
    if folder.name.startswith("tp") and not (folder / "meta.yaml").is_file():
        folder = folder.parent
    path = folder / "meta.yaml"
    try:
        meta = yaml.safe_load(text_of(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(meta, dict):
        raise ValueError(f"{path} must hold keys and values")
    if "model" not in meta:
        raise ValueError(f"{path} has no key 'model'")
    degrees = meta.get("tp_degrees", _degrees(folder) or [1])
    if not isinstance(degrees, list) or not all(isinstance(n, int) and n > 0 for n in degrees):
        raise ValueError(f"{path}: tp_degrees must be a list of whole numbers from 1, got {degrees!r}")
    folder = _of_degree(folder, degrees, tp)
    skew, notes = Skew({}), []
    fit = meta.get("skew_fit") or {}
    if not isinstance(fit, dict):
        raise ValueError(f"{path}: skew_fit must hold keys and values, got {fit!r}")
    if fit.get("enabled", False):
        skew_path = folder / "skew_fit.csv"
        names = table_of(skew_path)[0] if skew_path.is_file() else SKEW_COLUMNS
        missing = [name for name in SKEW_COLUMNS if name not in names]
        if skew_path.is_file() and not missing:
            skew = _skew(skew_path)
        else:
            why = f"has no column {missing[0]}" if missing else "is not there"
            notes.append(f"{skew_path} {why}: unequal decodes take the time of equal ones")
    try:
        operators = OperatorProfile(
            dense=_curves(folder / "dense.csv", "tokens"),
            per_sequence=_curves(folder / "per_sequence.csv", "sequences"),
            attention=_grid(folder / "attention.csv"),
            skew=skew,
        )
    except ValueError as error:
        raise ValueError(_located(folder, str(error))) from None
    if "rotary_emb" not in operators.dense:
        notes.append(f"{folder / 'dense.csv'} has no rotary_emb, which takes no time then")
    return ProfileFolder(
        model=str(meta["model"]),
        card=str(meta.get("hardware") or meta.get("gpu") or "a card without a name"),
        tp=tp,
        operators=operators,
        notes=tuple(notes),
    )


def _degrees(folder: Path) -> list[int]:
    """Those that have a folder."""
    return sorted(int(path.name[2:]) for path in folder.glob("tp[0-9]*") if path.name[2:].isdigit())


def _of_degree(folder: Path, degrees: list[int], tp: int) -> Path:
    own = folder / f"tp{tp}"
    if own.is_dir():
        return own
    if degrees != [tp]:
        known = degrees if degrees == [1] else _degrees(folder)
        raise ValueError(
            f"{folder} has no times for tensor parallel degree {tp}; it has {', '.join(map(str, known)) or 'none'}"
        )
    return folder


def _located(folder: Path, text: str) -> str:
    return text if str(folder) in text else f"{folder}: {text}"


def _curves(path: Path, key: str) -> dict[str, Curve]:
    found: dict[str, dict[int, float]] = {}
    for where, row in _rows(path, ("layer", key, "time_us")):
        count, seconds = _count(where, key, row[key], 1), _seconds(where, row["time_us"])
        curve = found.setdefault(row["layer"], {})
        if count in curve:
            raise ValueError(f"{where}: {row['layer']} at {key} {count} is there twice")
        curve[count] = seconds
    return {
        name: Curve(tuple(sorted(curve)), tuple(curve[n] for n in sorted(curve)))
        for name, curve in found.items()
    }


def _grid(path: Path) -> AttentionGrid:
    """Attention of one query per decode."""
    keyed = KEY in table_of(path)[0]
    columns = tuple(KEY if keyed and key == "kv_prefill" else key for key in POINT)
    found: dict[Point, float] = {}
    for where, row in _rows(path, (*columns, "time_us")):
        if row.get("layer", "attention") != "attention" or row.get("decode_q_len", "1") != "1":
            continue
        # Half a key is a rounding of odd chunks, and would be a value of the axis for itself.
        chunk, before, decodes, context = (
            _count(where, key, row[key], 0, rounded=key == KEY) for key in columns
        )
        point = (chunk, before, decodes, context)
        if chunk == 0 and decodes == 0:
            raise ValueError(f"{where}: prefill_chunk or n_decode must be above 0")
        if point in found:
            raise ValueError(f"{where}: the point {point} is there twice")
        found[point] = _seconds(where, row["time_us"])
    return AttentionGrid(found, by_key=keyed)


def _skew(path: Path) -> Skew:
    alphas: dict[int, dict[Box, tuple[float, int]]] = {}
    for where, row in _rows(path, SKEW_COLUMNS):
        box = Box(*(_upper_bound(where, row[key]) for key in BOX))
        alpha = _number(where, "alpha", row["alpha"])
        boxes = alphas.setdefault(_count(where, "pc", row["pc"], 0), {})
        boxes[box] = (alpha, _count(where, "n_samples", row["n_samples"], 1))
    return Skew(alphas)


def _upper_bound(where: str, label: str) -> float:
    """'n<=32' -> 32, 'kvB<=4k' -> 4096, 'sr<=15%' -> 0.15, 'kp=0' -> 0, 'sr>70%' -> inf."""
    if ">" in label:
        return math.inf
    text = label.rpartition("=")[2]
    unit = {"k": 1024.0, "%": 0.01}.get(text[-1:], 1.0)
    return _number(where, "label", text.rstrip("k%")) * unit


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(file and line, row) of a CSV file that has all `columns`."""
    names, rows = table_of(path)
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; it must have {', '.join(columns)}")
    for where, row in rows:
        if any(row[name] is None for name in columns):
            raise ValueError(f"{where} has fewer than {len(columns)} values")
        yield where, row


def _count(where: str, key: str, text: str, lowest: int, *, rounded: bool = False) -> int:
    number = _number(where, key, text)
    number = round(number) if rounded else number
    if number != int(number) or number < lowest:
        raise ValueError(f"{where}: {key} must be a whole number from {lowest}, got {text!r}")
    return int(number)


def _seconds(where: str, text: str) -> float:
    microseconds = _number(where, "time_us", text)
    if not microseconds > 0:
        raise ValueError(f"{where}: time_us must be above 0, got {text!r}")
    return microseconds * 1e-6


def _number(where: str, key: str, text: Any) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"{where}: {key} must be a number, got {text!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{where}: {key} must be finite, got {text!r}")
    return number
