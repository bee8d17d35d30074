"""Launching an iteration never waits for the device: the launch path of CUDA, run on tensors without memory.

The engine is told that the device `meta` has kernels, so all Python on the way to them runs as it does on a
GPU, launchers and their checks included; the kernels themselves are left out. Whatever would read a number
back has nothing to read and raises; `Waiting` looks for the copies that wait without saying so.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine.elementwise
import engine.engine
import engine.finetune
import engine.packing
import engine.sampling
from engine.driver import Driver, EngineArrivals
from engine.engine import Collected, Engine
from engine.graphs import Body
from engine.kernels.jit import Launch
from engine.launching import Launching, SecondStream
from engine.lora import Adapter
from engine.model import LayerWeights, Model, Weights
from engine.packing import Ints, Staging
from engine.sampling import Sampling
from sim.core.loop import Horizon, run_loop
from sim.core.request import Request
from sim.core.rows import Recorder
from sim.core.state import PipelineState
from tests.engine.test_streams import Device
from tests.engine.tiny import (
    CONFIGS,
    JobSetup,
    adapter_of,
    assemble_engine,
    put,
    sample_of,
    tiny_model,
    tokens_of,
)
from tests.engine.virtual import VirtualClock
from tests.support import SLOS, LinearCost, ListArrivals, build_policy, limits_of

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "repeat_interleave")
COPIES = ("copy_", "_to_copy", "index", "index_put_", "where")
DEVICE = torch.device("meta")


class Waiting(TorchDispatchMode):
    """Fails on operations that make the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        places = {tensor.device.type for tensor in given}
        if kwargs.get("device") is not None:
            places.add(torch.device(kwargs["device"]).type)
        if DEVICE.type not in places:
            return func(*args, **kwargs)
        assert name not in READS, f"{func} reads a number back"
        assert name != "scalar_tensor", "a number of the host becomes a tensor, and is copied"
        if name in ("index", "index_put_"):
            chosen = [index for index in args[1] if index is not None]
            assert all(index.dtype != torch.bool for index in chosen), f"{func} counts a mask on the host"
        if len(places) == 2 and name in COPIES:
            assert kwargs.get("non_blocking") or args[2:3] == (True,), f"{func} waits for its copy"
            if name == "_to_copy":
                return torch.empty(given[0].shape, dtype=given[0].dtype, device=kwargs["device"])
        return func(*args, **kwargs)


class Lists(TorchFunctionMode):
    """Fails on lists and numbers of the host that become tensors of the device, which dispatch cannot see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor):
            assert torch.device(kwargs.get("device") or "cpu").type == "cpu", (
                "a list becomes a device's tensor"
            )
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list) for part in index), "a list becomes an index"
        return func(*args, **kwargs)


class SomeLiger:
    """Results of the right shapes."""

    def rms_norm(self, x: torch.Tensor, *given: Any) -> tuple[torch.Tensor]:
        return (torch.empty_like(x),)

    def swiglu(self, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert gate_up.is_contiguous()
        return gate_up, gate_up[:, : gate_up.shape[1] // 2].contiguous()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The device has kernels that do nothing; names of those launched."""
    names: list[str] = []
    monkeypatch.setattr(Launch, "run", lambda launch: names.append(launch.kernel.__name__))
    monkeypatch.setattr(engine.elementwise, "liger", SomeLiger)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    for name, module in list(sys.modules.items()):
        if name.startswith("engine.") and hasattr(module, "uses_triton"):
            monkeypatch.setattr(module, "uses_triton", lambda tensor: True)

    def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
        return torch.empty(host.shape, dtype=host.dtype, device=device)

    for module in (engine.packing, engine.sampling, engine.finetune):
        monkeypatch.setattr(module, "upload", upload)

    def upload_into(staging: Staging, target: torch.Tensor, array: Ints) -> None:
        assert target.shape == array.shape

    monkeypatch.setattr(Staging, "upload_into", upload_into)
    return names


