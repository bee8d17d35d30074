"""The bypass of one linear layer on the ranks of a replica, as its compile plan places it.

`sim.compile.parallel` decides: which part of A and of B a rank has, the changes of state before, between and
after the two products, and whose gradients are sums over the ranks. Nothing of it is chosen here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from engine.changes import Change
from engine.parallel import Group, parts_of
from sim.compile.bypass import S0, P, R
from sim.compile.parallel import changes_of, gradient_path
from sim.compile.plan import BypassPlan
from sim.core.specs import ModelShape


class Share(NamedTuple):
    """One tensor of an adapter, stacked over layers, on the ranks."""

    dim: int | None
    """It is split along this dimension; None: every rank has it whole."""
    parts: int
    """Different parts; where they are fewer than ranks, neighbours hold the same."""
    shape: tuple[int, int]
    """Of the rank's part in one layer."""
    reduced: bool
    """Whether its gradient on a rank is a part of the sum over all ranks."""


class Placement:
    """One bypass, for adapters of one rank."""

    def __init__(self, plan: BypassPlan, lora_rank: int, group: Group, shape: ModelShape) -> None:
        """`shape` is the whole model's."""
        self.target, self.lora_rank = plan.target, lora_rank
        wide_in, wide_out = shape.linears[plan.target]
        tp, parts = group.size, parts_of(plan.target, shape, group.size)
        down, up = (step for step in plan.steps if step.kind != "change")
        reduced = [stage in plan.reduced_stages for stage in (0, 1)]
        self.a = {
            "R": Share(None, 1, (lora_rank, wide_in), reduced[0]),
            "Sin": Share(2, tp, (lora_rank, wide_in // tp), False),
            "Sout": Share(1, tp, (lora_rank // tp, wide_in), False),
        }[down.weight or ""]
        self.b = {
            "R": Share(None, 1, (wide_out, lora_rank), reduced[1]),
            "Sin": Share(2, tp, (wide_out, lora_rank // tp), False),
            "Sout": Share(1, parts, (wide_out // parts, lora_rank), False),
        }[up.weight or ""]
        came = {id(step): state for step, state, _, _ in gradient_path(plan.output_state, plan.steps)[1]}
        splits = ((wide_in, tp), (lora_rank, tp), (wide_out, parts))
        self.before, self.between, self.after = (
            None if step is None else Change(step, came[id(step)], group, _columns(tp, *split))
            for step, split in zip(changes_of(plan.steps), splits, strict=True)
        )
        self.adds = True
        """Whether what comes out is this rank's to add."""
        if self.after is not None and (self.after.before, self.after.after) == (R, P):
            self.after, self.adds = None, group.rank == 0
        self.rows_down, self.rows_up = (step.before == S0 for step in (down, up))
        """Whether the first and the second product are of this rank's tokens only."""
        self.plain = self.before is self.between is self.after is None and self.adds
        """Whether it is two products and nothing else."""
        self.key = (plan.composition, lora_rank if self.between is not None else None)
        """Adapters of one key may share a product: a change between the two takes ranks that are equal."""

    @property
    def sends(self) -> bool:
        """Whether any of its forward is a collective."""
        return any(c is not None and c.sends for c in (self.before, self.between, self.after))


def placements_of(
    plans: Iterable[BypassPlan], lora_rank: int, group: Group, shape: ModelShape
) -> dict[str, Placement]:
    """Target -> its placement."""
    return {plan.target: Placement(plan, lora_rank, group, shape) for plan in plans}


def _columns(tp: int, features: int, parts: int) -> list[slice]:
    return [Group(rank, tp).share(features, parts) for rank in range(tp)]
