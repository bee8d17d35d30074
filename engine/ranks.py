"""A replica on several devices: one process for each, of which this one leads.

Rank 0 runs the loop, the policy and the clock. What it does to its engine it first tells the others, in
order, and they do the same to theirs: load a model, assemble an engine, take a request with its prompt, a
drawn sample, a plan. Nobody else reads data or decides; tensors meet in the collectives of `engine.parallel`.
On one device there are no others, and the engine is the plain one.

    with replica(2, "cpu") as ranks:
        model = ranks.load(load_model, folder, torch.float32)
        engine, jobs = ranks.assemble(model, limits, [job])
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from engine.assemble import TrainingJob, assemble_engine
from engine.engine import Engine
from engine.finetune import Sample, SampleFeed
from engine.lora import Adapter
from engine.model import Model
from engine.parallel import ALONE, Group, PeerLost
from engine.sampling import Sampling
from sim.core.finetune import Job
from sim.core.plan import Limits, Plan
from sim.core.request import Request
from sim.errors import BUG, debugging, one_line

GRACE_S = 10.0
"""How long a process may take to end by itself."""
LOST = 3
"""Exit code of a rank that ended because another was gone."""

_CONTEXT = multiprocessing.get_context("spawn")


class RankFailed(ChildProcessError):
    """A rank ended that was still needed."""


@contextmanager
def replica(tp: int, device: str) -> Iterator[Replica]:
    """`tp` ranks on the devices of this machine (`cpu` or `cuda`), until the block ends.

    Raises ValueError for more ranks than devices, RankFailed when a rank fails within the block.
    """
    if tp == 1:
        yield Replica(ALONE, torch.device(device), ())
        return
    _check_devices(tp, device)
    with TemporaryDirectory(prefix="coserve-ranks-") as folder:
        peers = [_Peer(rank, tp, device, folder) for rank in range(1, tp)]
        ending, clean = threading.Event(), False
        try:
            for peer in peers:
                peer.ready()
            threading.Thread(target=_watch, args=(peers, ending), daemon=True).start()
            place = _join(0, tp, device, folder)
            yield Replica(Group(0, tp), place, peers)
            ending.set()
            for peer in peers:
                peer.tell(pickle.dumps(("end", ())))
            clean = True
        except PeerLost as error:
            ending.set()
            raise RankFailed(_failure(peers)) from error
        finally:
            ending.set()
            for peer in peers:
                peer.end(clean)
            if dist.is_initialized():
                dist.destroy_process_group()


class Replica:
    """All ranks, as rank 0 commands them."""

    def __init__(self, group: Group, device: torch.device, peers: Sequence[_Peer]) -> None:
        self.group = group
        self.device = device
        self._peers = peers

    def load(self, make: Callable[..., Model], *args: Any, **options: Any) -> Model:
        """`make(*args, device=, group=)` on every rank; `make` is a function of a module."""
        self._tell("load", make, args, options)
        return make(*args, **options, device=self.device, group=self.group)

    def assemble(
        self,
        model: Model,
        limits: Limits,
        jobs: Sequence[TrainingJob] = (),
        adapters: Mapping[str, Adapter] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> tuple[Engine, list[Job]]:
        """As `assemble_engine`, on every rank, for the model that was loaded last."""
        if not self._peers:
            return assemble_engine(model, limits, jobs, adapters, on_token)
        told = [replace(job, samples=(), adapter=_on_host(job.adapter)) for job in jobs]
        self._tell("assemble", limits, told, {n: _on_host(a) for n, a in (adapters or {}).items()})
        jobs = [replace(job, samples=self._telling(job)) for job in jobs]
        make = functools.partial(Leader, self._tell)
        return assemble_engine(model, limits, jobs, adapters, on_token, make)

    def _telling(self, job: TrainingJob) -> Iterator[Sample]:
        """The job's samples, each told to the others as it is drawn: before the plan that needs it."""
        assert not isinstance(job.samples, SampleFeed)
        for sample in job.samples:
            self._tell("sample", job.id, sample)
            yield sample

    def _tell(self, name: str, *args: Any) -> None:
        if self._peers:
            command = pickle.dumps((name, args), pickle.HIGHEST_PROTOCOL)
            for peer in self._peers:
                peer.tell(command)


class Leader(Engine):
    """The engine of rank 0: what it is made to do, the others are told."""

    def __init__(self, tell: Callable[..., None], **given: Any) -> None:
        super().__init__(**given)
        self._tell = tell

    def arrive(self, request: Request, tokens: Sequence[int], sampling: Sampling) -> None:
        super().arrive(request, tokens, sampling)
        self._tell("engine", "arrive", request, list(tokens), sampling)

    def ended(self, id: int) -> None:
        super().ended(id)
        self._tell("engine", "ended", id)

    def launch(self, plan: Plan) -> None:
        # Memory is the policy's, which no engine reads.
        self._tell("engine", "launch", plan._replace(memory=None))
        super().launch(plan)

    def collect(self) -> tuple[int, ...]:
        self._tell("engine", "collect")
        return super().collect()

    def adapter(self, job: str) -> Adapter:
        self._tell("engine", "adapter", job)
        return super().adapter(job)

    def optimizer_state(self, job: str) -> dict[str, Any]:
        self._tell("engine", "optimizer_state", job)
        return super().optimizer_state(job)

    def restore(self, job: str, state: dict[str, Any], steps: int) -> None:
        self._tell("engine", "restore", job, state, steps)
        super().restore(job, state, steps)


