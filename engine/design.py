"""What to time first: an endless design of iterations, any beginning of which is useful.

Each kind of work (decodes, prefill, windows, backward, mixtures, ...) is a box of a few dimensions: sizes by
their logarithm, contexts from none to the longest. A kind begins with the corners and the middle of its box and
then fills it evenly with the additive recurrence of Roberts ("The unreasonable effectiveness of quasirandom
sequences", 2018), and the kinds take turns. So the first minute covers everything coarsely, and each further
one halves the gaps. There is no seed: the n-th point is the same in every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, product
from typing import NamedTuple

from sim.core.plan import Limits
from sim.core.work import Chunk

GROWTH_TOKENS = 48
"""Room that each decode is left: its context grows by a token in every repeat."""


class Slice(NamedTuple):
    """Backward of `layer_tokens` in a sample of `sample_tokens`, after `done` layer-tokens."""

    sample_tokens: int
    done: int
    layer_tokens: int


class Point(NamedTuple):
    """One iteration to be timed."""

    decodes: int = 0
    context: int = 0
    """Cached tokens of each decode."""
    prefill: tuple[Chunk, ...] = ()
    ends: bool = True
    """Each chunk ends its prompt, and gives a token."""
    adapters: int = 0
    """Distinct adapters among the requests; 0 is the base model alone."""
    job: int = 0
    """Which of the rig's jobs does the finetuning."""
    forward: Chunk | None = None
    """With a backward, its sample's last window."""
    backward: Slice | None = None
    step: bool = False
    overlap: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """How large the work of an engine can be."""

    limits: Limits
    layers: int
    sample_tokens: int
    orders: tuple[str, ...]
    """Of each job, as `JobSpec.order`."""
    window_tokens: int
    """Longest window of a backward that runs its forward again."""
    adapters: int = 0
    """Adapters that requests may name."""
    overlap: bool = False
    """The engine has a second stream for finetuning."""

    @property
    def longest(self) -> int:
        """Cached tokens of a sequence, with room to go on."""
        limits = self.limits
        blocks = limits.kv_tokens // limits.block_tokens
        tokens = min(limits.max_sequence_tokens, blocks * limits.block_tokens)
        return max(1, tokens - GROWTH_TOKENS - 2)

    def context(self, sequences: int, beside_tokens: int = 0) -> int:
        """Longest context that so many sequences can have at once beside a prompt of `beside_tokens`."""
        limits = self.limits
        blocks = limits.kv_tokens // limits.block_tokens - -(-beside_tokens // limits.block_tokens)
        each = blocks // max(1, sequences) * limits.block_tokens
        return min(self.longest, each - GROWTH_TOKENS)


def design(space: Space) -> Iterator[Point]:
    """Points in order, without end; sizes of a small engine may come again."""
    kinds = _kinds(space)
    cubes = {name: _cube(dimensions) for name, (dimensions, _) in kinds.items()}
    for turn in count():
        for name in _ORDER:
            if name not in kinds:
                continue
            point = kinds[name][1](*next(cubes[name]))
            if point is not None:
                # Chunks that do not end their prompt give no token; both kinds are common.
                yield point._replace(ends=turn % 2 == 0) if point.prefill else point


_ORDER = (
    "decode", "prefill", "forward", "backward", "mixture", "part", "decode", "window", "adapters", "mixture",
    "step", "overlap", "prefill", "backward", "mixture", "forward", "overlap",
)  # fmt: skip
"""Turns of one round; an engine without a kind leaves it out."""

Make = Callable[..., Point | None]


def _kinds(space: Space) -> dict[str, tuple[int, Make]]:
    """Kind -> dimensions of its box, and the point at a place in it."""
    make = _Make(space)
    kinds: dict[str, tuple[int, Make]] = {"decode": (2, make.decode), "prefill": (2, make.prefill)}
    if space.adapters:
        kinds["adapters"] = (3, make.with_adapters)
    if space.orders:
        kinds |= {"forward": (2, make.forward), "mixture": (5, make.mixture), "step": (2, make.step)}
        if space.overlap:
            kinds["overlap"] = (5, lambda *u: _overlapping(make.mixture(*u)))
    if "layer_major" in space.orders:
        kinds |= {"backward": (2, make.backward), "part": (2, make.part)}
    if "window_major" in space.orders:
        kinds["window"] = (2, make.window)
    return kinds


def _overlapping(point: Point | None) -> Point | None:
    return None if point is None else point._replace(overlap=True)


