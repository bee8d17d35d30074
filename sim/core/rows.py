"""Result rows: what the loop records, column by column.

A table is one flat array of doubles, a row one packed string of bytes appended to it: 0.4 us and 8 bytes a
value, so millions of iterations fit. Strings are stored as codes into `labels`. Simulator and engine fill the
same tables; `sim.results` turns them into Parquet.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from enum import IntEnum
from struct import Struct

import numpy as np

from sim.core.request import Request
from sim.core.work import Work

WORK_COLUMNS = (
    "prefill_chunks",
    "prefill_tokens",
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
"""`Work`, flat. `backward_layers` counts the layers of all backward rectangles; pairs are query-key pairs of
causal attention (`Chunk.attention_pairs`)."""

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
    """Rows of doubles under named columns."""

    def __init__(self, columns: tuple[str, ...]) -> None:
        self.columns = columns
        self.data = array("d")
        # `extend` would add the values one by one: 1.0 us for a row of 26 where this takes 0.4.
        self._pack = Struct(f"{len(columns)}d").pack

    def append(self, row: Sequence[float]) -> None:
        """Add one row, in column order."""
        self.data.frombytes(self._pack(*row))

    def __len__(self) -> int:
        return len(self.data) // len(self.columns)

    def arrays(self) -> dict[str, np.ndarray]:
        """Column name -> array of shape (rows,), views of one copy."""
        rows = np.array(self.data, dtype=np.float64).reshape(-1, len(self.columns))
        return {name: rows[:, i] for i, name in enumerate(self.columns)}


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
        self.iterations = Table(ITERATION_COLUMNS)
        self.requests = Table(REQUEST_COLUMNS)
        self.segments = Table(SEGMENT_COLUMNS)
        self.ticks = Table(TICK_COLUMNS)
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
    prefill_tokens = forward_tokens = backward_layers = backward_tokens = recompute_tokens = 0
    prefill_pairs = forward_pairs = backward_pairs = recompute_pairs = 0.0
    for tokens, before in prefill:
        prefill_tokens += tokens
        prefill_pairs += tokens * (before + (tokens + 1) / 2)
    for tokens, before in forward:
        forward_tokens += tokens
        forward_pairs += tokens * (before + (tokens + 1) / 2)
    for layers, tokens, before in backward:
        layer_tokens = layers * tokens
        backward_layers += layers
        backward_tokens += layer_tokens
        backward_pairs += layer_tokens * (before + (tokens + 1) / 2)
    for tokens, before in recompute:
        recompute_tokens += tokens
        recompute_pairs += tokens * (before + (tokens + 1) / 2)
    return (
        len(prefill),
        prefill_tokens,
        prefill_pairs,
        count,
        context,
        sampled,
        len(forward),
        forward_tokens,
        forward_pairs,
        backward_layers,
        backward_tokens,
        backward_pairs,
        recompute_tokens,
        recompute_pairs,
        params,
        adapters,
        overlap,
    )
