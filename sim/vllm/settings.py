"""How a recorded vLLM was set up, as its `meta.json` says.

A setting that was not recorded is what an engine of that version does by itself; one that is not simulated is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from sim.vllm.values import Node, whole

ASYNC_SINCE = (0, 14)
"""vLLM that schedules one iteration ahead unless told otherwise (release notes of 0.14.0)."""
RESERVE_SINCE = (0, 19)
"""vLLM that admits a prompt when all of it fits, not its first chunk alone (pull request 37307)."""
SIZES_SINCE = (0, 12)
"""vLLM whose batch sizes with graphs are multiples of 16 from 256 on, not of 8."""
GRAPH_MODES = {
    "NONE": (0, 0),
    "PIECEWISE": (1, 1),
    "FULL": (2, 2),
    "FULL_DECODE_ONLY": (2, 0),
    "FULL_AND_PIECEWISE": (2, 1),
}
"""vLLM's name -> mode of batches of decodes alone, and of others: 0 none, 1 piecewise, 2 full."""


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


def engine_settings(meta: Node) -> EngineSettings:
    """Of `meta.json`. ValueError for a setting that is not simulated."""
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
        most_prompt_tokens=whole(f"{meta.path}: {threshold}", meta.get(threshold), 0)
        if meta.has(threshold)
        else 0,
    )


def _since(meta: Node, major: int, minor: int) -> bool:
    """Whether the engine is at least of this version; one of unknown version is taken as older."""
    text = str(meta.get("vllm_version")) if meta.has("vllm_version") else ""
    numbers = [int(part) for part in text.split(".")[:2] if part.isdigit()]
    return len(numbers) == 2 and numbers >= [major, minor]


def _graph_sizes(meta: Node, max_sequences: int, max_tokens: int) -> tuple[int, ...]:
    """Batch sizes with a CUDA graph. Recorders write a long list as '<list len=83>'; then, and where there is
    none, vLLM's own choice up to the largest (VllmConfig._set_cudagraph_sizes), by the length or by the version."""
    compilation = "resolved_config.compilation_config."
    key = compilation + "cudagraph_capture_sizes"
    sizes = meta.get(key) if meta.has(key) else "<list>"
    where = f"{meta.path}: cudagraph_capture_sizes"
    if isinstance(sizes, list):
        return tuple(whole(where, size) for size in sizes)
    if not (isinstance(sizes, str) and sizes.startswith("<list")):
        raise ValueError(f"{where} must be a list, got {sizes!r}")
    largest = 0
    for name in ("max_cudagraph_capture_size", "max_capture_size"):
        if not largest and meta.has(compilation + name):
            largest = whole(f"{meta.path}: {name}", meta.get(compilation + name), 0)
    largest = min(largest or min(2 * max_sequences, 512), max_tokens)
    now, before = (
        tuple(n for n in (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, step)) if n <= largest)
        for step in (16, 8)
    )
    length = sizes.removeprefix("<list len=").rstrip(">")
    if length.isdigit():
        return before if int(length) == len(before) else now
    return now if not meta.has("vllm_version") or _since(meta, *SIZES_SINCE) else before


def _graph_modes(meta: Node) -> tuple[bool, bool]:
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
