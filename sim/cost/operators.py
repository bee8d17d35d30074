"""Seconds of an iteration from a card's operator profile: kernel times of one layer, measured one by one.

A pass costs the sum of its operators: embedding and last norm once, what a layer holds once (its two norms
twice) per layer, attention per layer, and the head for every sequence in the batch. Between two measured
counts a product takes as long as at the higher one, since it computes whole tiles of rows. The non-obvious
idea is attention with several prompts in one kernel, which most profiles know for one prompt only: its time follows
the query-key pairs, so the prompts count as one chunk of all their tokens whose context gives the same
number of pairs. That context is negative for many short prompts; then the pairs that they lack are taken
off what a fresh chunk costs, unless the profile's grid has such chunks (`by_key`).

Columns and meaning of the files are those of LLMServingSim's profiler (MIT): `dense.csv` by tokens of the
batch, `per_sequence.csv` by sequences, `attention.csv` by one prefill chunk and its context beside equal
decodes, `skew_fit.csv` how far unequal decodes are from equal ones. Times there are microseconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sim.core.work import Chunk, Work
from sim.cost.grid import AttentionGrid
from sim.cost.skew import Skew

ONCE = ("embedding", "final_layernorm")
"""Operators by tokens that run once in a pass."""

PER_LAYER = {
    "layernorm": 2,  # before attention and before the MLP
    "qkv_proj": 1,
    "qk_norm": 1,
    "rotary_emb": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
}
"""Operators by tokens -> how often a layer runs them."""

OPTIONAL = ("qk_norm", "rotary_emb")
"""The first is not every model's; the second early profilers missed in models before Llama 3."""

PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
TILE_ROWS = 16
"""Tiles of a matrix product are a multiple of so many rows high, the height of a tensor core's operand. Times
rise in steps accordingly: on an RTX 4090 by 7 % from 1,536 to 1,552 tokens and by 0.1 % to the next 16."""

HEAD = ("lm_head", "sampler")
"""Operators by sequences, once in a pass."""


class Curve(NamedTuple):
    """Measured seconds at rising counts, linear between them and, by the last slope, beyond."""

    counts: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, count: float) -> float:
        return _linear(self.counts, self.seconds, count)

    def at_tile(self, count: int) -> float:
        """The same in steps: the next measured count holds `count` in its last tile, if it is that near."""
        index = bisect_left(self.counts, count)
        if index < len(self.counts) and self.counts[index] - count < TILE_ROWS:
            return self.seconds[index]
        return self.at(count)


class Spread(NamedTuple):
    """Contexts of the decodes of one iteration, in tokens."""

    shortest: int
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorProfile:
    """One card's and one model's operators, as measured."""

    dense: Mapping[str, Curve]
    """Operator -> seconds by tokens of the batch."""
    per_sequence: Mapping[str, Curve]
    """Operator -> seconds by sequences of the batch."""
    attention: AttentionGrid
    """One layer's attention, with equally long decodes."""
    skew: Skew
    """What unequally long decodes add."""

    def __post_init__(self) -> None:
        known = (*ONCE, *PER_LAYER)
        for name in self.dense:
            if name not in known:
                raise ValueError(f"dense operator {name!r} is unknown; known: {', '.join(known)}")
        missing = [name for name in known if name not in self.dense and name not in OPTIONAL]
        missing += [name for name in HEAD if name not in self.per_sequence]
        if missing:
            raise ValueError(f"the profile has no operator {missing[0]!r}")


