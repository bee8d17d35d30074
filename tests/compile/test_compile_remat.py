"""The Pareto list against all choices written out, and against minimum cuts."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from sim.compile.compiler import frontier
from sim.compile.families import layer_graph
from sim.compile.ir import Graph, Op, Tensor
from sim.compile.peft import PeftSpec
from sim.compile.prune import prune
from sim.compile.remat import nodes_of, pareto
from sim.compile.roles import keepable, keys_and_values
from sim.core.specs import ModelShape
from tests.compile.min_cut import min_cut

LLAMA_8B = ModelShape(
    name="llama-3.1-8b", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256
)
SPECS = {
    "all": PeftSpec(),
    "down": PeftSpec(targets=("down_proj",)),
    "ia3": PeftSpec(method="ia3", targets=("k_proj", "v_proj", "down_proj")),
    "adapter": PeftSpec(method="adapter", targets=("o_proj", "down_proj"), rank=64),
}


def random_graph(seed: int) -> tuple[Graph, set[str], set[str]]:
    """A chain with side branches of up to seven operators, some with two outputs; what is needed; what
    is pinned. Sizes are arbitrary: nothing runs."""
    rng = random.Random(seed)
    names, tensors, ops = ["x"], {"x": _tensor("x", rng)}, []
    for i in range(rng.randint(3, 7)):
        inputs = tuple(rng.sample(names, min(len(names), rng.choice((1, 1, 2)))))
        outputs = (f"t{i}", f"u{i}") if rng.random() < 0.3 else (f"t{i}",)
        tensors |= {n: _tensor(n, rng) for n in outputs}
        ops.append(Op(kind="add" if len(inputs) == 2 else "silu", inputs=inputs, outputs=outputs))
        names += outputs
    needed = set(rng.sample(names, rng.randint(1, len(names))))
    pinned = set(rng.sample(names[1:], rng.choice((0, 0, 1))))
    graph = Graph(name="random", tensors=tensors, ops=tuple(ops), input="x", output=names[-1])
    return graph, needed, pinned


def _tensor(name: str, rng: random.Random) -> Tensor:
    return Tensor(name=name, shape=(1, "T", rng.randint(1, 40)), dtype="float16")


def all_choices(graph: Graph, needed: set[str], pinned: set[str]) -> set[tuple[int, float]]:
    """Undominated (bytes, FLOPs) over every set kept and every set of operators run again."""
    nodes = nodes_of(graph, 0.0)
    names = [n for node in nodes for n in node.outputs]
    found = set()
    for again in itertools.product((False, True), repeat=len(nodes) - 1):
        runs = [node for node, r in zip(nodes[1:], again, strict=True) if r]
        made = {n for node in runs for n in node.outputs}
        for mask in itertools.product((False, True), repeat=len(names)):
            kept = {n for n, k in zip(names, mask, strict=True) if k} | pinned
            there = kept | made
            if needed <= there and all(there.issuperset(node.inputs) for node in runs):
                size = sum(graph.tensors[n].bytes_per_token for n in kept)
                found.add((size, sum(node.flops for node in runs)))
    return {a for a in found if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in found)}


@pytest.mark.parametrize("seed", range(25))
def test_pareto_list_is_that_of_all_choices(seed: int) -> None:
    graph, needed, pinned = random_graph(seed)
    while len(list(graph.activations())) > 9:
        seed += 1000
        graph, needed, pinned = random_graph(seed)
    points = pareto(graph, needed, 0.0, pinned=pinned)
    assert {(p.kept_bytes, p.extra_flops) for p in points} == all_choices(graph, needed, pinned)


@pytest.mark.parametrize("seed", range(100))
def test_pareto_list_holds_the_minimum_cut_at_every_price(seed: int) -> None:
    graph, needed, pinned = random_graph(seed)
    points = pareto(graph, needed, 0.0, pinned=pinned)
    for price in (0.0, 0.1, 0.5, 1.0, 2.0, 10.0):
        best = min(p.kept_bytes + price * p.extra_flops for p in points)
        assert min_cut(graph, needed, 0.0, price, pinned) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_real_layer_agrees_with_its_minimum_cuts(spec: PeftSpec) -> None:
    graph = layer_graph(LLAMA_8B, spec)
    _, points = frontier(graph, 2048.5)
    needed = {n for n, need in prune(graph).items() if need.kept}
    for price in (0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1.0, 1e3):
        best = min(p.kept_bytes + price * p.extra_flops for p in points)
        cut = min_cut(graph, needed, 2048.5, price, keys_and_values(graph), keepable(graph))
        assert cut == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_points_are_undominated_and_say_what_they_cost(spec: PeftSpec) -> None:
    graph = layer_graph(LLAMA_8B, spec)
    _, points = frontier(graph, 2048.5)
    producer = graph.producer
    flops = {node.outputs[0]: node.flops for node in nodes_of(graph, 2048.5)}
    for before, after in itertools.pairwise(points):
        assert after.kept_bytes < before.kept_bytes
        assert after.extra_flops > before.extra_flops
    for point in points:
        assert point.kept_bytes == sum(graph.tensors[n].bytes_per_token for n in point.kept)
        ran = {producer[n].out for n in point.recomputed}
        assert point.extra_flops == pytest.approx(math.fsum(flops[n] for n in ran))


def test_without_running_a_gemm_or_attention_again_a_layer_keeps_92_kib() -> None:
    """Three hand-written autograd functions (norm, SwiGLU, LoRA-linear) reach 92.1 KiB per token for a
    Llama-3.1-8B layer with LoRA everywhere; low-rank GEMMs run again there too."""
    graph = layer_graph(LLAMA_8B, PeftSpec())
    needed = {n for n, need in prune(graph).items() if need.kept}
    points = pareto(
        graph,
        needed,
        2048.5,
        pinned=keys_and_values(graph),
        may_recompute=lambda op: (
            op.kind != "attention" and (op.kind != "linear" or "lora" in op.out or "lora" in op.inputs[1])
        ),
    )
    assert points[-1].kept_bytes / 1024 == pytest.approx(92.1, abs=0.05)


def test_far_end_keeps_the_layer_input_and_the_keys_and_values() -> None:
    graph = layer_graph(LLAMA_8B, PeftSpec())
    _, points = frontier(graph, 2048.5)
    assert set(points[-1].kept) == {"x", *keys_and_values(graph)}