class _Follower:
    """What a rank that does not lead has, and the commands that it takes."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._model: Model | None = None
        self._engine: Engine | None = None
        self._feeds: dict[str, SampleFeed] = {}

    def load(self, make: Callable[..., Model], args: Iterable[Any], options: Mapping[str, Any]) -> None:
        self._engine = self._model = None
        self._model = make(*args, **options, device=self._device, group=self._group)

    def assemble(self, limits: Limits, jobs: Sequence[TrainingJob], adapters: Mapping[str, Adapter]) -> None:
        assert self._model is not None
        self._engine = None
        self._feeds = {job.id: SampleFeed(()) for job in jobs}
        jobs = [replace(job, samples=self._feeds[job.id]) for job in jobs]
        self._engine, _ = assemble_engine(self._model, limits, jobs, adapters)

    def sample(self, job: str, sample: Sample) -> None:
        self._feeds[job].put(sample)

    def engine(self, method: str, *args: Any) -> None:
        getattr(self._engine, method)(*args)


def _follow(rank: int, tp: int, device: str, folder: str, channel: Connection) -> None:
    """A process's life: do what it is told until the end, or until rank 0 is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        channel.send(("ready", ""))
        follower = _Follower(Group(rank, tp), _join(rank, tp, device, folder))
        while True:
            name, args = pickle.loads(channel.recv_bytes())
            if name == "end":
                break
            getattr(follower, name)(*args)
    except (EOFError, PeerLost):
        os._exit(LOST)
    except BaseException as error:
        if debugging():
            traceback.print_exc()
        channel.send(("failed", one_line(f"{type(error).__name__}: {error}")))
        os._exit(BUG)
    dist.destroy_process_group()


class _Peer:
    """A following process, as rank 0 sees it."""

    def __init__(self, rank: int, tp: int, device: str, folder: str) -> None:
        self.rank = rank
        self._name = f"rank {rank} of {tp}"
        self._channel, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(
            target=_follow, args=(rank, tp, device, folder, theirs), daemon=True, name=f"coserve-rank-{rank}"
        )
        self.process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait until the process has started."""
        try:
            self._channel.recv()
        except (EOFError, OSError) as error:
            raise PeerLost(self._name) from error

    def tell(self, command: bytes) -> None:
        try:
            self._channel.send_bytes(command)
        except OSError as error:
            raise PeerLost(self._name) from error

    def failure(self) -> str | None:
        """Why it ended, if that was its own doing. Waits for a process that is about to end."""
        self.process.join(GRACE_S)
        try:
            while self._channel.poll():
                kind, line = self._channel.recv()
                if kind == "failed":
                    return f"{self._name} failed: {line}"
        except (EOFError, OSError):
            pass
        code = self.process.exitcode
        if code in (None, 0, LOST):
            return None
        return (
            f"{self._name} was killed by signal {-code}"
            if code < 0
            else f"{self._name} ended with code {code}"
        )

    def end(self, clean: bool) -> None:
        """Let it end by itself if it was told to; there is no process afterwards."""
        if clean:
            self.process.join(GRACE_S)
        self._channel.close()
        for stop in (self.process.terminate, self.process.kill):
            if self.process.is_alive():
                stop()
                self.process.join(GRACE_S)
        self.process.close()


def _join(rank: int, tp: int, device: str, folder: str) -> torch.device:
    """Meet the other ranks; the device of this one."""
    place = torch.device(device) if device == "cpu" else torch.device(device, rank)
    if place.type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(place)
    # All ranks are on this machine, so nothing listens on a network.
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    dist.init_process_group(
        "gloo" if place.type == "cpu" else "nccl",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=tp,
        device_id=None if place.type == "cpu" else place,
    )
    return place


def _check_devices(tp: int, device: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < tp:
        raise ValueError(f"tp {tp} needs {tp} CUDA devices, this machine has {torch.cuda.device_count()}")
    if multiprocessing.current_process().daemon:
        raise ValueError(
            f"tp {tp} starts processes, which a sweep's worker must not: leave hydra/launcher alone"
        )


def _failure(peers: Sequence[_Peer]) -> str:
    reasons = [peer.failure() for peer in peers]
    return next((reason for reason in reasons if reason is not None), "a rank has ended")


def _watch(peers: Sequence[_Peer], ending: threading.Event) -> None:
    """End this process when a rank has failed and nothing here notices: it sleeps, or waits for a device."""
    wait([peer.process.sentinel for peer in peers])
    if not ending.wait(GRACE_S):
        print(f"coserve: error: {_failure(peers)}", file=sys.stderr, flush=True)
        os._exit(BUG)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(LOST)


def _on_host(adapter: Adapter) -> Adapter:
    a, b = ({k: t.detach().cpu() for k, t in tensors.items()} for tensors in (adapter.a, adapter.b))
    return replace(adapter, a=a, b=b)