def serve(policy: str, order: str, memory: str, launching: Launching) -> Engine:
    """A whole run of the engine, watched in every launch."""
    w = tiny_model("qwen2", torch.bfloat16).weights
    layers = tuple(LayerWeights(*(None if t is None else t.to(DEVICE) for t in layer)) for layer in w.layers)
    embed, norm = w.embed.to(DEVICE), w.norm.to(DEVICE)
    model = Model(CONFIGS["qwen2"], Weights(embed=embed, layers=layers, norm=norm, head=embed))
    job = JobSetup(
        samples=[sample_of(20 + 7 * i, seed=i) for i in range(4)],
        adapter=on_device(adapter_of("qwen2", 4, ["q_proj", "v_proj", "down_proj", "up_proj"])),
        order=order,
        memory=memory,
        max_tokens=80,
    )
    wide = on_device(adapter_of("qwen2", 8, ["k_proj", "gate_proj"], seed=3))
    limits = limits_of(kv_tokens=192, block_tokens=16, max_tokens=32, lookahead=1)
    ours, jobs = assemble_engine(model, limits, [job.of()], {"wide": wide}, launching=launching)
    for _ in range(3):
        assert ours._bank is not None
        ours._bank.hold(put(ours._bank, "qwen2", wide))  # so that steps move the bank
    prompts: dict[int, Any] = {}
    for id in range(9):
        prompt = tokens_of(3 + (id * 23) % 58, seed=id)
        request = Request(id, id * 0.005, len(prompt), 12, "default", (None, "wide", "job")[id % 3])
        prompts[id] = (request, prompt, Sampling(temperature=0.7 * (id % 2), top_k=5 + id, top_p=0.9))

    launch = ours.launch

    def watched(plan: Any) -> None:
        with Lists(), Waiting():
            launch(plan)

    def collect() -> Collected:
        done = ours._launched.popleft()
        ours._publish(done.steps, [(1.0, 1.0, 1.0)] * len(done.steps))
        for id in done.ids:
            if id in ours._live:
                ours._live[id].tokens.append(0)
        return Collected()

    ours.launch, ours.collect = watched, collect  # type: ignore[method-assign]
    given = {"predictor": LinearCost(optimizer_s=0.0), "budget_s": 0.02} if policy == "coserving" else {}
    state = PipelineState(limits=limits, slos=SLOS, recorder=Recorder(), jobs=jobs)
    source = EngineArrivals(
        ListArrivals(request for request, _, _ in prompts.values()), ours, lambda r: prompts[r.id][1:]
    )
    loop = run_loop(state, build_policy(policy, **given), source, Horizon())
    Driver(ours, VirtualClock(LinearCost())).run(loop)
    return ours


def on_device(adapter: Adapter) -> Adapter:
    def place(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}

    return Adapter(rank=adapter.rank, alpha=adapter.alpha, a=place(adapter.a), b=place(adapter.b))


def as_it_is(body: Body) -> Body:
    return body


@pytest.mark.parametrize(
    ("policy", "graphs"), [("coserving", False), ("coserving", True), ("spatial_stream", True)]
)
@pytest.mark.parametrize(("order", "memory"), [("layer_major", "stash"), ("window_major", "recompute")])
def test_no_launch_waits_for_the_device(
    order: str, memory: str, policy: str, graphs: bool, launched: list[str]
) -> None:
    captures = (lambda: as_it_is) if graphs else None
    ours = serve(policy, order, memory, Launching(captures, SecondStream(Device())))
    assert len(ours.steps) == 2
    assert not ours._live
    assert ours._bank is not None and ours._bank.moved == 1
    assert set(launched) == {
        "_attend",
        "_write",
        "_rotate",
        "_norm_backward",
        "_swiglu_backward",
        "_dq",
        "_dkv",
        "_shrink",
        "_expand",
        "_weight_grad",
    }


def assign(x: torch.Tensor, index: Any, value: Any) -> None:
    x[index] = value


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x[torch.tensor([1, 2])],
        lambda x: x[[1, 2]],
        lambda x: assign(x, (0, 0), 3),
        lambda x: assign(x, x > 0, 1.0),
        lambda x: x.copy_(torch.zeros(4, 4)),
    ],
)
def test_what_waits_is_found(waits: Any) -> None:
    x = torch.empty(4, 4, device=DEVICE)
    with Lists(), Waiting(), pytest.raises(AssertionError):
        waits(x)


@pytest.mark.parametrize(
    "does_not",
    [
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x[torch.empty(2, dtype=torch.int32, device=DEVICE)],
        lambda x: x[0].fill_(3),
        lambda x: x.masked_fill(x > 0, 0.0),
        lambda x: torch.full((3,), 2, device=x.device),
        lambda x: torch.tensor([1.0, 2.0]).sum().item(),
    ],
)
def test_what_does_not_wait_is_left_alone(does_not: Any) -> None:
    x = torch.empty(4, 4, device=DEVICE)
    with Lists(), Waiting():
        does_not(x)
