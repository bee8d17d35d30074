"""`TableFile`: the cost model fitted to a measured profile, for `cost=table`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from profiles.fit import fit, hides
from profiles.schema import PATHS, Profile, find_profile, read_profile
from sim.cost.context import CostContext
from sim.cost.fitted import FittedCost


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFile:
    """Builder: `path` is a file or the name of a shipped table; null is <device>-<model>."""

    path: str | None = None
    share: float = 1.0
    """Share of the rows that is fitted: a predictor that saw less than the world is not the world."""
    seed: int = 0
    """Which rows those are."""

    def __post_init__(self) -> None:
        if not 0.2 <= self.share <= 1:
            raise ValueError(f"share must be in [0.2, 1], got {self.share}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    def build(self, context: CostContext) -> FittedCost:
        profile = read_profile(self._file(context))
        _check_match(profile, context)
        table = fit(self._part(profile), context).table
        curves = table.curves.with_again(context.model.layers, context.again_gemm, context.again_attention)
        return replace(table, curves=curves).model(0 if hides(profile) else context.lookahead)

    def _file(self, context: CostContext) -> Path:
        if self.path is not None:
            return find_profile(self.path)
        try:
            return find_profile(f"{context.device.name}-{context.model.name}")
        except ValueError as error:
            raise ValueError(f"{error}, {PATHS} takes it; cost=roofline needs none") from None

    def _part(self, profile: Profile) -> Profile:
        count = len(profile.seconds)
        keep = np.random.default_rng(self.seed).permutation(count)[: max(1, round(self.share * count))]
        return replace(profile, columns={name: values[keep] for name, values in profile.columns.items()})


def _check_match(profile: Profile, context: CostContext) -> None:
    of = profile.provenance
    if of is None:
        return
    ours = (context.device.name, context.model.name, context.tp)
    if (of.device, of.model, of.tp) != ours:
        raise ValueError(
            f"{profile.file}: measured for {of.model} on {of.tp} x {of.device}; "
            f"asked for {ours[1]} on {ours[2]} x {ours[0]}"
        )
