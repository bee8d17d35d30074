"""Routers: which pipeline a request goes to. They see the load of each, not how long an answer will be."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol
from zlib import crc32

import numpy as np

from sim.core.cost import Predictor
from sim.core.request import Slo
from sim.core.state import PipelineState
from sim.core.work import Chunk, Work

LEAST_CHUNK_TOKENS = 64
"""The least chunk that is expected of a policy without `min_chunk_tokens`: it never cuts a prompt for the sake of
a bound, and is compared as if it did."""


class Incoming(NamedTuple):
    """A request as a router sees it."""

    prompt_tokens: int
    slo: Slo
    adapter: str | None
    arrival_s: float = 0.0


class Load:
    """A pipeline as a router sees it: its state and what was routed to it since it last planned."""

    def __init__(
        self, state: PipelineState, predictor: Predictor, min_chunk_tokens: int = LEAST_CHUNK_TOKENS
    ) -> None:
        """`min_chunk_tokens`: what the policy computes of a prompt even when it breaks the bound."""
        self.state = state
        self.predictor = predictor
        self.min_chunk_tokens = min_chunk_tokens
        self.clear()

    def clear(self) -> None:
        """The pipeline has taken what was routed to it."""
        self.inbox_requests = 0
        self.inbox_tokens = 0
        self.inbox_pairs = 0.0

    def add(self, prompt_tokens: int) -> None:
        """A request was routed to it."""
        self.inbox_requests += 1
        self.inbox_tokens += prompt_tokens
        self.inbox_pairs += Chunk(prompt_tokens, 0).attention_pairs

    @property
    def requests(self) -> int:
        return self.state.unfinished + self.inbox_requests

    @property
    def tokens(self) -> int:
        """Known tokens of all its unfinished requests."""
        return self.state.outstanding_tokens + self.inbox_tokens

    @property
    def predicts(self) -> bool:
        """Its policy predicts its iterations, which is how one keeps them within a bound."""
        return self.state.predicted_s > 0

    @property
    def slowness(self) -> float:
        """Measured over predicted seconds of its iterations so far; 1 while none was predicted."""
        state = self.state
        return state.measured_s / state.predicted_s if self.predicts else 1.0

    def iteration_s(self, work: Work) -> float:
        """Seconds by prediction, corrected by how wrong predictions were so far."""
        return self.predictor.iteration_s(work) * self.slowness


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
        if seed < 0:
            raise ValueError(f"cluster.router.seed must be at least 0, got {seed}")
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
        if not 1 <= max_imbalance < math.inf:
            raise ValueError(
                f"cluster.router.max_imbalance must be at least 1 and finite, got {max_imbalance}"
            )
        self._max_imbalance = max_imbalance
        self._fallback = LeastTokens()

    def choose(self, request: Incoming, pipelines: Seq[Load]) -> int:
        adapter = request.adapter
        if adapter is None:
            return self._fallback.choose(request, pipelines)
        count = len(pipelines)
        mean = (sum(p.requests for p in pipelines) + 1) / count
        ranked = sorted(range(count), key=lambda i: crc32(f"{adapter}/{i}".encode()))
        return next(i for i in ranked if pipelines[i].requests < self._max_imbalance * mean)


class SloAware:
    """The earliest predicted first token among the pipelines whose predicted TPOT and end keep the bounds.

    The prediction is each pipeline's own predictor, corrected by what was measured, asked for an iteration
    with all its requests decoding and the largest prefill chunk that keeps the TPOT bound, times the chunks
    that its backlog needs; an answer is expected to be as long as 95 % of the last ones of its class are at most.
    So unequal pipelines get unequal shares. When no pipeline keeps the bounds, the earliest first token decides
    alone.
    """

    def choose(self, request: Incoming, pipelines: Seq[Load]) -> int:
        slo, answer_tokens = request.slo, _answer_tokens(request, pipelines)
        seen = [_predict(request, load) for load in pipelines]

        def key(index: int) -> tuple[bool, float, int]:
            first_s, token_s = seen[index].first_s(), seen[index].token_s
            late = token_s > slo.tpot_s or first_s + answer_tokens * token_s > slo.e2e_s
            return late, first_s, index

        return min(range(len(pipelines)), key=key)


class Consolidate:
    """The fewest pipelines that keep the SLO: the first in order that has room and whose predicted latencies
    stay within the bounds.

    Decoding few sequences reads the weights as often as decoding many, so requests spread thinly cost
    every pipeline's finetuning; packed, they leave the other pipelines to finetune undisturbed. Like the best
    static split, but following the load. `headroom` is the share of each bound, and of the room for K/V, that
    may be used up; `unpredicted_headroom` that of pipelines whose policy does not predict its iterations: they
    are not held to the bound one by one, so the requests' mean times scatter about the prediction. When no
    pipeline has that much, the earliest predicted first token decides, among those that have room if there
    are any.

    A first token is expected as if finetuning stretched every iteration until then to the TPOT bound, which
    is what policies that know the bound do. The time of a token is that of the steady state with the new
    request: every sequence that ends makes room for the prompt of another, so each decode brings along
    prompt / output tokens of prefill, the ratio of the requests that have ended so far. An answer must
    also end in time if it is no longer than 95 % of the last ones of its class.
    """

    def __init__(self, *, headroom: float = 1.0, unpredicted_headroom: float = 0.7) -> None:
        for key, share in (("headroom", headroom), ("unpredicted_headroom", unpredicted_headroom)):
            if not 0 < share <= 1:
                raise ValueError(f"cluster.router.{key} must be in (0, 1], got {share}")
        self._headroom = headroom
        self._unpredicted_headroom = unpredicted_headroom

    def choose(self, request: Incoming, pipelines: Seq[Load]) -> int:
        outputs = sum([load.state.ended_output_tokens for load in pipelines])
        prompts = sum([load.state.ended_prompt_tokens for load in pipelines])
        ratio = prompts / outputs if outputs else 0.0
        slo, answer_tokens = request.slo, _answer_tokens(request, pipelines)
        best = (True, math.inf)
        chosen = 0
        for index, load in enumerate(pipelines):
            headroom = self._headroom if load.predicts else self._unpredicted_headroom
            full = _is_full(request, load, headroom)
            seen = _predict(request, load)
            first_s, token_s = seen.first_s(slo.tpot_s), _steady_token_s(request, load, ratio)
            if (
                not full
                and first_s <= headroom * slo.ttft_s
                and token_s <= headroom * slo.tpot_s
                and first_s + answer_tokens * token_s <= headroom * slo.e2e_s
            ):
                return index
            if (full, seen.first_s()) < best:
                chosen, best = index, (full, seen.first_s())
        return chosen


def _answer_tokens(request: Incoming, pipelines: Seq[Load]) -> int:
    """Tokens that most answers like that of the request have at most; 0 where no end-to-end bound is."""
    return max([load.state.expected_tokens(request.slo.name) for load in pipelines])


def _is_full(request: Incoming, load: Load, headroom: float) -> bool:
    """Whether the request would wait there for another to end: for a sequence, or for K/V room."""
    limits = load.state.limits
    tokens = load.tokens + request.prompt_tokens
    return load.requests >= limits.max_sequences or tokens > headroom * limits.kv_tokens


def _steady_token_s(request: Incoming, load: Load, prefill_per_decode: float) -> float:
    """Mean seconds of an iteration with the request among the decodes and prompts arriving as others end."""
    decode = _all_decoding(request, load)
    count = decode.decode_count
    alone_s = load.iteration_s(decode)
    state = load.state
    chunk = max(1, state.limits.max_tokens - count)
    context = 0
    if state.ended_prompt_tokens:
        context = _context(chunk, state.ended_prompt_pairs / state.ended_prompt_tokens)
    both_s = load.iteration_s(decode._replace(prefill=(Chunk(chunk, context),)))
    return alone_s + (both_s - alone_s) * count * prefill_per_decode / chunk


class _Prediction(NamedTuple):
    """What happens to the request where it is sent to."""

    wait_s: float
    """Until the iteration that runs has ended."""
    chunks: int
    """Iterations that the prompts before it and its own take."""
    chunk_s: float
    """Seconds of each of them without finetuning."""
    token_s: float
    """Seconds per token afterwards."""

    def first_s(self, stretched_s: float = 0.0) -> float:
        """Seconds to the first token, with iterations that are stretched to `stretched_s` if that is finite."""
        pace_s = max(self.chunk_s, stretched_s) if stretched_s < math.inf else self.chunk_s
        return self.wait_s + pace_s * self.chunks


def _predict(request: Incoming, load: Load) -> _Prediction:
    """A prompt has only the time that decoding leaves within the TPOT bound, so a long one takes many chunks; where
    no other request is, it is not cut for the sake of a bound.

    Chunks are taken to be alike, and their tokens to attend to as many as those of the backlog do in the mean, or
    to those before them in their chunk if these are more.
    """
    state = load.state
    decode = _all_decoding(request, load)
    beside, budget_s = decode, request.slo.tpot_s / load.slowness
    if not load.requests:
        beside, budget_s = Work(), math.inf
    backlog = state.waiting.tokens + load.inbox_tokens + request.prompt_tokens
    pairs = state.waiting.attention_pairs + load.inbox_pairs + Chunk(request.prompt_tokens, 0).attention_pairs
    for sequence in state.prefilling.values():
        left = Chunk(sequence.remaining_tokens, sequence.computed_tokens)
        backlog += left.tokens
        pairs += left.attention_pairs
    most = max(1, min(backlog, state.limits.max_tokens - beside.decode_count))
    attended = pairs / backlog
    chunk, context = _chunk(load, beside, _context(most, attended), most, budget_s)
    before = _context(chunk, attended)
    if before > context:  # the smaller the chunk, the more of what it attends to lies before it
        chunk, context = _chunk(load, beside, before, most, budget_s)
    return _Prediction(
        max(0.0, state.free_s - request.arrival_s),
        math.ceil(backlog / chunk),
        load.iteration_s(beside._replace(prefill=(Chunk(chunk, context),))),
        load.iteration_s(decode),
    )


def _chunk(load: Load, decode: Work, context: int, most: int, budget_s: float) -> tuple[int, int]:
    """Tokens that a policy computes of a prompt, beside `decode`, after `context`; and these."""
    within = load.predictor.largest_prefill(decode, context, most, budget_s)
    return max(within, min(most, load.min_chunk_tokens)), context


def _context(tokens: int, attended: float) -> int:
    """Tokens before a chunk of `tokens` that attend to `attended` tokens each in the mean."""
    return max(0, round(attended - (tokens + 1) / 2))


def _all_decoding(request: Incoming, load: Load) -> Work:
    """An iteration that decodes the request and all that are there."""
    count = min(load.requests + 1, load.state.limits.max_sequences)
    return Work(
        decode_count=count,
        decode_context_tokens=load.tokens + request.prompt_tokens,
        sampled_tokens=count,
    )
