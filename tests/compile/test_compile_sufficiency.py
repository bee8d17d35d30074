"""What pruning keeps is enough for autograd's gradients, and nothing of it can be spared.

The reference is the real `transformers` layer with real `peft` LoRA in float64. Its norms compute in
float32 whatever the model's dtype, so they are replaced by the same formula in float64.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from sim.compile.families import head_graph, layer_graph
from sim.compile.ir import Graph
from sim.compile.peft import LINEARS, PeftSpec
from sim.compile.prune import autograd, prune
from sim.compile.remat import Point, pareto
from sim.compile.roles import keys_and_values
from sim.core.specs import ModelShape
from tests.compile.interpret import Memory, NotKeptError, Values, backward, forward

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

TOKENS = 5
FAMILIES = ("llama", "qwen2")
SUBSETS = [s for n in range(1, 8) for s in itertools.combinations(LINEARS, n)]


def tiny(family: str) -> ModelShape:
    return ModelShape(
        name=f"tiny-{family}",
        layers=1,
        hidden=24,
        heads=4,
        kv_heads=2,
        head_dim=6,
        ffn=40,
        vocab=32,
        qkv_bias=family == "qwen2",
        dtype_bytes=8,
    )


def norm_in_float64(self: Any, x: Any) -> Any:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@dataclass
class Reference:
    """One real layer with LoRA on all seven linear layers; a subset is trained by silencing the rest."""

    shape: ModelShape
    layer: Any
    given: Values
    ups: dict[str, Any]

    def gradients(self, targets: tuple[str, ...], output_grad: Any) -> Values:
        """Autograd's gradients by graph name, `x` among them, for LoRA on `targets` alone."""
        x = torch.tensor(self.given["x"], requires_grad=True)
        rope = tuple(torch.tensor(self.given[n]) for n in ("cos", "sin"))
        for name, parameter in self.layer.named_parameters():
            target = name.split(".")[1]
            parameter.requires_grad_("lora" in name and target in targets)
            parameter.grad = None
            if "lora_B" in name:
                parameter.data = self.ups[name] if target in targets else torch.zeros_like(parameter)
        self.layer(x, position_embeddings=rope, attention_mask=None).backward(torch.tensor(output_grad))
        named = {clean(n): p.grad.numpy() for n, p in self.layer.named_parameters() if p.grad is not None}
        return named | {"x": x.grad.numpy()}


