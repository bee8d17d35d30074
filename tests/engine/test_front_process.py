"""The HTTP process of `coserve serve`, without the model's."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from engine.front_process import FrontProcess, front_process
from engine.messages import Serving

pytest.importorskip("starlette", reason="a server needs starlette and uvicorn")
pytest.importorskip("uvicorn", reason="a server needs starlette and uvicorn")
ROOT = Path(__file__).parents[2]
PATIENCE_S = 120
SERVING = Serving(name="m", adapters=(), vocab=400, longest_tokens=64, max_requests=4)


@contextmanager
def begun(folder: Path) -> Iterator[tuple[FrontProcess, int]]:
    """One that reads its model, and its port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        with front_process(str(folder), listening) as front:
            yield front, port


def test_clients_come_when_it_is_told_what_is_served_and_until_it_is_ended(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.front_process.GRACE_S", PATIENCE_S)
    with begun(model_folder) as (front, port):
        front.await_ready()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        front.serve(SERVING)
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        client.request("GET", "/health")
        assert client.getresponse().status == 200
        client.close()
        front.end()
        assert front.exit_code == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_one_that_was_not_needed_is_ended_at_once(model_folder: Path) -> None:
    with begun(model_folder) as (front, _):
        pass
    assert front.exit_code == -signal.SIGKILL


def test_one_that_ends_too_early_is_an_error(model_folder: Path) -> None:
    with begun(model_folder) as (front, _):
        front.kill()
        with suppress(ChildProcessError):  # unless it was ready before it was killed
            front.await_ready()
        with pytest.raises(ChildProcessError, match="the HTTP process ended with code -9"):
            front.await_ready()
        front.serve(SERVING)  # whoever reads the link is told


def test_one_that_does_not_end_is_killed(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.front_process.GRACE_S", 0.2)
    with begun(model_folder) as (front, _):
        front.await_ready()
        front.serve(SERVING)
        assert front._process.pid is not None
        os.kill(front._process.pid, signal.SIGSTOP)
    assert front.exit_code == -signal.SIGKILL


def test_end_tokens_that_are_none_are_a_mistake_of_the_folder(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with (
        begun(folder) as (front, _),
        pytest.raises(ValueError, match="eos_token_id must be a token or a list"),
    ):
        front.await_ready()


ALONE = """
import socket
from engine.front_process import FrontProcess
from tests.engine.test_front_process import SERVING

if __name__ == "__main__":
    front = FrontProcess({folder!r}, socket.create_server(("127.0.0.1", 0)))
    front.await_ready()
    front.serve(SERVING)
    print(front._process.pid, flush=True)
    front.link.recv()
"""


def _runs(process: int) -> bool:
    """Whether it does, and is not only waited for by nobody."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_without_the_server_the_http_process_ends(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(ALONE.format(folder=str(model_folder)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "alone.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as engine:
        assert engine.stdout is not None
        front = int(engine.stdout.readline())
        assert _runs(front)
        engine.kill()
    end_s = time.monotonic() + PATIENCE_S
    while _runs(front):
        assert time.monotonic() < end_s
        time.sleep(0.1)
