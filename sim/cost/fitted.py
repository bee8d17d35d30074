"""An `IterationCost` that knows the range of the rows its curves were fitted to."""

from __future__ import annotations

from sim.core.rows import WORK_COLUMNS, work_row
from sim.core.work import Work
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

    def outside(self, work: Work) -> tuple[str, ...]:
        """Columns of `work` that lie outside the fitted rows; empty when it is interpolation."""
        values = zip(WORK_COLUMNS, work_row(work), strict=True)
        return tuple(n for n, v in values if not self.ranges[n][0] <= v <= self.ranges[n][1])

    def extrapolates(self, work: Work) -> bool:
        return bool(self.outside(work))
