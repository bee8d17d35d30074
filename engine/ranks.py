"""The processes of a replica: started, watched and ended together.

Rank 0 is the process that asks for them. Commands go to the others through pipes, in order, so that a rank
that waits for one costs nothing and learns at once when rank 0 is gone. A rank that fails says why, and ends
all: in its own words where it had any.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
import torch.distributed as dist

from engine.parallel import Group, PeerLost
from sim.errors import BUG, debugging, one_line

GRACE_S = 10.0
"""How long a process may take to end by itself."""
LOST = 3
"""Exit code of a rank that ended because another was gone."""

END = "end"
"""The command after which there is none."""

_CONTEXT = multiprocessing.get_context("spawn")

Follower = Callable[[Group, torch.device], object]
"""Makes, in a process of its own, the object whose methods are the commands."""


class Tell(Protocol):
    """Have the other ranks call a method of their follower; returns at once."""

    def __call__(self, method: str, *args: object) -> None: ...


class RankFailed(ChildProcessError):
    """A rank ended that was still needed."""


@contextmanager
def start_ranks(tp: int, device: str, follower: Follower) -> Iterator[tuple[Group, torch.device, Tell]]:
    """`tp` ranks on the devices of this machine until the block ends: this one's group and device, and how
    to command the others. A process leads one replica at a time.

    Raises ValueError for more ranks than devices, RankFailed when a rank fails within the block.
    """
    _check_devices(tp, device)
    with TemporaryDirectory(prefix="coserve-ranks-") as folder:
        peers = [_Peer(rank, tp, device, folder, follower) for rank in range(1, tp)]
        ending, clean = threading.Event(), False

        def tell(method: str, *args: object) -> None:
            command = pickle.dumps((method, args), pickle.HIGHEST_PROTOCOL)
            for peer in peers:
                peer.send(command)

        try:
            for peer in peers:
                peer.ready()
            threading.Thread(target=_watch, args=(peers, ending, folder), daemon=True).start()
            yield Group(0, tp), _join(0, tp, device, folder), tell
            ending.set()
            tell(END)
            # All ranks at once: NCCL's waits for those of the others.
            dist.destroy_process_group()
            clean = True
        except PeerLost as error:
            ending.set()
            raise RankFailed(_failure(peers)) from error
        finally:
            ending.set()
            for peer in peers:
                peer.end(clean)
            if dist.is_initialized():
                # Collectives that have begun, which NCCL would wait for, have lost their other side.
                assert dist.group.WORLD is not None
                dist.group.WORLD.abort()
                dist.destroy_process_group()


def _follow(rank: int, tp: int, device: str, folder: str, make: Follower, channel: Connection) -> None:
    """A process's life: do what it is told until the end, or until rank 0 is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        channel.send(("ready", ""))
        follower = make(Group(rank, tp), _join(rank, tp, device, folder))
        while True:
            method, args = pickle.loads(channel.recv_bytes())
            if method == END:
                break
            getattr(follower, method)(*args)
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

    def __init__(self, rank: int, tp: int, device: str, folder: str, follower: Follower) -> None:
        self._name = f"rank {rank} of {tp}"
        self._channel, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(
            target=_follow,
            args=(rank, tp, device, folder, follower, theirs),
            daemon=True,
            name=f"coserve-rank-{rank}",
        )
        self.process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait until the process has started."""
        try:
            self._channel.recv()
        except (EOFError, OSError) as error:
            raise PeerLost(self._name) from error

    def send(self, command: bytes) -> None:
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


def _watch(peers: Sequence[_Peer], ending: threading.Event, folder: str) -> None:
    """End this process when a rank has failed and nothing here notices: it sleeps, or waits for a device."""
    wait([peer.process.sentinel for peer in peers])
    if not ending.wait(GRACE_S):
        shutil.rmtree(folder, ignore_errors=True)
        print(f"coserve: error: {_failure(peers)}", file=sys.stderr, flush=True)
        os._exit(BUG)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(LOST)
