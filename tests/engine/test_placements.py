"""Every legal placement of a bypass runs on two and four processes, and is one process's bypass."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from engine.assemble import plan_jobs
from engine.checkpoint import Progress, restore, save_checkpoint
from engine.lora import Adapter, read_adapter
from engine.optimizer import OptimizerSettings
from engine.parallel import Group
from engine.placement import placements_of
from engine.replica import Replica, replica
from sim.compile import compiler
from sim.compile.bypass import Bypass
from sim.compile.compiler import Analysis, bypasses_of, serving_bypasses
from sim.compile.parallel import Composition, compositions
from sim.compile.peft import PeftSpec
from sim.compile.plan import CompilePlan
from sim.compile.roles import ROW_PARALLEL
from sim.core.plan import Plan, View
from sim.core.request import Request
from sim.core.specs import DeviceSpec, ModelShape
from tests.engine.test_finetune_gradients import ALL, MODES, Splits, traffic
from tests.engine.test_tensor_parallel import RanksRun, assert_same, error, model_on
from tests.engine.tiny import JobSetup, adapter_of, config_of, sample_of
from tests.support import limits_of

RANK, TOKENS = 4, 24
SHAPE = replace(config_of("llama").shape, dtype_bytes=8)
"""Two key and value heads: each on two of four ranks."""
SPEC = PeftSpec(targets=ALL, rank=RANK, alpha=8.0)
SGD = OptimizerSettings(kind="sgd", learning_rate=1.0, max_grad_norm=None, schedule="constant")
ADAMW = OptimizerSettings(learning_rate=1e-2, weight_decay=0.01, max_grad_norm=0.5, schedule="constant")
WIRED = DeviceSpec(
    name="wired", peak_flops=1e12, memory_bandwidth_bytes_s=1e10, memory_bytes=1e9,
    link_bandwidth_bytes_s=1e11, sms=8, source="made up",
    extras={
        f"{name}_s": 1e-12
        for name in ("allreduce_fixed", "allreduce_hop", "allreduce_two_shot", "nccl_fixed", "nccl_hop",
                     "nccl_alltoall_simple")
    },
)  # fmt: skip
"""Slow by itself, with links as fast as nobody has: sending pays even for a tiny model."""


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Replica]:
    threads = torch.get_num_threads()
    with replica(request.param, "cpu") as started:
        yield started
    torch.set_num_threads(threads)


def labels(tp: int, layouts: bool = False) -> list[tuple[str, str]]:
    """Every composition of a column- and of a row-parallel layer, in pairs; the fewer ones come again. Only one of
    those that have the same of A and B on each rank and reduce the same, if `layouts`."""
    found: dict[bool, list[str]] = {}
    for bypass in bypasses_of(SHAPE, SPEC, tp):
        every = compositions(bypass, tp, TOKENS, compiler.REFERENCE, TOKENS)
        if layouts:
            every = [*{(c.weights, c.reduced): c for c in every}.values()]
        found.setdefault(bypass.name in ROW_PARALLEL, sorted(c.label for c in every))
    column, row = found[False], found[True]
    return list(zip(column, cycle(row), strict=False))


def forced(tp: int, column: str, row: str, number: int, spec: PeftSpec = SPEC) -> CompilePlan:
    """The plan for which these compositions are the cheapest; what it keeps varies with the number."""

    def price(bypass: Bypass, *given: Any) -> list[Composition]:
        wanted = row if bypass.name in ROW_PARALLEL else column
        return sorted(usual(bypass, *given), key=lambda c: c.label != wanted)

    usual = compiler.compositions
    order, mode = MODES[number % len(MODES)]
    share = (None, 0.0, math.inf, 0.1)[number % 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compositions", price)
        plan = Analysis(SHAPE, spec, seq_tokens=TOKENS, tp=tp, window_tokens=7).plan(mode, share, order)
    assert {b.composition for b in plan.bypasses} == {column, row}
    return plan


def run(
    ranks: Replica | None,
    order: str,
    memory: str,
    plan: CompilePlan | None,
    optimizer: OptimizerSettings,
    seeds: Sequence[int],
    adapter: Any = None,
    watch: Any = None,
    requests: int = 3,
) -> RanksRun:
    """Steps of two samples while requests of the job's adapter, of another one and of the base model are served."""
    lengths = {0: 23, 1: 10, 2: 17, 3: 21}
    job = JobSetup(
        samples=[sample_of(lengths[seed], seed=seed, ignored=seed) for seed in seeds],
        adapter=adapter_of("llama", RANK, ALL) if adapter is None else adapter,
        optimizer=optimizer,
        order=order,
        memory=memory,
        max_tokens=TOKENS,
        plan=plan,
    )
    unit = 1 if order == "window_major" else SHAPE.layers
    return RanksRun(
        ranks,
        model_on(ranks, "llama", torch.float64, {}),
        Splits([9, 5, 16], [11 * unit, 7 * unit]),
        limits_of(block_tokens=4, max_sequences=8, max_tokens=32),
        {id: short(*given) for id, given in traffic(requests, adapters=("other", "job", None)).items()},
        adapters={"other": adapter_of("llama", 3, ["q_proj", "k_proj", "o_proj", "up_proj"], seed=5)},
        jobs=[job],
        watch=watch,
    )


