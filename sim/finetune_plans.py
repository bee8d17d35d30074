"""The compile plans of a pipeline's finetuning jobs: what they hold beside serving, what they run again, and what
their bypasses do and send under tensor parallelism.

A job with `memory: auto` gets the plan that runs least again of those that fit its share of the free memory:
what is left beside the KV cache where its size is given, else at most AUTO_SHARE of what weights and activations
leave, so that the KV cache has the rest (more only where no plan is that small). Jobs divide it equally, after
those that do not ask.

The compiler is loaded when the first plan is asked for: runs without finetuning start without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from sim.core.finetune import AUTO
from sim.core.specs import BypassWork, DeviceSpec, LoraSpec, ModelShape
from sim.cost.efficiency import Efficiency
from sim.cost.memory import GIB
from sim.errors import OutOfReach
from sim.workload.finetune import Finetune

if TYPE_CHECKING:
    from sim.compile.plan import CompilePlan

AUTO_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetunePlans:
    """The plan of each job, by its name."""

    plans: Mapping[str, CompilePlan]

    @property
    def held_bytes(self) -> int:
        """Per device: each job has one sample in flight, of the longest, and an adapter of its own; their
        slices run one after the other."""
        plans = self.plans.values()
        passing = max((plan.passing_bytes for plan in plans), default=0)
        return sum(plan.held_bytes + plan.adapter_bytes for plan in plans) + passing

    @property
    def again_gemm(self) -> float:
        """Share of a layer's products that the backward runs again. A cost model does not see whose backward
        it is: the job that repeats most decides for all."""
        return max((plan.mean_again.gemm for plan in self.plans.values()), default=0.0)

    @property
    def again_attention(self) -> float:
        return max((plan.mean_again.attention for plan in self.plans.values()), default=0.0)

    @property
    def trained(self) -> BypassWork | None:
        """What the bypasses of a window do in a layer; of jobs that differ, those that take longest."""
        plans = self.plans.values()
        longest = max(plans, key=lambda plan: sum(b.seconds for b in plan.bypasses), default=None)
        return None if longest is None else longest.bypass_work

    def settle(self, finetune: Finetune) -> Finetune:
        """`finetune` with the memory that the plans chose."""
        jobs = {name: replace(job, memory=self.plans[name].mode) for name, job in finetune.jobs.items()}
        return replace(finetune, jobs=jobs)


def plans_of(
    finetune: Finetune,
    model: ModelShape,
    device: DeviceSpec,
    tp: int,
    free_bytes: float,
    kv_bytes: float | None,
) -> FinetunePlans:
    """Compile every job. `free_bytes` per device are left beside weights and activations, `kv_bytes` of them
    are the KV cache's (None: not said). Raises OutOfReach where nothing fits a job that asks, ValueError for a
    device whose constants are not known."""
    if finetune.jobs:
        Efficiency.of(device)  # refuses architectures and extras that are not known, in the device's name
    of = (model, finetune.lora, device, tp)
    plans = {
        name: _plan(*of, job.cutoff_len, job.accumulation, job.order, job.memory)
        for name, job in finetune.jobs.items()
        if job.memory != AUTO
    }
    share = AUTO_SHARE if kv_bytes is None else 1.0
    left = free_bytes - (kv_bytes or 0.0) - FinetunePlans(plans=plans).held_bytes
    asking = {name: job for name, job in finetune.jobs.items() if job.memory == AUTO}
    if asking and left <= 0:
        others = (
            "weights and activations"
            if kv_bytes is None
            else "weights, activations and the KV cache asked for"
        )
        raise OutOfReach(
            f"{model.name} on tp {tp} leaves no room for finetuning on {device.name}: {others} need "
            f"{-left / GIB:.1f} GiB more per device than may be used"
        )
    for name, job in asking.items():
        try:
            asked = (job.cutoff_len, job.accumulation, job.order, job.memory)
            plans[name] = _plan(*of, *asked, left / len(asking), share)
        except OutOfReach as error:
            raise OutOfReach(f"finetune.jobs.{name}.memory=auto: {error}") from None
    return FinetunePlans(plans={name: plans[name] for name in finetune.jobs})


@cache
def served_work(model: ModelShape, lora: LoraSpec, tp: int, max_sequences: int) -> BypassWork:
    """What the bypasses of inference tokens do in a layer. Requests on an adapter in training are charged for as
    the others are, though the engine runs them as that job's plan says."""
    from sim.compile.compiler import serving_bypasses
    from sim.compile.peft import PeftSpec
    from sim.compile.plan import work_of

    return work_of(serving_bypasses(model, PeftSpec.from_lora(lora), tp, max_sequences))


@cache
def _plan(
    model: ModelShape,
    lora: LoraSpec,
    device: DeviceSpec,
    tp: int,
    tokens: int,
    accumulation: int,
    order: str,
    memory: str,
    free_bytes: float = 0.0,
    wanted_share: float = 1.0,
) -> CompilePlan:
    """The plan of one job: of the memory that it names, or where this is auto the one that `free_bytes` allow."""
    from sim.compile.compiler import Analysis
    from sim.compile.peft import PeftSpec

    analysis = Analysis(
        model,
        PeftSpec.from_lora(lora),
        seq_tokens=tokens,
        device=device,
        tp=tp,
        accumulation=accumulation,
    )
    if memory == AUTO:
        return analysis.plan_within(free_bytes, wanted_share, order)
    return analysis.plan(memory, order=order)
