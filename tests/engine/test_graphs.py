"""Padded, repeated decodes give what decodes as they are give, and padding touches nothing.

On the CPU a captured iteration is its Python body, run again on the same buffers: all that a CUDA graph adds
is that the kernels are launched at once.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine.graphs
from engine.graphs import Body, CudaCapture, Decodes, Graphs, Shape, key_sizes, sequence_sizes
from engine.launching import GRAPHS, Launching, LaunchSettings
from engine.lora import AdapterBank
from engine.parallel import Group
from engine.sampling import Sampling
from sim.core.request import Request
from tests.engine.tiny import (
    CONFIGS,
    EngineRun,
    JobSetup,
    adapter_of,
    bank_of,
    put,
    sample_of,
    tiny_model,
    tokens_of,
)
from tests.support import LinearCost, build_policy, limits_of

BLOCK = 4
WIDTH = 500
"""Of the tests' block table: longer than the first size of keys."""


class Counting:
    """Captures that are the body itself; counts them and their replays."""

    def __init__(self) -> None:
        self.captured = self.replayed = self.made = 0

    def __call__(self) -> Any:
        self.made += 1
        return self.capture

    def capture(self, body: Body) -> Body:
        self.captured += 1
        body()  # what a capture does once to compile: only padding is there then

        def replay() -> torch.Tensor:
            self.replayed += 1
            return body()

        return replay


def prompts() -> dict[int, Any]:
    found = {}
    for id in range(11):
        prompt = tokens_of(3 + (id * 23) % 58, seed=id)
        request = Request(
            id, id * 0.004, len(prompt), 3 + (id * 7) % 18, "default", (None, "wide", "job")[id % 3]
        )
        found[id] = (request, prompt, Sampling(temperature=0.7 * (id % 2), top_k=30, seed=id))
    return found


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_run_with_captures_equals_one_without(family: str, lookahead: int) -> None:
    """Requests of three adapters come, go and are preempted, while a job trains one of them."""

    def run(launching: Launching) -> EngineRun:
        job = JobSetup(
            samples=[sample_of(20 + 7 * i, seed=i) for i in range(8)],
            adapter=adapter_of(family, 4, ["q_proj", "o_proj", "down_proj"]),
            max_tokens=80,
        )
        return EngineRun(
            tiny_model(family, torch.float64),
            build_policy("coserving", predictor=LinearCost(optimizer_s=0.0), budget_s=0.02),
            limits_of(kv_tokens=112, block_tokens=BLOCK, max_tokens=32, lookahead=lookahead),
            prompts(),
            adapters={"wide": adapter_of(family, 8, ["k_proj", "gate_proj"], seed=3)},
            jobs=[job],
            launching=launching,
        )

    counting = Counting()
    ours, plain = run(Launching(captures=counting)), run(Launching())
    assert any(plan.preempted for plan in plain.policy.plans)
    assert counting.replayed > 20
    assert counting.captured < counting.replayed
    assert ours.policy.plans == plain.policy.plans
    assert ours.tokens == plain.tokens
    for id, rows in plain.logits.items():
        torch.testing.assert_close(torch.stack(ours.logits[id]), torch.stack(rows), rtol=1e-9, atol=1e-9)
    assert [s.loss for s in ours.engine.steps] == pytest.approx(
        [s.loss for s in plain.engine.steps], rel=1e-9
    )


def graphs_of(bank: AdapterBank | None, captures: Any, slots: int = 12) -> tuple[Graphs, Any]:
    """Captures of a model whose pages hold noise; row s of the table has blocks of its own."""
    model = tiny_model("llama", torch.float64)
    pages = model.new_pages(slots * 8, BLOCK)
    generator = torch.Generator().manual_seed(5)
    for part in pages:
        part.normal_(generator=generator)
    table = np.zeros((slots, WIDTH), np.int32)
    table[:, :8] = np.random.default_rng(6).permutation(slots * 8).reshape(slots, 8)
    last_token = torch.arange(slots, dtype=torch.int32)
    return (
        Graphs(
            model=model,
            pages=pages,
            bank=bank,
            last_token=last_token,
            table=table,
            block_tokens=BLOCK,
            captures=captures,
        ),
        pages,
    )


