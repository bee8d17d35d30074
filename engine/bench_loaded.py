"""A run of the bench with its model on the device: what there is room for, what is measured before it, and what
runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from omegaconf import OmegaConf

from engine.assemble import TrainingJob
from engine.before import Before
from engine.bench_jobs import FIRST
from engine.bench_spec import BenchSpec
from engine.engine import Engine
from engine.machine import model_of, release
from engine.measure import finetune_peak_tok_s, first_uses, measure
from engine.model import Model
from engine.pipelines import Setting, Single, Split
from engine.replica import Replica
from engine.room import limits_and_plans
from sim.assemble import CONFIGS as SIMULATOR
from sim.compile.plan import CompilePlan
from sim.core.finetune import Job
from sim.core.plan import Limits, Policy
from sim.core.specs import DeviceSpec, LoraSpec
from sim.cost.context import CostContext
from sim.cost.fitted import FittedCost
from sim.cost.iteration import IterationCost
from sim.errors import keys_as
from sim.policy_node import policy_node, policy_of

MEASURED = (
    "model",
    "weights",
    "device",
    "limits",
    "memory_utilization",
    "job",
    "more_jobs",
    "launch",
    "predictor",
    "measure_s",
    "peak_s",
)
"""Keys of the config that what is measured before a run depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A run's model, and what goes beside it."""

    spec: BenchSpec
    model: Model
    limits: Limits
    plans: dict[str, CompilePlan]
    """Of each job."""
    assemble: Callable[..., tuple[Engine, list[Job]]]
    """Makes an engine, as `assemble_engine` does, with the run's launches on its ranks."""

    @property
    def key(self) -> str:
        """Runs that agree in it share what is measured before them."""
        told = [plan.describe() for plan in self.plans.values()]
        return json.dumps([*(self.spec.config[name] for name in MEASURED), *told])

    def measured(self) -> Before:
        """The predictor, and the peak of finetuning if it is asked for; the seed changes nothing of it."""
        predictor, seconds = self._predictor(), self.spec.peak_s
        if not seconds:
            return Before(predictor, None)
        release()
        alone = self._policy("finetune_only", predictor)
        jobs = self._jobs(0)
        return Before(
            predictor, finetune_peak_tok_s(self.model, self.limits, jobs, alone, seconds, self.assemble)
        )

    def first_uses(self) -> None:
        """Have the kernels of a run compiled before it, where nothing is measured that would."""
        first_uses(self.model, self.limits, self._jobs(0)[:1], self.assemble)

    def setting(self) -> Setting:
        """For pipelines whose jobs begin."""
        spec = self.spec
        return Setting(
            model=self.model,
            limits=self.limits,
            jobs=self._jobs(spec.seed),
            adapters=spec.served(self.model),
            slos=spec.slos,
            device=spec.device,
            seed=spec.seed,
            assemble=self.assemble,
        )

    def pipelines(self, predictor: IterationCost) -> Single | Split:
        """What runs the policy.

        The other side of a static split finetunes in slices within the latency budget, so that serving never
        waits for it longer than for a token of its own.
        """
        spec, setting = self.spec, self.setting()
        if spec.split is None:
            return Single(setting, policy_of(spec.policy, predictor, spec.slos))
        sliced = self._policy("temporal_limited", predictor)
        return Split(setting, spec.split.policy, sliced, spec.split.share)

    def _jobs(self, seed: int) -> list[TrainingJob]:
        return self.spec.training(self.model, seed, self.plans)

    def _policy(self, name: str, predictor: IterationCost) -> Policy:
        """A policy with its defaults."""
        node = OmegaConf.load(SIMULATOR / "policy" / f"{name}.yaml")
        return policy_of(policy_node(node), predictor, self.spec.slos)

    def _predictor(self) -> FittedCost:
        """A table of the profile that is given, or of what this machine does in `measure_s`."""
        spec = self.spec
        if spec.predictor is None:
            return measure(self.model, self.limits, self._jobs(0)[:1], spec.measure_s, self.assemble)
        self.first_uses()
        return table_of(spec.predictor, spec.device, self.model, spec.jobs[FIRST].lora, self.limits)


def table_of(path: str, device: DeviceSpec, model: Model, lora: LoraSpec, limits: Limits) -> FittedCost:
    """What a profile says of `model` on `device`. ValueError for one of another model or device."""
    from profiles.table_file import TableFile

    context = CostContext(
        device=device,
        model=model.whole.shape,
        tp=model.group.size,
        lora=lora,
        seed=0,
        lookahead=limits.lookahead,
    )
    with keys_as({"no profile ": "predictor: no profile "}):
        return TableFile(path=path).build(context)


def load_bench(spec: BenchSpec, ranks: Replica) -> Loaded:
    """Raises ValueError where there is no room for the limits or a job."""
    model = model_of(spec.shape, spec.device, spec.weights, ranks)
    limits, plans = limits_and_plans(
        model, spec.device, spec.limits, spec.training(model, 0, {}), spec.memory_utilization
    )
    assemble = partial(ranks.assemble, launching=spec.launch.on(model))
    return Loaded(spec=spec, model=model, limits=limits, plans=plans, assemble=assemble)
