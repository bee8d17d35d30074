"""What the nodes of a config mean that more than one command has: limits, cluster, SLO classes, costs, seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from sim.checked import build
from sim.core.plan import Limits
from sim.core.request import Slo
from sim.cost.context import CostBuilder
from sim.errors import keys_as
from sim.routing import Router

MOST_PIPELINES = 4096
"""Of a cluster: the noise of each has a seed of its own among so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """`cluster.limits`, as `Limits` with what the model and the device decide left open."""

    kv_tokens: int | None
    block_tokens: int
    max_sequences: int
    max_tokens: int
    max_sequence_tokens: int | None
    admission: str
    lookahead: int

    def __post_init__(self) -> None:
        room = max(1, self.block_tokens) if self.kv_tokens is None else self.kv_tokens
        with keys_as({"cluster.limits.": ""}):
            self.of(room, 1 if self.max_sequence_tokens is None else self.max_sequence_tokens)

    def of(self, kv_tokens: int, max_sequence_tokens: int) -> Limits:
        """With what is left open."""
        return Limits(
            kv_tokens=kv_tokens,
            block_tokens=self.block_tokens,
            max_sequences=self.max_sequences,
            max_tokens=self.max_tokens,
            max_sequence_tokens=max_sequence_tokens,
            admission=self.admission,
            lookahead=self.lookahead,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSettings:
    """One entry of `cluster.groups`: equal pipelines on one kind of device."""

    pipelines: int
    device: str | None = None
    """None is the `device` group's."""
    tp: int | None = None
    kv_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """The `cluster` group."""

    pipelines: int | None
    tp: int | None
    groups: tuple[GroupSettings, ...] | None
    router: Router
    memory_utilization: float
    limits: LimitSettings

    def __post_init__(self) -> None:
        if (self.pipelines is None) == (self.groups is None):
            raise ValueError(
                "cluster.pipelines (equal pipelines) or cluster.groups (unequal ones) must be given and the "
                f"other null, got {self.pipelines} and {'null' if self.groups is None else 'groups'}"
            )
        counts = {"cluster.pipelines": self.pipelines} if self.groups is None else {}
        counts |= {f"cluster.groups[{i}].pipelines": g.pipelines for i, g in enumerate(self.groups or ())}
        for where, count in counts.items():
            if count is not None and not 1 <= count <= MOST_PIPELINES:
                raise ValueError(f"{where} must be in 1..{MOST_PIPELINES}, got {count}")
        together = sum(group.pipelines for group in self.groups or ())
        if together > MOST_PIPELINES:
            raise ValueError(
                f"cluster.groups must have at most {MOST_PIPELINES} pipelines together, got {together}"
            )
        for i, group in enumerate(self.groups or ()):
            if group.kv_tokens is not None and group.kv_tokens < self.limits.block_tokens:
                raise ValueError(
                    f"cluster.groups[{i}].kv_tokens must hold a block of {self.limits.block_tokens} tokens, "
                    f"got {group.kv_tokens}"
                )
        if self.groups is not None and not self.groups:
            raise ValueError("cluster.groups must be null or name at least one group, got []")
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(f"cluster.memory_utilization must be in (0, 1], got {self.memory_utilization}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SloSettings:
    """The `slo` group."""

    name: str | None = None
    """Shown in titles of tables and figures."""
    classes: Mapping[str, Mapping[str, Any]]
    """Name -> bounds, as `Slo` has them; null is none."""
    tpot_s: Mapping[str, float] = field(default_factory=dict)
    """Model -> a bound that classes may refer to."""

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("slo.classes must name at least one class, got {}")
        for model, bound_s in self.tpot_s.items():
            if not bound_s > 0:
                raise ValueError(f"slo.tpot_s.{model} must be above 0 seconds, got {bound_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSettings:
    """The `cost` group: what an iteration takes, and what policies believe that it takes."""

    world: CostBuilder
    predictor: CostBuilder


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """The `run` node."""

    name: str | None
    drain_s: float
    bounds: bool
    resume: bool = False


def seed_of(config: DictConfig) -> int:
    """The seed of a run. Raises ValueError for what is none."""
    seed = config.seed
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be a whole number from 0, got {seed!r}")
    return seed


def slos_of(config: DictConfig) -> dict[str, Slo]:
    """The SLO classes by name."""
    settings = build(SloSettings, config.slo, "slo")
    slos = {}
    for name, bounds in settings.classes.items():
        given = {key: bound for key, bound in bounds.items() if bound is not None}
        slos[name] = build(Slo, given, f"slo.classes.{name}", name=name)
    return slos
