"""What arrives: a request and the latency bounds it is judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency bounds of one class of requests; `inf` is no bound.

    TTFT counts from arrival, queueing included. TPOT is the mean gap after the first token.
    """

    name: str = "default"
    ttft_s: float = math.inf
    tpot_s: float = math.inf
    e2e_s: float = math.inf

    def __post_init__(self) -> None:
        for key in ("ttft_s", "tpot_s", "e2e_s"):
            bound = getattr(self, key)
            if not bound > 0:
                raise ValueError(f"slo.classes.{self.name}.{key} must be above 0 seconds, got {bound}")

    @property
    def first_token_s(self) -> float:
        """Bound on the first token: it must come before the last."""
        return min(self.ttft_s, self.e2e_s)


class Request(NamedTuple):
    """One arrival.

    A NamedTuple, not a dataclass: hundreds of thousands are made in a run, and it is three times
    cheaper to make. `output_tokens` is for the loop alone; policies see a `Sequence`, without it.
    """

    id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    slo: str = "default"
    adapter: str | None = None
