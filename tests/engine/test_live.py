"""Requests as they come and tokens as they go, between a pipe and a loop: the test is both ends."""

from __future__ import annotations

import math
import multiprocessing
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.live import TRACE_COLUMNS, LiveArrivals
from engine.messages import LOST, Ask, Enough, Gone, Metrics, Stop, Tokens
from engine.sampling import Sampling
from sim.core.loop import Horizon
from sim.core.request import Request, Slo
from sim.core.rows import ITERATION_COLUMNS, STEP_COLUMNS, Outcome, Recorder, Table

PATIENCE_S = 30


class Loop:
    """Clock, driver and state in one, and whoever is at the other end of the pipe."""

    def __init__(self, trace: Any = None) -> None:
        self.time_s = 0.0
        self.woken = threading.Semaphore(0)
        self.there_at_wake: list[tuple[int, float]] = []
        """Requests and the horizon when the loop was woken: what comes after that, it may sleep through."""
        self.aborted: deque[int] = deque()
        self.finished: deque[int] = deque()
        self.failures: list[str] = []
        self.running, self.waiting = {1: None, 2: None}, SimpleNamespace(count=3)
        self.kv = SimpleNamespace(total=50, free=40)
        self.recorder, self.horizon = Recorder(), Horizon()
        ours, self.client = multiprocessing.Pipe()
        self.live = LiveArrivals(ours, self.horizon, self.recorder, Slo(), self.failures.append, trace)
        self.live.start(self, self, self)  # type: ignore[arg-type]
        self.told_first = self.told()

    def now_s(self) -> float:
        return self.time_s

    def wake(self) -> None:
        self.there_at_wake.append((len(self.live._asked), self.horizon.duration_s))
        self.woken.release()

    def abort(self, id: int) -> None:
        self.aborted.append(id)
        self.wake()

    def finish(self, id: int) -> None:
        self.finished.append(id)
        self.wake()

    def tell(self, message: object) -> None:
        """To the loop, which has taken it when this returns."""
        self.client.send(message)
        self.await_wake()

    def await_wake(self) -> None:
        assert self.woken.acquire(timeout=PATIENCE_S)

    def told(self) -> Any:
        """What the clients' side hears next."""
        assert self.client.poll(PATIENCE_S)
        return self.client.recv()

    def told_last(self) -> list[Any]:
        """All that it has heard; nothing after it counts."""
        self.live.stop(0.0)
        heard = []
        while type(message := self.told()) is not Stop:
            heard.append(message)
        return heard

    def record(self, table: Table, columns: tuple[str, ...], **values: float) -> None:
        table.append([values.get(name, 0) for name in columns])

    def iterate(self, **values: float) -> None:
        self.record(self.recorder.iterations, ITERATION_COLUMNS, **values)


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.client.close()


def ask(id: int, adapter: str | None = None) -> Ask:
    return Ask(id, [5, 6, 7], 9, 0.5, 0.25, 4, 11, frozenset({2}), adapter)


def test_a_request_arrives_when_it_was_asked(loop: Loop) -> None:
    assert loop.live.next_s() == math.inf
    for id, loop.time_s in ((7, 2.0), (8, 3.0)):
        loop.tell(ask(id, "law"))
    assert loop.there_at_wake == [(1, math.inf), (2, math.inf)]
    assert loop.live.next_s() == 2.0
    assert loop.live.due(1.9) == []
    (request,) = loop.live.due(2.0)
    assert request == Request(7, 2.0, 3, 9, "default", "law")
    assert loop.live.next_s() == 3.0
    assert [request.id for request in loop.live.due(5.0)] == [8]
    assert loop.live.prompt(request) == (
        [5, 6, 7],
        Sampling(temperature=0.5, top_p=0.25, top_k=4, seed=11, stop_tokens=frozenset({2})),
    )


def test_who_goes_before_the_loop_has_seen_him_is_aborted_without_it(loop: Loop) -> None:
    for message in (ask(1), ask(2), Gone(1)):
        loop.tell(message)
    (request,) = loop.live.due(0.0)
    assert request.id == 2 and list(loop.aborted) == [1]
    loop.live.prompt(request)
    assert not loop.live._asks and not loop.live._gone
    loop.live.tell()
    assert loop.live.metrics.counts["coserve_requests_aborted_total"] == 1


def test_who_goes_later_is_aborted_and_leaves_nothing(loop: Loop) -> None:
    """Also between his arrival and his prompt."""
    loop.tell(ask(1))
    (request,) = loop.live.due(0.0)
    loop.tell(Gone(1))
    loop.live.prompt(request)
    loop.tell(Gone(1))
    assert list(loop.aborted) == [1, 1]
    loop.live.ended(1, 0.0)
    assert not loop.live._asks and not loop.live._gone


def test_who_has_enough_is_finished(loop: Loop) -> None:
    loop.tell(Enough(4))
    assert list(loop.finished) == [4] and not loop.aborted


def test_tokens_go_out_with_the_next_plan_and_once(loop: Loop) -> None:
    """Or before the loop idles."""
    loop.live.due(0.0)
    loop.live.on_token(1, 65)
    loop.live.on_token(2, 66)
    loop.live.ended(1, 0.1)
    for now_s in (0.1, 0.2):
        loop.live.due(now_s)
    assert loop.told_last() == [Tokens([(1, 65), (2, 66), (1, None)])]
    loop.live.on_token(2, 67)
    loop.live.on_lost(3)
    loop.live.next_s()
    assert loop.told_last() == [Tokens([(2, 67), (3, LOST)])]


