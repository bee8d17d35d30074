"""The replay against vLLM's v1 scheduler and block pool read out line by line: equal times for each request.

The reference is slow and obvious: one request and one block at a time, lists, and tokens that are compared
themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from sim.core.work import Work
from sim.cost.operators import Spread
from sim.vllm.replay import HOST_SEQUENCE_S, replay
from sim.vllm.run import MeasuredRequests
from sim.vllm.settings import EngineSettings


@dataclass(eq=False)
class Asked:
    arrival_s: float
    prompt: Sequence[int]
    output_tokens: int
    name: int
    generated: int = 0
    computed: int = 0
    in_flight: int = 0
    """Tokens being sampled."""
    blocks: list[Block] = field(default_factory=list)
    running: bool = False
    prefilling: bool = False
    queued_s: float = -1.0
    first_s: float = -1.0
    last_s: float = -1.0

    @property
    def known(self) -> int:
        return len(self.prompt) + self.generated

    def beginning(self, tokens: int) -> tuple[object, ...]:
        """The first tokens themselves; those that were generated are nobody else's."""
        own = tuple((self.name, n) for n in range(tokens - len(self.prompt)))
        return (*self.prompt[:tokens], *own)


@dataclass(eq=False)
class Block:
    users: int = 0
    holds: tuple[object, ...] | None = None
    since: int = 0
    """Order in which blocks came to hold what they do: of several copies the oldest is found."""


