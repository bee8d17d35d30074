"""Reads the folder of a recorded vLLM run: how the engine was set up, what arrived, and what was measured.

`meta.json` holds the engine's resolved settings, `requests.jsonl` one line per request with vLLM's own
stamps, `timeseries.csv` what its logger counted per tick, `config.json` the links between devices; the last
two may be missing. The first three may be in a folder `vllm` beside `config.json`. A setting that was not
recorded is what an engine of that version does by itself. The prompts are in the workload that `meta.json`
names by `dataset_path` and `dataset_hash`, one JSON object with `input_tok_ids` per request. Stamps
are of two clocks: `arrival_time` is the wall clock of the front end, all others are the engine's. They are
brought together at the request that passed from one to the other fastest, which takes about a millisecond,
and time 0 is when the engine took in its first request.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.json_file import parse
from sim.vllm.text import table_of, text_of

Floats = NDArray[np.float64]

TICK_COLUMNS = ("t", "prompt_throughput", "gen_throughput", "running", "waiting")
LATER_TICK_COLUMNS = ("prompt_cached_throughput", "preempted")
"""That earlier recorders did not write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What decides how the engine schedules."""

    model: str
    version: str
    kv_blocks: int
    """Of one engine, as vLLM reports them; one of them is its null block and holds nothing."""
    block_tokens: int
    max_sequences: int
    max_tokens: int
    max_sequence_tokens: int
    prefix_caching: bool
    async_scheduling: bool
    reserve_full_prompt: bool
    graph_sizes: tuple[int, ...]
    graphs_for_decodes: bool
    graphs_for_mixed: bool
    tp: int
    replicas: int = 1
    """Engines of a data-parallel deployment; the blocks and limits above are each one's."""
    most_prompt_tokens: int = 0
    """Of one prompt in an iteration; 0 is no limit."""


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
    meta = _Node(recorded / "meta.json")
    ticks = recorded / "timeseries.csv"
    if prompts is None and meta.has("dataset_path"):
        beside = recorded / Path(str(meta.get("dataset_path"))).name
        prompts = beside if beside.is_file() else None
    return RunFolder(
        engine=_engine(meta),
        requests=_requests(recorded / "requests.jsonl", None if prompts is None else _prompts(prompts, meta)),
        ticks=_ticks(ticks) if ticks.is_file() else None,
        tick_s=meta.number("tick_seconds") if meta.has("tick_seconds") else 1.0,
        link=_link(folder / "config.json"),
    )


def _link(path: Path) -> Link | None:
    """LLMServingSim's own description of the system: GB/s and ns."""
    if not path.is_file():
        return None
    config = _Node(path)
    if not (config.has("link_bw") and config.has("link_latency")):
        return None
    return Link(
        bandwidth_bytes_s=config.number("link_bw") * 1e9,
        latency_s=_number(f"{path}: link_latency", config.get("link_latency")) * 1e-9,
    )


