"""An `IterationCost` that knows the range of the rows its curves were fitted to."""

from __future__ import annotations

from sim.cost.curves import Curves
from sim.cost.iteration import IterationCost


class FittedCost(IterationCost):
    """`IterationCost` over fitted curves."""

    def __init__(self, curves: Curves, ranges: dict[str, tuple[float, float]], lookahead: int = 0) -> None:
        super().__init__(curves, lookahead)
        self.ranges = ranges
        """Work column -> least and largest value among the rows."""

    @property
    def region(self) -> dict[str, tuple[float, float]]:
        return self.ranges
