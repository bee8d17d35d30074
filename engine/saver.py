"""Checkpoints written beside a loop that must not wait for a disk.

What is saved is copied to the host at once, and written by a thread, one after the other. What cannot be written
stops nothing: it is told, and remembered. A disk that is behind gets no more copies: the checkpoint is left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import Progress, save_checkpoint
from engine.engine import Engine
from engine.lora import Adapter
from sim.errors import message

MOST_WAITING = 4
"""Checkpoints that are copied and not written yet."""
MOST_FAILURES = 8
"""That are remembered, each once."""


class Frozen:
    """An engine's job as it stands now, on the host."""

    def __init__(self, engine: Engine, job: str) -> None:
        self._adapter: Adapter = _copied(engine.adapter(job))
        self._state: dict[str, Any] = _copied(engine.optimizer_state(job))

    def adapter(self, job: str) -> Adapter:
        return self._adapter

    def optimizer_state(self, job: str) -> dict[str, Any]:
        return self._state


class Saver:
    """Writes as `save_checkpoint` does, later. `tell` gets a line for each failure, from any thread."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._thread = ThreadPoolExecutor(1)
        self._writes: deque[Future[None]] = deque()
        self.failures: list[str] = []

    def __call__(
        self, folder: Path, engine: Engine, job: str, progress: Progress, base: str, keep: int | None
    ) -> None:
        while self._writes and self._writes[0].done():
            self._writes.popleft()
        if len(self._writes) >= MOST_WAITING:
            self._tell(
                f"checkpoint of step {progress.step}: left out, the disk is {len(self._writes)} behind"
            )
            return
        own = replace(progress, unlogged=tuple(progress.unlogged))
        self.submit(save_checkpoint, folder, Frozen(engine, job), job, own, base, keep)

    def submit(self, write: Callable[..., object], *given: object) -> None:
        """Have the thread call `write(*given)`."""
        self._writes.append(self._thread.submit(self.guarded, write, *given))

    def guarded(self, write: Callable[..., object], *given: object) -> None:
        """`write(*given)` now; whatever it raises is a failure."""
        try:
            write(*given)
        except Exception as error:
            self.fail(message(error) or f"{type(error).__name__}: {error}")

    def fail(self, line: str) -> None:
        """Tell it, and remember it; not again what is remembered."""
        if line not in self.failures:
            self._tell(line)
            self.failures = [*self.failures, line][:MOST_FAILURES]

    def finish(self) -> None:
        """Return when all is written."""
        self._thread.shutdown()


def _copied(value: Any) -> Any:
    """The same with copies of its tensors on the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(own) for own in value)
    if isinstance(value, Adapter):
        return replace(value, a=_copied(value.a), b=_copied(value.b))
    return value
