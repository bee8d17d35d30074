"""`coserve serve` as its clients see it, on loopback: answers, streams, refusals, ends, and the job beside them."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from engine.generate import main as generate
from engine.serve import main as serve
from engine.text import BUNDLED, read_text
from engine.training import main as finetune
from sim.cli import main as coserve
from sim.results import read_run

pytest.importorskip("starlette", reason="a server needs starlette and uvicorn")
pytest.importorskip("uvicorn", reason="a server needs starlette and uvicorn")
ROOT = Path(__file__).parents[2]
SHORT = ("device=cpu", "port=0", "measure_s=1", "drain_s=20")
JOB = {
    "dataset": "d.jsonl",
    "output_dir": "trained",
    "cutoff_len": 24,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "save_steps": 5,
}
FOREVER = 10_000
PATIENCE_S = 120
LONGEST_S = 240
"""Of a server."""


class Server:
    """A server in a process of its own, with the folder `here` as its working directory."""

    def __init__(self, here: Path, *arguments: str) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        command = [sys.executable, "-m", "sim.cli", "serve", *SHORT, *arguments]
        # Appended to: the offset is shared, and moves when somebody reads.
        (here / "errors").unlink(missing_ok=True)
        self.errors = (here / "errors").open("a+")
        self.process = subprocess.Popen(
            command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        # Whatever hangs, ends, and says where: pipes and connections of a process that is gone do not wait.
        self.watch = threading.Timer(LONGEST_S, self.process.send_signal, [signal.SIGABRT])
        self.watch.daemon = True
        self.watch.start()
        assert self.process.stdout is not None
        self.first = self.process.stdout.readline()
        found = re.fullmatch(r"(\S+): http://127\.0\.0\.1:(\d+)/v1\n", self.first)
        assert found is not None, self.told()
        self.name, self.port = found[1], int(found[2])

    def told(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        """Status, and the body as JSON; `body` makes it a POST, bytes as they are."""
        with self.connected() as connection:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, data)
            answer = connection.getresponse()
            content = answer.read().decode()
            plain = answer.getheader("content-type", "").startswith("text/plain")
            return answer.status, content if plain else json.loads(content)

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
        return float(dict(line.split() for line in text.splitlines()).get(f"coserve_{name}", 0))

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

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and what was printed."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        assert self.process.stdout is not None
        out, code = self.process.stdout.read(), self.process.wait(PATIENCE_S)
        return code, out


@contextmanager
def serving(here: Path, *arguments: str) -> Iterator[Server]:
    server = Server(here, *arguments)
    try:
        yield server
    finally:
        server.watch.cancel()
        server.process.kill()
        server.process.wait()
        server.errors.close()


def prepared(here: Path, **changes: object) -> Path:
    """A dataset and the file of a job."""
    sentences = [s for s in read_text(BUNDLED).replace("\n", " ").split(". ") if s]
    (here / "d.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences[:24]))
    (here / "job.yaml").write_text(yaml.safe_dump({**JOB, **changes}))
    return here


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that also trains: 240 steps."""
    here = prepared(tmp_path_factory.mktemp("serve"), num_train_epochs=20)
    arguments = [f"weights={model_folder}", "name=base", "train=job.yaml", "max_requests=40", "trace=t.csv"]
    with serving(here, *arguments) as running:
        yield running


def greedy(prompt: str | list[int], tokens: int = 12, **more: object) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}


PROMPTS = ("The harbour", "A ship at night", "Nobody")


