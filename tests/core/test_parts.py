"""The parts of the state against slow obvious references: queue, deadlines, blocks, backward rectangles."""

from __future__ import annotations

import math
import random
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.core.answers import AnswerPace
from sim.core.deadlines import TokenDeadlines
from sim.core.finetune import Backward, Forward, JobView, backward_chunks, recompute_chunks
from sim.core.jobs import Jobs
from sim.core.kv import KvBlocks
from sim.core.lateness import LateRequests
from sim.core.queue import AdmissionQueue
from sim.core.request import Slo
from sim.core.sequence import Sequence
from tests.support import job_of

bounded = settings(max_examples=80)
KEYS = {
    "fcfs": lambda s: s.arrival_s,
    "deadline": lambda s: s.arrival_s + s.slo.ttft_s if s.slo.ttft_s < math.inf else 1e12 + s.arrival_s,
    "shortest": lambda s: s.prompt_tokens,
}


@pytest.mark.parametrize("order", list(KEYS))
@bounded
@given(steps=st.lists(st.tuples(st.sampled_from("aaatpr"), st.integers(0, 9), st.booleans()), max_size=150))
def test_the_queue_is_returned_ones_then_a_stable_sort(
    order: str, steps: list[tuple[str, int, bool]]
) -> None:
    queue = AdmissionQueue(order)
    returned: list[Sequence] = []
    ordered: list[Sequence] = []
    taken: list[Sequence] = []
    for id, (step, number, bounded_ttft) in enumerate(steps):
        if step == "a":
            slo = Slo(ttft_s=float(1 + number)) if bounded_ttft else Slo()
            sequence = Sequence(id, id / 4, 1 + number, slo, None)
            queue.add(sequence)
            ordered = sorted([*ordered, sequence], key=KEYS[order])
        elif step == "t" and len(queue):
            assert queue.first() is (returned + ordered)[0]
            sequence = queue.take()
            assert sequence is (returned or ordered).pop(0)
            taken.append(sequence)
        elif step == "p" and taken:
            sequence = taken.pop()
            sequence.generated_tokens += 1
            queue.put_back(sequence)
            returned.insert(0, sequence)
        elif step == "r" and len(queue):
            sequence = (returned + ordered)[number % len(queue)]
            queue.remove(sequence)
            (returned if sequence in returned else ordered).remove(sequence)
        assert list(queue) == returned + ordered
        assert list(islice(queue, number)) == (returned + ordered)[:number]
        assert not len(queue) or queue.last() is (returned + ordered)[-1]
        assert len(queue) == len(returned) + len(ordered)
        known = [s.known_tokens for s in returned + ordered]
        assert queue.tokens == sum(known)
        assert queue.attention_pairs == sum(n * (n + 1) // 2 for n in known)


def test_a_long_queue_gives_equal_keys_in_their_order_of_arrival() -> None:
    queue = AdmissionQueue("fcfs")
    sequences = [Sequence(i, float(i), 1, Slo(), None) for i in range(1000)]
    for sequence in sequences:
        queue.add(sequence)
    assert [queue.take() for _ in sequences] == sequences and queue.tokens == 0


@bounded
@given(steps=st.lists(st.tuples(st.sampled_from("jjltt"), st.integers(1, 9), st.integers(0, 2)), max_size=80))
def test_deadlines_and_growth_are_those_of_a_walk_over_the_sequences(
    steps: list[tuple[str, int, int]],
) -> None:
    """Sequences join, leave and come back with more tokens; [sequence, cached, generated] are kept singly."""
    bounds = (0.05, 0.2, math.inf)
    deadlines, kv, tick = TokenDeadlines(), KvBlocks(4096, 4), 0
    inside: list[tuple[Sequence, int]] = []
    away: list[Sequence] = []
    for id, (step, number, kind) in enumerate(steps):
        if step == "j":
            if away and kind == 0:
                sequence = away.pop()
                sequence.generated_tokens += 1
            else:
                sequence = Sequence(id, 0.0, number, Slo(tpot_s=bounds[kind]), None)
                sequence.first_token_s, sequence.generated_tokens = number / 8, 1
            sequence.computed_tokens = sequence.known_tokens - 1
            sequence.start_tick = tick
            kv.join(sequence.computed_tokens, tick)
            deadlines.add(sequence)
            inside.append((sequence, tick))
        elif step == "l" and inside:
            sequence, joined = inside.pop(number % len(inside))
            kv.leave(sequence.computed_tokens, joined)
            deadlines.remove(sequence)
            sequence.generated_tokens += tick - joined
            away.append(sequence)
        else:
            tick += 1
        expected_s, growth = math.inf, 0
        for sequence, joined in inside:
            passed = tick - joined
            assert sequence.first_token_s is not None
            due_s = sequence.first_token_s + (sequence.generated_tokens + passed) * sequence.slo.tpot_s
            expected_s = min(expected_s, due_s)
            growth += (sequence.computed_tokens + passed) % 4 == 0
        assert deadlines.earliest_s(tick + 1) == pytest.approx(expected_s, rel=1e-12)
        assert kv.growth(tick + 1) == growth


def test_an_answer_is_expected_to_be_as_long_as_nearly_all_of_the_last() -> None:
    """2,000 answers, ever longer; one that has begun has the time left for what the last 500 of its class say."""
    pace, draws = AnswerPace(), random.Random(0)
    ended: list[int] = []
    for id in range(2000):
        sequence = Sequence(id, 0.0, 1, Slo(name="report", e2e_s=10.0), None)
        sequence.generated_tokens = draws.randrange(1, 100 + id)
        pace.add(sequence)
        pace.remove(sequence)
        pace.finished(sequence)
        ended.append(sequence.generated_tokens)
        other = Sequence(-1, 0.0, 1, Slo(name="other", e2e_s=10.0), None)
        other.generated_tokens = 10_000
        pace.finished(other)
        if id % 100 == 99:
            last = sorted(ended[-500:])
            begun = Sequence(id, 2.0, 1, Slo(name="report", e2e_s=10.0), None)
            begun.generated_tokens, begun.start_tick = 3, 8 * id
            pace.add(begun)
            assert pace.pace_s(8 * id, 4.0) == 8.0 / (last[int(0.98 * (len(last) - 1))] - 3)
            assert pace.expected_tokens("report") == last[int(0.95 * (len(last) - 1))]
            pace.remove(begun)
            assert pace.pace_s(8 * id, 4.0) == math.inf


@pytest.mark.parametrize(
    ("slo", "first_s", "end_s", "tokens", "first", "answer"),
    [
        (Slo(), 1e6, 2e6, 10, 0, 0),
        (Slo(ttft_s=2.0), 2.0, 9.0, 10, 0, 0),
        (Slo(ttft_s=2.0), 2.1, 9.0, 10, 1, 0),
        (Slo(tpot_s=0.5), 1.0, 3.0, 5, 0, 0),
        (Slo(tpot_s=0.5), 1.0, 3.0, 4, 0, 1),
        (Slo(tpot_s=0.5), 1.0, 1.0, 1, 0, 0),
        (Slo(e2e_s=3.0), 1.0, 3.0, 4, 0, 0),
        (Slo(e2e_s=3.0), 1.0, 3.1, 4, 0, 1),
        (Slo(e2e_s=3.0), 3.1, 3.1, 1, 1, 1),
    ],
)
def test_late_is_what_misses_a_bound(
    slo: Slo, first_s: float, end_s: float, tokens: int, first: int, answer: int
) -> None:
    """All from an arrival at 10 s; the newest request weighs 2 %."""
    requests = LateRequests()
    requests.first_token(slo, 10.0, 10.0 + first_s)
    requests.answer(slo, 10.0, 10.0 + first_s, 10.0 + end_s, tokens)
    assert (requests.first_token_share, requests.answer_share) == (0.02 * first, 0.02 * answer)


def test_the_share_of_late_requests_settles_at_that_of_the_worst_class() -> None:
    requests, draws = LateRequests(), random.Random(0)
    seen = []
    for _ in range(20_000):
        for name, share in (("rarely", 0.1), ("often", 0.4)):
            requests.first_token(Slo(name=name, ttft_s=1.0), 0.0, 2.0 if draws.random() < share else 1.0)
        seen.append(requests.first_token_share)
    assert sum(seen[1000:]) / 19_000 == pytest.approx(0.4, abs=0.01)


@st.composite
def backward_cuts(draw: st.DrawFn) -> tuple[str, int, int, list[int]]:
    """(order, layers, sample length, slice sizes that add up to all layer-tokens)."""
    order = draw(st.sampled_from(["layer_major", "window_major"]))
    layers, length = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    unit = layers if order == "window_major" else 1
    left, cuts = layers * length, []
    while left:
        cuts.append(unit * draw(st.integers(1, left // unit)))
        left -= cuts[-1]
    return order, layers, length, cuts


@bounded
@given(cut=backward_cuts())
def test_backward_rectangles_cover_each_cell_once_in_legal_order(
    cut: tuple[str, int, int, list[int]],
) -> None:
    """A cell (layer, token) may go backward once the layer above has its token, and the layer its own right
    neighbour: the gradient of a window's K and V is final only when all later queries are done."""
    order, layers, length, cuts = cut
    memory = "recompute" if order == "window_major" else "stash"
    next_token = [length - 1] * layers
    done = 0
    for layer_tokens in cuts:
        job = JobView("job", layers, order, memory, 1, length, length, done, False)
        rectangles = backward_chunks(job, layer_tokens)
        assert sum(r.layer_tokens for r in rectangles) == layer_tokens
        for rectangle in rectangles:
            layer = max(n for n in range(layers) if next_token[n] >= 0)
            assert rectangle.layers <= layer + 1
            for n in range(layer, layer - rectangle.layers, -1):
                for token in range(rectangle.context + rectangle.tokens - 1, rectangle.context - 1, -1):
                    assert next_token[n] == token, "not the cell's turn in its layer"
                    assert n == layers - 1 or next_token[n + 1] < token, "the layer above is not there yet"
                    next_token[n] = token - 1
        windows = [(c.tokens, c.context) for c in recompute_chunks(job, layer_tokens)]
        assert windows == ([] if memory == "stash" else [(r.tokens, r.context) for r in rectangles])
        done += layer_tokens
    assert next_token == [-1] * layers


def test_a_late_job_shares_from_its_start_and_claims_nothing_of_the_past() -> None:
    early, late = job_of(100, id="early"), job_of(100, id="late", start_s=5.0)
    jobs = Jobs([early, late])
    jobs.start(0.0)
    early.virtual_s = 1234.0
    jobs.start(5.0)
    assert late.virtual_s == early.virtual_s


def test_a_job_without_data_never_starts_and_one_with_a_rest_ends_with_a_partial_step() -> None:
    jobs = Jobs([job_of([], id="empty")])
    jobs.start(0.0)
    assert not jobs.active and jobs.views == () and jobs.next_start_s == math.inf


def test_a_backward_counts_one_pass_of_its_tokens_towards_a_jobs_share() -> None:
    job = job_of([100], weight=2.0, layers=4)
    job.advance(Forward("job", 100))
    assert job.virtual_s == 100 / 2.0
    job.advance(Backward("job", 4 * 100))
    assert job.virtual_s == 100 / 2.0 + 100 / 2.0