@dataclass(frozen=True, slots=True)
class _Make:
    """Points from places in the unit cube."""

    space: Space

    def decode(self, u: float, v: float) -> Point | None:
        """Many sequences and long ones do not fit together: the context is of what fits."""
        count = _size(u, self.space.limits.max_sequences)
        longest = self.space.context(count)
        return None if longest < 1 else Point(decodes=count, context=_size(v, longest))

    def prefill(self, u: float, v: float) -> Point:
        tokens = _size(u, min(self.space.limits.max_tokens, self.space.longest))
        return Point(prefill=(Chunk(tokens, _context(v, self.space.longest - tokens)),))

    def with_adapters(self, u: float, v: float, w: float) -> Point | None:
        point = self.decode(u, v)
        if point is None:
            return None
        return point._replace(adapters=min(point.decodes, _size(w, self.space.adapters)))

    def forward(self, u: float, v: float) -> Point:
        tokens = _size(u, self.space.sample_tokens)
        return Point(forward=Chunk(tokens, round(v * (self.space.sample_tokens - tokens))))

    def backward(self, u: float, v: float) -> Point:
        """Whole layers of a sample."""
        tokens, layers = _size(u, self.space.sample_tokens), _size(v, self.space.layers)
        return Point(job=self._job("layer_major"), backward=Slice(tokens, 0, layers * tokens))

    def part(self, u: float, v: float) -> Point:
        """Part of one layer."""
        most = self.space.sample_tokens
        tokens = _size(u, most)
        return Point(job=self._job("layer_major"), backward=Slice(most, round(v * (most - tokens)), tokens))

    def window(self, u: float, v: float) -> Point:
        """A window through all layers."""
        most, layers = self.space.sample_tokens, self.space.layers
        tokens = _size(u, self.space.window_tokens)
        done = round(v * (most - tokens)) * layers
        return Point(job=self._job("window_major"), backward=Slice(most, done, tokens * layers))

    def step(self, u: float, v: float) -> Point:
        """An optimizer step, alone or beside decodes."""
        beside = self.decode(u, v) if u > 0 else Point()
        return (beside or Point())._replace(step=True)

    def mixture(self, u: float, v: float, w: float, x: float, y: float) -> Point | None:
        """Decodes, often a chunk of a prompt, and finetuning of any kind."""
        limits = self.space.limits
        sequences = _size(u, max(1, limits.max_sequences - 2))
        # A third of the mixtures has no prefill, and none has where one sequence runs at a time.
        room = min(limits.max_tokens - sequences, self.space.longest // 2)
        room = room if sequences < limits.max_sequences else 0
        tokens = _size(3 * w / 2 - 0.5, room) if w > 1 / 3 and room > 0 else 0
        longest = self.space.context(sequences, tokens + limits.block_tokens)
        if longest < 1:
            return None
        tuned = self._finetuning(x, y)
        return tuned._replace(
            decodes=sequences,
            context=_size(v, longest),
            prefill=(Chunk(tokens, 0),) if tokens else (),
        )

    def _finetuning(self, x: float, y: float) -> Point:
        """By thirds: a window, a backward, a sample's last window and the beginning of its backward."""
        if x < 1 / 3:
            return self.forward(y, 3 * x)
        if x < 2 / 3:
            kinds = [self.backward if order == "layer_major" else self.window for order in self.space.orders]
            return kinds[round(97 * y) % len(kinds)](y, 3 * x - 1)
        tokens = _size(y, self.space.sample_tokens)
        unit = self.space.layers if self.space.orders[0] == "window_major" else 1
        return Point(
            forward=Chunk(tokens, 0), backward=Slice(tokens, 0, unit * _size(min(1.0, 3 * x - 2), tokens))
        )

    def _job(self, order: str) -> int:
        return self.space.orders.index(order)


def _size(u: float, most: int) -> int:
    """1..most, even in the logarithm."""
    return max(1, min(most, round(math.pow(most, min(1.0, max(0.0, u))))))


def _context(v: float, most: int) -> int:
    """None for the first quarter, then by the logarithm from 8."""
    if v < 0.25 or most < 8:
        return 0
    return round(8 * math.pow(most / 8, (v - 0.25) / 0.75))


def _cube(dimensions: int) -> Iterator[Sequence[float]]:
    """Corners (where they are few) and the middle, then the recurrence."""
    corners = product((1.0, 0.0), repeat=dimensions) if dimensions <= 2 else ((1.0,) * dimensions,)
    yield from corners
    root = 2.0
    for _ in range(40):
        root = (1 + root) ** (1 / (dimensions + 1))
    steps = [root ** -(axis + 1) for axis in range(dimensions)]
    for n in count():
        yield [(0.5 + n * step) % 1.0 for step in steps]