def test_answers_are_those_of_generate(
    server: Server, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    common = [f"model_name_or_path={model_folder}", f"prompts={tmp_path / 'p.txt'}", "max_new_tokens=12"]
    assert generate([*common, "chat=false", "ignore_eos=true"]) == 0
    alone = [json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()]
    with ThreadPoolExecutor(3) as clients:
        found = list(clients.map(lambda p: server.ask("/v1/completions", greedy(p)), PROMPTS))
    assert [body["choices"][0]["text"] for _, body in found] == alone
    status, both = server.ask("/v1/completions", greedy(list(PROMPTS)))  # type: ignore[arg-type]
    assert status == 200 and [choice["text"] for choice in both["choices"]] == alone
    assert both["usage"]["completion_tokens"] == 36 and both["object"] == "text_completion"


def test_a_stream_is_the_same_answer_in_pieces(server: Server) -> None:
    body = greedy("The harbour", 20)
    _, whole = server.ask("/v1/completions", body)
    *events, last = server.events("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "length"
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": 5}
    _, whole = server.ask("/v1/chat/completions", chat)
    events = server.events("/v1/chat/completions", chat)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]


def test_a_seed_gives_the_same_answer_and_none_another(server: Server) -> None:
    body = {"prompt": "The", "max_tokens": 16, "ignore_eos": True}
    texts = [
        server.ask("/v1/completions", {**body, **more})[1]["choices"][0]["text"]
        for more in ({"seed": 7}, {"seed": 7}, {}, {})
    ]
    assert texts[0] == texts[1] and len(set(texts)) > 2


def test_a_stop_ends_the_answer_before_it(server: Server) -> None:
    _, whole = server.ask("/v1/completions", greedy("The harbour", 30))
    text = whole["choices"][0]["text"]
    stop = text[8:10]
    finished = server.gauge("requests_finished_total")
    _, cut = server.ask("/v1/completions", greedy("The harbour", 200, stop=[stop]))
    assert cut["choices"][0]["text"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] < 30
    server.await_gauge("requests_finished_total", finished + 1)


def test_the_job_trains_meanwhile_and_its_adapter_answers(server: Server) -> None:
    server.await_gauge("finetune_steps_total", 20)
    names = [model["id"] for model in server.ask("/v1/models")[1]["data"]]
    assert names == ["base", "trained"]
    before = server.ask("/v1/completions", greedy("The harbour", 12, model="base"))[1]["choices"][0]["text"]
    after = server.ask("/v1/completions", greedy("The harbour", 12, model="trained"))[1]["choices"][0]["text"]
    assert before != after
    assert server.ask("/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", b"{", 400, "the body must be JSON"),
        ("completions", b"[" * 100_000, 400, "the body must be JSON"),
        ("completions", {"prompt": "x", "n": 3}, 400, "n is not supported"),
        ("completions", {"prompt": "x", "model": "other"}, 404, "no model 'other'; there are base, trained"),
        ("completions", {"prompt": "x", "max_tokens": 300}, 400, "at most 256 tokens fit together, got 1 of"),
        ("completions", {"prompt": "x " * 400}, 400, "at most 256 tokens fit together"),
        ("completions", {"prompt": ""}, 400, "at least one token"),
        ("completions", {"prompt": [0, 400]}, 400, "tokens must be in 0..399"),
        ("completions", {"prompt": ["x"] * 41}, 429, "40 requests are under way"),
        ("chat/completions", {"messages": []}, 400, "messages must be a list"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(
    server: Server, path: str, body: Any, status: int, words: str
) -> None:
    found, answer = server.ask(f"/v1/{path}", body)
    assert found == status and words in answer["error"]["message"]


def test_a_client_that_goes_frees_its_place(server: Server) -> None:
    aborted = server.gauge("requests_aborted_total")
    long = greedy("The harbour", 240)
    for stream in (True, False):
        with server.connected() as connection:
            connection.request("POST", "/v1/completions", json.dumps({**long, "stream": stream}))
            if stream:
                connection.getresponse().read(1)
            else:
                server.await_gauge("running", 1)
    server.await_gauge("requests_aborted_total", aborted + 2)


def test_many_clients_are_answered_or_turned_away(server: Server) -> None:
    alone = server.ask("/v1/completions", greedy("Nobody", 40))[1]["choices"][0]["text"]
    with ThreadPoolExecutor(60) as clients:
        found = list(clients.map(lambda _: server.ask("/v1/completions", greedy("Nobody", 40)), range(60)))
    answered = [body["choices"][0]["text"] for status, body in found if status == 200]
    assert {status for status, _ in found} <= {200, 429}
    assert len(answered) >= 20 and set(answered) == {alone}


def test_answers_under_way_are_finished_when_the_server_stops(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what was served is a trace for the simulator."""
    arguments = [f"weights={model_folder}", "name=m", "policy=inference_only", "trace=t.csv"]
    with serving(tmp_path, *arguments) as server:
        asked = greedy("The harbour", 240, stream=True, stream_options={"include_usage": True})
        with server.connected() as connection:
            connection.request("POST", "/v1/completions", json.dumps(asked))
            answer = connection.getresponse()
            begun = answer.read(1)
            server.process.send_signal(signal.SIGINT)
            events = (begun + answer.read()).decode().split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert json.loads(events[-3].removeprefix("data: "))["usage"]["completion_tokens"] == 240
        code, out = server.end(0)
        assert code == 0 and out == "1 requests answered, 240 tokens generated, 0 trained\n"
        assert "note: stopping: up to 20 s for the answers under way" in server.told()
    monkeypatch.chdir(tmp_path)
    assert (
        coserve(["simulate", "workload=csv", "workload.file=t.csv", "hydra.run.dir=o", "run.bounds=false"])
        == 0
    )
    requests = read_run("o").table("requests")
    assert requests["output_tokens"].tolist() == [240]
    assert serve([f"weights={model_folder}", "trace=t.csv"]) == 2
    assert "trace: t.csv exists; choose another file" in capsys.readouterr().err


def test_a_job_beside_requests_ends_as_it_does_alone(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = prepared(tmp_path, num_train_epochs=2)
    with serving(here, f"weights={model_folder}", "train=job.yaml", "policy=coserving_slack") as server:
        with ThreadPoolExecutor(4) as clients:
            list(clients.map(lambda p: server.ask("/v1/completions", greedy(p, 60)), PROMPTS * 4))
        server.await_gauge("finetune_steps_total", 24)
        code, out = server.end(signal.SIGINT)
        assert code == 0 and "resume" not in out
    monkeypatch.chdir(tmp_path)
    alone = [f"{key}={value}" for key, value in {**JOB, "output_dir": "alone"}.items()]
    assert finetune([*alone, f"model_name_or_path={model_folder}", "num_train_epochs=2"]) == 0
    ours, theirs = (load_file(f"{name}/adapter_model.safetensors") for name in ("trained", "alone"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=2e-5)
    assert {p.name for p in Path("trained").glob("checkpoint-*")} == {
        p.name for p in Path("alone").glob("checkpoint-*")
    }


def test_a_stopped_job_goes_on(model_folder: Path, tmp_path: Path) -> None:
    here = prepared(tmp_path, num_train_epochs=FOREVER)
    with serving(here, f"weights={model_folder}", "train=job.yaml", "policy=temporal") as server:
        server.await_gauge("finetune_steps_total", 6)
        code, out = server.end()
    assert code == 0
    last = re.search(r"resume=true goes on from checkpoint-(\d+)$", out, re.MULTILINE)
    assert last is not None
    prepared(tmp_path, num_train_epochs=FOREVER, resume=True)
    with serving(here, f"weights={model_folder}", "train=job.yaml", "policy=temporal") as server:
        server.await_gauge("finetune_steps_total", 1)
        server.end()
    steps = [
        json.loads(line)["step"] for line in (here / "trained/trainer_log.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > int(last[1])


def test_without_its_http_process_the_server_ends_and_without_the_server_that_does(
    model_folder: Path, tmp_path: Path
) -> None:
    arguments = [f"weights={model_folder}", "policy=inference_only"]
    with serving(tmp_path, *arguments) as server:
        server.ask("/v1/completions", greedy("Nobody"))
        server.await_gauge("requests_finished_total", 1)
        assert server.gauge("running") == server.gauge("kv_blocks_used") == 0
        os.kill(_front(server), signal.SIGKILL)
        code, _ = server.end(0)
        assert code == 2 and "the HTTP process ended by itself, with code -9" in server.told()
    with serving(tmp_path, *arguments) as server:
        front = _front(server)
        server.process.kill()
        server.process.wait()
        end_s = time.monotonic() + PATIENCE_S
        while Path(f"/proc/{front}").exists():
            assert time.monotonic() < end_s
            time.sleep(0.1)


def _front(server: Server) -> int:
    """The process that listens, besides the server's own."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return next(pid for pid, name in names.items() if "resource_tracker" not in name)


def test_what_a_failed_write_costs_is_the_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    """The folder turns into one that nobody can write to, and requests are answered on."""
    here = prepared(tmp_path, num_train_epochs=FOREVER)
    with serving(here, f"weights={model_folder}", "train=job.yaml", "name=m", "policy=temporal") as server:
        server.await_gauge("finetune_steps_total", 6)
        (here / "trained").rename(here / "away")
        (here / "trained").write_text("in the way")
        steps = server.gauge("finetune_steps_total")
        server.await_gauge("finetune_steps_total", steps + 12)
        assert server.ask("/v1/completions", greedy("The harbour"))[0] == 200
        code, _ = server.end()
        assert code == 2 and "trained" in server.told() and "Traceback" not in server.told()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["weights=nowhere"], "weights must be a folder with a Hugging Face model"),
        (["port=70000"], "port must be from 0 to 65535, got 70000"),
        (["max_requests=0"], "max_requests must be from 1 to"),
        (["dtype=int8"], "dtype must be null or one of float32, bfloat16"),
        (["train=nowhere.yaml"], "train: nowhere.yaml does not exist"),
        (["train=list.yaml"], "train: list.yaml must hold keys of coserve finetune"),
        (["train=less.yaml"], "less.yaml: output_dir is missing"),
        (["train=own.yaml"], "own.yaml: device is for coserve finetune; a server has its own"),
        (["train=measured.yaml"], "val_size is for coserve finetune; a server would answer nobody meanwhile"),
        (["train=odd.yaml"], "odd.yaml has no key 'lora_rnak'; did you mean 'lora_rank'"),
        (["+adapters.base=x", "name=base"], "names of their own, got base, base"),
        (["+adapters.law=x"], "not a PEFT adapter"),
        (
            ["slo=two_classes"],
            "slo must have a class named default, which requests are of, got interactive, batch",
        ),
        (["-m"], "-m is for runs that end; a server is one at a time"),
        (["policy=separate_25"], "splits several pipelines, and a server is one"),
        (["policy=finetune_only"], "policy must be one that serves, got FinetuneOnly"),
        (["train=job.yaml", "policy=inference_only"], "policy must be one that finetunes, got InferenceOnly"),
        (["peak_s=3"], "peak_s changes nothing here: peak_s is read by coserve bench alone"),
        (["job.accumulation=3"], "job.accumulation changes nothing here"),
        (["predictor=nowhere.parquet", "trace=t.csv"], "nowhere.parquet"),
        (["host=256.256.256.256"], "host 256.256.256.256, port 0: "),
        (["port=PORT"], "Address already in use"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_listens(
    arguments: list[str],
    words: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(prepared(tmp_path))
    Path("list.yaml").write_text("- x\n")
    Path("less.yaml").write_text("dataset: d.jsonl\n")
    Path("own.yaml").write_text("dataset: d.jsonl\noutput_dir: o\ndevice: cuda\n")
    Path("measured.yaml").write_text("dataset: d.jsonl\noutput_dir: o\nval_size: 0.1\n")
    Path("odd.yaml").write_text("dataset: d.jsonl\noutput_dir: o\nlora_rnak: 4\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        own = [argument.replace("PORT", str(taken.getsockname()[1])) for argument in arguments]
        assert serve([f"weights={model_folder}", *SHORT, *own]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1
    assert not Path("t.csv").exists()  # the same command may be given again


def slow_policy(here: Path, fails: bool) -> list[str]:
    """Arguments for a policy that takes its time, and in the end fails."""
    (here / "slow.py").write_text(
        "import time\nfrom sim.policies.inference_only import InferenceOnly\n\n"
        "class Slow(InferenceOnly):\n    def plan(self, view):\n        time.sleep(0.05)\n"
        f"        if {fails} and view.decode_work.decode_context_tokens > 8: raise RuntimeError('boom')\n"
        "        return super().plan(view)\n"
    )
    return ["policy=inference_only", "policy._target_=slow.Slow"]


@pytest.mark.parametrize(
    ("arguments", "signals", "fails", "code", "words"),
    [
        (["drain_s=0"], 1, False, 0, "up to 0 s for the answers under way"),
        (["drain_s=600"], 2, False, 130, "interrupted"),
        ([], 0, True, 2, "RuntimeError: boom"),
    ],
)
def test_an_end_before_the_answers_is_told_to_their_clients(
    arguments: list[str],
    signals: int,
    fails: bool,
    code: int,
    words: str,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    """Past `drain_s`, at a second signal, and when a policy fails."""
    slow = slow_policy(tmp_path, fails)
    with serving(tmp_path, f"weights={model_folder}", *slow, *arguments) as server, server.connected() as c:
        c.request("POST", "/v1/completions", json.dumps(greedy("The harbour", 240, stream=True)))
        answer = c.getresponse()
        assert answer.read(5) == b"data:"
        for _ in range(signals):
            server.process.send_signal(signal.SIGINT)
            server.await_told("stopping")
        *_, error, done, rest = answer.read().decode().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["message"] == "the server stops"
        assert (done, rest) == ("data: [DONE]", "")
        found, out = server.end(0)
        assert found == code and words in server.told() and "Traceback" not in server.told()
        assert code or "1 requests cut short" in out


def test_a_job_that_fails_is_told_and_leaves_the_server_serving(model_folder: Path, tmp_path: Path) -> None:
    here = prepared(tmp_path, learning_rate=1e37, num_train_epochs=FOREVER)
    with serving(here, f"weights={model_folder}", "train=job.yaml", "name=m", "policy=temporal") as server:
        server.await_gauge("finetune_jobs_failed_total", 1)
        assert "note: job trained: step" in server.told()
        for model in ("m", "trained"):
            assert server.ask("/v1/completions", greedy("Nobody", model=model))[0] == 200
        code, _ = server.end()
        assert code == 2 and "error: job trained: step" in server.told()
