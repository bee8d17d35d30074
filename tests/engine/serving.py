"""A server of `coserve serve` in a process of its own, and its clients on loopback."""

from __future__ import annotations

import faulthandler
import http.client
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.text import BUNDLED, read_text

ROOT = Path(__file__).parents[2]
SHORT = ("device=cpu", "port=0", "measure_s=1", "drain_s=20")
UNBOUND = ("slo.classes.default.ttft_s=600", "slo.classes.default.tpot_s=60")
"""A job goes on however slow the machine is: one that cannot keep the usual bounds leaves it no time."""
JOB = {
    "dataset": "d.jsonl",
    "output_dir": "trained",
    "cutoff_len": 24,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "save_steps": 7,
}
"""Two epochs have no more checkpoints than a saver whose disk is behind keeps waiting (`engine.saver.MOST_WAITING`)."""
PATIENCE_S = 120
LONGEST_S = 600
"""Of a server."""
_CONTEXT = multiprocessing.get_context("forkserver")
# What all servers import, one process imports; they are its forks.
_CONTEXT.set_forkserver_preload(["engine.serve"])


def _run(here: Path, arguments: list[str]) -> None:
    """The command in the folder `here`, to whose files it writes. The target of a process."""
    from sim.cli import main

    os.chdir(here)
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "errors")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC), stream.fileno())
    faulthandler.enable()
    torch.set_num_threads(1)
    sys.path.append(str(here))
    sys.exit(main(["serve", *SHORT, *arguments]))


class Server:
    """A server with the folder `here` as its working directory, where policies of its own may stand."""

    def __init__(self, here: Path, *arguments: str) -> None:
        self.here = here
        self._out, self._errors = here / "out", here / "errors"
        self._out.write_text("")
        self._errors.write_text("")
        with pytest.MonkeyPatch.context() as environment:
            # Wherever this process stands by now, the imports are those of this tree.
            environment.setenv("PYTHONPATH", str(ROOT))
            forkserver.ensure_running()
        self.process = _CONTEXT.Process(target=_run, args=(here, list(arguments)))
        self.process.start()
        # Whatever hangs, ends, and says where.
        self.watch = threading.Timer(LONGEST_S, self.send, [signal.SIGABRT])
        self.watch.daemon = True
        self.watch.start()
        while "\n" not in self._out.read_text() and self.process.is_alive():
            time.sleep(0.02)
        found = re.fullmatch(r"(\S+): http://127\.0\.0\.1:(\d+)/v1\n", self._out.read_text())
        assert found is not None, self.told()
        self.name, self.port = found[1], int(found[2])

    def send(self, number: int) -> None:
        """A signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def told(self) -> str:
        return self._errors.read_text()

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        """Status, and the body as JSON; `body` makes it a POST, bytes as they are."""
        with self.connected() as connection:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, data)
            answer = connection.getresponse()
            content = answer.read().decode()
            plain = answer.getheader("content-type", "").startswith("text/plain")
            return answer.status, content if plain else json.loads(content)

    def text(self, body: dict[str, Any]) -> str:
        """Of the answer to a completion."""
        status, answer = self.ask("/v1/completions", body)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        with self.connected() as connection:
            connection.request("POST", path, json.dumps({**body, "stream": True}))
            answer = connection.getresponse()
            assert answer.getheader("content-type", "").startswith("text/event-stream")
            parts = answer.read().decode().split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]

    @contextmanager
    def connected(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            yield connection
        finally:
            connection.close()

    def gauge(self, name: str) -> float:
        _, text = self.ask("/metrics")
        values = dict(line.rsplit(maxsplit=1) for line in text.splitlines() if not line.startswith("#"))
        return float(values.get(f"coserve_{name}", 0))

    def await_gauge(self, name: str, least: float) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while self.gauge(name) < least:
            assert time.monotonic() < end_s, (name, self.told())
            time.sleep(0.1)

    def await_told(self, words: str) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while words not in self.told():
            assert time.monotonic() < end_s, (words, self.told())
            time.sleep(0.05)

    def end(self, number: int | None = signal.SIGTERM) -> tuple[int | None, str]:
        """Exit code and what was printed after the first line; a `number` is sent before."""
        if number is not None:
            self.send(number)
        self.process.join(PATIENCE_S)
        return self.process.exitcode, self._out.read_text().split("\n", 1)[1]

    def front(self) -> int:
        """The id of its HTTP process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        names = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
        return next(pid for pid, name in names.items() if "resource_tracker" not in name)


@contextmanager
def serving(here: Path, *arguments: str) -> Iterator[Server]:
    server = Server(here, *arguments)
    try:
        yield server
    finally:
        server.watch.cancel()
        server.process.kill()
        server.process.join()


def prepared(here: Path, **changes: object) -> Path:
    """A dataset and the file of a job."""
    sentences = [s for s in read_text(BUNDLED).replace("\n", " ").split(". ") if s]
    (here / "d.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences[:24]))
    (here / "job.yaml").write_text(yaml.safe_dump({**JOB, **changes}))
    return here


def greedy(prompt: str | list[int], tokens: int = 12, **more: object) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
