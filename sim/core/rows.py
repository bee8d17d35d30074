"""Result rows: what the loop records, column by column.

A table is one flat array of bytes, a row one packed string appended to it, so millions of iterations fit: 131
bytes each, since whole numbers of a known range take as few bytes as that range needs. Strings are stored as
codes into `labels`. Simulator and engine fill the same tables; `sim.results` turns them into Parquet.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Mapping, Sequence
from enum import IntEnum

import numpy as np

from sim.core.request import Request
from sim.core.work import Work

WORK_COLUMNS = (
    "prefill_chunks",
    "prefill_tokens",
    "prefill_context_tokens",
    "prefill_pairs",
    "decode_count",
    "decode_context_tokens",
    "sampled_tokens",
    "forward_windows",
    "forward_tokens",
    "forward_pairs",
    "backward_layers",
    "backward_layer_tokens",
    "backward_pairs",
    "recompute_tokens",
    "recompute_pairs",
    "optimizer_params",
    "adapters",
    "overlap",
)
"""`Work`, flat. `prefill_context_tokens` sums the contexts of the chunks, `backward_layers` counts the layers of
all backward rectangles; pairs are query-key pairs of causal attention (`Chunk.attention_pairs`)."""

ITERATION_COLUMNS = (
    "pipeline",
    "iteration",
    "start_s",
    "end_s",
    "predicted_s",
    *WORK_COLUMNS,
    "running",
    "waiting",
    "kv_blocks_used",
    "preempted",
)
"""One row per iteration. `end_s - start_s` is the actual time; `predicted_s` is NaN when the policy
does not predict; `running` and `waiting` are counted after planning."""

REQUEST_COLUMNS = (
    "request",
    "pipeline",
    "slo",
    "adapter",
    "outcome",
    "arrival_s",
    "scheduled_s",
    "first_token_s",
    "last_token_s",
    "prompt_tokens",
    "output_tokens",
    "generated_tokens",
    "preemptions",
)
"""One row per arrived request. `scheduled_s` is the start of the first iteration that computed any of
it; times that never came are NaN. `output_tokens` was asked for, `generated_tokens` came out."""

SEGMENT_COLUMNS = ("request", "pipeline", "slo", "first_s", "start_tick", "end_tick")
"""Token times. After its token at `first_s` a request got one at the end of every decode tick in
(start_tick, end_tick] of its pipeline; a preempted request has several segments. Tick n is the n-th
row, from 1, of that pipeline's `ticks` table."""

TICK_COLUMNS = ("pipeline", "end_s")
"""End time of each iteration that decoded."""

STEP_COLUMNS = (
    "pipeline",
    "job",
    "step",
    "samples",
    "tokens",
    "end_s",
    "failed",
)
"""One row per optimizer step; `step` counts from 1 and is the adapter version that it publishes. One that
`failed` (its loss or gradient is not finite) publishes nothing, trained nothing, and is its job's last."""


WHOLE: Mapping[str, str] = {
    "pipeline": "H",
    "iteration": "I",
    "prefill_chunks": "H",
    "prefill_tokens": "I",
    "prefill_context_tokens": "I",
    "decode_count": "I",
    "decode_context_tokens": "I",
    "sampled_tokens": "I",
    "forward_windows": "H",
    "forward_tokens": "I",
    "backward_layers": "I",
    "backward_layer_tokens": "I",
    "recompute_tokens": "I",
    "optimizer_params": "Q",
    "adapters": "I",
    "overlap": "B",
    "running": "I",
    "waiting": "I",
    "kv_blocks_used": "I",
    "preempted": "I",
}
"""Columns of `iterations` and `ticks` that hold whole numbers from 0, and the unsigned integers (of `struct` and
of numpy: 1, 2, 4 and 8 bytes for B, H, I and Q) that they are kept as. All others are doubles."""


class Outcome(IntEnum):
    """How a request ended."""

    FINISHED = 0
    REJECTED = 1
    """Never admitted: cannot fit, or no pipeline serves."""
    ABORTED = 2
    """Ended by its client."""
    UNFINISHED = 3
    """Still waiting or running when the run ended."""