def short(request: Request, *rest: Any) -> tuple[Any, ...]:
    return request._replace(output_tokens=5), *rest


@functools.cache
def alone(
    order: str, memory: str, optimizer: OptimizerSettings, seeds: tuple[int, ...], requests: int
) -> RanksRun:
    return run(None, order, memory, None, optimizer, seeds, requests=requests)


def test_every_composition_gives_the_logits_and_gradients_of_one_rank(ranks: Replica) -> None:
    """A step of plain SGD: the adapter that comes out is the gradient, and nothing else."""
    tp, before = ranks.group.size, adapter_of("llama", RANK, ALL)
    pairs = labels(tp)
    assert len({c for c, _ in pairs}) == 17 and len({r for _, r in pairs}) == 9
    for number, (column, row) in enumerate(pairs):
        plan = forced(tp, column, row, number)
        own = run(ranks, plan.order, plan.mode, plan, SGD, (0, 1))
        other = alone(plan.order, plan.mode, SGD, (0, 1), 3)
        assert own.trainers[0].plan == plan
        assert_same(own, other, 1e-9)
        after = (r.engine.adapter("job").tensors() for r in (own, other))
        for start, end, reference in zip(before.tensors(), *after, strict=True):
            assert error(end - start, reference - start) < 1e-9, (column, row)


def test_every_composition_goes_on_from_one_rank_and_one_rank_from_it(ranks: Replica, tmp_path: Path) -> None:
    """A step of AdamW with clipping on one side, a checkpoint, and the next step on the other."""
    tp = ranks.group.size
    whole = alone(*MODES[0], ADAMW, (0, 1, 2, 3), 0)
    for number, (column, row) in enumerate(labels(tp, layouts=True)):
        plan = forced(tp, column, row, number * len(MODES) * 4)
        for first, second in ((ranks, None), (None, ranks)):
            folder = tmp_path / f"{number}-{first is None}"
            plans = {True: None, False: plan}
            start = run(first, *MODES[0], plans[first is None], ADAMW, (0, 1), requests=0)
            made = save_checkpoint(
                folder, start.engine, "job", Progress(step=1, samples=2, settings={}), None
            )
            end = run(
                second,
                *MODES[0],
                plans[second is None],
                ADAMW,
                (2, 3),
                read_adapter(made, SHAPE),
                lambda engine, made=made: restore(made, engine, "job"),
                requests=0,
            )
            assert end.engine.steps[-1].step == 2
            assert end.engine.steps[-1].grad_norm == pytest.approx(whole.engine.steps[-1].grad_norm, rel=1e-8)
            trained = (r.engine.adapter("job").tensors() for r in (end, whole))
            for own, reference in zip(*trained, strict=True):
                assert error(own, reference) < 1e-9, (column, row)


