"""Reads a card's operator profile: the folder that LLMServingSim's profiler leaves per card, model and dtype.

`meta.yaml` says what was measured; `dense.csv`, `per_sequence.csv`, `attention.csv` and, where `meta.yaml`
says `skew_fit.enabled`, `skew_fit.csv` hold the times, in microseconds. A folder `tpN` holds those of one of N
devices; without such folders the files are those of the only degree in `tp_degrees`. An alpha table that the
profile's own meta does not vouch for is not used.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sim.cost.grid import AttentionGrid, Point
from sim.cost.operators import Curve, OperatorProfile
from sim.cost.skew import Box, Skew

POINT = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
BOX = ("n_label", "skew_rate_label", "kv_big_label", "kp_label")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileFolder:
    """A profile and what it was measured on."""

    model: str
    card: str
    tp: int
    """Degree that the times are of: a device has a share of 1 / tp of every split layer."""
    operators: OperatorProfile


def read_profile(folder: Path, tp: int = 1) -> ProfileFolder:
    """The times of one of `tp` devices. Raises ValueError naming file, row and what is allowed."""
    path = folder / "meta.yaml"
    try:
        meta = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(meta, dict):
        raise ValueError(f"{path} must hold keys and values")
    for key in ("model", "hardware", "tp_degrees"):
        if key not in meta:
            raise ValueError(f"{path} has no key {key!r}")
    degrees = meta["tp_degrees"]
    if not isinstance(degrees, list) or not all(isinstance(n, int) and n > 0 for n in degrees):
        raise ValueError(f"{path}: tp_degrees must be a list of whole numbers from 1, got {degrees!r}")
    folder = _of_degree(folder, degrees, tp)
    skewed = bool((meta.get("skew_fit") or {}).get("enabled", False))
    try:
        operators = OperatorProfile(
            dense=_curves(folder / "dense.csv", "tokens"),
            per_sequence=_curves(folder / "per_sequence.csv", "sequences"),
            attention=AttentionGrid(_points(folder / "attention.csv")),
            skew=_skew(folder / "skew_fit.csv") if skewed else Skew({}),
        )
    except ValueError as error:
        raise ValueError(_located(folder, str(error))) from None
    return ProfileFolder(
        model=str(meta["model"]),
        card=str(meta["hardware"]),
        tp=tp,
        operators=operators,
    )


def _of_degree(folder: Path, degrees: list[int], tp: int) -> Path:
    own = folder / f"tp{tp}"
    if own.is_dir():
        return own
    if degrees != [tp]:
        known = sorted({*degrees} if degrees == [1] else {int(p.name[2:]) for p in folder.glob("tp[0-9]*")})
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


def _points(path: Path) -> dict[Point, float]:
    found: dict[Point, float] = {}
    for where, row in _rows(path, (*POINT, "time_us")):
        chunk, before, decodes, context = (_count(where, key, row[key], 0) for key in POINT)
        point = (chunk, before, decodes, context)
        if chunk == 0 and decodes == 0:
            raise ValueError(f"{where}: prefill_chunk or n_decode must be above 0")
        if point in found:
            raise ValueError(f"{where}: the point {point} is there twice")
        found[point] = _seconds(where, row["time_us"])
    return found


def _skew(path: Path) -> Skew:
    alphas: dict[int, dict[Box, tuple[float, int]]] = {}
    for where, row in _rows(path, ("pc", *BOX, "alpha", "n_samples")):
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
    reader = csv.DictReader(_text(path).splitlines())
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; it must have {', '.join(columns)}")
    for row in reader:
        where = f"{path} line {reader.line_num}"
        if any(row[name] is None for name in columns):
            raise ValueError(f"{where} has fewer than {len(columns)} values")
        yield where, row


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path.read_text(encoding="utf-8")


def _count(where: str, key: str, text: str, lowest: int) -> int:
    number = _number(where, key, text)
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
