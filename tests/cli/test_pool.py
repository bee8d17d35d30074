from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from sim.pool import WorkerDied, _Worker, run_calls


def prepare(base: int) -> Callable[[int], tuple[int, int]]:
    def call(value: int) -> tuple[int, int]:
        if value < 0:
            os._exit(-value)
        return base + value, os.getpid()

    return call


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_call_has_its_result_whatever_the_number_of_workers(workers: int) -> None:
    results = dict(run_calls(prepare, (10,), range(4), workers))
    assert {index: value for index, (value, _) in results.items()} == {0: 10, 1: 11, 2: 12, 3: 13}
    pids = {pid for _, pid in results.values()}
    assert len(pids) <= min(workers, 4)
    assert os.getpid() not in pids


def test_a_dead_worker_costs_its_call_and_no_other() -> None:
    results = dict(run_calls(prepare, (0,), [1, -3, 2, -4], 1))
    assert (results[0][0], results[2][0]) == (1, 2)
    assert isinstance(results[1], WorkerDied)
    assert "exit code 3" in str(results[1])
    assert "exit code 4" in str(results[3])


def test_a_call_begins_when_the_result_before_it_has_been_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is stopped then has all results but those of the calls that run."""
    begun: list[int] = []
    send = _Worker.send

    def noted(worker: _Worker, index: int, call: Any) -> None:
        begun.append(index)
        send(worker, index, call)

    monkeypatch.setattr(_Worker, "send", noted)
    for taken, (index, _) in enumerate(run_calls(prepare, (0,), range(3), 1)):
        assert index == taken and begun == list(range(taken + 1))


def sleeper() -> Callable[[float], int]:
    def call(wait_s: float) -> int:
        time.sleep(wait_s)
        return os.getpid()

    return call


def test_leaving_early_ends_the_running_calls() -> None:
    with closing(run_calls(sleeper, (), [0.0, 3600.0], 1)) as results:
        _, pid = next(results)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_calls_start_no_process() -> None:
    assert list(run_calls(prepare, (0,), [], 2)) == []
