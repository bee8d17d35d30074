"""Runs a graph in numpy, forward and backward, with nothing kept but what a plan keeps.

It is the proof that a plan is enough: the backward asks a `Memory` for each forward tensor that a
gradient rule names; the memory has what was kept, recomputes what the plan recomputes, and raises
`NotKeptError` for anything else. Slow and plain on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from sim.compile.ir import ACTIVATION, TOKENS, Graph, Op
from sim.compile.prune import wanted
from sim.compile.rules import RULES, VIEW

Array = Any
"""A float64 numpy array."""
Values = dict[str, Array]


class NotKeptError(KeyError):
    """The backward needs a forward tensor that was neither kept nor may be recomputed."""


def forward(graph: Graph, given: Mapping[str, Array]) -> Values:
    """Every tensor by name, from the input, the constants and the parameters in `given`.

    Arrays keep `given`'s precision: casts between floating types do nothing here.
    """
    values = dict(given)
    tokens = _tokens(graph, given)
    for op in graph.ops:
        values.update(zip(op.outputs, run_op(graph, op, values.__getitem__, tokens), strict=True))
    return values


class Memory:
    """What is left of the forward when the backward runs: parameters, constants and `kept`."""

    def __init__(
        self,
        graph: Graph,
        values: Mapping[str, Array],
        kept: Collection[str],
        recomputed: Collection[str] = (),
    ) -> None:
        """`kept` and `recomputed` name owners of memory (`rules.storage`); views come with them."""
        self.graph, self.recomputed = graph, set(recomputed)
        self.tokens = _tokens(graph, values)
        self._producer = graph.producer
        self._have = {n: v for n, v in values.items() if n in kept or graph.tensors[n].role != ACTIVATION}

    def get(self, name: str) -> Array:
        """The value of a forward tensor. Raises NotKeptError."""
        if name in self._have:
            return self._have[name]
        op = self._producer.get(name)
        if op is None or (RULES[op.kind].cost != VIEW and name not in self.recomputed):
            raise NotKeptError(name)
        made = run_op(self.graph, op, self.get, self.tokens)
        for output, value in zip(op.outputs, made, strict=True):
            self._have.setdefault(output, value)
        return self._have[name]


def backward(graph: Graph, memory: Memory, output_grad: Array, input_grad: bool = True) -> Values:
    """Gradients of the trainable parameters, and of the input if `input_grad`, from those of the
    output; reads the forward only through `memory` and only what the rules name."""
    grads_of = wanted(graph, input_grad)
    grads: Values = {graph.output: output_grad}
    for op in reversed(graph.ops):
        if op.out not in grads_of or op.out not in grads:
            continue
        grad = grads.pop(op.out) if op.out != graph.output else grads[op.out]
        for i, source in enumerate(op.inputs):
            if source not in grads_of:
                continue
            allowed = {*RULES[op.kind].needs(op, i)}
            part = _gradient(graph, op, i, grad, _reader(memory, allowed))
            part = _unbroadcast(part, _concrete(graph, source, memory.tokens))
            grads[source] = grads[source] + part if source in grads else part
    ends = {*graph.trainable} | ({graph.input} if input_grad else set())
    return {n: g for n, g in grads.items() if n in ends}


def _reader(memory: Memory, allowed: set[str]) -> Callable[[str], Array]:
    def get(name: str) -> Array:
        assert name in allowed, f"the rule does not name {name}"
        return memory.get(name)

    return get


def run_op(graph: Graph, op: Op, get: Callable[[str], Array], tokens: int) -> tuple[Array, ...]:
    """The outputs of one operator of a bound graph."""
    x = get(op.inputs[0])
    if op.kind == "view":
        return (x.reshape(_concrete(graph, op.out, tokens)),)
    if op.kind in ("add", "mul"):
        y = get(op.inputs[1])
        return (x + y if op.kind == "add" else x * y,)
    if op.kind == "linear":
        y = x @ get(op.inputs[1]).T
        return (y + get(op.inputs[2]) if len(op.inputs) > 2 else y,)
    if op.kind == "cat":
        return (np.concatenate([get(n) for n in op.inputs], axis=op.attrs["dim"]),)
    if op.kind == "attention":
        return _attention(x, get(op.inputs[1]), get(op.inputs[2]), op.attrs["scale"])
    if op.kind == "cross_entropy":
        log_probs = x - _logsumexp(x)[..., None]
        return -np.take_along_axis(log_probs, get(op.inputs[1])[:, None], 1).sum(), log_probs
    if op.kind not in _UNARY:
        raise ValueError(f"interpret: operator {op.kind} cannot run here, known are {sorted(_UNARY)}")
    return (_UNARY[op.kind](x, op.attrs),)


def _take(x: Array, attrs: dict[str, Any]) -> Array:
    index: list[Any] = [slice(None)] * x.ndim
    index[attrs["dim"]] = slice(attrs["start"], attrs["stop"])
    return x[tuple(index)]


_UNARY: dict[str, Callable[[Array, dict[str, Any]], Array]] = {
    "transpose": lambda x, a: np.swapaxes(x, *a["dims"]),
    "unsqueeze": lambda x, a: np.expand_dims(x, a["dim"]),
    "slice": _take,
    "cast": lambda x, a: x,
    "add_scalar": lambda x, a: x + a["value"],
    "scale": lambda x, a: x * a["factor"],
    "neg": lambda x, a: -x,
    "mean": lambda x, a: x.mean(-1, keepdims=True),
    "square": lambda x, a: x * x,
    "rsqrt": lambda x, a: 1 / np.sqrt(x),
    "silu": lambda x, a: x * _sigmoid(x),
    "gelu": lambda x, a: x * _normal_cdf(x),
    "relu": lambda x, a: np.maximum(x, 0),
}


def _gradient(graph: Graph, op: Op, i: int, grad: Array, get: Callable[[str], Array]) -> Array:
    """Gradient with respect to input i before broadcasting is undone; `get` only gives what the
    operator's rule names (weights included)."""
    attrs, kind = op.attrs, op.kind
    if kind == "linear":
        if i == 0:
            return grad @ get(op.inputs[1])
        rows = grad.reshape(-1, grad.shape[-1])
        return rows.sum(0) if i == 2 else rows.T @ _rows(get(op.inputs[0]))
    if kind == "mul":
        return grad * get(op.inputs[1 - i])
    if kind == "attention":
        return _attention_gradient(op, i, grad, get)
    if kind == "square":
        return 2 * grad * get(op.inputs[0])
    if kind == "rsqrt":
        return -0.5 * grad * get(op.out) ** 3
    if kind == "relu":
        return grad * (get(op.out) > 0)
    if kind == "silu":
        x = get(op.inputs[0])
        s = _sigmoid(x)
        return grad * s * (1 + x * (1 - s))
    if kind == "gelu":
        x = get(op.inputs[0])
        return grad * (_normal_cdf(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi))
    if kind == "cross_entropy":
        probs = np.exp(get(op.outputs[1]))
        probs[np.arange(len(probs)), get(op.inputs[1])] -= 1
        return grad * probs
    return _linear_gradient(graph, op, i, grad, attrs)


