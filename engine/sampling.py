"""The next token from logits: greedy, or drawn after temperature, top-k and top-p.

Every draw uses one uniform number that depends on the request's seed and the token's index alone, so a
request gives the same text in whatever batch it runs, and again after a preemption. Which way a token is drawn
depends on the request alone, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.packing import upload

MOST_NUMBERS = 1 << 23
"""Logits that are drawn from at a time: double precision and their order take up to 50 bytes for each."""
LOST = -1
"""Instead of a token that was drawn from logits that are not numbers."""
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request's tokens are chosen, and which end it."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """Only the so many most likely tokens; None is all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability, at least one."""
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end the output; empty ignores the end of text."""

    @property
    def limited(self) -> bool:
        """Whether only the likeliest tokens are drawn from, which takes their order."""
        return self.top_k is not None or self.top_p < 1

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or null, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) of token `index` under `seed` (SplitMix64, Steele et al. 2014)."""
    z = (_mix(seed & _MASK) + 0x9E3779B97F4A7C15 * (index + 1)) & _MASK
    return (_mix(z) >> 11) * 2.0**-53


def sample(logits: torch.Tensor, settings: Sequence[Sampling], indices: Sequence[int]) -> torch.Tensor:
    """One token [N] int32 for each row of logits [N, V]; `indices` count the outputs before each."""
    chosen = logits.argmax(1)
    most = max(1, MOST_NUMBERS // logits.shape[1])
    for draw, limited in ((_of_all, False), (_of_likeliest, True)):
        drawn = [n for n, s in enumerate(settings) if s.temperature > 0 and s.limited == limited]
        for first in range(0, len(drawn), most):
            part = drawn[first : first + most]
            every = len(part) == len(settings)
            rows = slice(None) if every else upload(torch.tensor(part), logits.device)
            chosen[rows] = draw(logits[rows], [settings[n] for n in part], [indices[n] for n in part])
    return chosen.to(torch.int32)


def told(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Tokens [N] drawn from logits [N, V], LOST where one of these is NaN or infinite upwards."""
    return torch.where(logits.amax(1) < math.inf, tokens, LOST)


def _of_all(logits: torch.Tensor, settings: Sequence[Sampling], indices: Sequence[int]) -> torch.Tensor:
    """By inversion over the tokens as they are numbered."""
    numbers = [(s.temperature, uniform(s.seed, i)) for s, i in zip(settings, indices, strict=True)]
    temperature, u = _columns(numbers, logits.device)
    total = _shares(logits, temperature).cumsum_(1)
    return (total <= u * total[:, -1:]).sum(1).clamp_(max=logits.shape[1] - 1)


def _of_likeliest(logits: torch.Tensor, settings: Sequence[Sampling], indices: Sequence[int]) -> torch.Tensor:
    """By inversion over the tokens in order of probability, those of equal ones as they are numbered."""
    vocab = logits.shape[1]
    numbers = [
        (s.temperature, s.top_k or vocab, s.top_p, uniform(s.seed, i))
        for s, i in zip(settings, indices, strict=True)
    ]
    temperature, top_k, top_p, u = _columns(numbers, logits.device)
    ordered, token = logits.float().sort(dim=1, descending=True, stable=True)
    p = _shares(ordered, temperature)
    rank = torch.arange(vocab, device=logits.device)
    p = p.masked_fill(rank >= top_k, 0.0)
    p = p / p.sum(1, keepdim=True)
    before = p.cumsum(1) - p
    p = p.masked_fill(before >= top_p, 0.0)
    total = p.cumsum(1)
    # Logits that are not numbers give no token a share: then the first, since an index outside ends CUDA.
    last = ((p > 0).sum(1, keepdim=True) - 1).clamp_(min=0)
    place = torch.minimum((total <= u * total[:, -1:]).sum(1, keepdim=True), last)
    return token.gather(1, place)[:, 0]


def _shares(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Probabilities [N, V]. Logits over the smallest temperatures are infinite; the greatest, made 0, is 0 over any."""
    return ((logits.double() - logits.amax(1, keepdim=True)) / temperature).softmax(1)


def _columns(numbers: Sequence[Sequence[float]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Columns [N, 1] of rows of numbers, on the device."""
    return upload(torch.tensor(numbers, dtype=torch.float64), device)[:, :, None].unbind(1)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
