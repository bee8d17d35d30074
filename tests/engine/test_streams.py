"""Finetuning beside inference gives what it gives after it, bit for bit, and no two accesses race.

`Device` stands in for `torch.cuda`: its streams and events carry vector clocks (Lamport 1978, Fidge 1988), so
it knows what is ordered and what may happen at once. `Races` watches every operation of a whole run and keeps
who touched which memory last: two accesses of which one writes must be ordered. Pages are watched one by one.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from engine.engine import Engine
from engine.kernels.attention_backward import attention_backward
from engine.kernels.paged_attention import paged_attention
from engine.kernels.write_kv import write_kv
from engine.launching import Launching, SecondStream
from engine.model import Batch
from engine.sampling import Sampling
from sim.core.finetune import Backward, Forward
from sim.core.plan import Plan
from sim.core.request import Request
from tests.engine.tiny import EngineRun, JobSetup, adapter_of, sample_of, tiny_model, tokens_of
from tests.support import build_policy, limits_of

FAMILY = "llama"
Clock = dict["Stream", int]


class Stream:
    """Operations in order; `seen[s]` is how many operations of s are sure to be done by now."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.seen: Clock = {self: 0}

    def wait_event(self, event: Event) -> None:
        self._merge(event.seen)

    def wait_stream(self, other: Stream) -> None:
        self._merge(other.seen)

    def _merge(self, seen: Clock) -> None:
        if self._device.deaf is not self:
            for stream, count in seen.items():
                self.seen[stream] = max(count, self.seen.get(stream, 0))


class Event:
    def __init__(self, device: Device) -> None:
        self._device = device
        self.seen: Clock = {}

    def record(self) -> None:
        self.seen = dict(self._device.current.seen)


