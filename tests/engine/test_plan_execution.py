"""The engine does what the compile plan says: gradients at every point of its list, and its bytes to the last one."""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.engine import Engine
from engine.finetune import SampleFeed, Trainer
from engine.kernels.loss import linear_cross_entropy
from engine.lora import ATTENTION, Adapter
from engine.model import Model
from engine.optimizer import OptimizerSettings
from sim.compile.compiler import Analysis
from sim.compile.peft import LINEARS, PeftSpec
from sim.compile.plan import CompilePlan
from sim.core.finetune import Backward, Forward, JobSpec
from sim.core.plan import Plan
from tests.engine.test_finetune_gradients import MODES, peft_grads, peft_of, summed_loss
from tests.engine.tiny import CONFIGS, adapter_of, bank_of, placed, sample_of, tiny_model
from tests.support import limits_of

SUBSETS = [s for n in range(1, 8) for s in itertools.combinations(LINEARS, n)]
CHOSEN = [LINEARS, ("down_proj",), ATTENTION, ("v_proj", "gate_proj"), ("up_proj",)]
"""Subsets of which every point is run."""
SAMPLE, PAGES, PAGE = sample_of(21, seed=3), 6, 4
RANK = 2
Key = tuple[str, int, str]


def part_of(adapter: Adapter, targets: tuple[str, ...]) -> Adapter:
    a, b = ({t: half[t] for t in targets} for half in (adapter.a, adapter.b))
    return Adapter(rank=adapter.rank, alpha=adapter.alpha, a=a, b=b)


@functools.cache
def analysis_of(family: str, targets: tuple[str, ...], item_bytes: int = 8) -> Analysis:
    shape = replace(CONFIGS[family].shape, dtype_bytes=item_bytes)
    spec = PeftSpec(targets=targets, rank=RANK, alpha=8.0)
    return Analysis(shape, spec, seq_tokens=PAGES * PAGE, window_tokens=7)


def plans_of(family: str, targets: tuple[str, ...], item_bytes: int = 8) -> list[CompilePlan]:
    """All different plans along the Pareto lists of an inner and of the lowest layer, taking turns in mode and
    order; the one for each end in all of them."""
    analysis = analysis_of(family, targets, item_bytes)
    points = [*analysis.points, *analysis.first_points]
    shares = sorted({0.0, *(p.extra_flops / analysis.step_flops for p in points)})
    plans = {}
    for n, share in enumerate(shares):
        for order, mode in MODES if share in (shares[0], shares[-1]) else [MODES[n % 3]]:
            plan = analysis.plan(mode, share, order)
            actions = [t.action for t in (*plan.tensors, *plan.first_tensors)]
            plans[(mode, order, *actions)] = plan
    return list(plans.values())


def trainer_of(model: Model, adapter: Adapter, plan: CompilePlan) -> tuple[Trainer, Engine]:
    """Pages that are not the sample's first, and a bank of a larger rank."""
    spec = JobSpec(
        id="job", layers=plan.layers, optimizer_params=1, accumulation=1, order=plan.order, memory=plan.mode
    )
    pages = model.new_pages(PAGES + 3, PAGE)
    family = model.config.family
    bank = bank_of(family, LINEARS, RANK + 1, model.dtype)
    feed = SampleFeed([SAMPLE])
    trainer = Trainer(
        spec=spec,
        plan=plan,
        model=model,
        pages=pages,
        blocks=range(3, 3 + PAGES),
        bank=bank,
        adapter=adapter,
        placements=placed(family, adapter.rank, adapter.targets),
        feed=feed,
        optimizer=OptimizerSettings(schedule="constant"),
    )
    next(feed.lengths())
    limits = limits_of(kv_tokens=3 * PAGE, block_tokens=PAGE)
    return trainer, Engine(model=model, pages=pages, limits=limits, bank=bank, trainers=[trainer])


def train_sample(model: Model, adapter: Adapter, plan: CompilePlan) -> Trainer:
    """Forward and backward of the sample in uneven windows; none of them the plan's own."""
    trainer, engine = trainer_of(model, adapter, plan)
    length = len(SAMPLE.tokens)
    for tokens in (10, 8, length - 18):
        engine.launch(Plan(finetune=(Forward("job", tokens),)))
    unit = plan.layers if plan.order == "window_major" else 1
    whole = length * plan.layers // unit
    for tokens in (9, 3, whole - 12):
        engine.launch(Plan(finetune=(Backward("job", tokens * unit),)))
    return trainer


