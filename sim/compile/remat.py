"""Rematerialisation: which needed tensors to keep and which to make again, exactly.

The layer's operators are walked once in order. For each the choice is: make its outputs again in the
backward (if everything it reads will be there), keep some of them, or neither. What later choices can
see of earlier ones is only which tensors *still to be read* will be there, a handful in a layer, so a
table from that set to the undominated pairs (kept bytes, extra FLOPs) is carried along: dynamic
programming over the graph's frontier. Its end is the whole Pareto list.

Bytes and FLOPs are per token and layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from sim.compile.ir import ACTIVATION, Graph, Op
from sim.compile.rules import RULES, VIEW, forward_flops, storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One undominated choice."""

    kept_bytes: int
    extra_flops: float
    kept: tuple[str, ...]
    recomputed: tuple[str, ...]
    """Outputs of the operators that run again; several may belong to one operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operator between owners of memory: views are followed through, parameters left out."""

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    flops: float
    source: bool = False
    """The layer's input: nothing in the layer can make it again."""


def nodes_of(graph: Graph, context_tokens: float) -> list[Node]:
    """The bound graph as nodes between owners of memory, the layer's input first."""
    owner = storage(graph)
    nodes = [Node(outputs=(graph.input,), inputs=(), flops=math.inf, source=True)]
    for op in graph.ops:
        if RULES[op.kind].cost == VIEW or not _activation(graph, op.out):
            continue
        inputs = dict.fromkeys(owner[n] for n in op.inputs)
        nodes.append(
            Node(
                outputs=op.outputs,
                inputs=tuple(n for n in inputs if _activation(graph, n)),
                flops=forward_flops(graph, op, context_tokens),
            )
        )
    return nodes


def pareto(
    graph: Graph,
    needed: Collection[str],
    context_tokens: float,
    *,
    pinned: Collection[str] = (),
    may_keep: Collection[str] | None = None,
    may_recompute: Callable[[Op], bool] | None = None,
) -> list[Point]:
    """All undominated (kept bytes, extra FLOPs), most bytes first.

    `needed` are the owners that the backward reads (`prune`); `pinned` are kept in any case (K and V of
    the sample, which later windows read); of the rest only those in `may_keep` are ever kept (None: any);
    operators for which `may_recompute` is false never run again.
    """
    producer = graph.producer
    nodes = nodes_of(graph, context_tokens)
    allowed = [
        not n.source and (may_recompute is None or may_recompute(producer[n.outputs[0]])) for n in nodes
    ]
    useful = _useful(nodes, set(needed) | set(pinned))
    last_reader = {name: i for i, n in enumerate(nodes) for name in n.inputs if useful[i]}
    size = {name: graph.tensors[name].bytes_per_token for n in nodes for name in n.outputs}
    table: dict[frozenset[str], list[_Entry]] = {frozenset(): [(0, 0.0, None)]}
    for i, node in enumerate(nodes):
        if not useful[i]:
            continue
        grown: dict[frozenset[str], list[_Entry]] = {}
        for live, entries in table.items():
            for there, kept_bytes, flops, choice in _choices(
                node, live, needed, pinned, may_keep, allowed[i], size
            ):
                state = frozenset(n for n in live | there if last_reader.get(n, -1) > i)
                moved = [(b + kept_bytes, f + flops, (choice, trail)) for b, f, trail in entries]
                grown.setdefault(state, []).extend(moved)
        table = {state: _undominated(entries) for state, entries in grown.items()}
    ends = _undominated([e for entries in table.values() for e in entries])
    return [_point(e, graph) for e in ends]


_Choice = tuple[tuple[str, ...], tuple[str, ...]]
"""(kept, recomputed) outputs of one node."""
_Trail = tuple[_Choice, "_Trail"] | None
_Entry = tuple[int, float, _Trail]


def _useful(nodes: list[Node], needed: set[str]) -> list[bool]:
    """Whether a node makes something needed, or something that could serve to make that again."""
    wanted, useful = set(needed), [False] * len(nodes)
    for i in range(len(nodes) - 1, -1, -1):
        if not wanted.isdisjoint(nodes[i].outputs):
            useful[i] = True
            wanted.update(nodes[i].inputs)
    return useful


def _choices(
    node: Node,
    live: frozenset[str],
    needed: Collection[str],
    pinned: Collection[str],
    may_keep: Collection[str] | None,
    allowed: bool,
    size: dict[str, int],
) -> list[tuple[frozenset[str], int, float, _Choice]]:
    """What may become of one node: (outputs that will be there, bytes, FLOPs, choice)."""
    found = []
    must = tuple(n for n in node.outputs if n in pinned)
    if allowed and live.issuperset(node.inputs):
        again = tuple(n for n in node.outputs if n not in must)
        if again:
            found.append((frozenset(node.outputs), sum(size[n] for n in must), node.flops, (must, again)))
    free = [n for n in node.outputs if n not in must and (may_keep is None or n in may_keep)]
    for mask in range(1 << len(free)):
        kept = must + tuple(n for k, n in enumerate(free) if mask >> k & 1)
        if all(n in kept for n in node.outputs if n in needed):
            found.append((frozenset(kept), sum(size[n] for n in kept), 0.0, (kept, ())))
    return found


def _undominated(entries: list[_Entry]) -> list[_Entry]:
    """Most bytes first, fewest FLOPs first; an entry stays if none has less of one and no more of
    the other."""
    entries.sort(key=lambda e: (e[1], e[0]))
    best: list[_Entry] = []
    for entry in entries:
        if not best or entry[0] < best[-1][0]:
            best.append(entry)
    return best


def _point(entry: _Entry, graph: Graph) -> Point:
    kept: list[str] = []
    recomputed: list[str] = []
    trail = entry[2]
    while trail is not None:
        (keeps, makes), trail = trail
        kept += keeps
        recomputed += makes
    order = {t.name: i for i, t in enumerate(graph.activations())}
    return Point(
        kept_bytes=entry[0],
        extra_flops=entry[1],
        kept=tuple(sorted(kept, key=order.__getitem__)),
        recomputed=tuple(sorted(recomputed, key=order.__getitem__)),
    )


def _activation(graph: Graph, name: str) -> bool:
    tensor = graph.tensors[name]
    return tensor.role == ACTIVATION and tensor.elements_per_token > 0
