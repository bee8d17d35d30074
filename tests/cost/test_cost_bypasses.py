"""What the bypasses of a window send is charged where it is sent, and the planner's choice is not dearer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sim.compile import compiler
from sim.compile.bypass import Bypass
from sim.compile.compiler import Analysis
from sim.compile.parallel import Composition
from sim.compile.peft import PeftSpec
from sim.core.specs import BypassWork, Collective, LoraSpec
from sim.core.work import Chunk, LayerChunk, Work
from sim.cost.collective import one_collective_s
from sim.cost.context import CostContext
from sim.cost.efficiency import Efficiency
from sim.cost.flat import row_seconds
from sim.cost.iteration import IterationCost
from sim.cost.roofline import OPTIMIZER_BYTES, Roofline
from tests.cost.test_cost_memory import device, model
from tests.cost.test_flat_and_saved import flat

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIGS = Path(__file__).parents[2] / "configs"
DEVICES = sorted(path.stem for path in (CONFIGS / "device").glob("*.yaml"))
MODELS = ("llama_3_1_8b", "qwen2_5_14b", "qwen2_5_32b", "llama_3_1_70b")
SHAPE, DEVICE, TP = model("llama_3_1_8b"), device("h100"), 4
LORA = LoraSpec(rank=64, targets=("up_proj", "down_proj"))
FORWARD = (Collective("all_reduce", 64), Collective("all_gather", 128))
BACKWARD = (Collective("reduce_scatter", 128), Collective("all_to_all", 4096))
SILENT = BypassWork(values=40000.0, flops=1e6, own_params=10**6)
SENDING = replace(SILENT, forward=FORWARD, backward=BACKWARD)


def cost(trained: BypassWork, **more: float) -> IterationCost:
    given = CostContext(device=DEVICE, model=SHAPE, tp=TP, lora=LORA, seed=0, trained=trained, **more)
    return Roofline(graph_tokens=10**9).build(given)


def sent_s(collectives: tuple[Collective, ...], tokens: int) -> float:
    """Of all layers."""
    efficiency = Efficiency.of(DEVICE)
    sizes = [(kind, 2.0 * tokens * features) for kind, features in collectives]
    return SHAPE.layers * sum(one_collective_s(*size, TP, DEVICE, efficiency) for size in sizes)


WORKS = {
    "window": (Work(forward=(Chunk(500, 100),)), lambda: sent_s(FORWARD, 500)),
    "two windows": (Work(forward=(Chunk(100, 0), Chunk(200, 10))), lambda: sent_s(FORWARD, 300)),
    "backward": (Work(backward=(LayerChunk(SHAPE.layers, 700, 0),)), lambda: sent_s(BACKWARD, 700)),
    "recompute": (
        Work(recompute=(Chunk(300, 0),), backward=(LayerChunk(SHAPE.layers, 300, 0),)),
        lambda: sent_s(FORWARD, 300) + sent_s(BACKWARD, 300),
    ),
    "serving": (Work(decode_count=9, decode_context_tokens=900, sampled_tokens=9, adapters=2), lambda: 0.0),
}


@pytest.mark.parametrize("name", WORKS)
def test_collectives_are_charged_once_for_what_sends_them(name: str) -> None:
    work, expected = WORKS[name]
    silent, sending = cost(SILENT), cost(SENDING)
    # A product of many tokens may hide a launch, which the curves round up to.
    assert sending.iteration_s(work) - silent.iteration_s(work) == pytest.approx(
        expected(), rel=1e-3, abs=1e-9
    )
    parts = sending.parts(work)
    assert sum(parts.values()) == pytest.approx(sending.iteration_s(work))
    assert parts["collective"] - silent.parts(work)["collective"] == pytest.approx(
        expected(), rel=1e-3, abs=1e-9
    )


def test_inverses_see_them() -> None:
    silent, sending = cost(SILENT), cost(SENDING)
    for budget_s in (0.02, 0.05):
        n, seconds = sending.largest_forward(Work(), 0, 4096, budget_s)
        assert seconds == sending.iteration_s(Work(forward=(Chunk(n, 0),))) <= budget_s
        assert sending.iteration_s(Work(forward=(Chunk(n + 1, 0),))) > budget_s
        assert n < silent.largest_forward(Work(), 0, 4096, budget_s)[0]


def test_flat_rows_have_them() -> None:
    work = WORKS["two windows"][0]
    sending = cost(SENDING)
    assert row_seconds(sending.curves, flat([work]))[0] == pytest.approx(sending.iteration_s(work), rel=0.01)


def test_collectives_do_not_run_again_with_products() -> None:
    """A backward that makes tensors again repeats nothing that was sent (`compiler.frontier`)."""
    work = WORKS["backward"][0]
    silent, sending = (
        cost(trained, again_gemm=1.0).iteration_s(work) - cost(trained).iteration_s(work)
        for trained in (SILENT, SENDING)
    )
    assert sending == pytest.approx(silent, rel=1e-6)


def test_a_step_updates_what_a_device_holds_and_adds_up_what_is_a_sum() -> None:
    params = LORA.params(SHAPE)
    work = Work(optimizer_params=params)
    base = cost(SILENT).iteration_s(work) - cost(SILENT).iteration_s(Work())
    byte_s = cost(SILENT).curves.optimizer_param_s * params / (SHAPE.layers * SILENT.own_params)
    assert base == pytest.approx(SHAPE.layers * SILENT.own_params * byte_s)
    bandwidth = DEVICE.memory_bandwidth_bytes_s * Efficiency.of(DEVICE).elementwise_bandwidth
    assert byte_s == pytest.approx(OPTIMIZER_BYTES / bandwidth)
    reduced = cost(replace(SILENT, reduced_params=5000)).iteration_s(work)
    size = 4.0 * SHAPE.layers * 5000
    expected = one_collective_s("all_reduce", size, TP, DEVICE, Efficiency.of(DEVICE))
    assert reduced - cost(SILENT).iteration_s(work) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_the_planners_choice_is_not_dearer_than_the_usual_one(
    name: str, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window and its backward, by the roofline: who chooses and who charges mean the same seconds."""
    usual = compiler.compositions

    def silent(bypass: Bypass, *given: object) -> list[Composition]:
        return sorted(usual(bypass, *given), key=lambda c: c.label not in ("1 4", "2 5"))

    shape, on_device, spec = model(name), device(on), PeftSpec(targets=ALL, rank=64, alpha=16.0)
    chosen = Analysis(shape, spec, seq_tokens=8192, device=on_device, tp=8).plan()
    monkeypatch.setattr(compiler, "compositions", silent)
    other = Analysis(shape, spec, seq_tokens=8192, device=on_device, tp=8).plan()
    lora = LoraSpec(rank=64, targets=ALL)
    seconds = []
    for each in (chosen, other):
        given = CostContext(device=on_device, model=shape, tp=8, lora=lora, seed=0, trained=each.bypass_work)
        built = Roofline(graph_tokens=10**9).build(given)
        n = each.window_tokens
        work = Work(forward=(Chunk(n, 0),), backward=(LayerChunk(shape.layers, n, 0),))
        step = Work(optimizer_params=lora.params(shape))
        seconds.append(built.iteration_s(work) + built.iteration_s(step) * n / (8 * 8192))
    assert seconds[0] <= seconds[1] * (1 + 1e-9)
