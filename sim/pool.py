"""Calls in parallel worker processes: results as they come, a dead worker costs one call, Ctrl-C stops all.

The standard executor gives up all calls when one worker dies, and its workers answer Ctrl-C with a
traceback each. Workers are spawned, not forked: a fork copies the locks of whatever threads numpy,
pyarrow or torch have started, and a spawned worker pays for its imports once per sweep.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

_CONTEXT = get_context("spawn")


class WorkerDied(Exception):
    """A worker process ended in the middle of a call."""


class _Worker:
    """One process and our end of its pipe."""

    def __init__(self, prepare: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...]) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs, prepare, args), daemon=True)
        with sigint_blocked():
            self.process.start()
        theirs.close()
        self.index: int | None = None

    def send(self, index: int, call: Any) -> None:
        self.index = index
        # A worker that is already dead says so when its result is read.
        with suppress(BrokenPipeError):
            self.pipe.send(call)

    def result(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return WorkerDied(f"its process ended with exit code {self.process.exitcode}")


def run_calls(
    prepare: Callable[..., Callable[[Any], Any]],
    args: tuple[Any, ...],
    calls: Sequence[Any],
    workers: int,
) -> Generator[tuple[int, Any], None, None]:
    """Yield (index, result) of each call in the order in which they finish.

    Each worker calls `prepare(*args)` once and the function that it returns for every call. That
    function must not raise; a worker that dies gives a `WorkerDied` as the result of its call.
    Closing the iterator ends the running calls.
    """
    waiting = list(enumerate(calls))[::-1]
    pool = [_Worker(prepare, args) for _ in range(min(workers, len(calls)))]
    try:
        for worker in pool:
            worker.send(*waiting.pop())
        while pool:
            ready = wait([worker.pipe for worker in pool])
            for worker in [worker for worker in pool if worker.pipe in ready]:
                index, result = worker.index, worker.result()
                # Before the next call begins: who is stopped has the results of all that ended before it.
                yield index, result  # type: ignore[misc]
                died = isinstance(result, WorkerDied)
                if died or not waiting:
                    pool.remove(worker)
                    worker.pipe.close()
                if died and waiting:
                    worker = _Worker(prepare, args)
                    pool.append(worker)
                if waiting:
                    worker.send(*waiting.pop())
    finally:
        for worker in pool:
            worker.process.terminate()
            worker.process.join()


def _serve(pipe: Connection, prepare: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...]) -> None:
    """A worker's life: until our end of the pipe is closed."""
    function = prepare(*args)
    while True:
        try:
            call = pipe.recv()
        except EOFError:
            return
        pipe.send(function(call))


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """A process started inside never sees Ctrl-C; here it is delivered at the end."""
    # The first start would also start this, which unblocks the signal again (CPython 3.11).
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