@functools.cache
def reference_model(family: str, folder: Path) -> Any:
    return peft_of(family, adapter_of(family, RANK, LINEARS), torch.float64, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peft")


def expected_grads(family: str, targets: tuple[str, ...], folder: Path) -> dict[Key, torch.Tensor]:
    """Autograd's through peft; a layer that is not among `targets` is silent as its B is 0."""
    model, whole = reference_model(family, folder / family), adapter_of(family, RANK, LINEARS)
    model.zero_grad()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parts = name.split(".")
            target, layer = parts[parts.index("lora_B") - 1], int(parts[parts.index("layers") + 1])
            value = whole.b[target][layer] if target in targets else torch.zeros_like(parameter)
            parameter.data.copy_(value)
    summed_loss(model, SAMPLE).backward()
    return {(t, n, kind): grad.clone() for t, n, kind, grad in peft_grads(model) if t in targets}


def assert_equal(grads: Adapter, expected: dict[Key, torch.Tensor]) -> None:
    for (target, layer, kind), value in expected.items():
        own = (grads.a if kind == "A" else grads.b)[target][layer]
        assert value.abs().max() > 0
        error = float((own - value).abs().max() / value.abs().max())
        assert error < 1e-9, (target, layer, kind, error)


@pytest.mark.parametrize("targets", CHOSEN, ids="+".join)
@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_point_of_the_list_gives_autograds_gradients(
    family: str, targets: tuple[str, ...], folder: Path
) -> None:
    model, adapter = tiny_model(family, torch.float64), adapter_of(family, RANK, LINEARS)
    expected = expected_grads(family, targets, folder)
    for plan in plans_of(family, targets):
        assert_equal(train_sample(model, part_of(adapter, targets), plan)._grads, expected)


def test_every_subset_of_layers_gives_autograds_gradients(folder: Path) -> None:
    """All 127, the families taking turns: by default, and with the most or the least kept or in between."""
    models = {family: tiny_model(family, torch.float64) for family in CONFIGS}
    for n, targets in enumerate(SUBSETS):
        family = [*CONFIGS][n % 2]
        adapter = part_of(adapter_of(family, RANK, LINEARS), targets)
        expected, analysis = expected_grads(family, targets, folder), analysis_of(family, targets)
        middle = analysis.pareto[len(analysis.pareto) // 2].extra_share
        shares = (None, (0.0, middle, math.inf)[n % 3])
        for share, (order, mode) in zip(shares, MODES[n % 2 :], strict=False):
            plan = analysis.plan(mode, share, order)
            assert_equal(train_sample(models[family], adapter, plan)._grads, expected)


def test_a_wrong_value_in_any_kept_tensor_shows_in_the_gradients() -> None:
    """What is kept is what is read: nothing is kept for nothing, and nothing is made again behind the plan."""
    family = "llama"
    model, adapter = tiny_model(family, torch.float64), adapter_of(family, RANK, LINEARS)
    for targets in CHOSEN:
        plans = [plan for plan in plans_of(family, targets) if plan.mode == "stash"]
        for plan in (plans[0], plans[len(plans) // 2], plans[-1]):
            trainer = train_sample(model, part_of(adapter, targets), plan)
            assert trainer._kept is not None
            truth = trainer._grads
            for layer, role in [(n, role) for n in (0, 1) for role in trainer._kept.layers[n]]:
                spoilt = spoil(model, part_of(adapter, targets), plan, layer, role)
                pairs = zip(spoilt.tensors(), truth.tensors(), strict=True)
                change = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
                assert change > 1e-7, (targets, layer, role)


def spoil(model: Model, adapter: Adapter, plan: CompilePlan, layer: int, role: str) -> Adapter:
    """Gradients when one kept tensor is changed between forward and backward."""
    trainer, engine = trainer_of(model, adapter, plan)
    length = len(SAMPLE.tokens)
    engine.launch(Plan(finetune=(Forward("job", length),)))
    assert trainer._kept is not None
    trainer._kept.layers[layer][role].mul_(1.01).add_(0.01)
    engine.launch(Plan(finetune=(Backward("job", length * plan.layers),)))
    return trainer._grads


# Bytes


class Counted(TorchDispatchMode):
    """Tensors made inside, as far as they are alive, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._found: set[int] = set()
        """Storages of others: read inside, and not made there."""
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = self._alive()
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in own:
                self._found.add(tensor.untyped_storage().data_ptr())
        result = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(t) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return result

    def _alive(self) -> dict[int, int]:
        self._made = [made for made in self._made if made() is not None]
        storages = [t.untyped_storage() for t in (made() for made in self._made) if t is not None]
        return {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in self._found}

    def live_bytes(self) -> int:
        return sum(self._alive().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("targets", [LINEARS, ("down_proj",), ATTENTION], ids="+".join)
@pytest.mark.parametrize("family", list(CONFIGS))
def test_bytes_held_for_a_sample_are_those_of_the_plan(
    family: str, targets: tuple[str, ...], dtype: torch.dtype
) -> None:
    """Everything that a trainer makes and holds is counted; what is not of the sample is known by name."""
    model, adapter = tiny_model(family, dtype), part_of(adapter_of(family, RANK, LINEARS), targets)
    plans = plans_of(family, targets, dtype.itemsize)
    for plan in (*plans[:3], plans[len(plans) // 3], plans[2 * len(plans) // 3], *plans[-3:]):
        with Counted() as counted:
            trainer, engine = trainer_of(model, adapter, plan)
        job = (*trainer.masters.tensors(), *trainer._grads.tensors(), trainer._loss)
        shelves = [shelf for (shelf,) in trainer._bank.shelves.values()]
        bank = [tensor for shelf in shelves for tensor in (shelf.a, shelf.b, shelf.a_ranks)]
        flags = (trainer._count, trainer._sound)
        others = [*job, *bank, *flags, trainer._bank.scales, engine._last_token, *engine._pages]
        held = counted.live_bytes() - sum(t.untyped_storage().nbytes() for t in others)
        sample_pages = 2 * engine._pages.k[:, 3 : 3 + PAGES].nbytes
        assert held + sample_pages == plan.held_bytes == trainer.held_bytes
        assert trainer._new_kept().nbytes + sample_pages == sum(
            plan.live_bytes()[part] for part in ("kept", "K V")
        )


@pytest.mark.parametrize("memory", ["stash", "recompute"])
def test_nothing_of_the_sample_outlives_a_slice_beside_what_the_plan_holds(memory: str) -> None:
    """After every forward and backward slice the same bytes are alive as before the first."""
    model, adapter = tiny_model("llama"), adapter_of("llama", RANK, LINEARS)
    plans = [p for p in plans_of("llama", LINEARS, 4) if p.mode == memory]
    for plan in (plans[0], plans[-1]):
        engine = trainer_of(model, adapter, plan)[1]
        with Counted() as counted:
            for tokens in (10, 11):
                engine.launch(Plan(finetune=(Forward("job", tokens),)))
                engine.collect()
                assert counted.live_bytes() == 0
            for _ in range(3):
                engine.launch(Plan(finetune=(Backward("job", 7 * plan.layers),)))
                engine.collect()
                assert counted.live_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_loss_has_the_logits_of_one_chunk_that_the_plan_counts(dtype: torch.dtype) -> None:
    shape = replace(CONFIGS["llama"].shape, dtype_bytes=dtype.itemsize)
    plan = Analysis(shape, PeftSpec(), seq_tokens=50, loss_chunk_tokens=16).plan()
    hidden, labels = torch.randn(50, shape.hidden).to(dtype), torch.randint(0, shape.vocab, (50,))
    weight = torch.randn(shape.vocab, shape.hidden).to(dtype)
    with Counted() as counted:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=plan.loss_chunk_tokens)
    beside_logits = counted.peak_bytes - hidden.nbytes - plan.live_bytes()["loss chunk"]
    assert 0 <= beside_logits < 16 * 64, "a few numbers per token"