def test_the_end_of_the_pipe_ends_the_loop_then_and_there() -> None:
    loop = Loop()
    loop.time_s = 4.0
    loop.client.close()
    loop.await_wake()
    assert loop.there_at_wake == [(0, 4.0)] and loop.horizon.drain_s == 0.0
    loop.live.stop(0.0)  # nobody hears it, and nothing fails


def test_what_was_recorded_is_counted_and_let_go(loop: Loop) -> None:
    for tokens in (3, 4):
        loop.iterate(prefill_tokens=tokens, sampled_tokens=tokens + 1, forward_tokens=tokens + 2)
    for failed in (0, 0, 1):
        loop.record(loop.recorder.steps, STEP_COLUMNS, tokens=10 * (1 - failed), failed=failed)
    request = Request(1, 0.0, 3, 9, "default", None)
    for outcome, count in ((Outcome.FINISHED, 4), (Outcome.REJECTED, 3), (Outcome.ABORTED, 2)):
        for _ in range(count):
            loop.recorder.add_request(request, 0, outcome)
    loop.recorder.add_request(request, 0, Outcome.UNFINISHED)
    loop.recorder.ticks.append((0, 1.0))
    loop.recorder.segments.append((1, 0, 0, 0.0, 1, 2))
    loop.live.tell()
    (heard,) = loop.told_last()
    assert type(heard) is Metrics and heard.text == loop.live.metrics.text()
    recorder = loop.recorder
    tables = recorder.requests, recorder.iterations, recorder.segments, recorder.ticks, recorder.steps
    assert not any(map(len, tables))
    loop.iterate(sampled_tokens=1)
    loop.live.tell()
    (heard,) = loop.told_last()
    assert "\ncoserve_generated_tokens_total 10\n" in heard.text
    assert "\ncoserve_requests_finished_total 4\n" in heard.text
    loop.live.tell()
    assert loop.told_last() == []  # nothing is new


def test_a_request_that_nothing_ran_for_is_counted_too(loop: Loop) -> None:
    loop.recorder.add_request(Request(1, 0.0, 3, 9, "default", None), 0, Outcome.ABORTED)
    loop.live.tell()
    (heard,) = loop.told_last()
    assert "\ncoserve_requests_aborted_total 1\n" in heard.text


def test_counts_begin_at_0_before_anything_runs(loop: Loop) -> None:
    assert type(loop.told_first) is Metrics
    assert "\ncoserve_generated_tokens_total 0\n" in loop.told_first.text


def test_counts_are_told_at_once_then_every_second_and_before_the_loop_idles(loop: Loop) -> None:
    def heard() -> int:
        return len(loop.told_last())

    for now_s, told in ((0.0, 1), (0.9, 0), (1.0, 1), (1.5, 0), (2.0, 1)):
        loop.iterate()
        loop.live.due(now_s)
        assert heard() == told, now_s
    loop.iterate()
    loop.live.next_s()
    assert heard() == 1


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Any]:
    with (tmp_path / "t.csv").open("w", encoding="utf-8") as file:
        file.write(",".join(TRACE_COLUMNS) + "\n")
        file.flush()
        yield file


HEAD = "arrival_s,prompt_tokens,output_tokens,slo,adapter\n"


def answered(loop: Loop, id: int, tokens: int, adapter: str | None = None) -> None:
    request = Request(id, id / 3, 10 + id, 50, "default", adapter)
    loop.recorder.add_request(request, 0, Outcome.FINISHED, generated_tokens=tokens)


def test_requests_that_got_tokens_are_lines_of_the_trace_as_they_end(trace: Any) -> None:
    loop = Loop(trace)
    answered(loop, 1, 5)
    answered(loop, 2, 0)
    answered(loop, 3, 7, "law")
    loop.live.tell()
    lines = "0.333333,11,5,default,\n1.000000,13,7,default,law\n"
    assert Path(trace.name).read_text() == HEAD + lines
    answered(loop, 4, 1)
    loop.live.tell()
    assert Path(trace.name).read_text() == HEAD + lines + "1.333333,14,1,default,\n"


class Full:
    """A file on a disk that has no room after some writes, and then takes half of one."""

    def __init__(self, file: Any, writes: int) -> None:
        self._file = file
        self._left = writes
        self._text = ""
        self.name = file.name
        self.closed = False

    def write(self, text: str) -> None:
        self._text += text

    def flush(self) -> None:
        if self._text:
            self._left -= 1
            fits = len(self._text) if self._left >= 0 else len(self._text) // 2
            self._file.write(self._text[:fits])
            self._file.flush()
            self._text = self._text[fits:]
        if self._text:
            raise OSError(28, "No space left on device")

    def tell(self) -> int:
        self.flush()
        return int(self._file.tell())

    def close(self) -> None:
        self.closed = True
        raise OSError(28, "No space left on device")


def test_a_full_disk_ends_the_trace_after_its_last_whole_line_and_nothing_else(trace: Any) -> None:
    full = Full(trace, 2)
    loop = Loop(full)
    for id in (1, 2, 3, 4):
        answered(loop, id, 5)
        loop.live.tell()
    assert loop.failures == ["trace: No space left on device; it ends after 2 requests"] and full.closed
    lines = "0.333333,11,5,default,\n0.666667,12,5,default,\n"
    assert Path(trace.name).read_text() == HEAD + lines
    assert loop.live.metrics.counts["coserve_requests_finished_total"] == 4


def test_a_disk_that_is_full_from_the_start_leaves_the_names_of_the_columns(trace: Any) -> None:
    loop = Loop(Full(trace, 0))
    answered(loop, 1, 5)
    loop.live.tell()
    assert loop.failures == ["trace: No space left on device; it ends after 0 requests"]
    assert Path(trace.name).read_text() == HEAD
