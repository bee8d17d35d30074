"""`Curves`: everything that an iteration costs, as precomputed lookups.

A cost model is made by filling in curves, from formulas (`roofline`) or from rows (`table`); one class,
`IterationCost`, turns them into seconds. So every model is equally fast and equally invertible.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple


class ChunkCost(NamedTuple):
    """Attention of `n` tokens after `c` cached ones:

    a = n token_s + n (c + (n+1)/2) pair_s, b = (c + n) read_s: fixed_s + max(a, b) + unhidden min(a, b)

    All tiles share the device in a; b is the longest tile, alone. Kernels that split the keys of few
    tiles over the device add the two (unhidden 1), others hide most of the shorter.
    """

    fixed_s: float = 0.0
    token_s: float = 0.0
    pair_s: float = 0.0
    read_s: float = 0.0
    unhidden: float = 0.0

    def seconds(self, tokens: int, context: int) -> float:
        """Written out again where it is called per iteration; the order of operations is the same."""
        compute_s = tokens * self.token_s + self.pair_s * (tokens * (context + (tokens + 1) * 0.5))
        reading_s = self.read_s * (context + tokens)
        if compute_s > reading_s:
            return self.fixed_s + (compute_s + self.unhidden * reading_s)
        return self.fixed_s + (reading_s + self.unhidden * compute_s)

    def times(self, factor: float) -> ChunkCost:
        """`factor` such chunks, or as many seconds more."""
        fixed_s, token_s, pair_s, read_s, unhidden = self
        return ChunkCost(factor * fixed_s, factor * token_s, factor * pair_s, factor * read_s, unhidden)

    def plus(self, other: ChunkCost, share: float) -> ChunkCost:
        """With `share` of `other` after it; exact where both are bound by the same of the two."""
        both = ChunkCost(*(a + share * b for a, b in zip(self, other, strict=True)))
        return both._replace(unhidden=self.unhidden)


class DecodeCost(NamedTuple):
    """Attention of all decodes: fixed_s + count sequence_s + summed context context_s."""

    fixed_s: float = 0.0
    sequence_s: float = 0.0
    context_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Lists are indexed by tokens from 0, have one length and never decrease; entry 0 is 0."""

    token_s: list[float]
    """One forward pass over so many tokens, all layers, without attention, logits and LoRA."""
    collective_s: list[float] | None
    """The part of `token_s` spent in all-reduces; None where it is not known apart."""
    sampled_s: list[float]
    """Logits and sampling of so many inference rows."""
    loss_s: list[float]
    """Loss of so many window tokens, and its gradient with respect to the last hidden state."""
    recompute_s: list[float]
    """A window's forward run again as a pass of its own: with LoRA, without attention and loss."""
    backward_layer_s: list[float]
    """Backward of so many tokens through one layer, without attention."""
    backward_collective_s: list[float] | None
    """The part of `backward_layer_s` spent in all-reduces; None where it is not known apart."""
    backward_start_s: float = 0.0
    """Once per iteration with any backward."""
    prefill: ChunkCost
    forward: ChunkCost
    recompute: ChunkCost
    backward: ChunkCost
    """Per layer; the other three are of all layers."""
    decode: DecodeCost
    lora_fixed_s: float
    """Bypasses of one pass: once when the inference tokens use an adapter, once for the windows."""
    lora_token_s: float
    window_lora_token_s: float | None = None
    """The same of a window's tokens, whose adapter may lie otherwise on the devices; None: as `lora_token_s`."""
    window_collective_s: list[float] | None = None
    """Collectives of the bypasses of so many window tokens, all layers; None: there are none."""
    adapter_s: float
    """Per distinct adapter among the inference tokens."""
    optimizer_param_s: float
    host_s: float
    """Per iteration, on the CPU: planning, building the batch, launching, reading the sampled tokens."""
    overlap_contention: float
    """kappa: two streams of a and b seconds alone take max(a, b) + kappa min(a, b) together."""

    def __post_init__(self) -> None:
        lists = {name: getattr(self, name) for name in LISTS}
        length = len(self.token_s)
        for name, values in lists.items():
            if values is None:
                continue
            if len(values) != length or length < 3:
                raise ValueError(f"curve {name} must have token_s's length, at least 3, got {len(values)}")
            if values[0] != 0 or any(b < a for a, b in pairwise(values)):
                raise ValueError(f"curve {name} must start at 0 and never decrease")
        if not 0 <= self.overlap_contention <= 1:
            raise ValueError(f"overlap_contention must be in [0, 1], got {self.overlap_contention}")

    def with_again(self, layers: int, gemm: float, attention: float) -> Curves:
        """With a backward that runs shares of its layer's forward again: of the matrix products, priced as a
        window's recompute without its all-reduces, and of the attention. Nothing changes with shares of 0."""
        if gemm == attention == 0:
            return self
        nothing_s = [0.0] * len(self.token_s)
        collectives_s = zip(
            self.collective_s or nothing_s, self.window_collective_s or nothing_s, strict=True
        )
        products_s = [
            gemm / layers * max(0.0, s - a - b)
            for s, (a, b) in zip(self.recompute_s, collectives_s, strict=True)
        ]
        seconds = (a + b for a, b in zip(self.backward_layer_s, products_s, strict=True))
        return replace(
            self,
            backward_layer_s=list(accumulate(seconds, max)),
            backward=self.backward.plus(self.recompute, attention / layers),
        )


LISTS = (
    "token_s",
    "collective_s",
    "sampled_s",
    "loss_s",
    "recompute_s",
    "backward_layer_s",
    "backward_collective_s",
    "window_collective_s",
)


def window_lora_s(curves: Curves, tokens: int) -> float:
    """Bypasses of so many window tokens, without their collectives."""
    token_s = curves.lora_token_s if curves.window_lora_token_s is None else curves.window_lora_token_s
    return curves.lora_fixed_s + token_s * tokens if tokens else 0.0


def slope_s(values: list[float], known_tokens: int) -> float:
    """Seconds per token beyond the known range: the mean slope of its upper half."""
    middle = known_tokens // 2
    return (values[known_tokens] - values[middle]) / (known_tokens - middle)


def extended(values: list[float], tokens: int) -> float:
    """`values[tokens]`, continued beyond its end."""
    last = len(values) - 1
    if tokens <= last:
        return values[tokens]
    return values[last] + (tokens - last) * slope_s(values, last)


def extend(values: list[float], known_tokens: int, length: int) -> None:
    """Continue `values` to `length`. Modifies it."""
    last_s, slope = values[known_tokens], slope_s(values, known_tokens)
    values.extend([last_s + (n - known_tokens) * slope for n in range(len(values), length)])
