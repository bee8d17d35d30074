"""How many of the last requests were late: by this finetuning gives way where bounds are missed, whatever the cause.

What policies predict (the time of an iteration, the pace that a queue needs) keeps most bounds. What they do not,
such as bursts that find no banked time or answers that hold all places for too long, shows here.
"""

from __future__ import annotations

from sim.core.request import Slo

WEIGHT = 0.02
"""Of the newest request of a class in its share."""


class LateRequests:
    """Exponential averages over the requests of each SLO class, of first tokens and of answers."""

    def __init__(self) -> None:
        self._first_tokens: dict[str, float] = {}
        self._answers: dict[str, float] = {}
        self.first_token_share = 0.0
        """Of first tokens that came later than their bound, of the class that has the largest."""
        self.answer_share = 0.0
        """Of answers that ended with a TPOT or an end-to-end time above their bound, likewise."""

    def first_token(self, slo: Slo, arrival_s: float, first_token_s: float) -> None:
        """The first token of a request has come."""
        self._count(self._first_tokens, slo.name, first_token_s - arrival_s > slo.first_token_s)

    def answer(self, slo: Slo, arrival_s: float, first_token_s: float, end_s: float, tokens: int) -> None:
        """An answer of `tokens` tokens has ended by itself."""
        slow = tokens > 1 and end_s - first_token_s > (tokens - 1) * slo.tpot_s
        self._count(self._answers, slo.name, slow or end_s - arrival_s > slo.e2e_s)

    def _count(self, shares: dict[str, float], slo: str, late: bool) -> None:
        share = shares.get(slo, 0.0)
        if late or share > 0:
            shares[slo] = share + WEIGHT * (late - share)
            self.first_token_share = max(self._first_tokens.values(), default=0.0)
            self.answer_share = max(self._answers.values(), default=0.0)
