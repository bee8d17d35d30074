"""What is measured before the first run of a sweep: the predictor, and finetuning alone.

It is measured once for all runs that agree in what it depends on, their key, and kept beside them: a sweep that
was cut short goes on (`run.resume`) in another process under the same predictor, and at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from engine.machine import Last
from sim.cost.iteration import IterationCost
from sim.cost.saved import from_plain, to_plain
from sim.json_file import read_object

FILE = "before.json"


class Before(NamedTuple):
    """What the runs of a sweep have in common."""

    predictor: IterationCost
    peak_tok_s: float | None
    """Trained tokens per second of finetuning alone; None: not measured."""


_LAST: Last[Before] = Last()


def before_runs(
    key: str,
    measured: Callable[[], Before],
    first_uses: Callable[[], None],
    folder: Path | None,
    resume: bool,
) -> Before:
    """What `measured` gives, once per `key`; kept in `folder`, and with `resume` taken from there.

    Then `first_uses` does what measuring has done besides, in the process that did it.
    """

    def found() -> Before:
        kept = _read(folder / FILE, key) if folder is not None and resume else None
        if kept is None:
            return measured()
        first_uses()
        return kept

    before = _LAST.get(key, found)
    if folder is not None:
        _write(folder / FILE, key, before)
    return before


def _read(path: Path, key: str) -> Before | None:
    """None where nothing was kept, or something of another key. ValueError for a file that is damaged."""
    if not path.exists():
        return None
    try:
        plain = read_object(path)
        if plain["key"] != key:
            return None
        return Before(from_plain(plain["predictor"]), plain["peak_tok_s"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); without it, it is measured again") from None


def _write(path: Path, key: str, before: Before) -> None:
    plain = {"key": key, "predictor": to_plain(before.predictor), "peak_tok_s": before.peak_tok_s}
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(plain), encoding="utf-8")
    os.replace(partial, path)