class Table:
    """Rows under named columns."""

    def __init__(self, columns: tuple[str, ...], whole: Mapping[str, str] | None = None) -> None:
        """`whole` gives columns their kind of unsigned integer; those that it does not name are doubles."""
        self.columns = columns
        self.data = array("B")
        kinds = {name: (whole or {}).get(name, "d") for name in columns}
        self.dtype = np.dtype(list(kinds.items()))
        self._kinds = kinds
        self._pack = struct.Struct("=" + "".join(kinds.values())).pack

    def append(self, row: Sequence[int | float]) -> None:
        """Add one row, in column order. Raises ValueError for a value that its column cannot hold."""
        try:
            self.data.frombytes(self._pack(*row))
        except struct.error:
            raise ValueError(self._refused(row)) from None

    def __len__(self) -> int:
        return len(self.data) // self.dtype.itemsize

    def arrays(self) -> dict[str, np.ndarray]:
        """Column name -> array of doubles of shape (rows,), copied."""
        rows = np.frombuffer(self.data, self.dtype) if self.data else np.empty(0, self.dtype)
        return {name: rows[name].astype(np.float64) for name in self.columns}

    def _refused(self, row: Sequence[int | float]) -> str:
        """What is wrong with a row that cannot be packed."""
        for (name, kind), value in zip(self._kinds.items(), row, strict=True):
            try:
                struct.pack(kind, value)
            except struct.error:
                size = np.dtype(kind).itemsize
                range_ = "a number" if kind == "d" else f"a whole number of 0..{256**size - 1}"
                return f"column {name} must hold {range_}, got {value!r}"
        raise AssertionError("every value of the row can be packed")


class Labels:
    """Strings as small integers, in order of first use."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = list(names)
        self._code = {name: i for i, name in enumerate(self.names)}

    def code(self, name: str) -> int:
        code = self._code.get(name)
        if code is None:
            code = self._code[name] = len(self.names)
            self.names.append(name)
        return code


class Recorder:
    """All tables of one run; pipelines of a cluster share one."""

    def __init__(self) -> None:
        self.iterations = Table(ITERATION_COLUMNS, WHOLE)
        self.requests = Table(REQUEST_COLUMNS)
        self.segments = Table(SEGMENT_COLUMNS)
        self.ticks = Table(TICK_COLUMNS, WHOLE)
        self.steps = Table(STEP_COLUMNS)
        self.slos = Labels()
        self.adapters = Labels([""])
        """Code 0 is the base model."""
        self.jobs = Labels()

    def add_request(
        self,
        request: Request,
        pipeline: int,
        outcome: Outcome,
        *,
        scheduled_s: float | None = None,
        first_token_s: float | None = None,
        last_token_s: float | None = None,
        generated_tokens: int = 0,
        preemptions: int = 0,
    ) -> None:
        """Record how a request ended; times that never came are None."""
        nan = math.nan
        self.requests.append(
            (
                request.id,
                pipeline,
                self.slos.code(request.slo),
                self.adapters.code(request.adapter or ""),
                outcome,
                request.arrival_s,
                nan if scheduled_s is None else scheduled_s,
                nan if first_token_s is None else first_token_s,
                nan if last_token_s is None else last_token_s,
                request.prompt_tokens,
                request.output_tokens,
                generated_tokens,
                preemptions,
            )
        )


def work_row(work: Work) -> tuple[float, ...]:
    """`work` in WORK_COLUMNS order."""
    prefill, count, context, sampled, forward, backward, recompute, params, adapters, overlap = work
    prefill_tokens = prefill_context = forward_tokens = 0
    backward_layers = backward_tokens = recompute_tokens = 0
    # Twice the pairs, which are whole numbers: those are multiplied faster.
    prefill_pairs = forward_pairs = backward_pairs = recompute_pairs = 0
    if prefill:
        for tokens, before in prefill:
            prefill_tokens += tokens
            prefill_context += before
            prefill_pairs += tokens * (before + before + tokens + 1)
    if forward:
        for tokens, before in forward:
            forward_tokens += tokens
            forward_pairs += tokens * (before + before + tokens + 1)
    if backward:
        for layers, tokens, before in backward:
            layer_tokens = layers * tokens
            backward_layers += layers
            backward_tokens += layer_tokens
            backward_pairs += layer_tokens * (before + before + tokens + 1)
    if recompute:
        for tokens, before in recompute:
            recompute_tokens += tokens
            recompute_pairs += tokens * (before + before + tokens + 1)
    return (
        len(prefill),
        prefill_tokens,
        prefill_context,
        0.5 * prefill_pairs,
        count,
        context,
        sampled,
        len(forward),
        forward_tokens,
        0.5 * forward_pairs,
        backward_layers,
        backward_tokens,
        0.5 * backward_pairs,
        recompute_tokens,
        0.5 * recompute_pairs,
        params,
        adapters,
        overlap,
    )