class _Node:
    """Values of a JSON file by dotted key, checked as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._root = parse(text_of(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error.msg} in line {error.lineno}") from None

    def get(self, key: str) -> Any:
        node = self._root
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                raise ValueError(f"{self.path} has no key {key!r}")
            node = node[part]
        return node

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        node = self._root
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return node is not None

    def whole(self, key: str, *others: str) -> int:
        """The first of the keys that is there; the error names the first."""
        key = next((name for name in (key, *others) if self.has(name)), key)
        return _whole(f"{self.path}: {key}", self.get(key))

    def flag(self, key: str, default: bool | None = None) -> bool:
        if default is not None and not self.has(key):
            return default
        value = self.get(key)
        if not isinstance(value, bool):
            raise ValueError(f"{self.path}: {key} must be true or false, got {value!r}")
        return value

    def number(self, key: str) -> float:
        number = _number(f"{self.path}: {key}", self.get(key))
        if not number > 0:
            raise ValueError(f"{self.path}: {key} must be above 0, got {number}")
        return number

    def expect(self, key: str, *allowed: object) -> None:
        """Refuse a setting that is there and not simulated."""
        value = self.get(key) if self.has(key) else None
        if value is not None and value not in allowed:
            known = " or ".join(map(repr, allowed))
            raise ValueError(f"{self.path}: {key} must be {known} to be simulated, got {value!r}")


def _engine(meta: _Node) -> EngineSettings:
    resolved, given = "resolved_config.", "engine_kwargs."
    scheduler, parallel = resolved + "scheduler_config.", resolved + "parallel_config."
    meta.expect(scheduler + "policy", "fcfs")
    meta.expect(scheduler + "enable_chunked_prefill", True)
    meta.expect(parallel + "pipeline_parallel_size", 1)
    meta.expect(parallel + "decode_context_parallel_size", 1)
    meta.expect(parallel + "prefill_context_parallel_size", 1)
    meta.expect(parallel + "is_moe_model", False)
    meta.expect(resolved + "speculative_config", None)
    meta.expect(resolved + "lora_config", None)
    caching = resolved + "cache_config.enable_prefix_caching"
    threshold = scheduler + "long_prefill_token_threshold"
    decodes, mixed = _graph_modes(meta)
    one = {"tensor_parallel_size": 1, "data_parallel_size": 1}
    for key in one:
        if meta.has(parallel + key) or meta.has(given + key):
            one[key] = meta.whole(parallel + key, given + key)
    blocks = meta.whole("kv_cache.num_gpu_blocks", resolved + "cache_config.num_gpu_blocks")
    block_tokens = meta.whole("kv_cache.block_size", resolved + "cache_config.block_size")
    max_sequences = meta.whole(scheduler + "max_num_seqs", given + "max_num_seqs")
    max_tokens = meta.whole(scheduler + "max_num_batched_tokens", given + "max_num_batched_tokens")
    longest = (resolved + "model_config.max_model_len", given + "max_model_len")
    # The front end, which is recorded, adds up what its engines report (vllm/v1/engine/utils.py and core_client.py).
    blocks //= one["data_parallel_size"]
    return EngineSettings(
        model=str(meta.get("model")),
        version=str(meta.get("vllm_version")) if meta.has("vllm_version") else "of unknown version",
        kv_blocks=blocks,
        block_tokens=block_tokens,
        max_sequences=max_sequences,
        max_tokens=max_tokens,
        # A model's own longest sequence that was not recorded is taken as longer than the blocks hold.
        max_sequence_tokens=meta.whole(*longest) if any(map(meta.has, longest)) else blocks * block_tokens,
        prefix_caching=meta.flag(caching if meta.has(caching) else "kv_cache.enable_prefix_caching", True),
        async_scheduling=meta.flag(scheduler + "async_scheduling", _since(meta, *ASYNC_SINCE)),
        reserve_full_prompt=meta.flag(scheduler + "scheduler_reserve_full_isl", _since(meta, *RESERVE_SINCE)),
        graph_sizes=_graph_sizes(meta, max_sequences, max_tokens),
        graphs_for_decodes=decodes,
        graphs_for_mixed=mixed,
        tp=one["tensor_parallel_size"],
        replicas=one["data_parallel_size"],
        most_prompt_tokens=_whole(f"{meta.path}: {threshold}", meta.get(threshold), 0)
        if meta.has(threshold)
        else 0,
    )


ASYNC_SINCE = (0, 14)
"""vLLM that schedules one iteration ahead unless told otherwise (release notes of 0.14.0)."""
RESERVE_SINCE = (0, 19)
"""vLLM that admits a prompt when all of it fits, not its first chunk alone (pull request 37307)."""


def _since(meta: _Node, major: int, minor: int) -> bool:
    """Whether the engine is at least of this version; one of unknown version is taken as older."""
    text = str(meta.get("vllm_version")) if meta.has("vllm_version") else ""
    numbers = [int(part) for part in text.split(".")[:2] if part.isdigit()]
    return len(numbers) == 2 and numbers >= [major, minor]


SIZES_SINCE = (0, 12)
"""vLLM whose batch sizes with graphs are multiples of 16 from 256 on, not of 8."""


def _graph_sizes(meta: _Node, max_sequences: int, max_tokens: int) -> tuple[int, ...]:
    """Batch sizes with a CUDA graph. Recorders write a long list as '<list len=83>'; then, and where there is
    none, vLLM's own choice up to the largest (VllmConfig._set_cudagraph_sizes), by the length or by the version."""
    compilation = "resolved_config.compilation_config."
    key = compilation + "cudagraph_capture_sizes"
    sizes = meta.get(key) if meta.has(key) else "<list>"
    where = f"{meta.path}: cudagraph_capture_sizes"
    if isinstance(sizes, list):
        return tuple(_whole(where, size) for size in sizes)
    if not (isinstance(sizes, str) and sizes.startswith("<list")):
        raise ValueError(f"{where} must be a list, got {sizes!r}")
    largest = 0
    for name in ("max_cudagraph_capture_size", "max_capture_size"):
        if not largest and meta.has(compilation + name):
            largest = _whole(f"{meta.path}: {name}", meta.get(compilation + name), 0)
    largest = min(largest or min(2 * max_sequences, 512), max_tokens)
    now, before = (
        tuple(n for n in (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, step)) if n <= largest)
        for step in (16, 8)
    )
    length = sizes.removeprefix("<list len=").rstrip(">")
    if length.isdigit():
        return before if int(length) == len(before) else now
    return now if not meta.has("vllm_version") or _since(meta, *SIZES_SINCE) else before


