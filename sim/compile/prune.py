"""Graph pruning: which forward tensors the backward still needs once frozen weights get no gradient.

Two sweeps over the graph. Forward: a tensor *depends* if it comes from a trainable parameter (or from
a layer input that wants a gradient). Backward: a tensor *matters* if the output comes from it. Gradient
operators exist where both hold; every other one only yields gradients of frozen weights and is deleted,
and with it each activation that only it reads. No layer is known by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from sim.compile.ir import Graph
from sim.compile.rules import RULES, storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One activation and the gradient operators that read it; none means that it may be dropped."""

    name: str
    bytes_per_token: int
    readers: tuple[str, ...]
    """`gradient of INPUT through OUTPUT`, in graph order."""

    @property
    def kept(self) -> bool:
        return bool(self.readers)

    @property
    def why(self) -> str:
        if self.readers:
            more = f" and {len(self.readers) - 1} more" if len(self.readers) > 1 else ""
            return f"read by {self.readers[0]}{more}"
        return "read by no gradient operator that is left"


def wanted(graph: Graph, input_grad: bool = True) -> set[str]:
    """Tensors whose gradient must be computed: on a path from something trainable to the output.

    `input_grad` says that a layer below trains too, so that the gradient has to leave through the
    graph's input.
    """
    depends = set(graph.trainable) | ({graph.input} if input_grad else set())
    for op in graph.ops:
        if not depends.isdisjoint(op.inputs):
            depends.add(op.out)
    matters = {graph.output}
    for op in reversed(graph.ops):
        if op.out in matters:
            matters.update(op.inputs)
    return depends & matters


def prune(graph: Graph, input_grad: bool = True) -> dict[str, Need]:
    """Owner of memory -> its Need, for every activation of a bound graph, in order of computation.

    Views count as their owner, so that no memory is counted twice.
    """
    grads, owner = wanted(graph, input_grad), storage(graph)
    readers = _owners(graph, owner)
    for op in graph.ops:
        if op.out not in grads:
            continue
        for i, source in enumerate(op.inputs):
            if source in grads:
                for name in RULES[op.kind].needs(op, i):
                    if owner[name] in readers:
                        readers[owner[name]].append(f"gradient of {source} through {op.out}")
    return _needs(graph, readers)


def autograd(graph: Graph, input_grad: bool = True) -> dict[str, Need]:
    """The same for what eager PyTorch saves: it decides per operator while going forward, before it can
    know what matters, and fused attention saves everything as soon as one operand wants a gradient."""
    depends = set(graph.trainable) | ({graph.input} if input_grad else set())
    owner = storage(graph)
    readers = _owners(graph, owner)
    for op in graph.ops:
        if depends.isdisjoint(op.inputs):
            continue
        depends.add(op.out)
        rule = RULES[op.kind]
        for i, source in enumerate(op.inputs):
            if source in depends or rule.saves_all:
                for name in rule.needs(op, i):
                    if owner[name] in readers:
                        readers[owner[name]].append(f"gradient of {source} through {op.out}")
    return _needs(graph, readers)


def unpruned(graph: Graph) -> dict[str, int]:
    """Owner of memory -> bytes per token of every activation: a graph that frees nothing."""
    owner = storage(graph)
    return {name: graph.tensors[name].bytes_per_token for name in _owners(graph, owner)}


def kept_bytes(needs: dict[str, Need]) -> int:
    """Bytes per token of what is kept."""
    return sum(n.bytes_per_token for n in needs.values() if n.kept)


def _owners(graph: Graph, owner: dict[str, str]) -> dict[str, list[str]]:
    """An empty list for each activation that owns memory (rotary tables are shared by all layers)."""
    return {t.name: [] for t in graph.activations() if owner[t.name] == t.name}


def _needs(graph: Graph, readers: dict[str, list[str]]) -> dict[str, Need]:
    return {
        name: Need(
            name=name,
            bytes_per_token=graph.tensors[name].bytes_per_token,
            readers=tuple(dict.fromkeys(found)),
        )
        for name, found in readers.items()
    }
