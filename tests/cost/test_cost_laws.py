"""Laws of the iteration cost, over every device and model file and for every kind of cost model."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sim.core.finetune import JobView, backward_chunks, recompute_chunks
from sim.core.specs import DeviceSpec, LoraSpec, ModelShape
from sim.core.work import Chunk, LayerChunk, Work
from sim.cost.context import CostContext
from sim.cost.flexllm import LaunchBound
from sim.cost.iteration import IterationCost
from sim.cost.roofline import Roofline
from sim.cost.sampled import Sampled
from sim.cost.scaled import Scaled

CONFIGS = Path(__file__).parents[2] / "configs"
DEVICES = sorted(path.stem for path in (CONFIGS / "device").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
SIZES = ("llama_3_1_8b", "qwen2_5_14b", "qwen2_5_32b", "llama_3_1_70b")
PAIRS = [(device, model) for device in DEVICES for model in MODELS if model in SIZES or device == "a100_80gb"]
"""Four sizes on every device, and every model on one."""
LORA = LoraSpec()


@cache
def context(device: str, model: str, lookahead: int = 0, tp: int | None = None) -> CostContext:
    spec = DeviceSpec(**OmegaConf.to_container(OmegaConf.load(CONFIGS / "device" / f"{device}.yaml")))
    shape = ModelShape(**OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / f"{model}.yaml")))
    degree = shape.tp if tp is None else tp
    return CostContext(device=spec, model=shape, tp=degree, lora=LORA, seed=3, lookahead=lookahead)


@cache
def roofline(device: str, model: str, lookahead: int = 0, tp: int | None = None) -> IterationCost:
    return Roofline().build(context(device, model, lookahead, tp))


@cache
def cost_models() -> dict[str, object]:
    """One of each kind of predictor, on the first device and model."""
    here, ahead = context(DEVICES[0], MODELS[0]), context(DEVICES[0], MODELS[0], 1)
    return {
        "roofline": Roofline().build(here),
        "roofline_lookahead": Roofline().build(ahead),
        "eager": Roofline(graph_tokens=0, host_s=0.0).build(here),
        "sampled": Sampled(of=Roofline()).build(here),
        "scaled": Scaled(of=Roofline(), factor=0.7).build(here),
        "launch_bound": LaunchBound(overlap_contention=0.5).build(here),
    }


KINDS = ("roofline", "roofline_lookahead", "eager", "sampled", "scaled", "launch_bound")

chunks = st.builds(Chunk, st.integers(1, 700), st.integers(0, 3000))
rectangles = st.builds(LayerChunk, st.integers(1, 80), st.integers(1, 3000), st.integers(0, 3000))


@st.composite
def works(draw: st.DrawFn) -> Work:
    prefill = tuple(draw(st.lists(chunks, max_size=3)))
    decodes = draw(st.integers(0, 256))
    return Work(
        prefill=prefill,
        decode_count=decodes,
        decode_context_tokens=decodes * draw(st.integers(0, 4000)),
        sampled_tokens=decodes + draw(st.integers(0, len(prefill))),
        forward=tuple(draw(st.lists(chunks, max_size=2))),
        backward=tuple(draw(st.lists(rectangles, max_size=3))),
        recompute=tuple(draw(st.lists(chunks, max_size=2))),
        optimizer_params=draw(st.sampled_from([0, 10_000_000])),
        adapters=draw(st.integers(0, 4)) if decodes or prefill else 0,
        overlap=draw(st.booleans()),
    )


def smaller(work: Work) -> list[Work]:
    """The work with one count each lowered."""
    less = []
    for name in ("prefill", "forward", "recompute", "backward"):
        items = getattr(work, name)
        if items:
            first, rest = items[0], items[1:]
            less.append(work._replace(**{name: rest}))
            less.append(work._replace(**{name: (first._replace(tokens=max(1, first.tokens - 7)), *rest)}))
            less.append(work._replace(**{name: (first._replace(context=first.context // 2), *rest)}))
    if work.decode_count:
        less.append(work._replace(decode_count=work.decode_count - 1))
        less.append(work._replace(decode_context_tokens=work.decode_context_tokens // 2))
    less.append(work._replace(sampled_tokens=work.sampled_tokens // 2, optimizer_params=0))
    less.append(work._replace(adapters=work.adapters // 2))
    return less


@pytest.mark.parametrize("kind", KINDS)
@given(work=works())
@settings(max_examples=60)
def test_no_less_work_takes_longer(kind: str, work: Work) -> None:
    cost = cost_models()[kind]
    seconds = cost.iteration_s(work)
    for less in smaller(work):
        assert cost.iteration_s(less) <= seconds


@pytest.mark.parametrize("kind", KINDS)
@given(work=works())
@settings(max_examples=60)
def test_parts_add_up(kind: str, work: Work) -> None:
    cost = cost_models()[kind]
    parts = cost.parts(work)
    assert sum(parts.values()) == pytest.approx(cost.iteration_s(work), rel=1e-12)
    assert parts.pop("overlap_saving") <= 0
    assert all(seconds > -1e-15 for seconds in parts.values()), parts


@given(work=works())
@settings(max_examples=60)
def test_each_kind_of_work_has_its_part(work: Work) -> None:
    parts = cost_models()["roofline"].parts(work)
    present = {
        "attention_prefill": bool(work.prefill),
        "attention_decode": work.decode_count > 0,
        "attention_forward": bool(work.forward),
        "loss": bool(work.forward),
        "logits": work.sampled_tokens > 0,
        "backward": bool(work.backward),
        "recompute": bool(work.recompute),
        "optimizer": work.optimizer_params > 0,
        "adapters": work.adapters > 0 or bool(work.forward),
    }
    assert {name: parts[name] > 1e-12 for name in present} == present


@given(work=works())
@settings(max_examples=80)
def test_overlap_lies_between_the_longer_stream_and_the_sum(work: Work) -> None:
    cost = cost_models()["roofline"]
    host_s = cost.curves.host_s
    work = work._replace(optimizer_params=0, overlap=True)
    inference_s = cost.iteration_s(work.inference) - host_s
    finetuning_s = cost.iteration_s(work.finetuning) - host_s
    together_s = cost.iteration_s(work) - host_s
    assert together_s >= max(inference_s, finetuning_s) - 1e-12
    assert together_s <= inference_s + finetuning_s + 1e-12
    kappa = cost.curves.overlap_contention
    expected_s = max(inference_s, finetuning_s) + kappa * min(inference_s, finetuning_s)
    assert together_s == pytest.approx(expected_s, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(work=works(), params=st.integers(1, 40_000_000))
@settings(max_examples=60)
def test_optimizer_steps_come_before_both_streams(kind: str, work: Work, params: int) -> None:
    cost = cost_models()[kind]
    # Of one decode and more, so that a lookahead hides the host behind it with and without the step.
    without = work._replace(decode_count=1 + work.decode_count, optimizer_params=0, overlap=True)
    step = without._replace(optimizer_params=params)
    optimizer_s = cost.parts(Work(optimizer_params=params))["optimizer"]
    assert optimizer_s > 0
    assert cost.iteration_s(step) == pytest.approx(optimizer_s + cost.iteration_s(without), rel=1e-12)
    added = {name: s - cost.parts(without)[name] for name, s in cost.parts(step).items()}
    assert added == pytest.approx(dict.fromkeys(added, 0.0) | {"optimizer": optimizer_s}, abs=1e-12)


def test_empty_work_costs_host_time() -> None:
    for kind in ("roofline", "roofline_lookahead"):
        cost = cost_models()[kind]
        assert cost.iteration_s(Work()) == cost.curves.host_s


def test_host_time_hides_behind_the_gpu_when_the_loop_looks_ahead() -> None:
    work = Work(decode_count=8, decode_context_tokens=8000, sampled_tokens=8)
    now, ahead = (cost_models()[kind] for kind in ("roofline", "roofline_lookahead"))
    assert now.iteration_s(work) == pytest.approx(ahead.iteration_s(work) + now.curves.host_s)
    assert ahead.parts(work)["host"] == 0
    slow = Roofline(host_s=0.5).build(context(DEVICES[0], MODELS[0], 1))
    assert slow.iteration_s(work) == 0.5


@pytest.mark.parametrize(("device", "model"), PAIRS)
def test_backward_is_additive_over_layers(device: str, model: str) -> None:
    cost = roofline(device, model)
    one = cost.parts(Work(backward=(LayerChunk(1, 900, 100),)))["backward"]
    five = cost.parts(Work(backward=(LayerChunk(5, 900, 100),)))["backward"]
    assert five == pytest.approx(5 * one, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@given(
    work=works(),
    at=st.integers(0, 4000),
    most=st.integers(0, 160),
    share=st.floats(0, 1.3),
)
@settings(max_examples=60)
def test_largest_prefill_and_forward_equal_a_scan(
    kind: str, work: Work, at: int, most: int, share: float
) -> None:
    cost = cost_models()[kind]

    def largest_forward(work: Work, at: int, most: int, budget_s: float) -> int:
        n, seconds = cost.largest_forward(work, at, most, budget_s)
        chosen = work._replace(forward=(*work.forward, Chunk(n, at))) if n else work
        assert seconds == cost.iteration_s(chosen)
        return n

    for name, ask in (("prefill", cost.largest_prefill), ("forward", largest_forward)):

        def with_tokens(n: int, name: str = name) -> float:
            return cost.iteration_s(work._replace(**{name: (*getattr(work, name), Chunk(n, at))}))

        low_s, high_s = cost.iteration_s(work), with_tokens(most + 1)
        budget_s = low_s + share * (high_s - low_s)
        scanned = max([n for n in range(1, most + 1) if with_tokens(n) <= budget_s], default=0)
        assert ask(work, at, most, budget_s) == scanned
        # As close to a boundary as floats come: one of them is the budget, and the next lower one.
        middle = max(1, most // 2)
        exact_s = with_tokens(middle)
        for budget_s in (exact_s, math.nextafter(exact_s, 0.0)):
            near = [n for n in range(1, most + 1) if with_tokens(n) <= budget_s]
            assert ask(work, at, most, budget_s) == max(near, default=0)


@st.composite
def jobs(draw: st.DrawFn) -> JobView:
    layers = draw(st.integers(1, 6))
    length = draw(st.integers(1, 60))
    order = draw(st.sampled_from(["layer_major", "window_major"]))
    memory = draw(st.sampled_from(["stash", "recompute"])) if order == "window_major" else "stash"
    unit = layers if order == "window_major" else 1
    done = unit * draw(st.integers(0, length * layers // unit))
    return JobView("job", layers, order, memory, 1000, length, length, done, draw(st.booleans()))


@pytest.mark.parametrize("kind", KINDS)
@given(work=works(), job=jobs(), share=st.floats(0, 1.3))
@settings(max_examples=80)
def test_largest_backward_equals_a_scan(kind: str, work: Work, job: JobView, share: float) -> None:
    cost = cost_models()[kind]
    unit = job.layers if job.order == "window_major" else 1

    def with_layer_tokens(n: int) -> float:
        more = work._replace(
            backward=work.backward + backward_chunks(job, n),
            recompute=work.recompute + recompute_chunks(job, n),
        )
        return cost.iteration_s(more)

    candidates = range(unit, job.backward_left + 1, unit)
    low_s = cost.iteration_s(work)
    high_s = with_layer_tokens(candidates[-1]) if candidates else low_s
    budgets = [low_s + share * (high_s - low_s)]
    if candidates:
        # As close to a boundary as floats come.
        exact_s = with_layer_tokens(candidates[int(min(share, 1.0) * (len(candidates) - 1))])
        budgets += [exact_s, math.nextafter(exact_s, 0.0)]
    for budget_s in budgets:
        scanned = max([n for n in candidates if with_layer_tokens(n) <= budget_s], default=0)
        seconds = with_layer_tokens(scanned) if scanned else low_s
        assert cost.largest_backward(work, job, budget_s) == (scanned, seconds)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_stream_that_hides_all_of_the_shorter_one_still_has_to_fit_itself(lookahead: int) -> None:
    """To the last bit: a little beside it fits its own seconds, and no fewer."""
    curves = replace(roofline("a100_80gb", "llama_3_1_8b").curves, overlap_contention=0.0)
    cost = IterationCost(curves, lookahead)
    serves = Work(decode_count=200, decode_context_tokens=1_000_000, overlap=True)
    tunes = Work(forward=(Chunk(500, 0),), backward=(LayerChunk(9, 2000, 0),), overlap=True)
    job = JobView("job", 32, "layer_major", "stash", 1, 40, 40, 0, False)

    def prefill(work: Work, budget_s: float) -> int:
        return cost.largest_prefill(work, 0, 9, budget_s)

    def forward(work: Work, budget_s: float) -> int:
        return cost.largest_forward(work, 0, 9, budget_s)[0]

    def backward(work: Work, budget_s: float) -> int:
        return cost.largest_backward(work, job, budget_s)[0]

    for params in range(1_000_003, 200_000_000, 1_000_003):
        for largest, beside in ((prefill, tunes), (forward, serves), (backward, serves)):
            work = beside._replace(optimizer_params=params)
            seconds = cost.iteration_s(work)
            assert largest(work, seconds) > 0
            assert largest(work, math.nextafter(seconds, 0.0)) == 0


@pytest.mark.parametrize(("device", "model"), PAIRS)
@pytest.mark.parametrize("budget_s", [0.02, 0.05, 0.2])
def test_inverses_at_real_sizes(device: str, model: str, budget_s: float) -> None:
    cost = roofline(device, model)
    shape = context(device, model).model
    work = Work(decode_count=40, decode_context_tokens=40_000, sampled_tokens=40, adapters=1)
    n, _ = cost.largest_forward(work, 1000, 20_000, budget_s)
    for tokens in [t for t in (n, n + 1) if 1 <= t <= 20_000]:
        fits = cost.iteration_s(work._replace(forward=(Chunk(tokens, 1000),))) <= budget_s
        assert fits == (tokens == n)
    job = JobView("job", shape.layers, "layer_major", "stash", 1, 3650, 3650, 3650 + 777, False)
    n, _ = cost.largest_backward(work, job, budget_s)
    for tokens in [t for t in (n, n + 1) if 1 <= t <= job.backward_left]:
        fits = cost.iteration_s(work._replace(backward=backward_chunks(job, tokens))) <= budget_s
        assert fits == (tokens == n)


def test_nothing_fits_a_budget_that_inference_alone_exceeds() -> None:
    cost = cost_models()["roofline"]
    work = Work(decode_count=64, decode_context_tokens=64_000, sampled_tokens=64)
    budget_s = cost.iteration_s(work) * 0.99
    job = JobView("job", 32, "layer_major", "stash", 1, 500, 500, 0, False)
    assert cost.largest_prefill(work, 0, 500, budget_s) == 0
    for fit in (cost.largest_forward(work, 0, 500, budget_s), cost.largest_backward(work, job, budget_s)):
        assert fit == (0, cost.iteration_s(work))


def test_passes_beyond_the_lists_keep_growing() -> None:
    cost = Roofline(max_tokens=1024).build(context(DEVICES[0], MODELS[0]))
    reference = roofline(DEVICES[0], MODELS[0])
    inside, outside = Work(prefill=(Chunk(1000, 0),)), Work(prefill=(Chunk(5000, 0),))
    assert cost.iteration_s(inside) == reference.iteration_s(inside)
    assert cost.region == {"pass_tokens": (0.0, 1024.0)}
    assert cost.iteration_s(outside) == pytest.approx(reference.iteration_s(outside), rel=0.1)
    assert sum(cost.parts(outside).values()) == pytest.approx(cost.iteration_s(outside), rel=1e-12)


def test_a_backward_beyond_the_lists_may_stand_beside_a_longer_window() -> None:
    def model() -> IterationCost:
        return Roofline(max_tokens=1024).build(context(DEVICES[0], MODELS[0]))

    window, back = Work(forward=(Chunk(5000, 0),)), Work(backward=(LayerChunk(1, 3000, 0),))
    both = model().iteration_s(window._replace(backward=back.backward))
    host_s = model().curves.host_s
    assert both == pytest.approx(model().iteration_s(window) + model().iteration_s(back) - host_s)


@pytest.mark.parametrize(("field", "value"), [("tp", 3), ("seed", -1), ("lookahead", 2)])
def test_a_context_is_checked(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        replace(context(DEVICES[0], MODELS[0]), **{field: value})
    with pytest.raises(ValueError, match="targets"):
        replace(context(DEVICES[0], MODELS[0]), lora=LoraSpec(targets=("down",)))
