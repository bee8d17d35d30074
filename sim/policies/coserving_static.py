"""What the published artifact runs: a static token budget, and K backward layers whatever the load.

An iteration holds B tokens (256): decodes, then prefill chunks first-come first-served, then finetuning
forward takes what is left. In the backward phase K whole-sequence layers (K = 1) run
beside every iteration on a second stream. No latency model at run time.
"""

from __future__ import annotations

from sim.core.finetune import Backward, Forward, JobView, Slice, Step
from sim.core.plan import Plan, View
from sim.policies.packing import pack_inference
from sim.policies.slices import whole_layers


class CoServingStatic:
    """FlexLLM's static policy. With mean iteration time t, mean sample length L and c inference tokens per
    iteration, a pipeline trains L / ((ceil(L / (B - c)) + layers / K) * t) tokens per second."""

    serves = True
    finetunes = True

    def __init__(self, *, token_budget: int = 256, backward_layers: int = 1, overlap: bool = True) -> None:
        if token_budget < 1 or backward_layers < 1:
            raise ValueError(
                "policy.token_budget and policy.backward_layers must be at least 1, "
                f"got {token_budget} and {backward_layers}"
            )
        self._token_budget = token_budget
        self._backward_layers = backward_layers
        self._overlap = overlap

    def plan(self, view: View) -> Plan:
        inference = pack_inference(view, self._token_budget)
        used = inference.work.decode_count + inference.work.prefill_tokens
        slices = self._slices(view.jobs[0], self._token_budget - used) if view.jobs else ()
        return Plan(
            decode=inference.decode,
            prefills=inference.prefills,
            preempted=inference.preempted,
            finetune=slices,
            overlap=self._overlap and bool(slices) and type(slices[-1]) is Backward,
        )

    def _slices(self, job: JobView, room: int) -> tuple[Slice, ...]:
        if job.step_due:
            return (Step(job.id),)
        if job.forward_left:
            tokens = min(job.forward_left, room)
            return (Forward(job.id, tokens),) if tokens > 0 else ()
        return (whole_layers(job, self._backward_layers),)
