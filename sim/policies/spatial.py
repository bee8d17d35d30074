"""Spatial sharing: inference and finetuning run at once and share the device without regard to the SLO.

The finetuning stream never pauses: beside each inference iteration it gets as much done as takes the same
time alone, so the iteration is as long as contention makes it. The world's overlap model (or two CUDA
streams) says how long that is.
"""

from __future__ import annotations

from sim.core.cost import Predictor
from sim.core.plan import Plan, View
from sim.core.work import Work
from sim.policies.packing import checked_budget, pack_inference
from sim.policies.slices import fill, whole_step


class Spatial:
    """The predictor only matches the two streams' lengths; no latency budget."""

    serves = True

    def __init__(
        self, *, predictor: Predictor, token_budget: int | None = None, max_forward_tokens: int = 8192
    ) -> None:
        self._predictor = predictor
        self._token_budget = checked_budget(token_budget)
        self._max_forward_tokens = max_forward_tokens

    def plan(self, view: View) -> Plan:
        inference = pack_inference(view, self._token_budget)
        if not inference.busy:
            slices = whole_step(Work(), view.jobs[0])[0] if view.jobs else ()
            return Plan(finetune=slices)
        alone_s = self._predictor.iteration_s(inference.work)
        slices, _ = fill(Work(), view.jobs, self._predictor, alone_s, self._max_forward_tokens)
        return inference.plan()._replace(finetune=slices, overlap=bool(slices))
