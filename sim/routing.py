"""Routers: which pipeline a request goes to. They see the load of each, not how long an answer will be."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol
from zlib import crc32

import numpy as np

from sim.core.cost import CostModel
from sim.core.request import Slo
from sim.core.state import PipelineState
from sim.core.work import Chunk, Work


class Incoming(NamedTuple):
    """A request as a router sees it."""

    prompt_tokens: int
    slo: Slo
    adapter: str | None


class Load:
    """A pipeline as a router sees it: its state and what was routed to it since it last planned."""

    def __init__(self, state: PipelineState, predictor: CostModel) -> None:
        self.state = state
        self.predictor = predictor
        self.inbox_requests = 0
        self.inbox_tokens = 0

    @property
    def requests(self) -> int:
        return self.state.unfinished + self.inbox_requests

    @property
    def tokens(self) -> int:
        """Known tokens of all its unfinished requests."""
        return self.state.outstanding_tokens + self.inbox_tokens


class Router(Protocol):
    def choose(self, request: Incoming, pipelines: Seq[Load]) -> int:
        """Index into `pipelines`, the serving ones."""
        ...


class RoundRobin:
    """Each in turn, whatever the load."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Incoming, pipelines: Seq[Load]) -> int:
        index = self._next % len(pipelines)
        self._next = index + 1
        return index


class LeastTokens:
    """Fewest outstanding tokens; the lowest index on a tie."""

    def choose(self, request: Incoming, pipelines: Seq[Load]) -> int:
        return min(range(len(pipelines)), key=lambda i: pipelines[i].tokens)


class PowerOfTwo:
    """The less loaded of two pipelines drawn at random (Mitzenmacher 2001)."""

    def __init__(self, *, seed: int = 0) -> None:
        self._random = np.random.default_rng([seed, crc32(b"router")])

    def choose(self, request: Incoming, pipelines: Seq[Load]) -> int:
        if len(pipelines) == 1:
            return 0
        first: int
        second: int
        first, second = self._random.choice(len(pipelines), size=2, replace=False).tolist()
        return first if pipelines[first].tokens <= pipelines[second].tokens else second


class AdapterAffinity:
    """Requests of one adapter meet on one pipeline, unless it is overloaded.

    Rendezvous hashing with bounded load: the pipelines are ranked by a hash of the adapter and the index, and
    the first whose requests stay within `max_imbalance` times the mean is taken. Requests without an adapter
    go to the fewest outstanding tokens.
    """

    def __init__(self, *, max_imbalance: float = 1.25) -> None:
        if not max_imbalance >= 1:
            raise ValueError(f"cluster.router.max_imbalance must be at least 1, got {max_imbalance}")
        self._max_imbalance = max_imbalance
        self._fallback = LeastTokens()

    def choose(self, request: Incoming, pipelines: Seq[Load]) -> int:
        adapter = request.adapter
        if adapter is None:
            return self._fallback.choose(request, pipelines)
        count = len(pipelines)
        mean = (sum(p.requests for p in pipelines) + 1) / count
        ranked = sorted(range(count), key=lambda i: crc32(f"{adapter}/{i}".encode()))
        bound = math.ceil(self._max_imbalance * mean)
        return next(i for i in ranked if pipelines[i].requests < bound)


class SloAware:
    """The earliest predicted first token among the pipelines whose predicted TPOT keeps the bound.

    The prediction is each pipeline's own predictor asked for an iteration with all its requests decoding
    and one full prefill chunk, times the chunks that its backlog needs. So unequal pipelines get unequal
    shares. When no pipeline keeps the bound, the earliest first token decides alone.
    """

    def choose(self, request: Incoming, pipelines: Seq[Load]) -> int:
        scores = [_predict(request, load) for load in pipelines]
        return min(range(len(pipelines)), key=lambda i: (scores[i][1] > request.slo.tpot_s, scores[i][0], i))


class Consolidate:
    """The fewest pipelines that keep the SLO: the first in order whose predicted latencies stay well within
    the bounds.

    Decoding few sequences reads the weights as often as decoding many, so requests spread thinly cost
    every pipeline's finetuning; packed, they leave the other pipelines to finetune undisturbed. Like the best
    static split, but following the load. `headroom` is the share of each bound that may be used up. When
    no pipeline has that much, the earliest predicted first token decides.

    The time of a token is that of the steady state with the new request: every sequence that ends makes room
    for the prompt of another, so each decode brings along prompt / output tokens of prefill, the ratio of the
    requests that have ended so far.
    """

    def __init__(self, *, headroom: float = 0.7) -> None:
        if not 0 < headroom <= 1:
            raise ValueError(f"cluster.router.headroom must be in (0, 1], got {headroom}")
        self._headroom = headroom

    def choose(self, request: Incoming, pipelines: Seq[Load]) -> int:
        outputs = sum([load.state.ended_output_tokens for load in pipelines])
        prompts = sum([load.state.ended_prompt_tokens for load in pipelines])
        ratio = prompts / outputs if outputs else 0.0
        first_s = math.inf
        chosen = 0
        for index, load in enumerate(pipelines):
            ttft_s, _ = _predict(request, load)
            if (
                ttft_s <= self._headroom * request.slo.ttft_s
                and _steady_token_s(request, load, ratio) <= self._headroom * request.slo.tpot_s
            ):
                return index
            if ttft_s < first_s:
                chosen, first_s = index, ttft_s
        return chosen


def _steady_token_s(request: Incoming, load: Load, prefill_per_decode: float) -> float:
    """Mean seconds of an iteration with the request among the decodes and prompts arriving as others end."""
    limits = load.state.limits
    count = min(load.requests + 1, limits.max_sequences)
    decode = Work(
        decode_count=count,
        decode_context_tokens=load.tokens + request.prompt_tokens,
        sampled_tokens=count,
    )
    alone_s = load.predictor.iteration_s(decode)
    chunk = max(1, limits.max_tokens - count)
    both_s = load.predictor.iteration_s(decode._replace(prefill=(Chunk(chunk, 0),)))
    return alone_s + (both_s - alone_s) * count * prefill_per_decode / chunk


def _predict(request: Incoming, load: Load) -> tuple[float, float]:
    """(seconds to the first token, seconds per token afterwards) if the request went there."""
    state = load.state
    count = min(load.requests + 1, state.limits.max_sequences)
    context = load.tokens + request.prompt_tokens
    backlog = state.waiting.tokens + load.inbox_tokens + request.prompt_tokens
    backlog += sum([s.remaining_tokens for s in state.prefilling.values()])
    chunk = max(1, min(backlog, state.limits.max_tokens - count))
    decode = Work(decode_count=count, decode_context_tokens=context, sampled_tokens=count)
    token_s = load.predictor.iteration_s(decode)
    chunk_s = load.predictor.iteration_s(decode._replace(prefill=(Chunk(chunk, 0),)))
    return chunk_s * math.ceil(backlog / chunk), token_s