class ByName(Splits):
    """Windows of the jobs in the order of their names."""

    def plan(self, view: View) -> Plan:
        return super().plan(view._replace(jobs=tuple(sorted(view.jobs))))


def mixed_ranks_run(ranks: Replica | None) -> RanksRun:
    """Windows of jobs "a", "b" and "c" in one batch, of which "b", the first in the bank, has a rank of its own."""
    jobs = []
    for name, rank in (("b", 3), ("a", RANK), ("c", RANK)):
        spec, tp = replace(SPEC, rank=rank), 1 if ranks is None else ranks.group.size
        adapter = adapter_of("llama", rank, ALL, seed=len(jobs))
        plan = None if ranks is None else forced(tp, "1 4", "S1>S0 3 S0>R 1 R>P", 0, spec)
        sample = sample_of(TOKENS, seed=rank)
        own = {"samples": [sample], "adapter": adapter, "plan": plan, "optimizer": SGD, "accumulation": 1}
        jobs.append(JobSetup(id=name, max_tokens=TOKENS, **own))
    model = model_on(ranks, "llama", torch.float64, {})
    return RanksRun(
        ranks, model, ByName([TOKENS], [SHAPE.layers * TOKENS]), limits_of(block_tokens=4), {}, jobs=jobs
    )


def test_what_is_kept_of_a_bypass_is_its_own_whatever_lies_beside_it(ranks: Replica) -> None:
    """A change between the products takes adapters of one rank, whose rows may have others among them."""
    own, alone = mixed_ranks_run(ranks), mixed_ranks_run(None)
    for name in "abc":
        after = (run.engine.adapter(name).tensors() for run in (own, alone))
        for tensor, wanted in zip(*after, strict=True):
            assert error(tensor, wanted) < 1e-9, name


class Sent:
    """Collectives that this rank takes part in, from `Group`'s own methods."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.found: Counter[tuple[str, int]] = Counter()
        times = {"all_reduce": 0, "all_gather": 1, "reduce_scatter": 0, "all_to_all": 1}
        for kind, split in times.items():
            patch.setattr(Group, kind, self._counting(kind, split, getattr(Group, kind)))

    def _counting(self, kind: str, split: int, send: Any) -> Any:
        def counting(group: Group, x: torch.Tensor) -> torch.Tensor:
            self.found[kind, x.numel() * group.size**split] += 1
            return send(group, x)

        return counting


class Chosen(NamedTuple):
    plan: CompilePlan
    masters: Adapter
    """This rank's."""
    sent: Counter[tuple[str, int]]
    adapter: Adapter


def chosen(ranks: Replica, device: DeviceSpec) -> Chosen:
    """A sample in one window forward and one backward, placed as `device` has it, and a step."""
    limits = limits_of(block_tokens=4, max_tokens=2 * TOKENS)
    job = JobSetup(
        samples=[sample_of(TOKENS, seed=1)],
        adapter=adapter_of("llama", RANK, ALL),
        optimizer=SGD,
        accumulation=1,
        max_tokens=TOKENS,
    )
    model = model_on(ranks, "llama", torch.float64, {})
    (job.plan,) = plan_jobs(model, limits, [job.of()], device=device)
    with pytest.MonkeyPatch.context() as patch:
        sent = Sent(patch)
        run = RanksRun(ranks, model, Splits([TOKENS], [SHAPE.layers * TOKENS]), limits, {}, jobs=[job])
    trainer = run.trainers[0]
    assert job.plan == trainer.plan
    return Chosen(trainer.plan, trainer.masters, sent.found, run.engine.adapter("job"))


