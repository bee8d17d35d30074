"""Checks of what users write into a config: hydra refuses unknown keys, but not wrong types."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sim.errors import nearest


def check_number(
    key: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float = math.inf,
) -> None:
    """Raise ValueError unless `value` is a finite number within the bounds."""
    bounds = [f"above {above:g}"] if above is not None else []
    bounds += [f"at least {at_least:g}"] if at_least is not None else []
    bounds += [f"at most {at_most:g}"] if at_most != math.inf else []
    good = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and value <= at_most
    )
    if not good:
        raise ValueError(f"{key} must be a number {' and '.join(bounds)}, got {value!r}")


def check_whole(key: str, value: Any, *, at_least: int, at_most: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number within the bounds."""
    above = at_most is not None and isinstance(value, int) and value > at_most
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least or above:
        bounds = f"at least {at_least}" + ("" if at_most is None else f" and at most {at_most:,}")
        raise ValueError(f"{key} must be a whole number, {bounds}, got {value!r}")


def check_choice(key: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError, naming the nearest choice, unless `value` is among `choices`."""
    names = list(choices)
    if value not in names:
        hint = nearest(str(value), names)
        raise ValueError(f"{key} must be one of {', '.join(names)}, got {value!r}{hint}")
