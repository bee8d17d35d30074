"""`coserve serve` as its clients see it, on loopback: answers, streams, refusals, ends, and the job beside them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint import checkpoints, read_progress
from engine.generate import main as generate
from engine.serve import TWICE_S
from engine.serve import main as serve
from engine.training import main as finetune
from sim.cli import main as coserve
from sim.results import read_run
from tests.engine.serving import JOB, PATIENCE_S, SHORT, UNBOUND, Server, greedy, prepared, serving

pytest.importorskip("starlette", reason="a server needs starlette and uvicorn")
pytest.importorskip("uvicorn", reason="a server needs starlette and uvicorn")
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
FOREVER = 10_000
EPOCHS, STEPS = 2, 24
PROMPTS = ("The harbour", "A ship at night", "Nobody")


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One whose job had requests beside it from its beginning."""
    here = prepared(tmp_path_factory.mktemp("serve"), num_train_epochs=EPOCHS)
    arguments = ["name=base", "train=job.yaml", "policy=coserving_slack", "max_requests=40", "trace=t.csv"]
    with serving(here, f"weights={model_folder}", *arguments, *UNBOUND) as running:
        with ThreadPoolExecutor(4) as clients:
            list(clients.map(lambda prompt: running.text(greedy(prompt, 60)), PROMPTS * 4))
        yield running


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """What `coserve generate` answers to PROMPTS."""
    Path("p.txt").write_text("\n".join(PROMPTS))
    assert generate([*arguments, "prompts=p.txt", "max_new_tokens=12", "chat=false", "ignore_eos=true"]) == 0
    return [json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()]


