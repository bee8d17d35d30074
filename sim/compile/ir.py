"""A small graph IR: one decoder layer, operator by operator, with symbolic shapes.

The operators are those that eager PyTorch runs, not fused ones: then what autograd saves can be counted
exactly, and fused kernels (a norm that keeps only its input) come out of rematerialisation by
themselves. Shapes are in terms of the tokens `T` and of the names of `dims_of`; `bind` puts in numbers
for all but `T`, so one shipped graph serves every model of its family.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sim.core.specs import ModelShape

TOKENS = "T"
"""The symbolic dimension that counts tokens; `bind` leaves it."""

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}

ACTIVATION, PARAMETER, CONSTANT = "activation", "parameter", "constant"

Dim = str | int
Attr = Any
"""A number, a name bound later, or a tuple of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor: `shape` of numbers and names, `dtype` of ITEM_BYTES or the name "model" / "adapter"."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str
    role: str = ACTIVATION

    @property
    def elements_per_token(self) -> int:
        """Elements per token of a bound tensor; 0 for one that does not grow with tokens."""
        if TOKENS not in self.shape:
            return 0
        return math.prod(d for d in self.shape if isinstance(d, int))

    @property
    def bytes_per_token(self) -> int:
        return self.elements_per_token * ITEM_BYTES[self.dtype]

    @property
    def elements(self) -> int:
        """Elements of a bound tensor without a token dimension (a parameter)."""
        return math.prod(d for d in self.shape if isinstance(d, int))


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operator; `kind` is a key of `rules.RULES`."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Attr] = field(default_factory=dict)

    @property
    def out(self) -> str:
        return self.outputs[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Operators in an order in which they can run. `input` is the hidden state that enters,
    `output` what leaves; `trainable` names the parameters that want a gradient."""

    name: str
    tensors: dict[str, Tensor]
    ops: tuple[Op, ...]
    input: str
    output: str
    trainable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = {n for n, t in self.tensors.items() if t.role != ACTIVATION} | {self.input}
        for op in self.ops:
            missing = [n for n in op.inputs if n not in known]
            if missing:
                raise ValueError(
                    f"graph {self.name}: {op.kind} {op.out} reads {missing[0]} before it is made"
                )
            known.update(op.outputs)
        for name in (self.output, *self.trainable):
            if name not in known:
                raise ValueError(f"graph {self.name}: no operator makes {name}")

    @property
    def producer(self) -> dict[str, Op]:
        """Tensor name -> the operator that makes it."""
        return {name: op for op in self.ops for name in op.outputs}

    def activations(self) -> Iterator[Tensor]:
        """Every activation, the input first, in order of computation."""
        yield self.tensors[self.input]
        for op in self.ops:
            for name in op.outputs:
                yield self.tensors[name]

    def bind(self, values: Mapping[str, float], dtypes: Mapping[str, str]) -> Graph:
        """Put numbers for names (dimensions and attributes) and dtypes for "model" and "adapter".

        Raises ValueError for a name without a value. Casts that change nothing disappear.
        """

        def number(item: Attr) -> Attr:
            if isinstance(item, tuple):
                return tuple(number(i) for i in item)
            if not isinstance(item, str) or item == TOKENS:
                return item
            if item not in values:
                raise ValueError(f"graph {self.name}: no value for {item!r}, known are {sorted(values)}")
            return values[item]

        tensors = {
            n: replace(t, shape=number(t.shape), dtype=dtypes.get(t.dtype, t.dtype))
            for n, t in self.tensors.items()
        }
        ops = tuple(replace(op, attrs={k: number(v) for k, v in op.attrs.items()}) for op in self.ops)
        return drop_idle_casts(replace(self, tensors=tensors, ops=ops))

    def to_json(self) -> str:
        """Text with one line per tensor and operator."""
        tensors = [[t.name, list(t.shape), t.dtype, t.role] for t in self.tensors.values()]
        ops = [[op.kind, list(op.inputs), list(op.outputs), op.attrs] for op in self.ops]
        head = {"name": self.name, "input": self.input, "output": self.output}
        head["trainable"] = list(self.trainable)  # type: ignore[assignment]
        lines = [json.dumps(head)[:-1] + ', "tensors": [']
        lines.append(",\n".join("  " + json.dumps(t) for t in tensors))
        lines.append('], "ops": [')
        lines.append(",\n".join("  " + json.dumps(o) for o in ops))
        return "\n".join([*lines, "]}", ""])

    @classmethod
    def from_json(cls, text: str) -> Graph:
        data = json.loads(text)
        tensors = {
            name: Tensor(name=name, shape=tuple(shape), dtype=dtype, role=role)
            for name, shape, dtype, role in data["tensors"]
        }
        ops = tuple(
            Op(kind=k, inputs=tuple(i), outputs=tuple(o), attrs={n: _tuples(v) for n, v in a.items()})
            for k, i, o, a in data["ops"]
        )
        return cls(
            name=data["name"],
            tensors=tensors,
            ops=ops,
            input=data["input"],
            output=data["output"],
            trainable=tuple(data["trainable"]),
        )


def _tuples(value: Attr) -> Attr:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def drop_idle_casts(graph: Graph) -> Graph:
    """The same graph without casts to the dtype that a tensor already has."""
    alias: dict[str, str] = {}
    ops = []
    for op in graph.ops:
        op = replace(op, inputs=tuple(alias.get(n, n) for n in op.inputs))
        if op.kind == "cast" and graph.tensors[op.inputs[0]].dtype == graph.tensors[op.out].dtype:
            alias[op.out] = op.inputs[0]
        else:
            ops.append(op)
    if not alias:
        return graph
    tensors = {n: t for n, t in graph.tensors.items() if n not in alias}
    output = alias.get(graph.output, graph.output)
    return replace(graph, tensors=tensors, ops=tuple(ops), output=output)


def same(left: Graph, right: Graph) -> list[str]:
    """Differences of two graphs as sentences, ignoring their names and the order of independent
    operators; empty when they agree."""
    found = []
    for kind, a, b in (
        ("tensor", left.tensors, right.tensors),
        ("operator", {o.out: o for o in left.ops}, {o.out: o for o in right.ops}),
    ):
        found += [f"{kind} {n} only in {left.name}" for n in a if n not in b]
        found += [f"{kind} {n} only in {right.name}" for n in b if n not in a]
        found += [f"{kind} {n}: {a[n]} is not {b[n]}" for n in a if n in b and a[n] != b[n]]
    if set(left.trainable) != set(right.trainable):
        found.append(f"trainable: {sorted(set(left.trainable) ^ set(right.trainable))} only in one")
    if (left.input, left.output) != (right.input, right.output):
        found.append("input or output differ")
    return found


def dims_of(model: ModelShape) -> dict[str, int]:
    """Names of a backbone's dimensions -> numbers: h hidden, f ffn, q and kv the projections' widths,
    H and K heads, G query heads per K/V head, d head size, half of it, V vocabulary."""
    return {
        "h": model.hidden,
        "f": model.ffn,
        "q": model.q_dim,
        "kv": model.kv_dim,
        "H": model.heads,
        "K": model.kv_heads,
        "d": model.head_dim,
        "half": model.head_dim // 2,
        "V": model.vocab,
    }
