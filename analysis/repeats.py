"""Which runs are repeats of each other, and what tells the others apart.

Repeats differ in nothing but the seed: only they are averaged. What is compared is the whole resolved config, so
that a setting which no label names never passes for a seed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis.runs import IDENTITY, SCENE, Row, flatten, number, text, varied, worst_attainment


class Repeated(NamedTuple):
    """Runs that differ in nothing but the seed, put together."""

    mean: Row
    """Labels and means; of no seed."""
    deviation: Row
    """Sample standard deviations; none of a number that fewer than two runs have."""
    seeds: tuple[str, ...]
    """That of each run."""
    known: Mapping[str, int]
    """Metric -> how many of the runs have it."""

    @property
    def with_seeds(self) -> Row:
        """`mean`, with all the seeds that it is of as its `seed`."""
        return {**self.mean, "seed": ", ".join(sorted(self.seeds))}


def over_seeds(rows: Sequence[Row]) -> list[Repeated]:
    """The `alike` groups of `rows`: means and deviations over the runs that have the number."""
    return [_repeated(group) for group in alike(rows)]


def alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in nothing but the seed, in order of first appearance.

    Labels and, where a row has it, the whole resolved `config` are compared. A seed that comes twice begins
    another group.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    seen: Counter[tuple[object, ...]] = Counter()
    for row in rows:
        labels = (*(text(row, key) for key in (*IDENTITY, "router") if key != "seed"), _frozen(row))
        run = (*labels, text(row, "seed"))
        groups.setdefault((*labels, seen[run]), []).append(row)
        seen[run] += 1
    return list(groups.values())


_SEEDS = ("seed", "cluster.router.seed")
_NO_SETTING = ("run.name", "run.bounds", "run.resume")
"""Keys of a config that change nothing in what is measured."""


def settings(row: Row) -> dict[str, Any]:
    """The resolved config that the row was run with, dotted, without its seeds; empty where it is not known."""
    config = row.get("config")
    if not isinstance(config, Mapping):
        return {}
    left_out = (*_SEEDS, *_NO_SETTING)
    return {key: value for key, value in flatten(config).items() if key not in left_out}


def _frozen(row: Row) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, _written(value)) for key, value in settings(row).items()))


def display_names(rows: Sequence[Row]) -> list[str]:
    """The policy of each row, with what tells it from other rows of the same source.

    That is what the runs' names do not share, name by name; for runs of one policy whose names say nothing, the
    settings in which the configs differ; and for runs of the same settings, labels and seed, the end of their
    folders. Keys are cut to their last words: `policy.margin=0.3` is `margin=0.3`.
    """
    parts: list[list[str]] = [[] for _ in rows]
    for group in _groups(rows, lambda i: (text(rows[i], "source"),)):
        names = [_pieces(rows[i]) for i in group]
        for i, own in zip(group, names, strict=True):
            parts[i] = [piece for piece in own if not all(piece in other for other in names)]
    columns = (*SCENE, "rate_rps", "router", "source")
    cells = [(_policy(row), *(text(row, column) for column in columns)) for row in rows]
    for group in _groups(rows, lambda i: (*cells[i], *parts[i])):
        _tell_settings(rows, group, parts)
    for group in _groups(rows, lambda i: (*cells[i], text(rows[i], "seed"), *parts[i])):
        folders = [Path(text(rows[i], "folder")).parts for i in group]
        depth = next((n for n in (1, 2, 3) if len({f[-n:] for f in folders}) == len(folders)), 3)
        if len(set(folders)) > 1:
            for i, folder in zip(group, folders, strict=True):
                parts[i].append("/".join(folder[-depth:]))
    short = _short_keys({piece.partition("=")[0] for own in parts for piece in own if "=" in piece})
    return [_named(_policy(row), own, short) for row, own in zip(rows, parts, strict=True)]


def shared_settings(rows: Sequence[Row]) -> list[str]:
    """For titles: of what the runs' names are made of, what all of them have and no label tells."""
    first, *others = [_pieces(row) for row in rows]
    told = ("slo", "cluster.limits.admission")
    return [
        piece
        for piece in first
        if piece.partition("=")[0] not in told and all(piece in other for other in others)
    ]