def test_answers_are_those_of_generate(
    server: Server,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = generated(capsys, f"model_name_or_path={model_folder}")
    with ThreadPoolExecutor(3) as clients:
        assert list(clients.map(lambda prompt: server.text(greedy(prompt)), PROMPTS)) == alone
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
    texts = [server.text({**body, **more}) for more in ({"seed": 7}, {"seed": 7}, {}, {})]
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


def test_a_job_beside_requests_ends_as_it_does_alone_and_its_adapter_answers(
    server: Server,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While the server goes on serving."""
    monkeypatch.chdir(prepared(tmp_path))
    alone = [f"{key}={value}" for key, value in {**JOB, "output_dir": "alone"}.items()]
    assert finetune([*alone, f"model_name_or_path={model_folder}", f"num_train_epochs={EPOCHS}"]) == 0
    capsys.readouterr()
    server.await_gauge("finetune_steps_total", STEPS)
    trained = server.here / "trained"
    end_s = time.monotonic() + PATIENCE_S
    while not (trained / "adapter_model.safetensors").exists():
        assert time.monotonic() < end_s
        time.sleep(0.05)
    ours, theirs = (
        load_file(trained / "adapter_model.safetensors"),
        load_file("alone/adapter_model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=2e-5)
    names = [{path.name for path in folder.glob("checkpoint-*")} for folder in (trained, Path("alone"))]
    assert names[0] == names[1]
    server.await_told(f"note: job trained: all {STEPS} steps are done")

    models = server.ask("/v1/models")[1]["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("base", 256), ("trained", 256)]
    less = "note: limits.max_sequence_tokens is 512, but a prompt and its answer have 256 tokens: the model's context"
    assert server.told().count(less) == 1
    found = generated(capsys, f"model_name_or_path={model_folder}", f"adapter_name_or_path={trained}")
    assert [server.text(greedy(prompt, model="trained")) for prompt in PROMPTS] == found
    assert [server.text(greedy(prompt, model="base")) for prompt in PROMPTS] != found
    assert server.ask("/health") == (200, {"status": "ok"})
    assert server.gauge("finetune_forward_tokens_total") == server.gauge("finetune_trained_tokens_total") > 0


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", b"{", 400, "the body must be JSON"),
        ("completions", b"[" * 100_000, 400, "the body must be JSON"),
        ("completions", {"prompt": "x", "n": 3}, 400, "n is not supported"),
        ("completions", {"prompt": "x", "model": "other"}, 404, "no model 'other'; there are base, trained"),
        ("completions", {"prompt": "x", "max_tokens": 300}, 400, "at most 256 tokens fit together here"),
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
    """One whose answer is whole before it is missed has gone too late: then another goes."""
    aborted, end_s = server.gauge("requests_aborted_total"), time.monotonic() + PATIENCE_S
    while server.gauge("requests_aborted_total") == aborted:
        assert time.monotonic() < end_s
        with server.connected() as connection:
            connection.request("POST", "/v1/completions", json.dumps(greedy("The harbour", 240, stream=True)))
            connection.getresponse().read(1)
        time.sleep(0.1)


def test_many_clients_are_answered_or_turned_away(server: Server) -> None:
    alone = server.text(greedy("Nobody", 40))
    with ThreadPoolExecutor(60) as clients:
        found = list(clients.map(lambda _: server.ask("/v1/completions", greedy("Nobody", 40)), range(60)))
    answered = [body["choices"][0]["text"] for status, body in found if status == 200]
    assert {status for status, _ in found} <= {200, 429}
    assert len(answered) >= 20 and set(answered) == {alone}


@needs_proc
def test_the_http_process_has_no_torch(server: Server) -> None:
    """Which would take seconds of every start."""
    status, _ = server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    assert status == 200
    assert "tokenizers" in (files := Path(f"/proc/{server.front()}/maps").read_text())
    assert "libtorch" not in files and "libtorch" in Path(f"/proc/{server.process.pid}/maps").read_text()


def test_answers_under_way_are_finished_when_the_server_stops(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was served is a trace for the simulator. A job that was ended between its last checkpoint and its adapter
    has that written at the start, and no more to do."""
    monkeypatch.chdir(prepared(tmp_path, max_steps=1, resume=True))
    alone = [f"{key}={value}" for key, value in JOB.items()]
    assert finetune([*alone, f"model_name_or_path={model_folder}", "max_steps=1"]) == 0
    adapter = Path("trained/adapter_model.safetensors")
    trained = adapter.read_bytes()
    adapter.unlink()
    capsys.readouterr()
    arguments = [f"weights={model_folder}", "name=m", "policy=temporal", "train=job.yaml", "trace=t.csv"]
    with serving(tmp_path, *arguments, f"drain_s={PATIENCE_S}") as server:
        asked = greedy("The harbour", 240, stream=True, stream_options={"include_usage": True})
        with server.connected() as connection:
            connection.request("POST", "/v1/completions", json.dumps(asked))
            answer = connection.getresponse()
            begun = answer.read(1)
            server.send(signal.SIGINT)
            events = (begun + answer.read()).decode().split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert json.loads(events[-3].removeprefix("data: "))["usage"]["completion_tokens"] == 240
        code, out = server.end(None)
        done, latency = out.splitlines()
        assert code == 0 and done == "1 requests answered, 240 tokens generated, 0 trained"
        share, ttft, tpot = latency.split("; ")
        assert share in [f"{met}.0 % of the requests met the SLO" for met in (0, 100)]
        assert ttft.startswith("TTFT p50 ") and tpot.startswith("TPOT p50 ")
        assert f"note: stopping: up to {PATIENCE_S} s for the answers under way" in server.told()
    assert adapter.read_bytes() == trained
    assert (
        coserve(["simulate", "workload=csv", "workload.file=t.csv", "hydra.run.dir=o", "run.bounds=false"])
        == 0
    )
    requests = read_run("o").table("requests")
    assert requests["output_tokens"].tolist() == [240]
    assert serve([f"weights={model_folder}", "trace=t.csv"]) == 2
    assert "trace: t.csv exists; choose another file" in capsys.readouterr().err


def put_in_the_way_of(folder: Path, away: Path) -> None:
    """A file in the place of a folder, which becomes `away`. A checkpoint may make the folder anew before the file is
    there: then that one goes too."""
    folder.rename(away)
    for number in itertools.count():
        try:
            folder.write_text("in the way")
            return
        except IsADirectoryError:
            folder.rename(away.with_name(f"{away.name}-{number}"))


def test_a_stopped_job_goes_on_and_what_a_failed_write_costs_is_the_checkpoint(
    model_folder: Path, tmp_path: Path
) -> None:
    """It is stopped while checkpoints are written. Later its folder turns into one that nobody can write to, and
    requests are answered on."""
    here, arguments = tmp_path, [f"weights={model_folder}", "train=job.yaml"]
    prepared(here, num_train_epochs=FOREVER, save_steps=1)
    with serving(here, *arguments, *UNBOUND) as server:
        server.await_gauge("finetune_steps_total", 6)
        code, out = server.end()
    assert code == 0
    last = re.search(r"resume=true goes on from checkpoint-(\d+)$", out, re.MULTILINE)
    assert last is not None
    whole = checkpoints(here / "trained")
    assert int(last[1]) == max(read_progress(checkpoint).step for checkpoint in whole)
    assert {path.name for path in whole} == {path.name for path in (here / "trained").glob("*checkpoint*")}
    prepared(here, num_train_epochs=FOREVER, resume=True, save_steps=1)
    with serving(here, *arguments, "name=m", "policy=temporal") as server:
        server.await_gauge("finetune_steps_total", 6)
        put_in_the_way_of(here / "trained", here / "away")
        steps = server.gauge("finetune_steps_total")
        server.await_gauge("finetune_steps_total", steps + 12)
        server.text(greedy("The harbour"))
        code, _ = server.end()
        assert code == 2 and "Traceback" not in server.told()
        assert re.search("^coserve serve: error: .*trained", server.told(), re.MULTILINE)
    lines = (here / "away/trainer_log.jsonl").read_text().splitlines()
    steps_logged = [json.loads(line)["step"] for line in lines]
    assert steps_logged == list(range(1, len(lines) + 1)) and len(lines) > int(last[1])


@needs_proc
def test_without_its_http_process_the_server_ends(model_folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path, f"weights={model_folder}", "policy=inference_only") as server:
        server.text(greedy("Nobody"))
        server.await_gauge("requests_finished_total", 1)
        assert server.gauge("running") == server.gauge("kv_blocks_used") == 0
        os.kill(server.front(), signal.SIGKILL)
        code, _ = server.end(None)
        assert code == 2 and "the HTTP process ended by itself, with code -9" in server.told()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["weights=silent"], "silent: its tokenizer cannot be read"),
        (["weights=nowhere"], "weights must be a folder with a Hugging Face model"),
        (["port=70000"], "port must be from 0 to 65535, got 70000"),
        (["name="], "name must be text or null, got nothing"),
        (["max_requests=0"], "max_requests must be from 1 to"),
        (["dtype=int8"], "dtype must be null or one of float32, bfloat16"),
        (["train=nowhere.yaml"], "train: nowhere.yaml does not exist"),
        (["train=list.yaml"], "train: list.yaml must hold keys of coserve finetune"),
        (["train=bytes.yaml"], "train: bytes.yaml is not UTF-8 at byte 9"),
        (["train=."], "train: . cannot be read: Is a directory"),
        (["train=less.yaml"], "less.yaml: output_dir is missing"),
        (["train=own.yaml"], "own.yaml: device is for coserve finetune; a server has its own"),
        (["train=measured.yaml"], "val_size is for coserve finetune; a server would answer nobody meanwhile"),
        (
            ["train=odd.yaml"],
            "odd.yaml has no key 'lora_rnak'; did you mean 'lora_rank'?; known: dataset, output_dir",
        ),
        (["train=first.yaml"], "first.yaml has no key 'datset'; did you mean 'dataset'?"),
        (["trace=list.yaml/t.csv"], "trace: list.yaml/t.csv cannot be written: Not a directory"),
        (["+adapters.base=x", "name=base"], "names of their own, got base, base"),
        (["+adapters.law=x"], "not a PEFT adapter"),
        (
            ["slo=two_classes"],
            "slo must have a class named default, which requests are of, got interactive, batch",
        ),
        (["-m"], "-m is for runs that end; a server is one at a time"),
        (["policy=separate_25"], "splits several pipelines, and a server is one"),
        (["policy=finetune_only"], "policy must be one that serves, got FinetuneOnly"),
        (["policy=inference_only", "policy._target_=late.Late"], "policy must be one that serves, got Late"),
        (["train=job.yaml", "policy=inference_only"], "policy must be one that finetunes, got InferenceOnly"),
        (["peak_s=3"], "peak_s changes nothing here: peak_s is read by coserve bench alone"),
        (["job.accumulation=3"], "job.accumulation changes nothing here"),
        (["predictor=nowhere.parquet", "trace=t.csv"], "nowhere.parquet"),
        (["predictor=p.parquet", "measure_s=3"], "measure_s changes nothing here: predictor is p.parquet"),
        (["memory_utilization=0.5"], "memory_utilization changes nothing here: limits.kv_tokens is "),
        (["slo=flexllm", "+slo.tpot_s.other=1"], "model.name"),
        (["+slo.tpot_s.other=1"], "slo.tpot_s.other"),
        (["host=fe80::1%nowhere"], "host fe80::1%nowhere, port 0: "),
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
    Path("bytes.yaml").write_bytes(b"dataset: \xff")
    Path("measured.yaml").write_text("dataset: d.jsonl\noutput_dir: o\nval_size: 0.1\n")
    Path("odd.yaml").write_text("dataset: d.jsonl\noutput_dir: o\nlora_rnak: 4\n")
    Path("first.yaml").write_text("datset: d.jsonl\noutput_dir: o\n")
    Path("late.py").write_text(
        "from sim.policies.inference_only import InferenceOnly\n\n"
        "class Late(InferenceOnly):\n    def __init__(self, token_budget):\n        self.serves = False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(model_folder, "silent")
    Path("silent/tokenizer.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        own = [argument.replace("PORT", str(taken.getsockname()[1])) for argument in arguments]
        assert serve([f"weights={model_folder}", *SHORT, *own]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1
    assert not Path("t.csv").exists()  # the same command may be given again


@pytest.mark.parametrize(
    "arguments",
    [["policy=separate_25"], ["policy=finetune_only"], ["train=job.yaml", "policy=inference_only"]],
)
def test_a_policy_that_cannot_run_here_costs_no_loading(
    arguments: list[str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr("engine.serve.load_model", lambda *given, **_: loaded.append(given))
    monkeypatch.chdir(prepared(tmp_path))
    assert serve([f"weights={model_folder}", *SHORT, *arguments]) == 2 and not loaded


def slow_policy(here: Path, fails: bool) -> list[str]:
    """Arguments for a policy that takes the longer the more is written: an answer of 240 tokens has five minutes to
    be cut short. It may fail in the middle."""
    (here / "slow.py").write_text(
        "import time\nfrom sim.policies.inference_only import InferenceOnly\n\n"
        "class Slow(InferenceOnly):\n    def plan(self, view):\n"
        "        written = view.decode_work.decode_context_tokens\n        time.sleep(written / 100)\n"
        f"        if {fails} and written > 8: raise RuntimeError('boom')\n"
        "        return super().plan(view)\n"
    )
    return ["policy=inference_only", "policy._target_=slow.Slow"]


@pytest.mark.parametrize(
    ("arguments", "signals", "fails", "code", "words"),
    [
        (["drain_s=0"], [signal.SIGINT], False, 0, "up to 0 s for the answers under way"),
        (["drain_s=600"], [signal.SIGINT] * 2, False, 130, "interrupted"),
        (["drain_s=600"], [signal.SIGTERM] * 2, False, 143, "terminated"),
        ([], [], True, 2, "RuntimeError: boom"),
    ],
)
def test_an_end_before_the_answers_is_told_to_their_clients(
    arguments: list[str],
    signals: list[int],
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
        for number in signals:
            server.send(number)
            server.await_told("stopping")
            time.sleep(TWICE_S)
        *_, error, done, rest = answer.read().decode().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["message"] == "the server stops"
        assert (done, rest) == ("data: [DONE]", "")
        found, out = server.end(None)
        assert found == code and words in server.told() and "Traceback" not in server.told()
        assert code or "1 requests cut short" in out


def test_a_job_that_fails_is_told_and_leaves_the_server_serving(model_folder: Path, tmp_path: Path) -> None:
    here = prepared(tmp_path, learning_rate=1e37, num_train_epochs=FOREVER)
    with serving(here, f"weights={model_folder}", "train=job.yaml", "name=m", "policy=temporal") as server:
        server.await_gauge("finetune_jobs_failed_total", 1)
        assert "note: job trained: step" in server.told()
        server.text(greedy("Nobody", model="m"))
        # Its last good step left finite weights, with which the logits are none.
        status, answer = server.ask("/v1/completions", greedy("Nobody", model="trained"))
        assert status == 500 and "logits are not numbers" in answer["error"]["message"]
        server.text(greedy("Nobody", model="m"))
        code, _ = server.end()
        assert code == 2 and "error: job trained: step" in server.told()
