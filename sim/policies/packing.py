"""Inference first: the part of a plan that every serving policy shares.

Decodes come first; when their growth does not fit, the last admitted are preempted. Then prefill chunks of
what is already admitted, then of the waiting queue, until the token budget, the sequences, the K/V blocks
or (where a predictor is given) the latency budget are used up. A waiting request is admitted only when its
whole prompt fits into the blocks that no admitted prompt still needs, so prefills never block each other.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as Seq
from itertools import chain, islice
from typing import NamedTuple

from sim.core.cost import Predictor
from sim.core.plan import Plan, View
from sim.core.sequence import Sequence
from sim.core.work import Chunk, Work

GROWTH_TOKENS = 64
GROWTH_SHARE = 0.2
"""Free K/V room per answer, and share of the whole: below both finetuning gives way, so that preemptions stay rare."""

LATE_FROM = 0.025
LATE_MOST = 0.05
"""Shares of late requests from which finetuning gives way to those that are here, and at which it stops for them."""

WAITED_SHARE = 0.5
"""Of its time to the first token, left to the first prompt in line, below which prompts may fill iterations."""


class Inference(NamedTuple):
    """The inference part of a plan, and its Work for a predictor."""

    decode: bool
    """False when the decodes must wait for blocks that the running iteration will release."""
    prefills: tuple[tuple[int, int], ...]
    preempted: tuple[int, ...]
    work: Work

    @property
    def busy(self) -> bool:
        """There are inference tokens to compute."""
        return self.work.decode_count > 0 or bool(self.prefills)

    def plan(self) -> Plan:
        return Plan(self.decode, self.prefills, self.preempted)


class Latency(NamedTuple):
    """A bound on the predicted time of the iteration for sizing prefill chunks."""

    predictor: Predictor
    budget_s: float
    min_chunk_tokens: int
    """Computed even when it breaks the bound: without it, decodes near the bound would starve prompts."""


def checked_budget(token_budget: int | None) -> int | None:
    """`policy.token_budget` as given, or ValueError."""
    if token_budget is not None and token_budget < 1:
        raise ValueError(f"policy.token_budget must be at least 1 or null, got {token_budget}")
    return token_budget


def checked_tokens(key: str, tokens: int) -> int:
    """`policy.<key>` as given, or ValueError."""
    if tokens < 1:
        raise ValueError(f"policy.{key} must be at least 1 token, got {tokens}")
    return tokens


def checked_share(key: str, share: float) -> float:
    """`policy.<key>` as given, or ValueError."""
    if not 0 < share <= 1:
        raise ValueError(f"policy.{key} must be in (0, 1], got {share}")
    return share


def serving_pace_s(view: View, share: float) -> float:
    """Seconds per iteration that let requests keep their bounds on the first token and on the end; `inf` where nothing
    bounds them. At most `share` of the tightest bound on a first token: a prompt that comes waits for the end.

    With it the first prompt in line, the last, and one of the tightest class that came now have their first token
    within `share` of the time that is left for it, when each iteration is full of prompt tokens. Where those that wait
    have no place, which only answers that end make, every second that iterations last longer keeps them waiting: 0;
    as where the answers themselves have no place to grow, since the slower they are the more of them there are.
    A deadline that is already lost counts as none: it must not cost the other requests theirs.
    """
    waiting, prefilling, limits = view.waiting, view.prefilling, view.limits
    pace_s = min(view.answer_pace_s, share * waiting.tightest_s)
    free_tokens = (view.free_blocks - view.growth_blocks) * limits.block_tokens
    if free_tokens < min(GROWTH_TOKENS * view.decode_count, GROWTH_SHARE * limits.kv_tokens):
        return 0.0
    if prefilling:
        first = prefilling[0]
    elif waiting.count:
        first = waiting.first()
    else:
        return pace_s
    last = waiting.last() if waiting.count else prefilling[-1]
    backlog = waiting.tokens + sum([s.remaining_tokens for s in prefilling])
    bounds = [
        (first.first_token_deadline_s - view.start_s, first.remaining_tokens),
        (last.first_token_deadline_s - view.start_s, backlog),
    ]
    if limits.admission != "deadline":
        bounds.append((waiting.tightest_s, backlog))
    room = max(1, limits.max_tokens - view.decode_count)
    places = limits.max_sequences - view.running
    full = waiting.count > 0 and (waiting.count > places or waiting.tokens > free_tokens)
    for left_s, tokens in bounds:
        if 0 < left_s < math.inf:
            pace_s = min(pace_s, 0.0 if full else share * left_s / math.ceil(tokens / room))
    return pace_s


def time_share(late_share: float) -> float:
    """Share of its time that is left to finetuning, for the requests that came late lately, whatever the cause."""
    return min(1.0, max(0.0, (LATE_MOST - late_share) / (LATE_MOST - LATE_FROM)))


def finetuning_budget_s(view: View, budget_s: float, share: float) -> float:
    """Seconds up to which finetuning may fill an iteration that may last `budget_s` for the sake of decodes."""
    budget_s = min(budget_s, serving_pace_s(view, share))
    if view.late_share <= LATE_FROM or not (view.running or view.waiting.count):
        return budget_s
    return budget_s * time_share(view.late_share)


def prompts_first(view: View, predictor: Predictor, correction: float = 1.0) -> bool:
    """Whether prompts may fill an iteration, however long it lasts: where first tokens come late, more often than
    answers do, and the first prompt in line has waited for half of its time. Full iterations compute more of them in
    the same time; answers, which are slower meanwhile, make up for it with those that only decode, or are late in
    their turn, which ends it. A prompt behind which nobody waits must still be in time so, by `correction` times what
    is predicted.
    """
    if view.late_first_tokens <= max(LATE_FROM, view.late_answers):
        return False
    waiting, prefilling = view.waiting, view.prefilling
    prompts = waiting.count + len(prefilling)
    if not prompts:
        return False
    first = prefilling[0] if prefilling else waiting.first()
    left_s = first.first_token_deadline_s - view.start_s
    if not left_s < WAITED_SHARE * (first.first_token_deadline_s - first.arrival_s):
        return False
    if prompts > 1:
        return True
    tokens = max(1, min(first.remaining_tokens, view.limits.max_tokens - view.decode_count))
    full = view.decode_work._replace(prefill=(Chunk(tokens, first.computed_tokens),))
    return correction * predictor.iteration_s(full) * math.ceil(first.remaining_tokens / tokens) <= left_s


def pack_inference(view: View, token_budget: int | None = None, latency: Latency | None = None) -> Inference:
    """Fill an iteration with inference tokens, at most `token_budget` and the pipeline's own limit.

    Decodes are never cut.
    """
    waiting, free = view.waiting.count, view.free_blocks - view.growth_blocks
    if not waiting and not view.prefilling and free >= 0:
        # Most iterations only decode.
        return tuple.__new__(Inference, (True, (), (), view.decode_work))
    limit = view.limits.max_tokens
    max_tokens = limit if token_budget is None else min(token_budget, limit)
    if free < 0:
        return _with_preemptions(view, max_tokens, latency)
    room = view.limits.max_sequences - view.running if waiting else 0
    return _with_prefills(
        view, view.decode_work, view.adapters, view.prefilling, room, max_tokens, free, latency
    )


def _with_preemptions(view: View, max_tokens: int, latency: Latency | None) -> Inference:
    free = view.free_blocks - view.growth_blocks
    count, context = view.decode_count, view.decode_context_tokens
    preempted: list[int] = []
    users = dict(view.adapters)
    for victim in view.victims():
        if free >= 0:
            break
        preempted.append(victim.id)
        free += victim.blocks
        if victim.decoding:
            count -= 1
            context -= victim.context_tokens
            free += victim.grows
            if victim.adapter is not None:
                users[victim.adapter] -= 1
    users = {adapter: left for adapter, left in users.items() if left}
    work = Work((), count, context, count, (), (), (), 0, len(users))
    kept = [s for s in view.prefilling if s.id not in preempted]
    inference = _with_prefills(view, work, users, kept, 0, max_tokens, free, latency)
    if not inference.busy:
        # Only with a lookahead: sequences that finish in the running iteration still hold their blocks.
        return Inference(False, (), (), Work())
    return inference._replace(preempted=tuple(preempted))


def _with_prefills(
    view: View,
    work: Work,
    users: Collection[str],
    prefilling: Seq[Sequence],
    room: int,
    max_tokens: int,
    free_blocks: int,
    latency: Latency | None,
) -> Inference:
    """Chunks of the admitted sequences `prefilling`, then of up to `room` waiting ones, after `work`, whose
    decodes use the adapters `users`."""
    block = view.limits.block_tokens
    tokens_left = max_tokens - work.decode_count
    sampled = work.sampled_tokens
    prefills: list[tuple[int, int]] = []
    chunks: list[Chunk] = []
    promised_blocks = 0  # what admitted prompts will still need after this iteration
    admitted = len(prefilling)
    added: set[str | None] = set()  # adapters of chunks that no decode uses
    for index, sequence in enumerate(chain(prefilling, islice(view.waiting, room))):
        known, adapter = sequence.known_tokens, sequence.adapter
        another = adapter is not None and adapter not in users and adapter not in added
        need = -(-known // block)
        if index >= admitted and (tokens_left <= 0 or need > free_blocks - promised_blocks):
            break
        done = sequence.computed_tokens
        held = -(-done // block)
        tokens = min(known - done, tokens_left, (held + free_blocks) * block - done)
        if latency is not None and tokens > 0:
            adapters = len(users) + len(added) + another
            so_far = Work(tuple(chunks), work[1], work[2], sampled, (), (), (), 0, adapters)
            within = latency.predictor.largest_prefill(so_far, done, tokens, latency.budget_s)
            if within < tokens:
                tokens_left = 0  # the budget is used up: nothing comes after this chunk
                tokens = within if chunks else max(within, min(tokens, latency.min_chunk_tokens))
        if tokens > 0:
            taken = -(-(done + tokens) // block) - held
            held += taken
            free_blocks -= taken
            tokens_left -= tokens
            sampled += done + tokens == known
            if another:
                added.add(adapter)
            prefills.append((sequence.id, tokens))
            chunks.append(Chunk(tokens, done))
        elif index >= admitted:
            break
        promised_blocks += need - held
    adapters = len(users) + len(added)
    packed = Work(tuple(chunks), work[1], work[2], sampled, (), (), (), 0, adapters)
    return Inference(True, tuple(prefills), (), packed)
