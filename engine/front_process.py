"""The HTTP process of `coserve serve`, as the engine's process has it: begun first, told what is served when that is
known, and ended with it.

It reads the tokenizer while this one loads the model.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from engine.front import run_front
from engine.messages import Failed, Serving
from sim.pool import sigint_blocked

GRACE_S = 10.0
"""For the HTTP process to end by itself."""
_CONTEXT = multiprocessing.get_context("spawn")


class FrontProcess:
    """A process that runs `engine.front.run_front`."""

    def __init__(self, folder: str, listening: socket.socket) -> None:
        """Begin it, for the model of a folder, on a socket that is bound."""
        self.link, other = _CONTEXT.Pipe()
        """What is said to it, and what it says (`engine.messages`)."""
        self._listening = listening
        self._process = _CONTEXT.Process(target=run_front, args=(folder, listening, other), daemon=True)
        self._serves = False
        with sigint_blocked():
            self._process.start()
        other.close()

    @property
    def exit_code(self) -> int | None:
        """Negative is the signal that ended it."""
        return self._process.exitcode

    def await_ready(self) -> None:
        """Return when it knows its model. ValueError says what is wrong with that, ChildProcessError that the process
        has ended."""
        try:
            told = self.link.recv()
        except EOFError:
            self._process.join(GRACE_S)
            raise ChildProcessError(f"the HTTP process ended with code {self.exit_code}") from None
        if type(told) is Failed:
            raise ValueError(told.line)

    def serve(self, serving: Serving) -> None:
        """Have it let clients in."""
        self._serves = True
        with suppress(BrokenPipeError):  # whoever reads the link is told as well
            self.link.send(serving)
        self._listening.listen()
        # Open in two processes it would let clients in whom nobody answers once the other has closed it.
        self._listening.close()

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """Hang up, and return when it has ended; again changes nothing."""
        if not self._serves:
            self.kill()
        # Closing the link is not enough while a thread reads it.
        with socket.socket(fileno=os.dup(self.link.fileno())) as end, suppress(OSError):  # it may have gone
            end.shutdown(socket.SHUT_RDWR)
        self._process.join(GRACE_S)
        if self._process.is_alive():
            self.kill()
            self._process.join()


@contextmanager
def front_process(folder: str, listening: socket.socket) -> Iterator[FrontProcess]:
    """One that does not outlive the block."""
    process = FrontProcess(folder, listening)
    try:
        yield process
    finally:
        process.end()
