"""Who asks: shares of SLO classes and of LoRA adapters among the requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.errors import nearest
from sim.workload.checks import check_number, check_whole

MOST_ADAPTERS = 100_000
"""Each has a name in memory, and its share of the requests a place in the draw of every one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterMix:
    """`count` adapters whose popularity falls as 1 / rank**zipf, beside the base model's share."""

    count: int = 0
    zipf: float = 1.0
    base_share: float = 0.0
    """Share of requests for the base model alone; without adapters it is all of them."""

    def __post_init__(self) -> None:
        check_whole("workload.adapters.count", self.count, at_least=0, at_most=MOST_ADAPTERS)
        check_number("workload.adapters.zipf", self.zipf, at_least=0)
        check_number("workload.adapters.base_share", self.base_share, at_least=0, at_most=1)

    @property
    def names(self) -> tuple[str, ...]:
        """Code -> name; code 0 is the base model."""
        return ("", *(f"adapter_{i}" for i in range(self.count)))

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Codes into `names`, shape (count,)."""
        if self.count == 0:
            return np.zeros(count, np.int32)
        weights = 1 / np.arange(1, self.count + 1) ** self.zipf
        shares = np.append(self.base_share, weights / weights.sum() * (1 - self.base_share))
        return _draw(shares, count, rng).astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class SloMix:
    """Share of the requests in each SLO class."""

    names: tuple[str, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, slo_mix: Mapping[str, Any] | None, slo_names: Sequence[str]) -> SloMix:
        """The user's class -> share (they need not add up to 1); None is equal shares of all classes."""
        if not slo_names:
            raise ValueError("slo.classes must name at least one class")
        if slo_mix is None:
            return cls(names=tuple(slo_names), shares=(1 / len(slo_names),) * len(slo_names))
        for name, share in slo_mix.items():
            if name not in slo_names:
                raise ValueError(
                    f"workload.slo_mix: no SLO class {name!r}; the slo config has {', '.join(slo_names)}"
                    f"{nearest(str(name), slo_names)}"
                )
            check_number(f"workload.slo_mix.{name}", share, at_least=0)
        total = sum(slo_mix.values())
        if not total > 0:
            raise ValueError(f"workload.slo_mix must have a share above 0, got {dict(slo_mix)}")
        shares = tuple(slo_mix.get(name, 0) / total for name in slo_names)
        return cls(names=tuple(slo_names), shares=shares)

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int16]:
        """Codes into `names`, shape (count,)."""
        return _draw(np.array(self.shares), count, rng).astype(np.int16)


def _draw(shares: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices by share, one uniform each, so that other shares move few of them."""
    edges = np.cumsum(shares)
    return np.searchsorted(edges / edges[-1], rng.random(count), side="right")
