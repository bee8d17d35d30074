"""Time every kernel on production shapes against its floor and against torch, or Liger-Kernel where it says so.

The floor of a shape is the larger of its least bytes over the device's measured copy bandwidth and
its arithmetic over its measured matrix rate; no version runs much faster. Inputs rotate among copies
that do not fit the cache together, and a sample of calls replays as a CUDA graph, so that launch gaps
and cached data stay out of the numbers. Results are checked before they are timed.

    python tests/benchmarks/kernels.py runs/kernels            # needs a GPU, some three minutes
    python tests/benchmarks/kernels.py runs/kernels --only decode --tiles
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

import engine.kernels.attention_backward as backward_file
import engine.kernels.paged_attention as attention_file
from engine.elementwise import rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward
from engine.graphs import capture_stream
from engine.kernels.attention_backward import Tiles, attention_backward, attention_backward_reference
from engine.kernels.dropout import dropout
from engine.kernels.grouped_lora import grouped_lora, grouped_lora_reference
from engine.kernels.jit import shared_bytes
from engine.kernels.lora_weight_grad import lora_weight_grad
from engine.kernels.loss import linear_cross_entropy
from engine.kernels.paged_attention import paged_attention, paged_attention_reference
from engine.kernels.paged_keys import Tile
from engine.kernels.write_kv import write_kv

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16  # Llama-3.1-8B
HIDDEN, MLP, EPS = 4096, 14336, 1e-5
SCALE = HEAD_DIM**-0.5
SAMPLES, CALLS = 15, 8
ROTATE_BYTES = 256 * 2**20
"""More than any cache: an H200 has 60 MB of L2."""

Call = Callable[[], object]
Install = tuple[Any, str, Callable[..., Any]]
"""Module, name and replacement of a function that chooses tiles."""


class Row(NamedTuple):
    """One timed shape; None where there is nothing to compare with."""

    case: str
    variant: str
    median_s: float
    low_s: float
    high_s: float
    floor_s: float
    bound: str
    torch_s: float | None
    error: float | None
    """|out - reference| / |reference|, the reference computed in float32."""


class Case(NamedTuple):
    """A shape: `make` builds fresh inputs and returns the call and torch's equal, `check` its error."""

    name: str
    bytes_moved: float
    flops: float
    make: Callable[[], tuple[Call, Call | None]]
    check: Callable[[], float] | None
    tile: str
    """Whose tiles it exercises: decode, chunk, backward, or nobody's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="where kernels.json is written")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--tiles", action="store_true", help="also time other tile sizes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("timing kernels needs a CUDA device")
    torch.manual_seed(0)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bandwidth_bytes_s, rate_flops = ceilings()
    print(f"copy {bandwidth_bytes_s / 1e12:.2f} TB/s, bf16 product {rate_flops / 1e12:.0f} TFLOP/s")
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "copy_bandwidth_bytes_s": bandwidth_bytes_s,
        "matrix_rate_flops": rate_flops,
    }
    rows: list[Row] = []
    failed = 0
    for case in cases():
        if arguments.only not in case.name:
            continue
        for variant, install in tile_variants(case.tile) if arguments.tiles else [("chosen", None)]:
            try:
                with tiles(install):
                    rows.append(time_case(case, variant, bandwidth_bytes_s, rate_flops))
            except Exception as error:  # of one kernel, or of what it is held against: the others go on
                failed += 1
                print(
                    f"{case.name:38} {variant:26} {type(error).__name__}: {error}".split("\n")[0], flush=True
                )
                continue
            finally:
                torch.cuda.empty_cache()
            print_row(rows[-1], header=len(rows) == 1)
            # After each: who is stopped midway leaves what was measured.
            found = {**record, "rows": [row._asdict() for row in rows]}
            partial = arguments.folder / ".kernels.json.partial"
            partial.write_text(json.dumps(found, indent=1) + "\n")
            partial.replace(arguments.folder / "kernels.json")
    if failed:
        raise SystemExit(f"{failed} of {failed + len(rows)} could not be timed")


def ceilings() -> tuple[float, float]:
    """Measured bytes/s of a large copy (read + written) and FLOP/s of a large bf16 product."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy_s = statistics.median(time_calls([lambda: target.copy_(source)]))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_s = statistics.median(time_calls([lambda: a @ b]))
    return 2 * source.nbytes / copy_s, 2 * 8192**3 / product_s


