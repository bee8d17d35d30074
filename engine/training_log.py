"""What a finetuning run tells of itself: JSON lines, TensorBoard, and a bar for a person who waits; where standard
error is no terminal, rows as text.

A row stands for the steps since the one before: its loss is their mean, as transformers logs it. A resumed
run writes the rows that it would have written in one go.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from engine.engine import StepRecord
from sim.json_file import parse, taken_apart

SCALARS = {key: f"train/{key}" for key in ("loss", "grad_norm", "learning_rate", "epoch", "tok_s")}
SCALARS["eval_loss"] = "eval/loss"
"""What TensorBoard gets of a row -> its name there."""
PRINTED_S = 10.0
"""Seconds in which at most one row of training is printed; the first, the last and those of eval_loss always are."""


class TrainingLog:
    """The log of one run, as a context."""

    def __init__(
        self,
        path: Path,
        *,
        total: int,
        done: int,
        every: int,
        epoch_samples: int,
        unlogged: Sequence[float],
        tensorboard: Path | None,
    ) -> None:
        """`path` gets a row every `every` steps and after the last of `total`; `done` steps were made before,
        those of `unlogged` without a row. `epoch_samples` make an epoch; `tensorboard` is a folder for events.
        """
        self._path = path
        self._total = total
        self._done = done
        self._every = every
        self._epoch_samples = epoch_samples
        self._tensorboard = tensorboard
        self.unlogged = list(unlogged)
        """Losses of the steps since the last row."""
        self.last_loss: float | None = None
        self.last_eval_loss: float | None = None
        self.evaluated = False
        """Whether there is a row for what was measured after the `done` steps, as a stop may have come before."""

    def __enter__(self) -> TrainingLog:
        from tqdm import tqdm

        # What was logged after the checkpoint is trained again.
        with taken_apart(self._path, "coserve finetune"):
            rows = [(line, parse(line)) for line in self._lines()]
            kept = [line for line, _ in takewhile(lambda pair: pair[1]["step"] <= self._done, rows)]
            self.evaluated = any(row["step"] == self._done and "eval_loss" in row for _, row in rows)
        self._file = self._path.open("a", encoding="utf-8")
        # Written anew, they would be lost to a kill or a full disk in between.
        self._file.truncate(len("".join(kept).encode()))
        self._events = None if self._tensorboard is None else _events(self._tensorboard, self._done)
        self._plain = not sys.stderr.isatty()
        self._bar = tqdm(total=self._total, initial=self._done, unit="step", leave=False, disable=self._plain)
        self._started_s = self._row_s = time.perf_counter()
        self._row_tokens = 0
        self._printed_s = -math.inf
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        with suppress(OSError):  # rows that could not be written, which was told
            self._file.close()
        if self._events is not None:
            self._events.close()

    def add(self, record: StepRecord, samples: int, tokens: int) -> None:
        """A step; `samples` are trained so far, `tokens` by this run."""
        self.last_loss = record.loss
        self.unlogged.append(record.loss)
        now_s = time.perf_counter()
        tok_s = (tokens - self._row_tokens) / (now_s - self._row_s)
        shown = {"loss": f"{record.loss:.4f}", "lr": f"{record.learning_rate:.2e}", "tok/s": f"{tok_s:,.0f}"}
        self._bar.set_postfix(shown)
        self._bar.update(1)
        if record.step % self._every and record.step != self._total:
            return
        row = {
            "step": record.step,
            "loss": sum(self.unlogged) / len(self.unlogged),
            "grad_norm": record.grad_norm,
            "learning_rate": record.learning_rate,
            "epoch": samples / self._epoch_samples,
            "samples": samples,
            "tok_s": round(tok_s, 1),
            "elapsed_s": round(now_s - self._started_s, 3),
        }
        self._write(row)
        self.unlogged.clear()
        self._row_s, self._row_tokens = now_s, tokens
        if self._plain and (record.step == self._total or now_s - self._printed_s >= PRINTED_S):
            self._printed_s = now_s
            left_s = (now_s - self._started_s) / (record.step - self._done) * (self._total - record.step)
            self._print(row, f", {tok_s:,.0f} tok/s, {timedelta(seconds=round(left_s))} left")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside is not training, and counts in no row's tokens per second."""
        before_s = time.perf_counter()
        yield
        self._row_s += time.perf_counter() - before_s

    def add_eval(self, step: int, samples: int, loss: float) -> None:
        """The loss of samples that nothing is trained on, after a step."""
        self.last_eval_loss = loss
        # JSON has no NaN: large weights that are finite may give one.
        told = loss if math.isfinite(loss) else None
        row = {"step": step, "eval_loss": told, "epoch": samples / self._epoch_samples}
        self._write(row)
        if self._plain:
            self._print(row)

    def rise(self) -> str | None:
        """Mean loss of the first and of the last tenth of the rows, if it is higher at the end."""
        rows = [row for row in map(parse, self._lines()) if row.get("loss") is not None]
        if len(rows) < 2:
            return None
        tenth = -(-len(rows) // 10)
        first, last = (fmean(row["loss"] for row in part) for part in (rows[:tenth], rows[-tenth:]))
        if last <= first:
            return None
        begin, end = rows[tenth - 1]["step"], rows[-tenth - 1]["step"]
        return f"the loss is higher at the end: mean {first:.4f} to step {begin}, {last:.4f} after step {end}"

    def _print(self, row: Mapping[str, Any], rest: str = "") -> None:
        known = [(key, row[key]) for key in SCALARS if key in row and key != "tok_s"]
        numbers = ", ".join(f"{key} {math.nan if value is None else value:.4g}" for key, value in known)
        print(f"step {row['step']} of {self._total}: {numbers}{rest}", file=sys.stderr, flush=True)

    def _write(self, row: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if self._events is not None:
            for name, tag in SCALARS.items():
                if row.get(name) is not None:
                    self._events.add_scalar(tag, row[name], row["step"])

    def _lines(self) -> list[str]:
        if not self._path.exists():
            return []
        # A kill may have cut the last line short.
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]


def check_tensorboard() -> None:
    """Raise ModuleNotFoundError now if it is missing, and not after the model has been loaded."""
    import tensorboard  # noqa: F401


def _events(folder: Path, done: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # Events of steps after the checkpoint are hidden: those are made again.
    return SummaryWriter(str(folder), purge_step=done + 1)
