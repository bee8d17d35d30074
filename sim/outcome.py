"""What came of one run: its summary, or the error that ended it, as text that any process can show."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sim.errors import FailedInPart, debugging


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one run."""

    overrides: tuple[str, ...]
    """As given for this run, Hydra's own left out."""
    row: dict[str, Any] | None = None
    """The task's summary; None when there is none."""
    error: str | None = None
    """One line, or the traceback of a mistake of ours; None when all went well."""
    user_caused: bool = False
    exception: BaseException | None = None
    """The error itself, where it happened in this process."""

    @property
    def failed(self) -> bool:
        return self.error is not None

    @property
    def failure(self) -> str:
        """What a sweep prints of a failed run."""
        return f"run {' '.join(self.overrides)} failed: {self.error}"


def caught(error: Exception, overrides: Sequence[str], line: str | None) -> Outcome:
    """The outcome of a run that raised `error`; `line` says it in one line if a user caused it."""
    text = "".join(traceback.format_exception(error)) if line is None or debugging() else ""
    return Outcome(
        overrides=tuple(overrides),
        row=error.row if isinstance(error, FailedInPart) else None,
        error=text + (line or ""),
        user_caused=line is not None,
        exception=error,
    )
