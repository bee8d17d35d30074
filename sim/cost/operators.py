"""Seconds of an iteration from a card's operator profile: kernel times of one layer, measured one by one.

A pass costs the sum of its operators: embedding and last norm once, what a layer holds once (its two norms
twice) per layer, attention per layer, and the head for every sequence in the batch. The non-obvious idea is
attention with several prompts in one kernel, which the profile knows for one prompt only: its time follows the
query-key pairs, so the prompts count as one chunk of all their tokens whose context gives the same number of
pairs (below context 0 when they are many short ones, along the profile's slope there).

Columns and meaning of the files are those of LLMServingSim's profiler (MIT): `dense.csv` by tokens of the
batch, `per_sequence.csv` by sequences, `attention.csv` by one prefill chunk and its context beside equal
decodes, `skew_fit.csv` how far unequal decodes are from equal ones. Times there are microseconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sim.core.work import Chunk, Work
from sim.cost.grid import AttentionGrid

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

HEAD = ("lm_head", "sampler")
"""Operators by sequences, once in a pass."""


class Curve(NamedTuple):
    """Measured seconds at rising counts, linear between them and, by the last slope, beyond."""

    counts: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, count: float) -> float:
        return _linear(self.counts, self.seconds, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorProfile:
    """One card's and one model's operators, as measured."""

    dense: Mapping[str, Curve]
    """Operator -> seconds by tokens of the batch."""
    per_sequence: Mapping[str, Curve]
    """Operator -> seconds by sequences of the batch."""
    attention: AttentionGrid

    def __post_init__(self) -> None:
        known = (*ONCE, *PER_LAYER)
        for name in self.dense:
            if name not in known:
                raise ValueError(f"dense operator {name!r} is unknown; known: {', '.join(known)}")
        missing = [name for name in known if name not in self.dense and name != "qk_norm"]
        missing += [name for name in HEAD if name not in self.per_sequence]
        if missing:
            raise ValueError(f"the profile has no operator {missing[0]!r}")


class OperatorCost:
    """A `CostModel` of inference passes. Finetuning has no profile here and is refused."""

    def __init__(
        self, profile: OperatorProfile, *, layers: int, graph_sizes: Sequence[int] = (), max_tokens: int = 2048
    ) -> None:
        """`graph_sizes`: batch sizes with a CUDA graph; smaller batches are padded to the next of them."""
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self._profile = profile
        self._layers = layers
        self._padded = padded_sizes(graph_sizes, max_tokens)
        self._pass_s = [self._dense_s(n) for n in range(max_tokens + 1)]

    def iteration_s(self, work: Work) -> float:
        """Seconds of the GPU; host time is the driver's."""
        return sum(self.parts(work).values())

    def parts(self, work: Work) -> dict[str, float]:
        """GEMMs and element-wise ("dense"), attention, and the head."""
        if work.forward or work.backward or work.recompute or work.optimizer_params:
            raise ValueError("an operator profile knows inference only, got finetuning work")
        tokens = work.decode_count + work.prefill_tokens
        if tokens == 0:
            return {"dense": 0.0, "attention": 0.0, "head": 0.0}
        # Every scheduled sequence gets logits, also one whose prompt is not done: its token is dropped.
        rows = work.decode_count + len(work.prefill)
        return {
            "dense": self._pass_s[self._padded[tokens]],
            "attention": self._layers * self._attention_s(work),
            "head": sum(self._profile.per_sequence[name].at(rows) for name in HEAD),
        }

    def _dense_s(self, tokens: int) -> float:
        dense = self._profile.dense
        once = sum(dense[name].at(tokens) for name in ONCE)
        layer = sum(times * dense[name].at(tokens) for name, times in PER_LAYER.items() if name in dense)
        return once + self._layers * layer

    def _attention_s(self, work: Work) -> float:
        grid = self._profile.attention
        decodes = work.decode_count
        context = work.decode_context_tokens / decodes if decodes else 0.0
        if not work.prefill:
            return grid.at(0, 0, decodes, context)
        tokens, before = as_one_chunk(work.prefill)
        return grid.at(tokens, before, decodes, context)


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
