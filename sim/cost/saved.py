"""A cost model as a file: the numbers of its curves, so that it answers elsewhere exactly as it did.

Fitting again from the rows would differ in the last digits where the linear algebra is another one, and a plan
sized by the one would not be that of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sim.checked import build, check
from sim.cost.curves import ChunkCost, Curves, DecodeCost
from sim.cost.iteration import IterationCost

_TUPLES = {
    "prefill": ChunkCost,
    "forward": ChunkCost,
    "recompute": ChunkCost,
    "backward": ChunkCost,
    "decode": DecodeCost,
}


def to_plain(cost: IterationCost) -> dict[str, Any]:
    """Plain containers and numbers, exact as JSON writes them."""
    values = {field.name: getattr(cost.curves, field.name) for field in fields(Curves)}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return {"lookahead": cost.lookahead, "curves": plain}


def from_plain(plain: Mapping[str, Any]) -> IterationCost:
    """The model that `to_plain` was given. ValueError for a number that is none, KeyError and TypeError for what is
    missing or too much."""
    curves = check(plain["curves"], dict[str, Any], "curves")
    made = {
        name: kind(*check(curves.pop(name), tuple[float, ...], f"curves.{name}"))
        for name, kind in _TUPLES.items()
    }
    lookahead = check(plain["lookahead"], int, "lookahead")
    return IterationCost(build(Curves, curves, "curves", **made), lookahead)