GRAPH_MODES = {
    "NONE": (0, 0),
    "PIECEWISE": (1, 1),
    "FULL": (2, 2),
    "FULL_DECODE_ONLY": (2, 0),
    "FULL_AND_PIECEWISE": (2, 1),
}
"""vLLM's name -> mode of batches of decodes alone, and of others: 0 none, 1 piecewise, 2 full."""


def _graph_modes(meta: _Node) -> tuple[bool, bool]:
    """Whether batches of decodes alone, and others, run as CUDA graphs and are padded to their sizes."""
    eager = "resolved_config.model_config.enforce_eager"
    if meta.flag(eager if meta.has(eager) else "engine_kwargs.enforce_eager", False):
        return False, False
    key = "resolved_config.compilation_config.cudagraph_mode"
    mode = meta.get(key) if meta.has(key) else "FULL_AND_PIECEWISE"
    if isinstance(mode, str):
        mode = list(GRAPH_MODES.get(mode.rpartition(".")[2].upper(), (mode,)))
    pair = mode if isinstance(mode, list) else [mode, mode]
    if len(pair) != 2 or any(isinstance(m, bool) or m not in (0, 1, 2) for m in pair):
        raise ValueError(
            f"{meta.path}: {key} must be 0, 1 or 2, or a pair of these, or one of {', '.join(GRAPH_MODES)}, "
            f"got {meta.get(key)!r}"
        )
    return pair[0] != 0, pair[1] != 0


def _prompts(path: Path, meta: _Node) -> list[list[int]]:
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
    arrival, queued, first, last = (_number(f"{where}: {key}", row[key]) for key in keys[:4])
    if not queued <= first <= last:
        raise ValueError(
            f"{where}: queued_ts, first_token_ts and last_token_ts must not decrease, "
            f"got {queued}, {first}, {last}"
        )
    prompt, output = (_whole(f"{where}: {key}", row[key]) for key in keys[4:])
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
            columns[name].append(_number(f"{where}: {name}", row[name]))
    if not columns["t"]:
        return None
    if (np.diff(columns["t"]) <= 0).any():
        raise ValueError(f"{path}: t must rise from row to row")
    return {name: np.array(values) for name, values in columns.items()}


MOST = 100_000_000
"""Of tokens, blocks and sequences; a list of so many is still held."""


def _whole(where: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
        raise ValueError(f"{where} must be a whole number from {least} to {MOST}, got {value!r}")
    return value


def _number(where: str, value: object) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} must be a finite number, got {value!r}")
    return number