def short_settings(pieces: Sequence[str]) -> list[str]:
    """`pieces` of runs' names with keys cut to their last two words, or as many more as tell them apart."""
    pairs = [piece.partition("=") for piece in pieces]
    short = _short_keys({key for key, equals, _ in pairs if equals}, least=2)
    return [f"{short.get(key, key)}{equals}{value}" for key, equals, value in pairs]


def line_names(rows: Sequence[Row], labels: Sequence[str] = ("source", "router")) -> list[str]:
    """`display_names` for figures, which have no columns: with those of `labels` in which `rows` differ. A row stands
    for its repeats, so that its seed does not tell it from another."""
    told = varied(rows, labels)
    return [
        name + (f" [{', '.join(text(row, key) or '-' for key in told)}]" if told else "")
        for name, row in zip(display_names([{**row, "seed": None} for row in rows]), rows, strict=True)
    ]


def run_names(rows: Sequence[Row]) -> list[str]:
    """`display_names` for lines about runs: with every label that the rows differ in."""
    units = {"rate_rps": "{} req/s", "seed": "seed {}"}
    told = varied(rows, [*SCENE, "rate_rps", "router", "source", "seed"])
    return [
        name
        + (
            f" [{', '.join(units.get(key, '{}').format(text(row, key) or '-') for key in told)}]"
            if told
            else ""
        )
        for name, row in zip(display_names(rows), rows, strict=True)
    ]


def _policy(row: Row) -> str:
    return text(row, "policy") or text(row, "name") or "-"


def _pieces(row: Row) -> list[str]:
    """What a run's name is made of: its overrides, or the words that a user gave it."""
    name = text(row, "name")
    return re.split(r", (?=[\w./@+~-]+=)", name) if name not in ("", text(row, "policy")) else []


def _groups(rows: Sequence[Row], key: Callable[[int], tuple[str, ...]]) -> list[list[int]]:
    """Positions of `rows` by their key, where there are at least two."""
    found: dict[tuple[str, ...], list[int]] = {}
    for i in range(len(rows)):
        found.setdefault(key(i), []).append(i)
    return [group for group in found.values() if len(group) > 1]


def _tell_settings(rows: Sequence[Row], group: Sequence[int], parts: Sequence[list[str]]) -> None:
    """Add to `parts` what the configs of a group differ in."""
    configs = [settings(rows[i]) for i in group]
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [_written(config.get(key)) for config in configs]
        if len(set(values)) > 1:
            for i, value in zip(group, values, strict=True):
                parts[i].append(f"{key}={value}")


def _written(value: object) -> str:
    """As the command line takes it; equal numbers alike, whole or not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _short_keys(keys: Collection[str], least: int = 1) -> dict[str, str]:
    """Each dotted key cut to as many of its last words, `least` or more, as tell it from the others."""
    short = {}
    for key in keys:
        words = key.split(".")
        tails = (".".join(words[n:]) for n in reversed(range(max(1, len(words) - least + 1))))
        others = [other for other in keys if other != key]
        short[key] = next((t for t in tails if not any(f".{o}".endswith(f".{t}") for o in others)), key)
    return short


def _named(policy: str, parts: Sequence[str], short: Mapping[str, str]) -> str:
    said = []
    for piece in parts:
        key, equals, value = piece.partition("=")
        said.append(f"{short[key]}={value}" if equals else piece)
    return f"{policy} ({', '.join(said)})" if said else policy


def _repeated(rows: Sequence[Row]) -> Repeated:
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value))
    values = {
        key: [value for row in rows if not math.isnan(value := number(row, key))]
        for key in keys
        if key not in IDENTITY
    }
    mean = {key: math.fsum(v) / len(v) if v else math.nan for key, v in values.items()}
    deviation = {key: float(np.std(v, ddof=1)) for key, v in values.items() if len(v) > 1}
    known = {key: len(v) for key, v in values.items()}
    mean["worst_attainment"] = math.fsum(map(worst_attainment, rows)) / len(rows)
    return Repeated(
        {**rows[0], **mean, "seed": None}, deviation, tuple(text(row, "seed") for row in rows), known
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