def time_case(case: Case, variant: str, bandwidth_bytes_s: float, rate_flops: float) -> Row:
    pairs = [case.make() for _ in range(copies(case))]
    times = time_calls([call for call, _ in pairs])
    torchs = [other for _, other in pairs if other is not None]
    # Autograd runs on the forward's stream, which a capture forbids: its launches are not hidden.
    torch_s = statistics.median(time_calls(torchs, captured=case.tile != "backward")) if torchs else None
    memory_s, compute_s = case.bytes_moved / bandwidth_bytes_s, case.flops / rate_flops
    return Row(
        case=case.name,
        variant=variant,
        median_s=statistics.median(times),
        low_s=min(times),
        high_s=max(times),
        floor_s=max(memory_s, compute_s),
        bound="memory" if memory_s > compute_s else "compute",
        torch_s=torch_s,
        error=case.check() if case.check is not None else None,
    )


def copies(case: Case) -> int:
    """Of its inputs, so many that a call finds nothing of them in the cache."""
    return int(ROTATE_BYTES // case.bytes_moved) + 1


def time_calls(calls: list[Call], captured: bool = True) -> list[float]:
    """Seconds of one call, SAMPLES times, each the mean of CALLS calls or more, replayed as a graph."""
    repeats = -(-CALLS // len(calls))

    def run() -> None:
        for _ in range(repeats):
            for call in calls:
                call()

    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs may still be under way there
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    go: Call = run
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        go = graph.replay
    go()
    times = []
    for _ in range(SAMPLES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        go()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / (repeats * len(calls)))
    return times


def cases() -> Iterator[Case]:
    for count in (1, 32, 128):
        for context in (1024, 4096):
            yield attention_case(f"decode {count} x {context}", [1] * count, [context] * count)
    mixed = [1] * 64
    yield attention_case("prefill 2048", [2048], [0])
    yield attention_case("prefill 512 after 1536", [512], [1536])
    yield attention_case("window 512 after 3500", [512], [3500])
    yield attention_case("window 64 after 3500", [64], [3500])
    yield attention_case("mixed 64 decodes, chunk, window", [*mixed, 256, 512], [1024] * 64 + [0, 3000])
    for window, start in ((512, 3500), (64, 3500), (2048, 0)):
        yield backward_case(window, start)
    yield write_case(640)
    yield lora_case("lora 128 decodes, 32 adapters r16", [4] * 32, 16)
    yield lora_case("lora 128 decodes, 32 adapters r64", [4] * 32, 64)
    yield lora_case("lora window 512 r16", [512], 16)
    yield lora_case("lora 64 adapters and window 512 r16", [*([1] * 64), 512], 16)
    yield weight_grad_case(512, 14336, 16)
    yield loss_case(512)
    yield norm_case(512)
    yield norm_backward_case(512)
    yield rotary_case(512)
    yield swiglu_case(512)
    yield swiglu_backward_case(512)
    yield dropout_case(512)


def attention_case(name: str, lengths: list[int], contexts: list[int]) -> Case:
    tokens, sequences = sum(lengths), len(lengths)
    keys = [n + c for n, c in zip(lengths, contexts, strict=True)]
    used = [-(-n // BLOCK) for n in keys]
    decodes = next((i for i, n in enumerate(lengths) if n != 1), sequences)

    def tensors() -> tuple[Any, ...]:
        order = torch.randperm(sum(used), device="cuda").int()
        tables = torch.zeros(sequences, max(used), dtype=torch.int32, device="cuda")
        at = 0
        for s, blocks in enumerate(used):
            tables[s, :blocks] = order[at : at + blocks]
            at += blocks
        pages = (random(sum(used), BLOCK, KV_HEADS, HEAD_DIM) for _ in range(2))
        start = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
        context = torch.tensor(contexts, dtype=torch.int32).cuda()
        return (random(tokens, HEADS, HEAD_DIM), *pages, tables, start, context)

    def make() -> tuple[Call, Call | None]:
        batch = tensors()

        def call() -> object:
            return paged_attention(*batch, scale=SCALE, max_keys=max(keys), decodes=decodes)

        if len(set(lengths)) > 1 or len(set(contexts)) > 1:
            return call, None
        # torch's own attention on the same numbers, contiguous and without pages: a lower bound.
        n = lengths[0]
        q = random(sequences, HEADS, n, HEAD_DIM)
        k, v = (random(sequences, KV_HEADS, keys[0], HEAD_DIM) for _ in range(2))
        mask = None if n == 1 else torch.ones(n, keys[0], dtype=torch.bool, device="cuda").tril(keys[0] - n)
        causal = contexts[0] == 0
        return call, lambda: F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if causal else mask, is_causal=causal and n > 1, enable_gqa=True
        )

    def check() -> float:
        batch = tensors()
        out, _ = paged_attention(*batch, scale=SCALE, max_keys=max(keys), decodes=decodes)
        upcast = (x.float() if x.is_floating_point() else x for x in batch)
        return error(out, paged_attention_reference(*upcast, scale=SCALE)[0])

    pairs = sum(n * (c + (n + 1) / 2) for n, c in zip(lengths, contexts, strict=True))
    moved = 2 * (2 * sum(keys) * KV_HEADS * HEAD_DIM + 2 * tokens * HEADS * HEAD_DIM)
    return Case(name, moved, 4 * pairs * HEADS * HEAD_DIM, make, check, "decode" if decodes else "chunk")


def backward_case(window: int, start: int) -> Case:
    keys = start + window
    used = -(-keys // BLOCK)

    def tensors() -> list[Any]:
        q, dout = random(window, HEADS, HEAD_DIM), random(window, HEADS, HEAD_DIM)
        pages = [random(used, BLOCK, KV_HEADS, HEAD_DIM) for _ in range(2)]
        table = torch.randperm(used, device="cuda").int()
        out, lse = paged_attention(
            q,
            pages[0],
            pages[1],
            table[None],
            torch.tensor([0, window]).int().cuda(),
            torch.tensor([start]).int().cuda(),
            scale=SCALE,
            max_keys=keys,
        )
        totals = [torch.zeros(keys, KV_HEADS, HEAD_DIM, device="cuda") for _ in range(2)]
        return [dout, q, out, lse, *pages, table, *totals]

    def make() -> tuple[Call, Call | None]:
        given = tensors()
        call = lambda: attention_backward(*given, start=start, scale=SCALE)  # noqa: E731
        if start:
            return call, None
        leaves = [random(1, h, keys, HEAD_DIM).requires_grad_() for h in (HEADS, KV_HEADS, KV_HEADS)]
        q, k, v = leaves
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        gradient = torch.randn_like(attended)
        return call, lambda: torch.autograd.grad(attended, leaves, gradient, retain_graph=True)

    def check() -> float:
        given = tensors()
        dq = attention_backward(*given, start=start, scale=SCALE)
        upcast = [x.float() if x.dtype == torch.bfloat16 else x.clone() for x in given]
        for total in upcast[-2:]:
            total.zero_()
        wanted = attention_backward_reference(*upcast, start=start, scale=SCALE)
        pairs = ((dq, wanted), (given[-2], upcast[-2]), (given[-1], upcast[-1]))
        return max(error(found, want) for found, want in pairs)

    pairs = window * (start + (window + 1) / 2)
    moved = 2 * (2 * keys * KV_HEADS + 4 * window * HEADS) * HEAD_DIM + 16 * keys * KV_HEADS * HEAD_DIM
    # Seven products of a query-key pair: the scores and dp are needed by dq and by dk, dv.
    flops = 14 * pairs * HEADS * HEAD_DIM
    return Case(f"backward {window} after {start}", moved, flops, make, check, "backward")


def write_case(tokens: int) -> Case:
    def make() -> tuple[Call, Call | None]:
        k, v = random(tokens, KV_HEADS, HEAD_DIM), random(tokens, KV_HEADS, HEAD_DIM)
        k_pages, v_pages = (random(4096, BLOCK, KV_HEADS, HEAD_DIM) for _ in range(2))
        slots = torch.randperm(4096 * BLOCK, device="cuda")[:tokens]

        def other() -> None:
            k_pages.flatten(0, 1).index_copy_(0, slots, k)
            v_pages.flatten(0, 1).index_copy_(0, slots, v)

        return lambda: write_kv(k, v, k_pages, v_pages, slots), other

    return Case(f"write {tokens}", 8 * tokens * KV_HEADS * HEAD_DIM, 0.0, make, None, "")


def lora_case(name: str, lengths: list[int], rank: int) -> Case:
    wide, tokens, segments = 4096, sum(lengths), len(lengths)

    def tensors() -> list[Any]:
        return [
            random(tokens, wide),
            random(tokens, wide),
            random(segments, rank, wide) / 64,
            random(segments, wide, rank) / 8,
            torch.full((segments,), rank).int().cuda(),
            torch.full((segments,), 2.0).cuda(),
            torch.tensor([0, *lengths]).cumsum(0).int().cuda(),
            torch.arange(segments).int().cuda(),
        ]

    def make() -> tuple[Call, Call | None]:
        given = tensors()
        y, x, a, b = given[:4]
        other = (lambda: y.addmm_(x @ a[0].T, b[0].T, alpha=2.0)) if segments == 1 else None
        return lambda: grouped_lora(*given), other

    def check() -> float:
        given = tensors()
        upcast = [z.float() if z.is_floating_point() else z for z in given]
        upcast[0] = upcast[0].clone()
        grouped_lora(*given)
        grouped_lora_reference(*upcast)
        return error(given[0], upcast[0])

    moved = 2 * (3 * tokens * wide + 2 * segments * rank * wide)
    return Case(name, moved, 4 * tokens * wide * rank, make, check, "")


def weight_grad_case(tokens: int, wide: int, rank: int) -> Case:
    def make() -> tuple[Call, Call | None]:
        grad, small = torch.zeros(rank, wide, device="cuda"), torch.randn(tokens, rank, device="cuda")
        x = random(tokens, wide)
        return lambda: lora_weight_grad(grad, small, x, 2.0), lambda: small.bfloat16().T @ x

    moved = 2 * tokens * wide + 8 * rank * wide + 4 * tokens * rank
    return Case(f"weight grad {tokens} x {wide} r{rank}", moved, 2 * tokens * wide * rank, make, None, "")


def loss_case(tokens: int) -> Case:
    hidden_size, vocabulary = 4096, 128256

    def make() -> tuple[Call, Call | None]:
        hidden, weight = random(tokens, hidden_size), random(vocabulary, hidden_size) / 64
        labels = torch.randint(0, vocabulary, (tokens,), device="cuda")
        return lambda: linear_cross_entropy(hidden, weight, labels), None

    moved = 2 * (2 * vocabulary * hidden_size + 2 * tokens * hidden_size)
    return Case(f"loss {tokens}", moved, 4 * tokens * hidden_size * vocabulary, make, None, "")


def norm_case(tokens: int) -> Case:
    """Liger's norm beside torch's."""

    def make() -> tuple[Call, Call | None]:
        x, weight = random(tokens, HIDDEN), random(HIDDEN)
        return lambda: rms_norm(x, weight, EPS), lambda: F.rms_norm(x, (HIDDEN,), weight, EPS)

    def check() -> float:
        x, weight = random(tokens, HIDDEN), random(HIDDEN)
        return error(rms_norm(x, weight, EPS).cpu(), rms_norm(x.float().cpu(), weight.float().cpu(), EPS))

    return Case(f"norm {tokens}, beside torch's", 4 * tokens * HIDDEN, 0.0, make, check, "")


def norm_backward_case(tokens: int) -> Case:
    """Ours beside Liger's, which needs the forward's 1 / rms."""
    from liger_kernel.ops.rms_norm import rms_norm_backward as ligers
    from liger_kernel.ops.rms_norm import rms_norm_forward

    def make() -> tuple[Call, Call | None]:
        dy, x, weight = random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN)

        def other() -> object:
            _, rows, rstd, block, warps, mode = rms_norm_forward(x, weight, EPS, 0.0, "gemma", None)
            return ligers(dy, rows, weight, rstd, 0.0, mode, block, warps, False, None, needs_dw=False)

        return lambda: rms_norm_backward(dy, x, weight, EPS), other

    def check() -> float:
        given = random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN)
        wanted = rms_norm_backward(*(tensor.float().cpu() for tensor in given), EPS)
        return error(rms_norm_backward(*given, EPS).cpu(), wanted)

    return Case(f"norm backward {tokens}, beside Liger's", 6 * tokens * HIDDEN, 0.0, make, check, "")


def rotary_case(tokens: int) -> Case:
    """Queries and keys of one projection, ours beside Liger's, which copies them first."""
    from liger_kernel.ops.rope import rope_forward

    def tensors() -> list[torch.Tensor]:
        fused = random(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)
        angle = torch.rand(tokens, 1, HEAD_DIM // 2, device="cuda") * 6
        return [fused[:, : HEADS + KV_HEADS], angle.cos(), angle.sin()]

    def make() -> tuple[Call, Call | None]:
        both, cos, sin = tensors()
        q, k = torch.split(both[None].transpose(1, 2), (HEADS, KV_HEADS), dim=1)
        whole = [torch.cat((part, part), dim=2).transpose(0, 1).contiguous() for part in (cos, sin)]
        return lambda: rotate(both, cos, sin), lambda: rope_forward(q, k, *whole)

    def check() -> float:
        both, cos, sin = tensors()
        return error(rotate(both, cos, sin).cpu(), rotate(both.float().cpu(), cos.cpu(), sin.cpu()))

    moved = 4 * tokens * (HEADS + KV_HEADS) * HEAD_DIM + 4 * tokens * HEAD_DIM
    return Case(f"rotary {tokens}, beside Liger's", moved, 0.0, make, check, "")


def swiglu_case(tokens: int) -> Case:
    """Liger's SwiGLU beside torch's."""

    def make() -> tuple[Call, Call | None]:
        gate, up = random(tokens, 2 * MLP).chunk(2, dim=1)
        return lambda: swiglu(gate, up), lambda: F.silu(gate) * up

    def check() -> float:
        gate, up = random(tokens, 2 * MLP).chunk(2, dim=1)
        return error(swiglu(gate, up).cpu(), swiglu(gate.float().cpu(), up.float().cpu()))

    return Case(f"swiglu {tokens}, beside torch's", 6 * tokens * MLP, 0.0, make, check, "")


def swiglu_backward_case(tokens: int) -> Case:
    """Ours beside Liger's for the fused product."""
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward

    def make() -> tuple[Call, Call | None]:
        gate_up, d_active = random(tokens, 2 * MLP), random(tokens, MLP)
        gate, up = gate_up.chunk(2, dim=1)

        def call() -> object:
            return swiglu_backward(d_active, gate, up)

        return call, lambda: swiglu_fused_gate_up_backward(gate_up, d_active)

    def check() -> float:
        given = [random(tokens, MLP) for _ in range(3)]
        wanted = swiglu_backward(*(tensor.float().cpu() for tensor in given))
        return error(swiglu_backward(*given).cpu(), wanted)

    return Case(f"swiglu backward {tokens}, beside Liger's", 10 * tokens * MLP, 0.0, make, check, "")


def dropout_case(tokens: int) -> Case:
    """Ours, whose mask is made again where it is wanted, beside torch's, which keeps one."""

    def make() -> tuple[Call, Call | None]:
        x = random(tokens, MLP)
        return lambda: dropout(x, 0.1, 7, 0), lambda: F.dropout(x, 0.1)

    def check() -> float:
        x = random(tokens, MLP)
        return error(dropout(x, 0.1, 7, 0).cpu(), dropout(x.float().cpu(), 0.1, 7, 0))

    return Case(f"dropout {tokens}, beside torch's", 4 * tokens * MLP, 0.0, make, check, "")


@contextmanager
def tiles(install: Install | None) -> Iterator[None]:
    """While it lasts, `install` decides the tiles."""
    if install is None:
        yield
        return
    file, name, replacement = install
    original = getattr(file, name)
    try:
        _choose(file, name, replacement)
        yield
    finally:
        _choose(file, name, original)


def _choose(file: Any, name: str, function: Callable[..., Any]) -> None:
    """Let `function` decide the tiles, also of launches that were made before."""
    setattr(file, name, function)
    for launcher in (attention_file._parts, backward_file._pair):
        launcher.cache_clear()


def tile_variants(kind: str) -> list[tuple[str, Install | None]]:
    """The chosen tiles and others that compile without many spills (see engine.kernels.hopper)."""
    found: list[tuple[str, Install | None]] = [("chosen", None)]
    now = backward_file.backward_tiles(torch.bfloat16, shared_bytes(torch.device("cuda", 0)))

    def add(file: Any, function: str, tile: Tile, name: str = "", choice: Tile | Tiles | None = None) -> None:
        replacement = tile if choice is None else choice
        found.append((f"{name}{tuple(tile)}", (file, function, lambda *_: replacement)))

    if kind == "decode":
        for keys, warps, stages in ((64, 4, 3), (32, 4, 5), (128, 4, 5), (64, 2, 5), (64, 8, 5)):
            add(attention_file, "decode_tile", Tile(16, keys, warps, stages))
    if kind == "chunk":
        for tile in (Tile(128, 64, 8, 3), Tile(128, 128, 8, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 5)):
            add(attention_file, "chunk_tile", tile)
    if kind == "backward":
        for tile in (Tile(64, 128, 8, 2), Tile(32, 128, 8, 3), Tile(64, 64, 8, 3), Tile(32, 64, 4, 3)):
            add(backward_file, "backward_tiles", tile, "dkv", Tiles(now.dq, tile))
        for tile in (Tile(64, 64, 4, 3), Tile(128, 64, 8, 5), Tile(128, 32, 8, 5)):
            add(backward_file, "backward_tiles", tile, "dq", Tiles(tile, now.dkv))
    return found


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def print_row(row: Row, header: bool) -> None:
    if header:
        print(
            f"{'case':38} {'variant':26} {'us':>9} {'low-high us':>17} {'floor us':>9} {'of floor':>8} "
            f"{'torch us':>9} {'error':>9}"
        )
    print(
        f"{row.case:38} {row.variant:26} {row.median_s * 1e6:9.1f} "
        f"{row.low_s * 1e6:8.1f}-{row.high_s * 1e6:8.1f} {row.floor_s * 1e6:9.1f} "
        f"{row.floor_s / row.median_s:8.0%} "
        f"{'-' if row.torch_s is None else format(row.torch_s * 1e6, '.1f'):>9} "
        f"{'-' if row.error is None else format(row.error, '.1e'):>9}",
        flush=True,
    )


if __name__ == "__main__":
    main()
