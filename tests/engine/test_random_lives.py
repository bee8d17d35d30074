"""Requests that are aborted or have enough at any iteration, and jobs that are spoilt beside others: what is left comes
out as if alone, and nothing is held any more. On one stream or two, captured or not, each at random.

`python -m tests.engine.test_random_lives FIRST COUNT` tries other seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from engine.engine import Engine
from engine.launching import Launching, SecondStream
from sim.core.plan import Plan
from sim.core.rows import Outcome
from tests.engine.mixtures import Mixture, mixture, try_seeds
from tests.engine.test_random_runs import Versions, assert_trained_alone, served_alone
from tests.engine.test_streams import Device
from tests.engine.tiny import EngineRun, tiny_model
from tests.engine.wild import one_of
from tests.support import token_times

SPOILS: tuple[Callable[[Any], object], ...] = (
    lambda trainer: trainer._loss.fill_(float("nan")),
    lambda trainer: next(trainer._grads.tensors()).fill_(float("inf")),
    lambda trainer: trainer._dx.fill_(float("nan")),
)


class Lives(EngineRun):
    """A run in which things end at iterations that its seed says."""

    def __init__(self, seed: int, mixed: Mixture, *given: Any, **named: Any) -> None:
        self._random = np.random.default_rng(seed)
        self._iterations = int(self._random.integers(4, 40))
        self._asked = {id: request.output_tokens for id, (request, _, _) in mixed.prompts.items()}
        self.aborted: set[int] = set()
        self.enough: dict[int, int] = {}
        """Request -> its tokens when its client had enough."""
        super().__init__(*given, **named)

    def _launch(self, launch: Any) -> Any:
        inner = super()._launch(launch)

        def wrapped(plan: Plan) -> None:
            inner(plan)
            assert self.engine.tables.free == self.state.kv.free
            random = self._random
            if self._asked and random.random() < 3 / self._iterations:
                id = one_of(random, *self._asked)
                if self.tokens[id] and random.random() < 0.5:
                    self.driver.finish(id)
                    self.enough.setdefault(id, len(self.tokens[id]))
                else:
                    self.driver.abort(id)
                    self.aborted.add(id)
            if random.random() < 0.5 / self._iterations:
                one_of(random, *SPOILS)(one_of(random, *self.engine.trainers.values()))

        return wrapped


def check(seed: int) -> None:
    mixed, versions = mixture(seed), Versions()
    random = np.random.default_rng((seed, 1))
    model = tiny_model(mixed.family, torch.float64, **mixed.changes)
    launching = Launching(
        captures=one_of(random, None, lambda: lambda body: body),
        second=one_of(random, None, SecondStream(Device())),
    )
    run = Lives(
        seed,
        mixed,
        model,
        mixed.policy(),
        mixed.limits,
        mixed.prompts,
        adapters=mixed.adapters,
        jobs=mixed.jobs,
        watch=versions,
        keep_logits=False,
        launching=launching,
    )
    for job in mixed.jobs:
        failure = run.engine.failures.get(job.id)
        assert_trained_alone(run, job, model, None if failure is None else failure.step - 1)
    assert_ended(
        run, mixed, lambda id: served_alone(mixed, model, versions, id) if id in versions.of_request else []
    )
    assert_nothing_held(run.engine, run, mixed)


def assert_ended(run: Lives, mixed: Mixture, alone: Callable[[int], list[int]]) -> None:
    """Every request once, with all its tokens or with the first of them."""
    rows = run.recorder.requests.arrays()
    assert sorted(rows["request"].tolist()) == sorted(mixed.prompts)
    times = token_times(run.recorder)
    for id, outcome, made in zip(
        rows["request"].tolist(), rows["outcome"].tolist(), rows["generated_tokens"].tolist(), strict=True
    ):
        own = run.tokens[id]
        assert len(own) == made == len(times.get(id, [])), (id, outcome)
        whole = alone(id)
        assert own == whole[: len(own)], id
        assert outcome in (Outcome.FINISHED, Outcome.ABORTED)
        if outcome == Outcome.ABORTED:
            assert id in run.aborted
        elif id not in run.enough:
            assert own == whole, id
        else:
            assert len(own) >= min(len(whole), run.enough[id])


def assert_nothing_held(engine: Engine, run: Lives, mixed: Mixture) -> None:
    blocks = mixed.limits.kv_tokens // mixed.limits.block_tokens
    assert engine.tables.free == run.state.kv.free == blocks
    assert not engine._live and not run.state.running and not run.state._adapter_users
    assert engine._bank is not None
    # Held: one slot for each fixed adapter, and for each job one that is served and one that is trained on.
    assert sum(engine._bank._users) == len(mixed.adapters) + 2 * len(mixed.jobs)


@pytest.mark.parametrize("seed", range(4))
def test_what_ends_at_any_time_leaves_the_rest_as_if_alone(seed: int) -> None:
    check(seed)


if __name__ == "__main__":
    try_seeds(check)