def decodes(count: int, adapters: bool = False) -> Decodes:
    random = np.random.default_rng(count)
    slot = np.sort(random.integers(-1, 2, count)) if adapters else np.full(count, -1)
    return Decodes(
        slots=random.permutation(12)[:count].astype(np.int32),
        contexts=random.integers(0, 31, count).astype(np.int32),
        adapters=slot.astype(np.int32),
    )


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9, 12])
def test_only_the_pages_of_the_new_tokens_change(count: int) -> None:
    graphs, pages = graphs_of(None, Counting())
    before = [part.clone() for part in pages]
    given = decodes(count)
    graphs.run(given)
    block = graphs.table[given.slots, given.contexts // BLOCK]
    own = torch.zeros(before[0].shape[1:3], dtype=torch.bool)
    own[block, given.contexts % BLOCK] = True
    for part, old in zip(pages, before, strict=True):
        changed = (part != old).flatten(3).any(3)
        assert torch.equal(changed, own.expand_as(changed))


def test_capturing_changes_nothing() -> None:
    graphs, pages = graphs_of(None, Counting())
    before = [part.clone() for part in pages]
    last = graphs.last_token.clone()
    assert graphs.warm_up() == len(sequence_sizes(12)) * len(key_sizes(WIDTH, BLOCK))
    assert all(torch.equal(part, old) for part, old in zip(pages, before, strict=True))
    assert torch.equal(graphs.last_token, last)


def test_without_requests_that_name_adapters_only_the_base_model_is_captured() -> None:
    captures = Counting()
    graphs, _ = graphs_of(graph_bank(2), captures)
    shapes = len(sequence_sizes(12)) * len(key_sizes(WIDTH, BLOCK))
    assert graphs.warm_up(adapters=False) == shapes
    assert graphs.warm_up() == captures.captured == 2 * shapes


def graph_bank(slots: int) -> AdapterBank:
    return bank_of("llama", ("q_proj", "down_proj"), 4, torch.float64, slots)


@pytest.mark.parametrize("count", [1, 3, 8, 11])
def test_each_row_is_what_it_is_alone(count: int) -> None:
    """Whatever is in the other rows, in the padding, and was in the buffers before."""
    bank = graph_bank(2)
    for n in range(2):
        put(bank, "llama", adapter_of("llama", 2 + n, ["q_proj", "down_proj"], seed=n))
    graphs, pages = graphs_of(bank, Counting())
    graphs.run(decodes(12, adapters=True))
    start = [part.clone() for part in pages]
    given = decodes(count, adapters=True)
    together = graphs.run(given)[0].clone()
    for n in range(count):
        for part, old in zip(pages, start, strict=True):
            part.copy_(old)
        alone, slots = graphs.run(Decodes(*[part[n : n + 1] for part in given]))
        torch.testing.assert_close(alone[0], together[n], rtol=1e-9, atol=1e-9)
        assert slots.tolist() == [given.slots[n]]


def test_a_bank_that_moved_makes_captures_void() -> None:
    bank, counting = graph_bank(1), Counting()
    put(bank, "llama", adapter_of("llama", 4, ["q_proj"], seed=1))
    graphs, _ = graphs_of(bank, counting)
    given = Decodes(*[np.array([n], np.int32) for n in (3, 5, 0)])
    before = graphs.run(given)[0].clone()
    graphs.run(given)
    assert (counting.captured, counting.made) == (1, 1)
    old = [t for (s,) in bank.shelves.values() for t in (s.a, s.b, s.a_ranks)] + [bank.scales]
    put(bank, "llama", adapter_of("llama", 4, ["q_proj"], seed=2))
    for tensor in old:
        tensor.fill_(-1)  # the memory is somebody else's now
    torch.testing.assert_close(graphs.run(given)[0], before)
    assert (counting.captured, counting.made) == (2, 2)


def test_shapes_are_the_smallest_that_fit() -> None:
    graphs, _ = graphs_of(None, Counting())
    assert sequence_sizes(12) == [1, 2, 4, 8, 12]
    assert key_sizes(WIDTH, BLOCK) == [1024, 2000]

    def shape(count: int, longest: int) -> Shape:
        contexts = np.full(count, 3, np.int32)
        contexts[-1] = longest
        return graphs.shape(Decodes(np.arange(count, dtype=np.int32), contexts, np.full(count, -1, np.int32)))

    assert shape(1, 3) == Shape(1, 1024, False)
    assert shape(3, 1023) == Shape(4, 1024, False)
    assert shape(9, 1024) == Shape(12, 2000, False)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 8, 100, 256, 1000])
def test_sizes_rise_to_the_most_there_may_be(most: int) -> None:
    sizes = sequence_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert all(b <= 2 * a for a, b in itertools.pairwise(sizes))
    assert len(sizes) < 50


@pytest.mark.parametrize(("width", "block"), [(1, 16), (64, 16), (65, 16), (8192, 16), (100, 24)])
def test_key_sizes_are_whole_blocks_up_to_the_longest(width: int, block: int) -> None:
    sizes = key_sizes(width, block)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == width * block
    assert all(size % block == 0 for size in sizes)


def settings() -> Iterator[LaunchSettings]:
    for graphs in GRAPHS:
        for streams in (1, 2):
            yield LaunchSettings(graphs=graphs, streams=streams)