class PlainVllm:
    """Requests are (arrival_s, prompt token ids, output tokens); `seconds` gives an iteration's time from its
    chunks (tokens, context) and the contexts of its decodes."""

    def __init__(
        self,
        requests: Sequence[tuple[float, Sequence[int], int]],
        seconds: Callable[[list[tuple[int, int]], list[int]], float],
        *,
        blocks: int,
        block_tokens: int,
        max_sequences: int,
        max_tokens: int,
        asynchronous: bool,
        caching: bool = True,
        reserve: bool = True,
        threshold: int = 0,
        host_s: float = 0.0,
    ) -> None:
        self.requests = [Asked(*row, name) for name, row in enumerate(requests)]
        self.coming = deque(sorted(self.requests, key=lambda r: (r.arrival_s, r.name)))
        self.free = [Block() for _ in range(blocks)]
        self.all = list(self.free)
        self.running: list[Asked] = []
        self.waiting: deque[Asked] = deque()
        self.block, self.max_sequences, self.max_tokens = block_tokens, max_sequences, max_tokens
        self.asynchronous, self.caching, self.reserve = asynchronous, caching, reserve
        self.threshold, self.seconds, self.host_s = threshold or max_tokens, seconds, host_s
        self.preemptions = self.remembered = 0

    def run(self) -> None:
        now, device = 0.0, -1.0
        flying: deque[tuple[float, list[Asked]]] = deque()
        while self.coming or self.waiting or self.running:
            while self.coming and self.coming[0].arrival_s <= now:
                request = self.coming.popleft()
                request.queued_s = now
                self.waiting.append(request)
            planned = self.schedule()
            if planned is not None:
                sampled, chunks, decodes = planned
                ready = now + self.host_s * len(self.running)
                device = max(device, ready) + self.seconds(chunks, decodes)
                flying.append((device, sampled))
                if self.asynchronous and len(flying) < 2:
                    continue
            if flying:
                end, sampled = flying.popleft()
                now = max(now, end)
                self.update(sampled, now)
            elif self.coming:
                now = max(now, self.coming[0].arrival_s)

    def schedule(self) -> tuple[list[Asked], list[tuple[int, int]], list[int]] | None:
        budget, preempting = self.max_tokens, False
        scheduled: list[tuple[Asked, int]] = []
        at = 0
        while at < len(self.running) and budget > 0:
            request = self.running[at]
            if request.generated + request.in_flight == request.output_tokens:
                at += 1
                continue
            tokens = min(request.known + request.in_flight - request.computed, self.threshold, budget)
            while tokens and not self.room(request, tokens):
                preempting = True
                last = self.running.pop()
                self.preempt(last)
                if last is request:
                    break
            if not request.running:
                break
            if tokens:
                scheduled.append((request, tokens))
                budget -= tokens
            at += 1
        while not preempting and self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            request = self.waiting[0]
            found = self.find(request)
            done = len(found) * self.block
            tokens = min(request.known - done, self.threshold, budget)
            upto = request.known if self.reserve else done + tokens
            unused = sum(block.users == 0 for block in found)
            if -(-upto // self.block) - len(found) + unused > len(self.free):
                break
            for block in found:
                if block.users == 0:
                    self.free.remove(block)
                block.users += 1
            request.blocks, request.computed = list(found), done
            request.running = request.prefilling = True
            assert self.room(request, tokens)
            self.running.append(self.waiting.popleft())
            scheduled.append((request, tokens))
            budget -= tokens
        if not scheduled:
            return None
        sampled, chunks, decodes = [], [], []
        for request, tokens in scheduled:
            behind = request.known + request.in_flight - request.computed
            if request.prefilling:
                chunks.append((tokens, request.computed))
            else:
                decodes.append(request.computed)
            request.computed += tokens
            if tokens == behind:
                request.prefilling = False
                request.in_flight += 1
                sampled.append(request)
        return sampled, chunks, decodes

    def room(self, request: Asked, tokens: int) -> bool:
        upto = request.computed + tokens
        missing = -(-upto // self.block) - len(request.blocks)
        if missing > len(self.free):
            return False
        for _ in range(missing):
            block = self.free.pop(0)
            block.users, block.holds = 1, None
            request.blocks.append(block)
        self.remember(request, min(upto, request.known))
        return True

    def remember(self, request: Asked, tokens: int) -> None:
        if self.caching:
            for index, block in enumerate(request.blocks[: tokens // self.block]):
                if block.holds is None:
                    block.holds = request.beginning((index + 1) * self.block)
                    block.since = self.remembered = self.remembered + 1

    def find(self, request: Asked) -> list[Block]:
        found = []
        for index in range((request.known - 1) // self.block):
            beginning = request.beginning((index + 1) * self.block)
            same = [block for block in self.all if block.holds == beginning]
            if not same:
                break
            found.append(min(same, key=lambda block: block.since))
        return found

    def preempt(self, request: Asked) -> None:
        self.release(request)
        request.computed, request.running = 0, False
        self.preemptions += 1
        self.waiting.appendleft(request)

    def release(self, request: Asked) -> None:
        for block in reversed(request.blocks):
            block.users -= 1
            if block.users == 0:
                self.free.append(block)
        request.blocks = []

    def update(self, sampled: list[Asked], now: float) -> None:
        for request in sampled:
            request.generated += 1
            request.in_flight -= 1
            if request.first_s < 0:
                request.first_s = now
            if request.generated == request.output_tokens:
                request.last_s = now
                if request.running:
                    self.running.remove(request)
                    self.release(request)
                else:
                    self.waiting.remove(request)
            elif request.running:
                self.remember(request, min(request.computed - request.in_flight, request.known))


BLOCK = 4


class Linear:
    """A cost that tells chunks, contexts and spreads apart."""

    def iteration_s(self, work: Work, spread: Spread | None = None) -> float:
        pairs = sum(chunk.attention_pairs for chunk in work.prefill)
        longest = 0 if spread is None else spread.longest
        return self.of(work.prefill_tokens, pairs, work.decode_count, work.decode_context_tokens, longest)

    @staticmethod
    def of(tokens: int, pairs: int, decodes: int, context: int, longest: int) -> float:
        return 1e-3 + 1e-4 * (tokens + decodes) + 1e-6 * pairs + 1e-6 * context + 1e-7 * longest

    def seconds(self, chunks: list[tuple[int, int]], decodes: list[int]) -> float:
        pairs = sum(tokens * done + tokens * (tokens + 1) // 2 for tokens, done in chunks)
        tokens = sum(tokens for tokens, _ in chunks)
        return self.of(tokens, pairs, len(decodes), sum(decodes), max(decodes, default=0))


def conversations(rng: np.random.Generator, count: int) -> list[list[int]]:
    """Prompts of which half begin with an earlier one, or with a part of it."""
    prompts: list[list[int]] = []
    for _ in range(count):
        own = rng.integers(0, 50, rng.integers(1, 60)).tolist()
        if prompts and rng.random() < 0.5:
            before = prompts[rng.integers(len(prompts))]
            own = before[: rng.integers(len(before) + 1)] + own[:20]
        prompts.append(own)
    return prompts


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("asynchronous", "caching", "reserve", "threshold"),
    [
        (True, True, True, 0),
        (False, True, True, 0),
        (True, False, True, 0),
        (True, True, False, 0),
        (False, True, False, 16),
        (True, True, True, 16),
    ],
)
def test_requests_are_served_when_vllm_serves_them(
    seed: int, asynchronous: bool, caching: bool, reserve: bool, threshold: int
) -> None:
    rng = np.random.default_rng(seed)
    count, blocks, max_sequences = 60, 60, 12
    # Decodes behind prompts that use up the iteration wait in vLLM, which only a threshold makes possible.
    max_tokens = max_sequences * threshold or 64
    prompts = conversations(rng, count)
    arrival_s = np.sort(rng.uniform(0, 0.6, count))
    outputs = rng.integers(1, 60, count)
    engine = EngineSettings(
        model="", version="", kv_blocks=blocks + 1, block_tokens=BLOCK, max_sequences=max_sequences,
        max_tokens=max_tokens, max_sequence_tokens=1000, prefix_caching=caching, async_scheduling=asynchronous,
        reserve_full_prompt=reserve, graph_sizes=(), graphs_for_decodes=False, graphs_for_mixed=False, tp=1,
        most_prompt_tokens=threshold,
    )  # fmt: skip
    requests = MeasuredRequests(
        arrival_s=arrival_s, queued_s=arrival_s, first_token_s=arrival_s, last_token_s=arrival_s,
        prompt_tokens=np.array([len(prompt) for prompt in prompts]), output_tokens=outputs, prompts=prompts,
    )  # fmt: skip
    played = replay(engine, requests, Linear())  # type: ignore[arg-type]
    reference = PlainVllm(
        list(zip(arrival_s.tolist(), prompts, outputs.tolist(), strict=True)),
        Linear().seconds,
        blocks=blocks, block_tokens=BLOCK, max_sequences=max_sequences, max_tokens=max_tokens,
        asynchronous=asynchronous, caching=caching, reserve=reserve, threshold=threshold,
        host_s=HOST_SEQUENCE_S,
    )  # fmt: skip
    reference.run()
    assert played.preemptions == reference.preemptions > 0
    assert (played.found_tokens > 0) == caching
    stamps = (
        ("queued_s", played.queued_s),
        ("first_s", played.first_token_s),
        ("last_s", played.last_token_s),
    )
    for name, values in stamps:
        expected = [getattr(request, name) for request in reference.requests]
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-9)