class OperatorCost:
    """A `CostModel` of inference passes. Finetuning has no profile here and is refused."""

    def __init__(
        self,
        profile: OperatorProfile,
        *,
        layers: int,
        max_tokens: int,
        decode_sizes: Sequence[int] = (),
        mixed_sizes: Sequence[int] = (),
        collective_s: Callable[[int], float] | None = None,
    ) -> None:
        """`decode_sizes`, `mixed_sizes`: batch sizes that have a CUDA graph, for batches of decodes alone and
        for others; a smaller batch is padded to the next of them, a larger one is not. `collective_s`: of one
        layer by tokens, where devices share it."""
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self._profile = profile
        self._layers = layers
        pass_s = [self._dense_s(n) for n in range(max_tokens + 1)]
        if collective_s is not None:
            pass_s = [s + layers * collective_s(n) for n, s in enumerate(pass_s)]
        self._decode_s = [pass_s[n] for n in padded_sizes(decode_sizes, max_tokens)]
        self._mixed_s = [pass_s[n] for n in padded_sizes(mixed_sizes, max_tokens)]

    def iteration_s(self, work: Work, spread: Spread | None = None) -> float:
        """Seconds of the GPU; host time is the driver's. Without `spread` all decodes are equally long."""
        return sum(self.parts(work, spread).values())

    def parts(self, work: Work, spread: Spread | None = None) -> dict[str, float]:
        """GEMMs, element-wise and collectives ("dense"), attention, and the head."""
        if work.forward or work.backward or work.recompute or work.optimizer_params:
            raise ValueError("an operator profile knows inference only, got finetuning work")
        work = _single_tokens_decode(work)
        tokens = work.decode_count + work.prefill_tokens
        if tokens == 0:
            return {"dense": 0.0, "attention": 0.0, "head": 0.0}
        # Every scheduled sequence gets logits, also one whose prompt is not done: its token is dropped.
        rows = work.decode_count + len(work.prefill)
        return {
            "dense": (self._mixed_s if work.prefill else self._decode_s)[tokens],
            "attention": self._layers * self._attention_s(work, spread),
            "head": sum(self._profile.per_sequence[name].at(rows) for name in HEAD),
        }

    def _dense_s(self, tokens: int) -> float:
        dense = self._profile.dense
        once = sum(dense[name].at(tokens) for name in ONCE)
        layer = 0.0
        for name, times in PER_LAYER.items():
            if name in dense:
                curve = dense[name]
                layer += times * (curve.at_tile(tokens) if name in PRODUCTS else curve.at(tokens))
        return once + self._layers * layer

    def _attention_s(self, work: Work, spread: Spread | None) -> float:
        decodes = work.decode_count
        if not decodes:
            return self._kernel_s(work.prefill, 0, 0.0)
        mean = work.decode_context_tokens / decodes
        mean_s = self._kernel_s(work.prefill, decodes, mean)
        if spread is None or spread.longest == spread.shortest:
            return mean_s
        share = (mean - spread.shortest) / (spread.longest - spread.shortest)
        tokens, before = as_one_chunk(work.prefill) if work.prefill else (0, 0.0)
        alpha = self._profile.skew.at(tokens, decodes, share, spread.longest, before)
        longest_s = self._kernel_s(work.prefill, decodes, spread.longest)
        return mean_s + alpha * (longest_s - mean_s)

    def _kernel_s(self, chunks: Sequence[Chunk], decodes: int, context: float) -> float:
        """One layer's attention over `chunks` and `decodes` sequences of `context` tokens each."""
        grid = self._profile.attention
        if not chunks:
            return grid.at(0, 0, decodes, context)
        tokens, before = as_one_chunk(chunks)
        if grid.by_key:
            return grid.at(tokens, before + tokens / 2, decodes, context)
        if before >= 0:
            return grid.at(tokens, before, decodes, context)
        # As many pairs fewer than a fresh chunk has as a chunk with context -before has more.
        fresh_s = grid.at(tokens, 0, decodes, context)
        fewer_s = fresh_s - (grid.at(tokens, -before, decodes, context) - fresh_s)
        longest = max(chunks, key=lambda c: c.attention_pairs)
        return max(fewer_s, grid.at(longest.tokens, longest.context, decodes, context))


def _single_tokens_decode(work: Work) -> Work:
    """A chunk of one token is a decode: the engine tells them apart by their queries alone."""
    single = [chunk for chunk in work.prefill if chunk.tokens == 1]
    if not single:
        return work
    return work._replace(
        prefill=tuple(chunk for chunk in work.prefill if chunk.tokens > 1),
        decode_count=work.decode_count + len(single),
        decode_context_tokens=work.decode_context_tokens + sum(chunk.context for chunk in single),
    )


def as_one_chunk(chunks: Sequence[Chunk]) -> tuple[int, float]:
    """(tokens, context) of the one chunk with the tokens and the query-key pairs of all `chunks`.

    The context is negative for many short prompts: they have fewer pairs than one prompt of all their tokens.
    """
    tokens = sum(c.tokens for c in chunks)
    pairs = sum(c.attention_pairs for c in chunks)
    return tokens, pairs / tokens - (tokens + 1) / 2


def padded_sizes(graph_sizes: Sequence[int], max_tokens: int) -> list[int]:
    """Batch size -> size that is computed, for 0..max_tokens."""
    sizes = sorted(size for size in set(graph_sizes) if size <= max_tokens)
    padded = []
    for n in range(max_tokens + 1):
        index = bisect_left(sizes, n)
        padded.append(sizes[index] if n and index < len(sizes) else n)
    return padded


def _linear(counts: Sequence[int], seconds: Sequence[float], count: float) -> float:
    if len(counts) == 1:
        return seconds[0]
    high = min(max(bisect_left(counts, count), 1), len(counts) - 1)
    low = high - 1
    share = (count - counts[low]) / (counts[high] - counts[low])
    return seconds[low] + share * (seconds[high] - seconds[low])