def _linear_gradient(graph: Graph, op: Op, i: int, grad: Array, attrs: dict[str, Any]) -> Array:
    """Operators whose gradient reads nothing of the forward."""
    kind = op.kind
    source = graph.tensors[op.inputs[i]].shape
    if kind in ("add", "add_scalar", "cast"):
        return grad
    if kind == "scale":
        return grad * attrs["factor"]
    if kind == "neg":
        return -grad
    if kind == "mean":
        width = source[-1]
        assert isinstance(width, int)
        return np.repeat(grad, width, axis=-1) / width
    if kind == "view":
        return grad.reshape([-1 if d == TOKENS else int(d) for d in source])
    if kind == "transpose":
        return np.swapaxes(grad, *attrs["dims"])
    if kind == "unsqueeze":
        return np.squeeze(grad, attrs["dim"])
    if kind == "slice":
        width = source[attrs["dim"]]
        assert isinstance(width, int)
        pads = [(0, 0)] * grad.ndim
        pads[attrs["dim"]] = (attrs["start"], width - attrs["stop"])
        return np.pad(grad, pads)
    if kind == "cat":
        sizes = [int(graph.tensors[n].shape[attrs["dim"]]) for n in op.inputs]
        start = sum(sizes[:i])
        return np.take(grad, range(start, start + sizes[i]), axis=attrs["dim"])
    raise ValueError(f"interpret: operator {kind} has no gradient here")


def _attention(query: Array, key: Array, value: Array, scale: float) -> tuple[Array, Array]:
    """Causal attention, (1, H, T, d) with (1, K, T, d) keys -> output and log-sum-exp (1, H, T)."""
    scores = _scores(query, key, scale)
    lse = _logsumexp(scores)
    return np.exp(scores - lse[..., None]) @ _spread(value, query), lse


def _attention_gradient(op: Op, i: int, grad: Array, get: Callable[[str], Array]) -> Array:
    query, key = get(op.inputs[0]), get(op.inputs[1])
    scale = op.attrs["scale"]
    probs = np.exp(_scores(query, key, scale) - get(op.outputs[1])[..., None])
    if i == 2:
        return _gather(np.swapaxes(probs, -1, -2) @ grad, key)
    value = _spread(get(op.inputs[2]), query)
    row_sums = (grad * get(op.outputs[0])).sum(-1, keepdims=True)
    dscores = probs * (grad @ np.swapaxes(value, -1, -2) - row_sums) * scale
    if i == 0:
        return dscores @ _spread(key, query)
    return _gather(np.swapaxes(dscores, -1, -2) @ query, key)


def _scores(query: Array, key: Array, scale: float) -> Array:
    scores = query @ np.swapaxes(_spread(key, query), -1, -2) * scale
    hidden = np.triu(np.ones(scores.shape[-2:], dtype=bool), 1)
    return np.where(hidden, -np.inf, scores)


def _spread(key: Array, query: Array) -> Array:
    """K/V heads repeated for their groups of query heads."""
    return np.repeat(key, query.shape[1] // key.shape[1], axis=1)


def _gather(grad: Array, key: Array) -> Array:
    """The sum over each group of query heads."""
    batch, heads, tokens, size = grad.shape
    return grad.reshape(batch, key.shape[1], heads // key.shape[1], tokens, size).sum(2)


def _logsumexp(x: Array) -> Array:
    top = x.max(-1)
    return top + np.log(np.exp(x - top[..., None]).sum(-1))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _tokens(graph: Graph, values: Mapping[str, Array]) -> int:
    return int(values[graph.input].shape[graph.tensors[graph.input].shape.index(TOKENS)])


def _concrete(graph: Graph, name: str, tokens: int) -> tuple[int, ...]:
    return tuple(tokens if d == TOKENS else int(d) for d in graph.tensors[name].shape)


def _unbroadcast(grad: Array, shape: tuple[int, ...]) -> Array:
    """Sum what broadcasting repeated."""
    extra = grad.ndim - len(shape)
    grad = grad.sum(axis=tuple(range(extra))) if extra else grad
    axes = tuple(i for i, d in enumerate(shape) if d == 1 and grad.shape[i] != 1)
    return grad.sum(axis=axes, keepdims=True) if axes else grad
