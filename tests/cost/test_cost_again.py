"""A backward that runs its forward again costs that forward more, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sim.core.finetune import JobView
from sim.core.specs import LoraSpec
from sim.core.work import Chunk, LayerChunk, Work
from sim.cost.context import CostContext
from sim.cost.curves import DecodeCost
from sim.cost.flexllm import ATTENTION, LaunchBound
from sim.cost.roofline import Roofline
from tests.cost.test_cost_memory import device, model

SHAPE = model("llama_3_1_8b")


def context(tp: int = 1, **shares: float) -> CostContext:
    return CostContext(device=device("a100_80gb"), model=SHAPE, tp=tp, lora=LoraSpec(), seed=0, **shares)


@pytest.mark.parametrize("builder", [Roofline(), LaunchBound()], ids=["roofline", "launch_bound"])
def test_running_everything_again_costs_the_forward_once_more(builder: Roofline | LaunchBound) -> None:
    """All shares 1, one device: as much as recomputing the same window."""
    plain = builder.build(context())
    again = builder.build(context(again_gemm=1.0, again_attention=1.0))
    for tokens, before in ((64, 0), (512, 100), (2048, 4096)):
        backward = (LayerChunk(SHAPE.layers, tokens, before),)
        forward = (Chunk(tokens, before),)
        expected = plain.iteration_s(Work(backward=backward, recompute=forward))
        found = again.iteration_s(Work(backward=backward))
        # Exact but where compute bounds one of the two attentions and reading keys the other.
        assert found == pytest.approx(expected, rel=0.01)
        assert found > plain.iteration_s(Work(backward=backward))


def test_shares_of_nothing_change_nothing() -> None:
    curves = Roofline().curves(context())
    assert curves.with_again(32, 0.0, 0.0) is curves


def test_all_reduces_do_not_run_again() -> None:
    """Row-parallel layers, which have them, never do (`sim.compile.compiler.frontier`)."""
    curves = Roofline().curves(context(tp=4))
    more = curves.with_again(SHAPE.layers, 1.0, 0.0)
    assert curves.collective_s is not None
    for n in (16, 256, 4096):
        extra_s = more.backward_layer_s[n] - curves.backward_layer_s[n]
        alone_s = (curves.recompute_s[n] - curves.collective_s[n]) / SHAPE.layers
        assert extra_s == pytest.approx(alone_s, rel=0.05)


def test_more_again_leaves_a_smaller_slice() -> None:
    job = JobView("job", SHAPE.layers, "layer_major", "stash", 1, 4096, 4096, 0, False)
    shares = (0.0, 0.2, 0.5, 1.0)
    fits = [
        Roofline().build(context(again_gemm=s, again_attention=s)).largest_backward(Work(), job, 0.05)[0]
        for s in shares
    ]
    assert fits == sorted(fits, reverse=True)
    assert fits[0] > fits[-1] > 0


def test_shares_are_shares() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        replace(context(), again_gemm=1.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"extras": {"decode_bandwidth": 0.5}},
        {"memory_bandwidth_bytes_s": 1e12},
        {"clock_hz": 1e9},
        {"architecture": "ada"},
        {"name": "mine"},
    ],
)
def test_fitted_attention_is_the_shipped_card_s_alone(changes: dict[str, Any]) -> None:
    """Any other device has the formulas', whatever its name."""
    shipped = context()
    own = replace(shipped, device=replace(shipped.device, **changes))
    named = replace(shipped, device=replace(own.device, name="other"))
    fitted, found, formula = (LaunchBound().curves(c) for c in (shipped, own, named))
    assert fitted.decode == DecodeCost(*(SHAPE.layers * seconds for seconds in ATTENTION[32, 8][1]))
    assert (found.decode, found.prefill) == (formula.decode, formula.prefill)
    assert found.decode != fitted.decode


def test_fitted_attention_is_of_two_bytes_a_value() -> None:
    wide = replace(context(), model=replace(SHAPE, dtype_bytes=4))
    assert LaunchBound().curves(wide).decode != LaunchBound().curves(context()).decode
