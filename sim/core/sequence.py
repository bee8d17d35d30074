"""A request inside a pipeline: tokens computed so far, catching up with the tokens known.

Prefill, chunked prefill, decode and recompute after preemption are the same progress. While a
sequence decodes, all of them advance together, so its counts are not updated token by token: they
follow from the decode tick at which it joined.
"""

from __future__ import annotations

from sim.core.request import Slo


class Sequence:
    """Mutable, owned by `PipelineState`. How long the output will be is not in here."""

    __slots__ = (
        "adapter",
        "adapter_version",
        "arrival_s",
        "computed_tokens",
        "decoding",
        "first_token_s",
        "generated_tokens",
        "id",
        "preemptions",
        "prompt_tokens",
        "scheduled_s",
        "segment_first_s",
        "slo",
        "start_tick",
    )

    def __init__(self, id: int, arrival_s: float, prompt_tokens: int, slo: Slo, adapter: str | None) -> None:
        self.id = id
        self.arrival_s = arrival_s
        self.prompt_tokens = prompt_tokens
        self.slo = slo
        self.adapter = adapter
        self.adapter_version = 0
        """Version of the adapter that the sequence started with, and keeps."""
        self.computed_tokens = 0
        """Tokens in the cache; while decoding, as of `start_tick`."""
        self.generated_tokens = 0
        """Output tokens that are known; while decoding, as of `start_tick`."""
        self.start_tick = 0
        """Decode tick after which it joined the decoding sequences."""
        self.decoding = False
        self.preemptions = 0
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.segment_first_s: float | None = None
        """When the token that the last prefill (or recompute) ended with came out."""

    @property
    def known_tokens(self) -> int:
        return self.prompt_tokens + self.generated_tokens

    @property
    def remaining_tokens(self) -> int:
        """Known tokens still to compute before the next one can be sampled."""
        return self.prompt_tokens + self.generated_tokens - self.computed_tokens

    @property
    def first_token_deadline_s(self) -> float:
        return self.arrival_s + self.slo.first_token_s