def reductions(plan: CompilePlan, group: Group) -> Counter[tuple[str, int]]:
    """At the step: of gradients of parts of the sum, and of those of repeated key and value heads."""
    found = Counter[tuple[str, int]]()
    for placement in placements_of(plan.bypasses, RANK, group, SHAPE).values():
        for share in (placement.a, placement.b):
            repeated = share.parts if share.dim is not None and share.parts < group.size else 1
            if share.reduced or repeated > 1:
                found["all_reduce", repeated * SHAPE.layers * math.prod(share.shape)] += 1
    return found


def test_the_engine_runs_what_the_planner_chose_and_sends_what_the_simulator_charges(ranks: Replica) -> None:
    """With such links the cheapest is not the usual. Two runs differ by what their bypasses send, and by what is
    reduced at the step."""
    tp = ranks.group.size
    own, usual = chosen(ranks, WIRED), chosen(ranks, compiler.REFERENCE)
    assert {b.composition for b in usual.plan.bypasses} == {"1 4", "2 5"}
    assert not {b.composition for b in own.plan.bypasses} & {"1 4", "2 5"}
    fresh = Analysis(SHAPE, SPEC, seq_tokens=TOKENS, device=WIRED, tp=tp, accumulation=1).plan()
    assert own.plan.bypasses == fresh.bypasses
    for bypass in own.plan.bypasses:
        wide_in, wide_out = SHAPE.linears[bypass.target]
        down, up = ({"R": (1, 1), "Sin": (tp, 1), "Sout": (1, tp)}[w] for w in bypass.weights)
        parts = min(tp, SHAPE.kv_heads) if bypass.target in ("k_proj", "v_proj") else tp
        a, b = own.masters.a[bypass.target], own.masters.b[bypass.target]
        assert a.shape == (SHAPE.layers, RANK // down[1], wide_in // down[0])
        assert b.shape == (SHAPE.layers, wide_out // min(up[1], parts), RANK // up[0])
    for ours, other in zip(own.adapter.tensors(), usual.adapter.tensors(), strict=True):
        assert error(ours, other) < 1e-9

    work = own.plan.bypass_work
    charged = Counter[tuple[str, int]]()
    for kind, features in (*work.forward, *work.backward):
        charged[kind, TOKENS * features] += SHAPE.layers
    assert charged and usual.plan.bypass_work.forward == usual.plan.bypass_work.backward == ()
    for run in (own, usual):
        run.sent.subtract(reductions(run.plan, ranks.group))
    own.sent.subtract(usual.sent)
    assert +own.sent == charged and not -own.sent
    for run in (own, usual):
        reduced = sum(size * count for (_, size), count in reductions(run.plan, ranks.group).items())
        assert reduced == SHAPE.layers * run.plan.bypass_work.reduced_params
        held = sum(tensor.numel() for tensor in run.masters.tensors())
        assert held == SHAPE.layers * run.plan.bypass_work.own_params


LARGE = ModelShape(
    name="8b", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256
)


def test_a_large_rank_and_window_is_placed_otherwise_and_lies_so_on_the_ranks() -> None:
    spec = PeftSpec(targets=ALL, rank=256, alpha=256.0)
    plan = Analysis(LARGE, spec, seq_tokens=8192, tp=8, window_tokens=4096).plan()
    labels = {b.target: b.composition for b in plan.bypasses}
    assert labels["up_proj"] == labels["q_proj"] == "R>S1 2 P>R 4"
    for bypass in plan.bypasses:
        placement = placements_of([bypass], 256, Group(1, 8), LARGE)[bypass.target]
        shares = placement.a, placement.b
        assert tuple({None: "R", 2: "Sin", 1: "Sout"}[share.dim] for share in shares) == bypass.weights
        assert tuple(n for n, share in enumerate(shares) if share.reduced) == bypass.reduced_stages
        assert placement.sends == bool(bypass.work.forward)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("rank", [8, 64, 256, 512])
def test_what_is_only_served_sends_nothing_between_its_products(rank: int, tp: int) -> None:
    spec = PeftSpec(targets=ALL, rank=rank, alpha=16.0)
    for bypass in serving_bypasses(LARGE, spec, tp, 256):
        assert bypass.work.forward == (), bypass.composition
