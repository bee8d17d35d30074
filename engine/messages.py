"""What the HTTP process and the engine's process of `coserve serve` tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

LOST = -1
"""Instead of a token: the model's logits are not numbers."""


class Ask(NamedTuple):
    """To the engine: a request. Sampling as `engine.sampling.Sampling` has it."""

    id: int
    tokens: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    seed: int
    stop_tokens: frozenset[int]
    adapter: str | None


class Gone(NamedTuple):
    """To the engine: nobody wants the rest of a request."""

    id: int


class Enough(NamedTuple):
    """To the engine: a request's answer is whole without the rest."""

    id: int


class Ready(NamedTuple):
    """To the engine, first: what is served can be told."""


class Failed(NamedTuple):
    """To the engine instead of `Ready`: there is no serving this model."""

    line: str
    """What is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """From the engine, first: what is served. Clients can come."""

    name: str
    """Of the base model."""
    adapters: tuple[str, ...]
    vocab: int
    longest_tokens: int
    """Of prompt and answer together."""
    max_requests: int
    """At once; more are turned away."""


class Tokens(NamedTuple):
    """From the engine after an iteration: a token of a request, LOST, or None when it is done with it."""

    tokens: list[tuple[int, int | None]]


class Metrics(NamedTuple):
    """From the engine now and then: what Prometheus is told."""

    text: str


class Stop(NamedTuple):
    """From the engine: take no more requests, and hang up when those under way are answered."""

    drain_s: float
    """What is not answered after it is given up."""
