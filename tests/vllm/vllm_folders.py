"""Small run and profile folders for tests: a made-up card, and runs that our own replay has "recorded"."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from profiles.compare import timeline
from profiles.validate import cost_of
from sim.vllm.profile import read_profile
from sim.vllm.replay import Replay, replay
from sim.vllm.run import MeasuredRequests, RunFolder, read_run
from sim.vllm.settings import EngineSettings

DENSE = ("embedding", "layernorm", "qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj")


def write_profile(
    folder: Path, model: str = "meta-llama/Llama-3.1-8B", degrees: tuple[int, ...] = (1,)
) -> Path:
    """A profile with times linear in everything; several degrees have a folder each and equal times."""
    folder.mkdir()
    (folder / "meta.yaml").write_text(
        f"model: {model}\nhardware: made-up\ntp_degrees: {list(degrees)}\nskew_fit:\n  enabled: false\n"
    )
    for degree in degrees:
        own = folder if degrees == (1,) else folder / f"tp{degree}"
        own.mkdir(exist_ok=True)
        _write_times(own)
    return folder


def padded(tokens: int) -> int:
    """Batch of decodes as the graphs of `meta` compute it."""
    return next(size for size in (1, 2, 4, 8, 16, 32) if size >= tokens)


def _write_times(folder: Path) -> None:
    tokens = (1, 8, 64, 512)
    rows = [(name, n, 20 + 0.5 * n) for name in (*DENSE, "final_layernorm") for n in tokens]
    write_csv(folder / "dense.csv", ("layer", "tokens", "time_us"), rows)
    heads = [(name, n, 50 + n) for name in ("lm_head", "sampler") for n in (1, 64)]
    write_csv(folder / "per_sequence.csv", ("layer", "sequences", "time_us"), heads)
    chunks, decodes, contexts = (0, 16, 512), (0, 1, 64), (0, 16, 2048)
    points = [
        (c, b, n, k, 10 + 0.001 * c * (b + 50) + 0.01 * n * (k + 20))
        for c in chunks
        for b in (contexts if c else (0,))
        for n in decodes
        for k in (contexts[1:] if n else (0,))
        if c or n
    ]
    columns = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    write_csv(folder / "attention.csv", columns, points)


def meta(*, blocks: int = 120, async_scheduling: bool = True, caching: bool = True) -> dict[str, Any]:
    return {
        "model": "meta-llama/Llama-3.1-8B",
        "vllm_version": "0.19.0",
        "tick_seconds": 1.0,
        "kv_cache": {"num_gpu_blocks": blocks, "block_size": 16},
        "resolved_config": {
            "scheduler_config": {
                "policy": "fcfs",
                "enable_chunked_prefill": True,
                "long_prefill_token_threshold": 0,
                "max_num_seqs": 64,
                "max_num_batched_tokens": 256,
                "async_scheduling": async_scheduling,
                "scheduler_reserve_full_isl": True,
            },
            "parallel_config": {
                "data_parallel_size": 1,
                "pipeline_parallel_size": 1,
                "tensor_parallel_size": 1,
            },
            "cache_config": {"enable_prefix_caching": caching},
            "model_config": {"max_model_len": 1024, "enforce_eager": False},
            "compilation_config": {"cudagraph_mode": [2, 1], "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
            "speculative_config": None,
            "lora_config": None,
        },
    }


def record(folder: Path, profile: Path, settings: dict[str, Any], count: int = 60) -> Replay:
    """Write the run that our own replay gives for `count` random requests."""
    rng = np.random.default_rng(0)
    arrival_s = np.cumsum(rng.exponential(0.05, count))
    prompts, outputs = rng.integers(20, 400, count), rng.integers(1, 120, count)
    arrival_s -= arrival_s[0]
    write_run(folder, settings, arrival_s, arrival_s, arrival_s, arrival_s, prompts, outputs)
    run = read_run(folder)
    played = replay(run.engine, run.requests, cost_of(run, read_profile(profile, run.engine.tp)))
    stamps = (played.queued_s, played.first_token_s, played.last_token_s)
    write_run(folder, settings, arrival_s, *stamps, prompts, outputs)
    _write_ticks(folder, run.engine, run.requests, played)
    return played


def write_run(
    folder: Path,
    settings: dict[str, Any],
    arrival_s: Sequence[float] | np.ndarray[Any, Any],
    queued_s: Sequence[float] | np.ndarray[Any, Any],
    first_s: Sequence[float] | np.ndarray[Any, Any],
    last_s: Sequence[float] | np.ndarray[Any, Any],
    prompts: Sequence[int] | np.ndarray[Any, Any],
    outputs: Sequence[int] | np.ndarray[Any, Any],
) -> Path:
    """The files of a run; the two clocks start at different times."""
    folder.mkdir(exist_ok=True)
    (folder / "meta.json").write_text(json.dumps(settings))
    keys = ("arrival_time", "queued_ts", "first_token_ts", "last_token_ts", "input_toks", "output_toks")
    with (folder / "requests.jsonl").open("w") as file:
        for row in zip(arrival_s, queued_s, first_s, last_s, prompts, outputs, strict=True):
            times = [float(row[0]) + 1.75e9, *(float(t) + 4096.0 for t in row[1:4])]
            file.write(json.dumps(dict(zip(keys, [*times, int(row[4]), int(row[5])], strict=True))) + "\n")
    rows = [(1.0, 1.0, 1.0, 1, 0)]
    write_csv(folder / "timeseries.csv", TICKS, rows)
    return folder


TICKS = ("t", "prompt_throughput", "gen_throughput", "running", "waiting")


def _write_ticks(folder: Path, engine: EngineSettings, requests: MeasuredRequests, played: Replay) -> None:
    """`requests` in the order of `played`."""
    stamps = {name: getattr(played, name) for name in ("queued_s", "first_token_s", "last_token_s")}
    requests = replace(requests, **stamps)
    end_s = np.arange(1.0, np.ceil(played.last_token_s.max()) + 1)
    ones = dict.fromkeys(TICKS[1:], np.ones(len(end_s)))
    run = RunFolder(engine=engine, requests=requests, ticks={"t": end_s, **ones}, tick_s=1.0)
    line = timeline(run, played)
    names = ("prompt_tok_s", "gen_tok_s", "running", "waiting")
    rows = list(zip(line.end_s, *(line.predicted[name] for name in names), strict=True))
    write_csv(folder / "timeseries.csv", TICKS, rows)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