def clean(name: str) -> str:
    return name.replace(".base_layer", "").replace(".default", "")


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request: pytest.FixtureRequest) -> Reference:
    from engine.capture import EPSILON, build_model
    from tests.compile.adapters import apply_peft

    shape = tiny(request.param)
    torch.manual_seed(0)
    model = apply_peft(build_model(shape, request.param, "float64", "cpu"), PeftSpec(rank=3, alpha=6))
    layer = model.get_base_model().model.layers[0]
    for module in (layer.input_layernorm, layer.post_attention_layernorm):
        module.forward = norm_in_float64.__get__(module)
        assert module.variance_epsilon == EPSILON
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 6, (1, TOKENS, shape.head_dim // 2)).repeat(2, -1)
    given = {clean(n): p.detach().numpy() for n, p in layer.named_parameters()}
    given |= {"x": rng.normal(size=(1, TOKENS, shape.hidden)), "cos": np.cos(angles), "sin": np.sin(angles)}
    ups = {n: p.data for n, p in layer.named_parameters() if "lora_B" in n}
    return Reference(shape, layer, given, ups)


def graph_and_values(reference: Reference, targets: tuple[str, ...]) -> tuple[Graph, Values]:
    from engine.capture import EPSILON

    graph = layer_graph(reference.shape, PeftSpec(rank=3, alpha=6, targets=targets), eps=EPSILON)
    given = {n: v for n, v in reference.given.items() if n in graph.tensors}
    given |= {clean(n): v.numpy() for n, v in reference.ups.items() if clean(n) in graph.tensors}
    return graph, forward(graph, given)


def kept_by_pruning(graph: Graph, input_grad: bool = True) -> set[str]:
    return {n for n, need in prune(graph, input_grad).items() if need.kept}


def assert_equal(found: Values, expected: Values) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        error = np.abs(found[name] - value).max() / np.abs(value).max()
        assert error < 1e-10, (name, error)


def test_kept_tensors_suffice_for_every_subset_of_targets(reference: Reference) -> None:
    output_grad = np.random.default_rng(1).normal(size=reference.given["x"].shape)
    assert len(SUBSETS) == 2**7 - 1
    for targets in SUBSETS:
        graph, values = graph_and_values(reference, targets)
        expected = reference.gradients(targets, output_grad)
        pruned = backward(graph, Memory(graph, values, kept_by_pruning(graph)), output_grad)
        assert_equal(pruned, expected)
        for point in _corners(graph):
            memory = Memory(graph, values, point.kept, point.recomputed)
            assert_equal(backward(graph, memory, output_grad), expected)
        del expected["x"]
        bottom = Memory(graph, values, kept_by_pruning(graph, input_grad=False))
        assert_equal(backward(graph, bottom, output_grad, input_grad=False), expected)


def test_every_kept_tensor_is_necessary_for_every_subset_of_targets(reference: Reference) -> None:
    output_grad = np.random.default_rng(1).normal(size=reference.given["x"].shape)
    for targets in SUBSETS:
        graph, values = graph_and_values(reference, targets)
        for input_grad in (True, False):
            kept = kept_by_pruning(graph, input_grad)
            for name in kept:
                with pytest.raises(NotKeptError):
                    backward(graph, Memory(graph, values, kept - {name}), output_grad, input_grad)
        for point in _corners(graph):
            for name in set(point.kept) - set(keys_and_values(graph)):
                memory = Memory(graph, values, set(point.kept) - {name}, point.recomputed)
                with pytest.raises(NotKeptError):
                    backward(graph, memory, output_grad)


@pytest.mark.parametrize("targets", [LINEARS, ("down_proj",), ("q_proj", "v_proj"), ("k_proj", "gate_proj")])
def test_a_wrong_value_in_any_kept_tensor_shows_in_the_gradients(
    reference: Reference, targets: tuple[str, ...]
) -> None:
    """Necessity of the values: that a rule names a tensor does not yet mean that it counts."""
    output_grad = np.random.default_rng(1).normal(size=reference.given["x"].shape)
    graph, values = graph_and_values(reference, targets)
    kept = kept_by_pruning(graph)
    truth = backward(graph, Memory(graph, values, kept), output_grad)
    for name in kept:
        spoilt = values | {name: values[name] * 1.01 + 0.01}
        found = backward(graph, Memory(graph, spoilt, kept), output_grad)
        change = max(np.abs(found[n] - truth[n]).max() / np.abs(truth[n]).max() for n in truth)
        assert change > 1e-6, name


@pytest.mark.parametrize(
    "spec",
    [
        PeftSpec(method="ia3", targets=("k_proj", "v_proj", "down_proj")),
        PeftSpec(method="adapter", targets=("o_proj", "down_proj"), rank=4),
        PeftSpec(method="adapter", targets=("down_proj",), rank=4, activation="gelu"),
    ],
    ids=lambda s: f"{s.method}-{s.activation}",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_bypasses_agree_with_finite_differences(family: str, spec: PeftSpec) -> None:
    """No torch: the gradient of a random direction against central differences, in float64."""
    graph = layer_graph(tiny(family), spec)
    rng = np.random.default_rng(2)
    given: Values = {
        n: rng.normal(size=tuple(map(int, t.shape))) * 0.4
        for n, t in graph.tensors.items()
        if t.role == "parameter"
    }
    angles = rng.uniform(0, 6, (1, TOKENS, 3)).repeat(2, -1)
    given |= {"x": rng.normal(size=(1, TOKENS, 24)), "cos": np.cos(angles), "sin": np.sin(angles)}
    output_grad = rng.normal(size=(1, TOKENS, 24))
    for point in _corners(graph):
        memory = Memory(graph, forward(graph, given), point.kept, point.recomputed)
        grads = backward(graph, memory, output_grad)
        assert set(grads) == {*graph.trainable, "x"}
        for name, grad in grads.items():
            way = rng.normal(size=grad.shape)
            up, down = (
                (forward(graph, given | {name: given[name] + s * way})[graph.output] * output_grad).sum()
                for s in (1e-5, -1e-5)
            )
            assert (grad * way).sum() == pytest.approx((up - down) / 2e-5, rel=1e-5)


def _corners(graph: Graph) -> list[Point]:
    """The first point that recomputes, one in the middle, and the far end of the Pareto list."""
    points = pareto(graph, kept_by_pruning(graph), TOKENS / 2, pinned=keys_and_values(graph))
    return [points[min(1, len(points) - 1)], points[len(points) // 2], points[-1]]


def test_a_trainable_branch_that_leads_nowhere_keeps_nothing() -> None:
    """Autograd cannot know that; pruning walks back from the output."""
    graph = layer_graph(tiny("llama"), PeftSpec(targets=("down_proj",)))
    ops = [op for op in graph.ops if op.out != "mlp.down_proj.add"]
    last = replace(ops[-1], inputs=("add", "mlp.down_proj.linear"))
    dead = replace(graph, ops=(*ops[:-1], last))
    assert not any(need.kept for need in prune(dead, input_grad=False).values())
    assert any(need.kept for need in prune(graph, input_grad=False).values())
    assert any(need.kept for need in autograd(dead, input_grad=False).values())


def test_head_gradient_agrees_with_finite_differences() -> None:
    graph = head_graph(tiny("llama"))
    rng = np.random.default_rng(3)
    given: Values = {
        n: rng.normal(size=tuple(map(int, t.shape)))
        for n, t in graph.tensors.items()
        if t.role == "parameter"
    }
    given |= {"x": rng.normal(size=(1, TOKENS, 24)), "labels": rng.integers(0, 32, TOKENS)}
    kept = {n for n, need in prune(graph).items() if need.kept}
    grad = backward(graph, Memory(graph, forward(graph, given), kept), np.ones(()))["x"]
    way = rng.normal(size=grad.shape)
    up, down = (forward(graph, given | {"x": given["x"] + s * way})[graph.output] for s in (1e-5, -1e-5))
    assert (grad * way).sum() == pytest.approx((up - down) / 2e-5, rel=1e-5)
