"""`Sampled`: a table fitted to a few noisy iterations of another model.

It stands for what a deployment has: a short profile of its own engine. Its errors are those of the
smaller model and of the noise in the profile, so a policy that believes it is never exactly right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sim.core.rows import WORK_COLUMNS, work_row
from sim.core.specs import ModelShape
from sim.core.work import Chunk, LayerChunk, Work
from sim.cost.context import CostBuilder, CostContext
from sim.cost.fitted import FittedCost
from sim.cost.noisy import Noisy
from sim.cost.table import Table

LEAST_ROWS, MOST_ROWS = 100, 100_000
"""The most are timed and fitted in a few seconds; the fit gains nothing from more."""
WINDOW_MAJOR = 1 / 4
"""Share of the backward slices that are windows. Only they have few tokens in many layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Builder: times `rows` designed works by `of`, with noise, and fits a table to them."""

    of: CostBuilder
    rows: int = 600
    spread: float = 0.03
    """Of the noise in the profile; see `Noisy`."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread must be in [0, 1), got {self.spread}")
        if not LEAST_ROWS <= self.rows <= MOST_ROWS:
            raise ValueError(
                f"rows must be at least {LEAST_ROWS} to fit all terms and at most {MOST_ROWS:,}, got {self.rows}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    def build(self, context: CostContext) -> FittedCost:
        noisy = Noisy(of=self.of, spread=self.spread, seed=self.seed + 1)
        profiled = noisy.build(replace(context, lookahead=0))
        works = designed_works(context.model, context.lora.params(context.model), self.rows, self.seed)
        seconds = np.array([profiled.iteration_s(work) for work in works])
        flat = np.array([work_row(work) for work in works], dtype=np.float64)
        columns = {name: flat[:, i] for i, name in enumerate(WORK_COLUMNS)}
        return Table.fit(columns, seconds).model(context.lookahead)


def designed_works(model: ModelShape, params: int, rows: int, seed: int) -> list[Work]:
    """`rows` works over the range of an engine: decodes alone and with prefill, finetuning windows,
    backward slices, recomputed windows and optimizer steps, each alone and mixed, log-uniform in size.

    Every tenth runs its finetuning on a second stream.
    """
    draw = _Draw(np.random.default_rng((seed, rows)))
    longest = 8192
    works = []
    for i in range(rows):
        kinds = _KINDS[i % len(_KINDS)]
        decodes = draw.size(256) if "d" in kinds else 0
        context = sum(draw.size(4096) for _ in range(min(decodes, 4))) * decodes // max(1, min(decodes, 4))
        prefill = tuple(Chunk(draw.size(2048), draw.context(4096)) for _ in range(draw.few("p" in kinds)))
        sampled = decodes + draw.up_to(len(prefill))
        forward = (Chunk(draw.size(2048), draw.context(longest)),) if "f" in kinds else ()
        backward = draw.backward(model.layers, longest) if "b" in kinds else ()
        recompute: tuple[Chunk, ...] = ()
        if "r" in kinds:
            window = draw.window(longest)
            backward, recompute = (LayerChunk(model.layers, *window),), (window,)
        works.append(
            Work(
                prefill=prefill,
                decode_count=decodes,
                decode_context_tokens=context,
                sampled_tokens=sampled,
                forward=forward,
                backward=backward,
                recompute=recompute,
                optimizer_params=params if "o" in kinds else 0,
                adapters=draw.up_to(min(8, decodes)) if i % 2 else 0,
                overlap=i % 10 == 9 and bool(forward or backward),
            )
        )
    return works


_KINDS = ("d", "dp", "df", "db", "p", "d", "dpf", "b", "f", "dr", "dp", "df", "db", "d", "o", "do", "dpb")


class _Draw:
    """Sizes for a design."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random

    def size(self, most: int) -> int:
        """Log-uniform in 1..most."""
        return min(most, int((most + 1) ** self._random.random()))

    def context(self, most: int) -> int:
        """0 half of the time, else log-uniform."""
        return 0 if self._random.random() < 0.5 else self.size(most)

    def up_to(self, most: int) -> int:
        return int(self._random.integers(0, most + 1))

    def few(self, wanted: bool) -> int:
        return int(self._random.integers(1, 4)) if wanted else 0

    def window(self, longest: int) -> Chunk:
        """Anywhere in a long sample: few tokens after thousands are as likely as many."""
        tokens = self.size(2048)
        return Chunk(tokens, self.up_to(longest - tokens))

    def backward(self, layers: int, longest: int) -> tuple[LayerChunk, ...]:
        """As a slice of a sample falls, of either order: a window through all layers; or the rest of one layer,
        whole layers, part of the next."""
        if self._random.random() < WINDOW_MAJOR:
            return (LayerChunk(layers, *self.window(longest)),)
        length = max(256, self.size(longest))
        first, last = self.up_to(length - 1), self.up_to(length - 1)
        whole = self.size(layers) if self._random.random() < 0.7 else 0
        pieces = ((1, first, 0), (whole, length, 0), (1, last, length - last))
        return tuple(LayerChunk(*piece) for piece in pieces if piece[0] and piece[1])