@pytest.mark.parametrize("chosen", list(settings()), ids=str)
def test_on_the_cpu_kernels_follow_each_other(chosen: LaunchSettings) -> None:
    model = tiny_model("llama")
    if chosen.graphs == "on":
        with pytest.raises(ValueError, match=r"graphs=on: graphs need a CUDA device"):
            chosen.on(model)
    else:
        assert chosen.on(model) == Launching()


@pytest.mark.parametrize("streams", [1, 2])
def test_tensor_parallel_models_launch_one_by_one(streams: int) -> None:
    model: Any = SimpleNamespace(device=torch.device("cuda"), group=Group(1, 2))
    assert LaunchSettings(streams=streams).on(model) == Launching()
    with pytest.raises(ValueError, match="spread over 2 GPUs"):
        LaunchSettings(graphs="on", streams=streams).on(model)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"graphs": "yes"}, "auto, on, off"), ({"streams": 3}, "1 or 2")]
)
def test_unknown_choices_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaunchSettings(**wrong)


class Inputs(TorchDispatchMode):
    """The memory that operations inside read and did not make, kept so that nobody else gets it."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, Any] = {}
        self._made: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.read |= {k: v for k, v in memory((args, kwargs)).items() if k not in self._made}
        self._made |= {k: v for k, v in memory(result).items() if k not in self.read}
        return result


def memory(value: Any) -> dict[int, Any]:
    """What the tensors in `value` lie in, by its identity."""
    found = [leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return {storage._cdata: storage for storage in found}


def test_what_a_capture_reads_outlives_it() -> None:
    """A CUDA graph holds addresses, not tensors: nothing else may be given their memory."""
    read: dict[int, Any] = {}

    def capture(body: Body) -> Body:
        with Inputs() as inputs:
            out = body()
        read.update(inputs.read)
        read.update(memory([cell.cell_contents for cell in body.__closure__ or ()]))
        return lambda: out

    bank = graph_bank(2)
    put(bank, "llama", adapter_of("llama", 4, ["q_proj", "down_proj"], seed=0))
    graphs, _ = graphs_of(bank, lambda: capture)
    graphs.warm_up()
    gc.collect()
    alive = memory([t for t in gc.get_objects() if type(t) is torch.Tensor])
    assert len(read) > 20
    assert read.keys() <= alive.keys()


class Products:
    """`torch.cuda` as far as a capture and the workspaces of its products go: that of a stream is made by its first
    product, in the pool of the capture if there is one, and is the stream's until it is cleared."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.workspace: str | None = None
        """Where that of the stream of captures lies."""
        self.captured: list[str] = []
        """Where those lie that the captured products use."""
        self.place = "memory"
        """Where memory is taken from now."""
        self._pools = (f"pool {n}" for n in itertools.count())
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(engine.graphs, "capture_stream", lambda: stream)
        for name, value in (
            ("graph_pool_handle", lambda: next(self._pools)),
            ("current_stream", lambda: stream),
            ("stream", lambda of: nullcontext()),
            ("CUDAGraph", lambda: SimpleNamespace(replay=lambda: None)),
            ("graph", self._graph),
        ):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self._clear, raising=False)

    @contextmanager
    def _graph(self, graph: Any, *, pool: str, **given: Any) -> Iterator[None]:
        self.place = pool
        try:
            yield
        finally:
            self.place = "memory"

    def _clear(self) -> None:
        self.workspace = None

    def body(self) -> torch.Tensor:
        """A product."""
        self.workspace = self.workspace or self.place
        if self.place != "memory":
            self.captured.append(self.workspace)
        return torch.zeros(1)


def test_workspaces_of_captured_products_live_as_long_as_their_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each in the pool of its graph, where no other graph frees it, and no product outside of graphs uses it."""
    products = Products(monkeypatch)
    one, other = CudaCapture(), CudaCapture()
    for capture in (one, other, one):
        capture(products.body)
        assert products.workspace is None
    assert products.captured == ["pool 0", "pool 1", "pool 0"]


class Garbage:
    """Dead as soon as it is made, but for the collector to find out; notes where memory came from when it was found."""

    def __init__(self, products: Products, found: list[str]) -> None:
        self.itself, self.products, self.found = self, products, found

    def __del__(self) -> None:
        self.found.append(self.products.place)


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_collected_while_capturing(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """What a graph among it holds cannot be given back then: the capture would fail."""
    products, found, passes = Products(monkeypatch), [], 0

    def body() -> torch.Tensor:
        nonlocal passes
        passes += 1
        Garbage(products, found)
        kept: list[list[int]] = [[] for _ in range(100_000)]
        assert len(kept) < 10**6
        if fails and products.place != "memory":
            raise RuntimeError("out of memory")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext():
        CudaCapture()(body)
    assert gc.isenabled()
    gc.collect()
    assert (passes, found) == (2, ["memory"] * 2)
