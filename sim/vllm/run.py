"""Reads the folder of a recorded vLLM run: how the engine was set up, what arrived, and what was measured.

`meta.json` holds the engine's resolved settings (`sim.vllm.settings`), `requests.jsonl` one line per request
with vLLM's own stamps, `timeseries.csv` what its logger counted per tick, `config.json` the links between
devices; the last two may be missing. The first three may be in a folder `vllm` beside `config.json`. The
prompts are in the workload that `meta.json` names by `dataset_path` and `dataset_hash`, one JSON object with
`input_tok_ids` per request. Stamps are of two clocks: `arrival_time` is the wall clock of the front end, all
others are the engine's. They are brought together at the request that passed from one to the other fastest,
which takes about a millisecond, and time 0 is when the engine took in its first request.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.json_file import parse
from sim.vllm.settings import EngineSettings, engine_settings
from sim.vllm.text import table_of, text_of
from sim.vllm.values import Node, finite, whole

Floats = NDArray[np.float64]

TICK_COLUMNS = ("t", "prompt_throughput", "gen_throughput", "running", "waiting")
LATER_TICK_COLUMNS = ("prompt_cached_throughput", "preempted")
"""That earlier recorders did not write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Between the devices of a tensor-parallel group."""

    bandwidth_bytes_s: float
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRequests:
    """Columns of shape (requests,), in the order in which the engine took them in; seconds on its clock."""

    arrival_s: Floats
    queued_s: Floats
    first_token_s: Floats
    last_token_s: Floats
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    prompts: Sequence[Sequence[int]] | None = None
    """Token ids of each prompt, or other numbers that are equal where these are; None: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """One recorded run."""

    engine: EngineSettings
    requests: MeasuredRequests
    ticks: dict[str, Floats] | None
    """Column of `timeseries.csv` -> shape (ticks,); `t` is the end of the tick. None: none was recorded."""
    tick_s: float
    link: Link | None = None
    """None: `config.json` does not say."""


def read_run(folder: Path, prompts: Path | None = None) -> RunFolder:
    """`prompts`: the run's workload; None looks for it in the folder, and does without where it is not.

    Raises ValueError naming the file, the key or line, and what is allowed.
    """
    inner = folder / "vllm"
    recorded = inner if (inner / "meta.json").is_file() and not (folder / "meta.json").is_file() else folder
    meta = Node(recorded / "meta.json")
    ticks = recorded / "timeseries.csv"
    if prompts is None and meta.has("dataset_path"):
        beside = recorded / Path(str(meta.get("dataset_path"))).name
        prompts = beside if beside.is_file() else None
    return RunFolder(
        engine=engine_settings(meta),
        requests=_requests(recorded / "requests.jsonl", None if prompts is None else _prompts(prompts, meta)),
        ticks=_ticks(ticks) if ticks.is_file() else None,
        tick_s=meta.number("tick_seconds") if meta.has("tick_seconds") else 1.0,
        link=_link(folder / "config.json"),
    )


def _link(path: Path) -> Link | None:
    """LLMServingSim's own description of the system: GB/s and ns."""
    if not path.is_file():
        return None
    config = Node(path)
    if not (config.has("link_bw") and config.has("link_latency")):
        return None
    return Link(
        bandwidth_bytes_s=config.number("link_bw") * 1e9,
        latency_s=finite(f"{path}: link_latency", config.get("link_latency")) * 1e-9,
    )


def _prompts(path: Path, meta: Node) -> list[list[int]]:
    """Token ids by row of the workload; rows that are sessions are passed over, as vLLM's driver does."""
    text = text_of(path)
    if meta.has("dataset_hash"):
        expected, own = str(meta.get("dataset_hash")), hashlib.sha256(path.read_bytes()).hexdigest()
        if own != expected:
            raise ValueError(
                f"{path} is not the workload of this run: its SHA-256 is {own[:12]}..., "
                f"dataset_hash in meta.json is {expected[:12]}..."
            )
    found = []
    for at, line in enumerate(text.splitlines(), 1):
        where = f"{path} line {at}"
        row = _object(where, line) if line.strip() else {"sub_requests": ()}
        if "sub_requests" in row:
            continue
        tokens = row.get("input_tok_ids")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ValueError(f"{where}: input_tok_ids must be a list of whole numbers")
        found.append(tokens)
    return found


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        row = parse(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} must hold keys and values")
    return row


def _requests(path: Path, prompts: list[list[int]] | None) -> MeasuredRequests:
    rows = [_request(path, at, line) for at, line in enumerate(text_of(path).splitlines(), 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} has no requests")
    table = np.array(rows, dtype=np.float64)
    if prompts is not None:
        _check_lengths(path, table[:, 4], prompts)
    # The engine's own order where stamps are equal: that in which the front end saw them.
    order = np.lexsort((table[:, 0], table[:, 1]))
    table = table[order]
    arrival, queued, first, last, prompt, output = table.T
    origin = queued[0]
    on_engine_clock = arrival + (queued - arrival).min()
    return MeasuredRequests(
        arrival_s=on_engine_clock - origin,
        queued_s=queued - origin,
        first_token_s=first - origin,
        last_token_s=last - origin,
        prompt_tokens=prompt.astype(np.int64),
        output_tokens=output.astype(np.int64),
        prompts=None if prompts is None else [prompts[row] for row in order],
    )


def _check_lengths(path: Path, prompt_tokens: Floats, prompts: list[list[int]]) -> None:
    if len(prompts) < len(prompt_tokens):
        raise ValueError(f"{path} has {len(prompt_tokens)} requests, their workload only {len(prompts)}")
    for row, (tokens, prompt) in enumerate(zip(prompt_tokens, prompts, strict=False), 1):
        if len(prompt) != tokens:
            raise ValueError(
                f"{path} request {row}: input_toks is {tokens:.0f}, its prompt in the workload has {len(prompt)}"
            )


def _request(path: Path, at: int, line: str) -> tuple[float, ...]:
    where = f"{path} line {at}"
    row = _object(where, line)
    keys = ("arrival_time", "queued_ts", "first_token_ts", "last_token_ts", "input_toks", "output_toks")
    for key in keys:
        if key not in row:
            raise ValueError(f"{where} has no key {key!r}; it must have {', '.join(keys)}")
    if all(row[key] is None for key in keys[:4]):
        raise ValueError(
            f"{where} has no stamps, so it was never answered; take it out to validate the others"
        )
    arrival, queued, first, last = (finite(f"{where}: {key}", row[key]) for key in keys[:4])
    if not queued <= first <= last:
        raise ValueError(
            f"{where}: queued_ts, first_token_ts and last_token_ts must not decrease, "
            f"got {queued}, {first}, {last}"
        )
    prompt, output = (whole(f"{where}: {key}", row[key]) for key in keys[4:])
    return arrival, queued, first, last, prompt, output


def _ticks(path: Path) -> dict[str, Floats] | None:
    names, rows = table_of(path)
    missing = [name for name in TICK_COLUMNS if name not in names]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; it must have {', '.join(TICK_COLUMNS)}")
    later = [name for name in LATER_TICK_COLUMNS if name in names]
    columns: dict[str, list[float]] = {name: [] for name in (*TICK_COLUMNS, *later)}
    for where, row in rows:
        for name in columns:
            columns[name].append(finite(f"{where}: {name}", row[name]))
    if not columns["t"]:
        return None
    if (np.diff(columns["t"]) <= 0).any():
        raise ValueError(f"{path}: t must rise from row to row")
    return {name: np.array(values) for name, values in columns.items()}
