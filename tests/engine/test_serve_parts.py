"""What a server does at a signal, at a step of its job and with its port, without a server."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import engine.serve
from engine.front_process import GRACE_S
from engine.saver import Saver
from engine.serve import TWICE_S, Settings, _bound, _check_policy, _longest, _stopping, _trained, _training
from sim.cli import main as coserve
from sim.core.plan import Limits
from tests.engine.serving import SHORT, prepared


class Timer:
    """One that only remembers."""

    def __init__(self, interval_s: float, function: Callable[[], None]) -> None:
        self.interval_s, self.function = interval_s, function
        self.events: list[str] = []

    def start(self) -> None:
        self.events.append("started")

    def cancel(self) -> None:
        self.events.append("cancelled")


def test_the_first_signal_drains_and_the_second_interrupts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An HTTP process that has long had to be gone is killed."""
    timers: list[Timer] = []
    drains: list[float] = []

    def timer(*given: Any) -> Timer:
        timers.append(Timer(*given))
        return timers[-1]

    monkeypatch.setattr(engine.serve.threading, "Timer", timer)
    live: Any = SimpleNamespace(stop=drains.append)
    front: Any = SimpleNamespace(kill=lambda: None)
    now_s = 5.0
    monkeypatch.setattr(engine.serve.time, "monotonic", lambda: now_s)
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    with _stopping(live, front, 7) as stop:
        assert not stop.asked and not timers[0].events
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and drains == [7] and timers[0].events == ["started"]
        now_s += TWICE_S / 2
        os.kill(os.getpid(), signal.SIGTERM)  # the same once more
        now_s += TWICE_S
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert drains == [7] and timers[0].events == ["started", "cancelled"]
    assert (timers[0].interval_s, timers[0].function) == (7 + 2 * GRACE_S, front.kill)
    assert [signal.getsignal(number) for number in numbers] == before
    assert capsys.readouterr().err.count("stopping: up to 7 s") == 1


def test_a_stop_while_the_model_is_loaded_leaves_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object, **__: object) -> None:
        assert Path("t.csv").exists()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine.serve, "load_model", load)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    command = ["serve", f"weights={model_folder}", *SHORT, "policy=inference_only", "trace=t.csv"]
    assert coserve(command) == 143
    assert capsys.readouterr().err == "coserve serve: terminated\n"
    assert signal.getsignal(signal.SIGTERM) == before and not Path("t.csv").exists()


class Job:
    """A training and its engine, of which only what is called is there."""

    total = 3

    def __init__(self, steps: int) -> None:
        self.job = SimpleNamespace(id="job")
        self.trainers = {"job": SimpleNamespace(optimizer=SimpleNamespace(steps=steps))}
        self.steps: list[object] = []
        self.logged: list[int] = []
        self.written: list[object] = []
        self.on_step: Any = None
        self.on_failure: Any = None

    @contextmanager
    def on(self, engine: object, save: object) -> Iterator[None]:
        self.on_step = self.log
        yield

    def log(self, record: Any) -> None:
        self.logged.append(record.step)
        raise OSError(28, "full", "log")

    def write(self, frozen: object) -> None:
        self.written.append(frozen)

    def step(self, number: int) -> None:
        record = SimpleNamespace(step=number)
        self.steps.append(record)
        self.on_step(record)


@pytest.mark.parametrize(("done", "written"), [(0, 1), (2, 1), (3, 2)])
def test_a_job_is_logged_whatever_fails_and_its_adapter_written_when_it_ends(
    done: int, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at once, where it had ended; and a server remembers no steps."""
    monkeypatch.setattr(engine.serve, "Frozen", lambda *given: given)
    job: Any = Job(done)
    saver = Saver(lambda _: None)
    with _trained(job, job, saver):
        for number in (1, 2):
            job.step(number)
        assert not job.steps
        job.step(3)
        job.on_failure(SimpleNamespace(failure="not finite"))
    saver.finish()
    assert job.logged == [1, 2, 3] and not job.steps
    assert job.written == [(job, "job")] * written
    assert saver.failures == ["full: log", "not finite"]


def test_a_job_has_the_model_and_the_numbers_of_its_server(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared(tmp_path))
    settings = Settings(
        weights=str(model_folder),
        name=None,
        adapters={},
        dtype="bfloat16",
        tp=2,
        train="job.yaml",
        host="127.0.0.1",
        port=0,
        max_requests=1,
        drain_s=0,
        trace=None,
        predictor=None,
        memory_utilization=0.9,
    )
    training = _training(settings, "cpu")
    assert training is not None
    found = training.settings
    assert (found.model_name_or_path, found.dtype) == (str(model_folder), "bfloat16")
    assert (found.tp, found.device) == (2, "cpu")


@pytest.mark.parametrize(
    ("kv_tokens", "given", "most", "why"),
    [
        (4096, 256, 256, None),
        (4096, 512, 256, "the model's context"),
        (100, 512, 96, "what limits.kv_tokens holds"),
        (100, 96, 96, None),
    ],
)
def test_a_limit_that_cannot_be_is_told(
    kv_tokens: int, given: int, most: int, why: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = Limits(kv_tokens=kv_tokens, block_tokens=16, max_sequence_tokens=given)
    assert _longest(limits, context_tokens=256) == most
    told = f"note: limits.max_sequence_tokens is {given}, but a prompt and its answer have {most} tokens: {why}\n"
    assert capsys.readouterr().err == (told if why else "")


class Late:
    """A policy of whose class nothing is known."""


def test_a_class_of_policies_is_refused_for_what_it_says_alone() -> None:
    _check_policy(Late, Late, trains=True)


def test_a_port_is_free_as_soon_as_its_server_has_ended() -> None:
    """While the kernel still remembers a connection."""
    with socket.create_server(("127.0.0.1", 0)) as old:
        port = old.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        old.accept()[0].close()
        client.close()
    with _bound("127.0.0.1", port) as listening:
        assert listening.getsockname()[1] == port
