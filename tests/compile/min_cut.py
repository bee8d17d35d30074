"""The convex hull of `sim.compile.remat`'s Pareto list by another road: a project-selection cut per price of a FLOP."""

from __future__ import annotations

import math
from collections.abc import Collection

from sim.compile.ir import Graph
from sim.compile.remat import nodes_of


def min_cut(
    graph: Graph,
    needed: Collection[str],
    context_tokens: float,
    bytes_per_flop: float,
    pinned: Collection[str] = (),
    may_keep: Collection[str] | None = None,
) -> float:
    """The least of kept bytes + `bytes_per_flop` * extra FLOPs, as the value of a minimum cut.

    Every tensor is an edge of its size, every operator an edge of its price; what the backward needs
    hangs on the sink. (Project selection; Chen et al. 2016 and the min-cut partitioner of functorch
    have the case of a price of 0.)
    """
    flow = _Flow()
    for node in nodes_of(graph, context_tokens):
        run = ("run", node.outputs[0])
        flow.edge("source", run, math.inf if node.source else node.flops * bytes_per_flop)
        for name in node.inputs:
            flow.edge(name, run, math.inf)
        for name in node.outputs:
            keepable = may_keep is None or name in may_keep
            flow.edge(run, name, graph.tensors[name].bytes_per_token if keepable else math.inf)
            if name in needed and name not in pinned:
                flow.edge(name, "sink", math.inf)
    fixed = 0
    for name in pinned:
        # A pinned tensor is there for nothing more than its own bytes.
        fixed += graph.tensors[name].bytes_per_token
        flow.free(name)
    return flow.maximum("source", "sink") + fixed


class _Flow:
    """Maximum flow by shortest augmenting paths (Edmonds and Karp 1972); graphs have 100 nodes."""

    def __init__(self) -> None:
        self.room: dict[object, dict[object, float]] = {}

    def edge(self, a: object, b: object, capacity: float) -> None:
        self.room.setdefault(a, {})[b] = self.room.get(a, {}).get(b, 0.0) + capacity
        self.room.setdefault(b, {}).setdefault(a, 0.0)

    def free(self, b: object) -> None:
        """Make b available at no price: nothing may flow into or through it."""
        for a in self.room.get(b, {}):
            self.room[a][b] = 0.0
            self.room[b][a] = 0.0

    def maximum(self, source: object, sink: object) -> float:
        total = 0.0
        while True:
            before: dict[object, object] = {source: source}
            queue = [source]
            for a in queue:
                for b, room in self.room[a].items():
                    if room > 1e-9 and b not in before:
                        before[b] = a
                        queue.append(b)
            if sink not in before:
                return total
            path, b = [], sink
            while b != source:
                path.append((before[b], b))
                b = before[b]
            step = min(self.room[a][b] for a, b in path)
            for a, b in path:
                self.room[a][b] -= step
                self.room[b][a] += step
            total += step
