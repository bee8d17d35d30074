"""What each operator's gradient needs, what it costs, and what PyTorch saves for it.

`needs(op, i)` names the forward tensors that the gradient with respect to input i reads, beside the
gradient of the output; parameters among them are always at hand. This is the whole knowledge that
pruning and rematerialisation share. That it is enough is proved by running graphs that may read
nothing else (`tests/compile/interpret.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sim.compile.ir import Graph, Op

VIEW, ELEMENTWISE, GEMM, ATTENTION = "view", "elementwise", "gemm", "attention"

Needs = Callable[[Op, int], tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """`cost` is the class of the operator; `saves_all` says that PyTorch saves the needs of all inputs
    as soon as one of them wants a gradient (fused kernels), else only those of inputs that do."""

    cost: str
    needs: Needs
    saves_all: bool = False


def _nothing(op: Op, i: int) -> tuple[str, ...]:
    return ()


def _inputs(op: Op, i: int) -> tuple[str, ...]:
    return (op.inputs[0],)


def _result(op: Op, i: int) -> tuple[str, ...]:
    return (op.outputs[0],)


def _linear(op: Op, i: int) -> tuple[str, ...]:
    return ((op.inputs[1],), (op.inputs[0],), ())[i]


def _product(op: Op, i: int) -> tuple[str, ...]:
    return (op.inputs[1 - i],)


def _attention(op: Op, i: int) -> tuple[str, ...]:
    """dV = P'dO needs the probabilities P = exp(QK' - lse) only; dQ and dK also V and, for the row sums
    of dO * O, the output (FlashAttention-2, algorithm 2)."""
    query, key, value = op.inputs
    out, lse = op.outputs
    return (query, key, lse) if i == 2 else (query, key, value, out, lse)


def _second_output(op: Op, i: int) -> tuple[str, ...]:
    return (op.outputs[1],)


def _labels_and_log_probs(op: Op, i: int) -> tuple[str, ...]:
    return (op.inputs[1], op.outputs[1])


RULES: dict[str, Rule] = {
    "view": Rule(cost=VIEW, needs=_nothing),
    "transpose": Rule(cost=VIEW, needs=_nothing),
    "unsqueeze": Rule(cost=VIEW, needs=_nothing),
    "slice": Rule(cost=VIEW, needs=_nothing),
    "cast": Rule(cost=ELEMENTWISE, needs=_nothing),
    "add": Rule(cost=ELEMENTWISE, needs=_nothing),
    "add_scalar": Rule(cost=ELEMENTWISE, needs=_nothing),
    "scale": Rule(cost=ELEMENTWISE, needs=_nothing),
    "neg": Rule(cost=ELEMENTWISE, needs=_nothing),
    "cat": Rule(cost=ELEMENTWISE, needs=_nothing),
    "mean": Rule(cost=ELEMENTWISE, needs=_nothing),
    "square": Rule(cost=ELEMENTWISE, needs=_inputs),
    "silu": Rule(cost=ELEMENTWISE, needs=_inputs),
    "gelu": Rule(cost=ELEMENTWISE, needs=_inputs),
    "relu": Rule(cost=ELEMENTWISE, needs=_result),
    "rsqrt": Rule(cost=ELEMENTWISE, needs=_result),
    "mul": Rule(cost=ELEMENTWISE, needs=_product),
    "dropout": Rule(cost=ELEMENTWISE, needs=_second_output),
    "linear": Rule(cost=GEMM, needs=_linear),
    "attention": Rule(cost=ATTENTION, needs=_attention, saves_all=True),
    "cross_entropy": Rule(cost=ELEMENTWISE, needs=_labels_and_log_probs),
}
"""Kind of operator -> rule. `dropout` has its scaled mask as second output, `attention` (causal, grouped
heads) its log-sum-exp, `cross_entropy` the log probabilities. Running dropout again needs the state of
its random stream, which is not counted."""


def forward_flops(graph: Graph, op: Op, context_tokens: float) -> float:
    """FLOPs per token of an operator; attention sees `context_tokens` keys on average (causal: half
    the sequence). Element-wise operators count one per element of their widest operand."""
    rule, tensors = RULES[op.kind], graph.tensors
    if rule.cost == VIEW:
        return 0.0
    if rule.cost == GEMM:
        return 2.0 * tensors[op.inputs[1]].elements if tensors[op.out].elements_per_token else 0.0
    if rule.cost == ATTENTION:
        return 4.0 * tensors[op.inputs[0]].elements_per_token * context_tokens
    return float(max(tensors[n].elements_per_token for n in (*op.inputs, *op.outputs)))


def backward_flops(graph: Graph, op: Op, wanted: set[str], context_tokens: float) -> float:
    """FLOPs per token of the gradients of the inputs in `wanted`. A GEMM costs its forward per wanted
    operand; attention 5 products where the forward has 2 (scores again, dP, dV, dQ, dK)."""
    rule = RULES[op.kind]
    forward = forward_flops(graph, op, context_tokens)
    inputs = [n for n in op.inputs if n in wanted]
    if not inputs:
        return 0.0
    if rule.cost == GEMM:
        return forward * len([n for n in inputs if n in op.inputs[:2]])
    return forward * (2.5 if rule.cost == ATTENTION else 1.0)


def storage(graph: Graph) -> dict[str, str]:
    """Tensor -> the tensor that owns its memory: views share their source's."""
    owner = {name: name for name in graph.tensors}
    for op in graph.ops:
        if RULES[op.kind].cost == VIEW:
            owner[op.out] = owner[op.inputs[0]]
    return owner