class Device:
    """Streams and events as `torch.cuda` has them."""

    def __init__(self) -> None:
        self.deaf: Stream | None = None
        """A stream that waits for nothing."""
        self.main = self.current = Stream(self)

    def Stream(self) -> Stream:  # noqa: N802 - torch's name
        return Stream(self)

    def Event(self) -> Event:  # noqa: N802
        return Event(self)

    def current_stream(self) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class Races(TorchDispatchMode):
    """Records accesses of all operations inside, and those that nothing orders."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device
        self._written: dict[Any, tuple[Stream, int]] = {}
        self._read: dict[Any, Clock] = {}
        self._alive: list[Any] = []
        self.found: list[str] = []
        self.crossed: set[Any] = set()
        """Memory that one stream wrote and another touched."""
        self.streams: set[Stream] = set()
        self.beside = False
        """Whether a stream ran something that does not wait for all that another was given before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        reads, writes = [], []
        for given, value in zip(func._schema.arguments, args, strict=False):
            changed = given.alias_info is not None and given.alias_info.is_write
            (writes if changed else reads).extend(tensors(value))
        reads += tensors(kwargs)
        writes += [t for t in tensors(result) if all(self._key(t) != self._key(r) for r in reads)]
        self.step(str(func), map(self._key, reads), map(self._key, writes))
        return result

    def step(self, name: str, reads: Iterable[Any], writes: Iterable[Any]) -> None:
        """One operation on the current stream."""
        stream = self._device.current
        stream.seen[stream] += 1
        self.beside |= any(stream.seen.get(other, 0) < other.seen[other] for other in self.streams)
        self.streams.add(stream)
        reads, writes = set(reads), set(writes)
        for key in reads | writes:
            writer = self._written.get(key)
            if writer is not None and writer[0] is not stream:
                self.crossed.add(key)
                if stream.seen.get(writer[0], 0) < writer[1]:
                    self.found.append(f"{name} may come before what it needs was written")
        for key in writes:
            for reader, count in self._read.pop(key, {}).items():
                if stream.seen.get(reader, 0) < count:
                    self.found.append(f"{name} may write what is still read")
            self._written[key] = (stream, stream.seen[stream])
        for key in reads:
            self._read.setdefault(key, {})[stream] = stream.seen[stream]

    @contextmanager
    def pages(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Races]:
        """Inside, operators on pages count for the pages that they touch, not for all memory of the pages."""
        for function, watched in (
            (write_kv, self._write_kv),
            (paged_attention, self._paged_attention),
            (attention_backward, self._attention_backward),
        ):
            for name, module in list(sys.modules.items()):
                if name.startswith("engine.") and getattr(module, function.__name__, None) is function:
                    monkeypatch.setattr(module, function.__name__, watched)
        with self:
            yield self

    def _write_kv(self, k: Any, v: Any, k_pages: Any, v_pages: Any, slots: Any) -> None:
        def used() -> set[int]:
            return {slot // k_pages.shape[1] for slot in slots.tolist() if slot >= 0}

        self._apart(write_kv, (k, v), (k_pages, v_pages), (slots,), used, writes_pages=True)

    def _paged_attention(
        self, q: Any, k_pages: Any, v_pages: Any, tables: Any, start: Any, context: Any, **more: Any
    ) -> Any:
        def used() -> set[int]:
            ends = context + start.diff()
            return {
                page
                for row, end in zip(tables.tolist(), ends.tolist(), strict=True)
                for page in row[: -(-end // k_pages.shape[1])]
            }

        return self._apart(paged_attention, (q,), (k_pages, v_pages), (tables, start, context), used, **more)

    def _attention_backward(
        self,
        dout: Any,
        q: Any,
        out: Any,
        lse: Any,
        k_pages: Any,
        v_pages: Any,
        table: Any,
        dk: Any,
        dv: Any,
        **more: Any,
    ) -> Any:
        def used() -> set[int]:
            return set(table[: -(-(more["start"] + q.shape[0]) // k_pages.shape[1])].tolist())

        given = (dout, q, out, lse)
        return self._apart(
            attention_backward, given, (k_pages, v_pages), (table, dk, dv), used, changed=(dk, dv), **more
        )

    def _apart(
        self,
        function: Callable[..., Any],
        before: tuple[Any, ...],
        pages: tuple[Any, Any],
        after: tuple[Any, ...],
        used: Callable[[], set[int]],
        *,
        writes_pages: bool = False,
        changed: tuple[Any, ...] = (),
        **more: Any,
    ) -> Any:
        """Run `function` unwatched, and count its accesses by page."""
        with _disable_current_modes():
            touched = {(part.data_ptr(), page) for part in pages for page in used()}
            result = function(*before, *pages, *after, **more)
        reads = {self._key(t) for t in (*before, *after)}
        writes = {self._key(t) for t in (*changed, *tensors(result))}
        reads, writes = (reads, writes | touched) if writes_pages else (reads | touched, writes)
        self.step(function.__name__, reads, writes)
        return result

    def _key(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        self._alive.append(storage)  # so that no other memory gets its address
        return storage._cdata


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def overlapped(
    policy: str,
    mode: tuple[str, str],
    lookahead: int,
    launching: Launching,
    watch: Callable[[Engine], None] | None = None,
) -> EngineRun:
    """Requests that come and go while a job trains on a second stream, and some of them run on its adapter."""
    order, memory = mode
    prompts = {}
    for id in range(7):
        prompt = tokens_of(3 + (id * 23) % 40, seed=id)
        request = Request(id, id * 0.004, len(prompt), 6 + id, "default", (None, "wide", "job")[id % 3])
        prompts[id] = (request, prompt, Sampling(temperature=0.7 * (id % 2), seed=id))
    job = JobSetup(
        samples=[sample_of(11 + 3 * i, seed=i) for i in range(6)],
        adapter=adapter_of(FAMILY, 4, ["q_proj", "o_proj", "down_proj"]),
        order=order,
        memory=memory,
        max_tokens=32,
    )
    given = {"forward_tokens": 9} if policy == "spatial_stream" else {"token_budget": 40}
    return EngineRun(
        tiny_model(FAMILY, torch.float64),
        build_policy(policy, **given),
        limits_of(kv_tokens=192, block_tokens=4, max_tokens=64, lookahead=lookahead),
        prompts,
        adapters={"wide": adapter_of(FAMILY, 8, ["k_proj", "gate_proj"], seed=3)},
        jobs=[job],
        launching=launching,
        watch=watch,
    )


MODES = [("layer_major", "stash"), ("window_major", "recompute")]


@pytest.mark.parametrize(
    ("policy", "mode", "lookahead"),
    [
        ("spatial_stream", MODES[0], 0),
        ("spatial_stream", MODES[1], 1),
        ("coserving_static", MODES[0], 1),
        ("coserving_static", MODES[1], 0),
    ],
)
def test_nothing_races_and_results_are_those_of_one_stream(
    policy: str, mode: tuple[str, str], lookahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device()
    captures = (lambda: lambda body: body) if lookahead else None
    with Races(device).pages(monkeypatch) as races:
        ours = overlapped(policy, mode, lookahead, Launching(captures, SecondStream(device)))
    plain = overlapped(policy, mode, lookahead, Launching())

    kinds = {type(piece) for plan in plain.policy.plans if plan.overlap for piece in plan.finetune}
    assert Backward in kinds
    assert (Forward in kinds) == (policy == "spatial_stream")
    assert len(races.streams) == 2
    assert races.beside
    assert races.found == []
    # What is given back to the allocator has been used on the stream that it was taken on, and no other.
    held = {t.untyped_storage()._cdata for t in gc.get_objects() if type(t) is torch.Tensor}
    crossed = {key for key in races.crossed if not isinstance(key, tuple)}
    assert crossed
    assert crossed <= held

    assert ours.policy.plans == plain.policy.plans
    assert ours.tokens == plain.tokens
    assert len(plain.engine.steps) == 3
    assert ours.engine.steps == plain.engine.steps
    for own, other in zip(
        ours.trainers[0].masters.tensors(), plain.trainers[0].masters.tensors(), strict=True
    ):
        assert torch.equal(own, other)


@pytest.mark.parametrize("streams", [1, 2])
def test_windows_that_share_no_kernels_are_a_pass_of_their_own_after_inference(streams: int) -> None:
    passes: list[list[int]] = []
    """Tokens of each, by iteration."""

    def watch(engine: Engine) -> None:
        forward, launch = engine.model.forward, engine.launch

        def counted(batch: Batch, *given: Any) -> torch.Tensor:
            passes[-1].append(len(batch.tokens))
            return forward(batch, *given)

        def launched(plan: Plan) -> None:
            passes.append([])
            launch(plan)

        engine.model.forward, engine.launch = counted, launched  # type: ignore[method-assign]

    launching = Launching(second=SecondStream(Device()) if streams == 2 else None)
    rows = overlapped("spatial_stream", MODES[0], 0, launching, watch).recorder.iterations.arrays()
    inference, windows = rows["prefill_tokens"] + rows["decode_count"], rows["forward_tokens"]
    expected = [
        [int(n) for n in ((ours, theirs) if apart else (ours + theirs,)) if n]
        for ours, theirs, apart in zip(inference, windows, rows["overlap"], strict=True)
    ]
    assert passes == expected
    assert max(map(len, passes)) == 2


@pytest.mark.parametrize("deaf", ["main", "second"])
def test_a_wait_that_is_left_out_is_found(deaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    second = SecondStream(device)
    device.deaf = device.main if deaf == "main" else second._stream
    with Races(device).pages(monkeypatch) as races:
        overlapped("spatial_stream", MODES[0], 0, Launching(second=second))
    assert races.found
