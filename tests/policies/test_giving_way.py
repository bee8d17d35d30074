"""Finetuning gives way to prompts, answers and the requests that came late."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sim.core.finetune import Forward
from sim.core.loop import Horizon
from sim.core.plan import Plan
from sim.core.request import Request, Slo
from sim.core.rows import Recorder
from sim.core.state import PipelineState
from tests.policies.scenes import BUDGETED, COST, PLACES
from tests.support import LinearCost, build_policy, job_of, limits_of, run


def plan_of(
    name: str,
    requests: list[Request],
    slos: dict[str, Slo],
    under_way: Plan,
    now_s: float,
    **limits: Any,
) -> Plan:
    """What the policy plans at `now_s` once `under_way` has been done, with a budget of 50 ms."""
    cost = LinearCost(prefill_s=2.0**-16)
    state = PipelineState(limits=limits_of(**limits), slos=slos, recorder=Recorder(), jobs=[job_of(8000)])
    for request in requests:
        assert state.arrive(request)
    if under_way.prefills:
        state.apply(under_way, 0.0)
        state.commit(0.0)
    settings = {} if name == "coserving_slack" else {"margin": 0.0}
    return build_policy(name, predictor=cost, budget_s=0.05, **settings).plan(state.view(now_s))


@pytest.mark.parametrize("name", ["coserving", "spatial_limited", "coserving_slack"])
@pytest.mark.parametrize(
    ("admission", "first", "last", "under_way", "now_s", "budget_s"),
    [
        # Prompt tokens and bound on the first token of each, all here at 0 s; half of the time left, over iterations
        # of 256. First-come first-served, one of the tighter class that came now would be behind both.
        pytest.param("fcfs", (600, math.inf), (700, math.inf), {}, 0.0, 0.05, id="no-hurry"),
        pytest.param("fcfs", (600, math.inf), (700, 0.24), {}, 0.0, 0.24 / 2 / 6, id="last"),
        pytest.param("fcfs", (600, 0.24), (700, math.inf), {}, 0.0, 0.24 / 2 / 6, id="one-to-come"),
        pytest.param("fcfs", (600, 0.12), (700, 0.24), {}, 0.0, 0.12 / 2 / 6, id="one-to-come-tighter"),
        pytest.param("shortest", (600, 0.12), (700, 0.24), {}, 0.0, 0.12 / 2 / 6, id="one-to-come-shortest"),
        pytest.param("fcfs", (600, 0.24), (700, 0.24), {}, 0.1, 0.14 / 2 / 6, id="last-waited"),
        pytest.param("fcfs", (600, 0.24), (700, 0.24), {}, 0.3, 0.24 / 2 / 6, id="both-lost"),
        pytest.param("fcfs", (600, math.inf), (700, 0.2), {0: 200}, 0.0, 0.2 / 2 / 5, id="one-under-way"),
        pytest.param(
            "fcfs", (400, math.inf), (500, 0.12), {0: 100, 1: 100}, 0.0, 0.12 / 2 / 3, id="two-under-way"
        ),
        pytest.param("fcfs", (56, math.inf), (256, 0.08), {0: 56}, 0.0, 0.08 / 2 / 2, id="beside-a-decode"),
        # By deadline it would pass the other.
        pytest.param("deadline", (600, 0.12), (700, math.inf), {}, 0.0, 0.12 / 2 / 3, id="first"),
        pytest.param("deadline", (600, 0.22), (700, math.inf), {}, 0.1, 0.12 / 2 / 3, id="first-waited"),
        pytest.param("deadline", (600, 0.15), (700, 0.24), {}, 0.0, 0.24 / 2 / 6, id="both-last-tighter"),
        pytest.param("deadline", (600, 0.12), (700, 0.48), {}, 0.0, 0.12 / 2 / 3, id="both-first-tighter"),
        pytest.param("deadline", (600, 0.1), (700, math.inf), {}, 0.2, 0.05, id="first-lost"),
        pytest.param("deadline", (600, 0.1), (700, 0.44), {}, 0.2, 0.24 / 2 / 6, id="first-lost-last-not"),
        pytest.param("deadline", (600, 0.1), (700, 0.1), {}, 0.2, 0.05, id="last-lost"),
        pytest.param(
            "deadline", (600, 0.08), (700, math.inf), {0: 200}, 0.0, 0.08 / 2 / 2, id="first-under-way"
        ),
    ],
)
@pytest.mark.parametrize("bound", ["ttft_s", "e2e_s"])
def test_finetuning_leaves_prompts_the_time_that_their_first_tokens_need(
    name: str,
    bound: str,
    admission: str,
    first: tuple[int, float],
    last: tuple[int, float],
    under_way: dict[int, int],
    now_s: float,
    budget_s: float,
) -> None:
    """Finetuning fills the iteration up to the budget by hand, to the last token of its window."""
    requests = [Request(id, 0.0, tokens, 10, str(id)) for id, (tokens, _) in enumerate((first, last))]
    slos = {str(id): Slo(**{bound: bound_s}) for id, (_, bound_s) in enumerate((first, last))}
    plan = plan_of(name, requests, slos, Plan(prefills=tuple(under_way.items())), now_s, admission=admission)
    assert plan.prefills and [type(piece) for piece in plan.finetune] == [Forward]
    assert plan.predicted_s is not None
    assert budget_s - 2.0**-14 < plan.predicted_s <= budget_s * (1 + 1e-9)


@pytest.mark.parametrize("name", ["coserving", "spatial_limited", "coserving_slack"])
@pytest.mark.parametrize(("bound_s", "budget_s"), [(math.inf, 0.05), (0.2, 0.05), (0.06, 0.03)])
def test_an_iteration_ends_in_half_of_the_time_that_a_prompt_to_come_has(
    name: str, bound_s: float, budget_s: float
) -> None:
    """Nobody waits; one answer is under way, of the class of those that come."""
    slos = {"chat": Slo(ttft_s=bound_s, tpot_s=0.05)}
    plan = plan_of(name, [Request(0, 0.0, 16, 20, "chat")], slos, Plan(prefills=((0, 16),)), 0.0)
    assert plan.decode and plan.predicted_s is not None
    assert budget_s - 2.0**-14 < plan.predicted_s <= budget_s * (1 + 1e-9)


@pytest.mark.parametrize("name", ["coserving", "spatial_limited", "coserving_slack"])
@pytest.mark.parametrize(
    ("running", "waiting", "ttft_s", "trains"),
    [
        pytest.param(16, 0, 1.0, True, id="nobody-waits"),
        pytest.param(16, 1, 1.0, False, id="no-sequence-left"),
        pytest.param(16, 1, math.inf, True, id="no-hurry"),
        pytest.param(16, 1, 0.01, False, id="lost-as-for-the-next"),
        pytest.param(8, 3, 1.0, True, id="all-fit"),
        pytest.param(8, 4, 1.0, False, id="not-the-blocks-of-all"),
    ],
)
def test_finetuning_gives_way_where_only_answers_that_end_make_place(
    name: str, running: int, waiting: int, ttft_s: float, trains: bool
) -> None:
    """16 sequences or 4,096 tokens are all that fit; those that wait have 1,000 each."""
    requests = [Request(i, 0.0, 16, 20, "chat") for i in range(running)]
    requests += [Request(running + i, 0.0, 1000, 20, "late") for i in range(waiting)]
    under_way = Plan(prefills=tuple((i, 16) for i in range(running)))
    slos = {"chat": Slo(tpot_s=0.05), "late": Slo(ttft_s=ttft_s)}
    assert bool(plan_of(name, requests, slos, under_way, 0.02).finetune) == trains


@pytest.mark.parametrize("name", ["coserving", "spatial_limited", "coserving_slack"])
@pytest.mark.parametrize(
    ("answers", "kv_tokens", "trains"), [(1, 400, True), (1, 384, False), (8, 480, True), (8, 464, False)]
)
def test_finetuning_gives_way_where_answers_have_no_room_to_grow(
    name: str, answers: int, kv_tokens: int, trains: bool
) -> None:
    """An answer holds blocks for 32 tokens and takes 16 more now; 64 are to be left for each or, where that is less,
    a fifth of all room."""
    tokens = 320 if answers == 1 else 32
    requests = [Request(i, 0.0, tokens, 300, "chat") for i in range(answers)]
    under_way = Plan(prefills=tuple((i, tokens) for i in range(answers)))
    plan = plan_of(name, requests, {"chat": Slo()}, under_way, 0.0, kv_tokens=kv_tokens, max_tokens=320)
    assert plan.decode and bool(plan.finetune) == trains


@pytest.mark.parametrize("name", [*BUDGETED, "coserving_slack"])
def test_first_tokens_come_in_time_that_finetuning_would_make_late(name: str) -> None:
    """Bursts of 32 prompts of 200 tokens: 25 iterations, 0.5 s of them alone and 1.25 s in iterations of 50 ms."""
    requests = [Request(i, 2.0 * (i // 32), 200, 2, "chat") for i in range(128)]
    policy = build_policy(name, predictor=COST, first_token_share=0.9)
    result = run(
        policy, requests, jobs=[job_of(900)], limits=PLACES, world=COST, horizon=Horizon(duration_s=8.0)
    )
    rows = result.table("requests")
    assert len(rows["request"]) == 128
    assert (rows["first_token_s"] - rows["arrival_s"]).max() < 1.0
    if name != "temporal_limited":
        beside = [plan.finetune for plan in result.log.plans if plan.prefills]
        assert np.mean([len(slices) > 0 for slices in beside]) > 0.9


@pytest.mark.parametrize("name", [*BUDGETED, "coserving_slack"])
def test_answers_end_in_time_that_finetuning_would_make_late(name: str) -> None:
    """Decodes alone take 5 ms, so that an answer of 200 tokens takes 1 s, and 8 s in iterations of 40 ms."""
    requests = [Request(i, 0.5 * i, 16, 200 if i % 4 else 50, "chat") for i in range(80)]
    result = run(
        build_policy(name, predictor=COST, budget_s=0.05),
        requests,
        jobs=[job_of(900)],
        limits=PLACES,
        world=COST,
        horizon=Horizon(duration_s=50.0),
        slos={"chat": Slo(name="chat", e2e_s=4.0)},
    )
    rows = result.table("requests")
    late = rows["request"][~(rows["last_token_s"] - rows["arrival_s"] <= 4.0)]
    assert len(rows["request"]) == 80 and len(late) > 0 and late.max() < 16, "until lengths are known"
    assert np.mean([len(plan.finetune) > 0 for plan in result.log.plans]) > 0.4


LATE = Slo(name="late", ttft_s=0.5)


SLOW = Slo(name="slow", tpot_s=0.1)
"""Both are missed where every iteration ends a second after the last."""


def plan_after(
    name: str,
    cost: LinearCost,
    slos: tuple[Slo, ...],
    busy: bool,
    waited_s: tuple[float, ...] = (),
    **settings: Any,
) -> Plan:
    """What the policy plans with a budget of 50 ms once a request of two tokens of each of `slos` has ended, an
    iteration a second; where it is `busy`, beside one that decodes; and with prompts that have waited so
    long, each for a first token in 2 s."""
    classes = {slo.name: slo for slo in (*slos, Slo(name="here", tpot_s=0.05), Slo(name="waits", ttft_s=2.0))}
    state = PipelineState(limits=limits_of(), slos=classes, recorder=Recorder(), jobs=[job_of(8000)])
    for id, slo in enumerate(slos):
        assert state.arrive(Request(id, 2.0 * id, 16, 2, slo.name))
        for plan, end_s in ((Plan(prefills=((id, 16),)), 2.0 * id + 1), (Plan(decode=True), 2.0 * id + 2)):
            state.apply(plan, end_s - 1)
            state.commit(end_s)
    now_s = 2.0 * len(slos)
    if busy:
        assert state.arrive(Request(len(slos), now_s, 16, 20, "here"))
        state.apply(Plan(prefills=((len(slos), 16),)), now_s)
        state.commit(now_s)
    for id, ago_s in enumerate(waited_s, len(slos) + 1):
        assert state.arrive(Request(id, now_s - ago_s, 600, 20, "waits"))
    return build_policy(name, predictor=cost, budget_s=0.05, **settings).plan(state.view(now_s))


@pytest.mark.parametrize("name", ["coserving", "spatial_limited", "coserving_slack"])
@pytest.mark.parametrize(
    ("slos", "share"),
    [
        pytest.param((SLOW,), 1.0, id="one"),
        pytest.param((SLOW, LATE), 0.4, id="both"),
        pytest.param((SLOW, SLOW), 0.416, id="answers"),
        pytest.param((LATE, LATE), 0.416, id="first-tokens"),
        pytest.param((SLOW, SLOW, Slo(name="other", tpot_s=0.1)), 0.416, id="the-worst-class"),
        pytest.param((Slo(name="whole", e2e_s=1.5),) * 2, 0.416, id="ends"),
        pytest.param((Slo(name="whole", e2e_s=0.5),), 0.4, id="an-end-before-the-first-token"),
        pytest.param((SLOW, SLOW, SLOW), 0.0, id="too-many"),
        pytest.param((Slo(name="slow", tpot_s=1.5, ttft_s=1.5, e2e_s=2.5),), 1.0, id="in-time"),
    ],
)
def test_finetuning_gives_way_where_requests_came_late(
    name: str, slos: tuple[Slo, ...], share: float
) -> None:
    """By 2.5 to 5 % of the last requests, of which the newest weighs 2 %."""
    settings = {} if name == "coserving_slack" else {"margin": 0.0}
    plan = plan_after(name, LinearCost(prefill_s=2.0**-16), slos, True, **settings)
    assert plan.decode and plan.predicted_s is not None
    if share:
        assert 0.05 * share - 2.0**-14 < plan.predicted_s <= 0.05 * share * (1 + 1e-9)
    else:
        assert not plan.finetune
    alone = plan_after(name, LinearCost(prefill_s=2.0**-16), slos, False, **settings)
    assert alone.predicted_s is not None and alone.predicted_s > 0.05 - 2.0**-13, "where nobody is here"


@pytest.mark.parametrize("name", ["coserving", "spatial_limited", "temporal_limited", "coserving_slack"])
@pytest.mark.parametrize(
    ("slos", "waited_s", "first"),
    [
        pytest.param((LATE,) * 3, (1.1, 0.0), True, id="late-and-waiting"),
        pytest.param((LATE,) * 3, (0.9, 0.9), False, id="fresh"),
        pytest.param((LATE,) * 3, (3.0, 0.0), True, id="too-late"),
        pytest.param((LATE,) * 3, (1.1,), True, id="one-that-would-be-in-time"),
        pytest.param((LATE,) * 3, (1.9,), False, id="one-that-would-be-late"),
        pytest.param((LATE,) * 3, (0.9,), False, id="one-that-is-fresh"),
        pytest.param((LATE,), (1.1, 0.0), False, id="few"),
        pytest.param((SLOW,) * 3, (1.1, 0.0), False, id="answers"),
        pytest.param((LATE, LATE, SLOW, SLOW), (1.1, 0.0), False, id="answers-as-many"),
        pytest.param((SLOW, SLOW, LATE, LATE, LATE), (1.1, 0.0), True, id="answers-less"),
    ],
)
def test_prompts_that_wait_fill_an_iteration_where_first_tokens_came_late(
    name: str, slos: tuple[Slo, ...], waited_s: tuple[float, ...], first: bool
) -> None:
    """48 of 256 tokens keep a bound of 50 ms, beside an answer; the newest request weighs 2 %."""
    plan = plan_after(name, LinearCost(prefill_s=2.0**-10), slos, True, waited_s, min_chunk_tokens=16)
    tokens = sum(count for _, count in plan.prefills)
    assert plan.decode
    assert (tokens == 255 and not plan.finetune) if first else 16 <= tokens <= 48


def test_slack_idles_less_after_late_requests_until_it_has_been_quiet() -> None:
    """0.3 of a TTFT of 1 s, or the budget of an iteration where more would come late again."""
    for slos, idle_s in (((), 0.3), ((SLOW,) * 2, 0.3 * 0.416), ((SLOW,) * 9, 0.05)):
        plan = plan_after("coserving_slack", COST, slos, False, ttft_s=1.0)
        assert plan.predicted_s is not None
        assert idle_s - 2.0**-13 < plan.predicted_s <= idle_s * (1 + 1e-9)
