"""The HTTP side of `coserve serve` alone: the test is the engine at the other end of its pipe."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

import engine.front
from engine.front import Front
from engine.messages import LOST, Ask, Enough, Gone, Metrics, Serving, Stop, Tokens

PATIENCE_S = 60


class Engine:
    """What the front is told, and what it is asked."""

    def __init__(self, front: Front, serving: Serving, link: Connection, listening: socket.socket) -> None:
        self.front = front
        self.link = link
        self.port = listening.getsockname()[1]
        self._thread = threading.Thread(target=front.serve, args=(serving, listening), daemon=True)
        self._thread.start()

    def got(self) -> Any:
        """The next message."""
        assert self.link.poll(PATIENCE_S)
        return self.link.recv()

    def say(self, *tokens: tuple[int, int | None]) -> None:
        self.link.send(Tokens(list(tokens)))

    def post(self, body: object, path: str = "completions") -> http.client.HTTPConnection:
        connection = self.connection()
        connection.request("POST", f"/v1/{path}", body if isinstance(body, bytes) else json.dumps(body))
        return connection

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    def ended(self) -> bool:
        self._thread.join(PATIENCE_S)
        return not self._thread.is_alive()


@pytest.fixture
def engine_end(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(engine.front, "HANG_UP_S", PATIENCE_S)
    serving = Serving(
        name="base",
        adapters=("law",),
        vocab=400,
        longest_tokens=64,
        max_requests=4,
    )
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs, socket.create_server(("127.0.0.1", 0)) as listening:
        other = Engine(Front(str(model_folder), theirs), serving, ours, listening)
        yield other
        if not ours.closed:
            ours.send(Stop(0.0))
        assert other.ended()


LONG = {"prompt": "The", "max_tokens": 50}


@pytest.mark.parametrize("gone", [False, True])
def test_answers_that_are_given_up_say_so(engine_end: Engine, gone: bool) -> None:
    """When the time to end is over, and when the engine has gone without a word."""
    whole, stream = engine_end.post(LONG), engine_end.post({**LONG, "stream": True})
    first, second = engine_end.got().id, engine_end.got().id
    engine_end.say((first, 65), (second, 65))
    events = stream.getresponse()
    assert events.read(5) == b"data:"
    if gone:
        engine_end.link.close()
    else:
        engine_end.link.send(Stop(0.0))
    answer = whole.getresponse()
    assert answer.status == 503
    assert json.loads(answer.read())["error"]["message"] == "the server stops"
    error, done, rest = events.read().decode().split("\n\n")[-3:]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
    assert (done, rest) == ("data: [DONE]", "") and engine_end.ended()
    with pytest.raises(ConnectionRefusedError):
        engine_end.connection().connect()


def test_logits_that_are_no_numbers_are_an_error_of_the_server(engine_end: Engine) -> None:
    whole, stream = engine_end.post(LONG), engine_end.post({**LONG, "stream": True})
    for message in (engine_end.got(), engine_end.got()):
        engine_end.say((message.id, 65), (message.id, LOST), (message.id, None))
    answer = whole.getresponse()
    assert answer.status == 500
    assert "logits are not numbers" in json.loads(answer.read())["error"]["message"]
    error, done, _ = stream.getresponse().read().decode().split("\n\n")[-3:]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 500 and done == "data: [DONE]"
    assert not engine_end.link.poll(0.2), "nothing is to be ended"


def _listens(end: Engine) -> bool:
    try:
        socket.create_connection(("127.0.0.1", end.port), PATIENCE_S).close()
    except ConnectionError:
        return False
    return True


def _begun(end: Engine) -> socket.socket:
    """A client whose request waits for its body of 15 bytes."""
    client = socket.create_connection(("127.0.0.1", end.port), PATIENCE_S)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\nExpect: 100-continue\r\n\r\n"
    client.sendall(head)
    told = b"HTTP/1.1 100 Continue\r\n\r\n"
    assert client.recv(len(told)) == told
    return client


def test_a_stop_lets_running_answers_end_and_takes_no_more(engine_end: Engine) -> None:
    stream = engine_end.post({**LONG, "max_tokens": 2, "stream": True})
    slow = _begun(engine_end)
    id = engine_end.got().id
    engine_end.link.send(Stop(PATIENCE_S))
    end_s = time.monotonic() + PATIENCE_S
    while _listens(engine_end):
        assert time.monotonic() < end_s
        time.sleep(0.02)
    slow.sendall(b'{"prompt": "x"}')
    assert slow.recv(12) == b"HTTP/1.1 503"
    slow.close()
    engine_end.say((id, 65), (id, 66), (id, None))
    assert stream.getresponse().read().endswith(b"data: [DONE]\n\n")
    assert engine_end.ended()


def test_a_client_between_two_requests_is_hung_up_on(engine_end: Engine) -> None:
    """A stop comes while its connection is open and asks for nothing."""
    with socket.create_connection(("127.0.0.1", engine_end.port), PATIENCE_S) as kept:
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert kept.recv(12) == b"HTTP/1.1 200"
        engine_end.link.send(Stop(PATIENCE_S))
        assert engine_end.ended()
        while kept.recv(4096):
            pass


def test_a_connection_outlives_the_pauses_of_clients(engine_end: Engine) -> None:
    """Clients keep an idle one for 5 s and more, and take its end under a request for a failure."""
    connection = engine_end.connection()
    for pause_s in (6, 0):
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read()
        kept = connection.sock
        time.sleep(pause_s)
    assert connection.sock is kept is not None


def test_a_body_that_comes_byte_by_byte_is_taken_and_holds_nobody_up(engine_end: Engine) -> None:
    body = json.dumps({**LONG, "max_tokens": 1}).encode()
    with socket.create_connection(("127.0.0.1", engine_end.port), PATIENCE_S) as slow:
        slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        for n, byte in enumerate(head + body):
            slow.send(bytes([byte]))
            if n == len(head):
                assert engine_end.post(b"{").getresponse().status == 400
        id = engine_end.got().id
        engine_end.say((id, 65), (id, None))
        assert slow.recv(12) == b"HTTP/1.1 200"


def test_a_client_that_keeps_its_body_does_not_hold_the_end_up(
    engine_end: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.front, "HANG_UP_S", 0.2)
    with _begun(engine_end) as slow:
        slow.sendall(b"{")
        engine_end.link.send(Stop(0.0))
        assert engine_end.ended()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_before_its_first_token_is_told_of(
    capfd: pytest.CaptureFixture[str], engine_end: Engine, stream: bool
) -> None:
    connection = engine_end.post({**LONG, "prompt": ["x", "y"], "stream": stream})
    asked = {engine_end.got().id, engine_end.got().id}
    connection.close()
    told = [engine_end.got(), engine_end.got()]
    assert {type(message) for message in told} == {Gone} and {message.id for message in told} == asked
    # What it leaves behind counts no more: there is room for four again.
    engine_end.post({**LONG, "prompt": ["x"] * 4})
    assert all(type(engine_end.got()) is Ask for _ in range(4))
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_that_goes_while_it_asks_is_forgotten(
    capfd: pytest.CaptureFixture[str], engine_end: Engine
) -> None:
    with _begun(engine_end) as cut:
        cut.sendall(b"{")
    engine_end.link.send(Stop(PATIENCE_S))
    assert engine_end.ended() and "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_its_choice_while_others_run(
    engine_end: Engine, stream: bool, tokenizer: Any
) -> None:
    (token,) = tokenizer.encode("h")
    body = {**LONG, "prompt": ["x", "y"], "max_tokens": 2, "stop": "h", "stream": stream}
    connection = engine_end.post(body)
    first, second = engine_end.got().id, engine_end.got().id
    engine_end.say((first, token))
    told = engine_end.got()
    assert (type(told), told.id) == (Enough, first)
    engine_end.say((second, 65), (second, 66), (second, None))
    content = connection.getresponse().read().decode()
    if stream:
        assert content.count('"finish_reason": "stop"') == content.count('"finish_reason": "length"') == 1
    else:
        choices = json.loads(content)["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["stop", "length"]
        assert choices[0]["text"] == "" and json.loads(content)["usage"]["completion_tokens"] == 3


def events_of(connection: http.client.HTTPConnection) -> list[dict[str, Any]]:
    """What a stream has told before its end."""
    *events, done, rest = connection.getresponse().read().decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


ALL_COUNTS = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


def test_each_chunk_has_the_counts_of_its_choice_so_far_and_the_last_has_those_of_all(
    engine_end: Engine, tokenizer: Any
) -> None:
    prompts = ["x", "The harbour"]
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    connection = engine_end.post({**LONG, **ALL_COUNTS, "prompt": prompts, "max_tokens": 2})
    first, second = engine_end.got().id, engine_end.got().id
    engine_end.say((first, 65), (second, 66))
    engine_end.say((first, 67), (second, 68), (first, None), (second, None))
    *events, last = events_of(connection)
    for index, prompt_tokens in enumerate(lengths):
        counts = [event["usage"] for event in events if event["choices"][0]["index"] == index]
        assert [count["completion_tokens"] for count in counts] == [1, 2]
        assert {count["prompt_tokens"] for count in counts} == {prompt_tokens}
        assert all(c["total_tokens"] == prompt_tokens + c["completion_tokens"] for c in counts)
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (sum(lengths), 4)


def test_each_token_is_a_chunk_and_the_last_has_the_reason(engine_end: Engine, tokenizer: Any) -> None:
    """Clients take the times of chunks for those of tokens: half a character and an end token have theirs too."""
    tokens = [*tokenizer.encode("\u00e9"), *tokenizer.encode("h"), 0]
    connection = engine_end.post({**LONG, "stream": True})
    id = engine_end.got().id
    engine_end.say(*((id, token) for token in tokens), (id, None))
    choices = [event["choices"][0] for event in events_of(connection)]
    assert [choice["text"] for choice in choices] == ["", "\u00e9", "h", ""]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]


def test_no_line_ends_within_an_event(engine_end: Engine, tokenizer: Any) -> None:
    """Wherever a client sees the end of one: U+2028 is one to many."""
    text = "a\u2028b\u0085c"
    tokens = tokenizer.encode(text)
    connection = engine_end.post({**LONG, "max_tokens": len(tokens), "stream": True})
    id = engine_end.got().id
    engine_end.say(*((id, token) for token in tokens), (id, None))
    *lines, done = filter(None, connection.getresponse().read().decode().splitlines())
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert done == "data: [DONE]" and "".join(event["choices"][0]["text"] for event in events) == text


def test_a_chat_begins_with_its_first_token(engine_end: Engine) -> None:
    """Clients take the time of the first chunk that has a choice for that of the first token."""
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    connection = engine_end.post(body, "chat/completions")
    engine_end.got()
    engine_end.link.send(Stop(0.0))
    (event,) = events_of(connection)
    assert event["error"]["message"] == "the server stops"


@pytest.mark.parametrize(("tokens", "counts"), [([65, 0], [0, 1, 2, 2]), ([0], [0, 1, 1])])
def test_the_role_of_a_chat_has_no_tokens(engine_end: Engine, tokens: list[int], counts: list[int]) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, **ALL_COUNTS}
    connection = engine_end.post(body, "chat/completions")
    id = engine_end.got().id
    engine_end.say(*((id, token) for token in tokens), (id, None))
    events = events_of(connection)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["usage"]["completion_tokens"] for event in events] == counts


def test_a_stop_in_what_was_held_back_is_the_reason_of_the_end(engine_end: Engine, tokenizer: Any) -> None:
    """Half a character is text only when no other half follows."""
    tokens = [*tokenizer.encode("x"), tokenizer.encode("\u00e9")[0]]
    connection = engine_end.post({**LONG, "max_tokens": len(tokens), "stop": "\ufffd"})
    id = engine_end.got().id
    engine_end.say(*((id, token) for token in tokens), (id, None))
    choice = json.loads(connection.getresponse().read())["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("x", "stop")


def test_an_end_token_ends_the_answer_and_is_counted(engine_end: Engine) -> None:
    connection = engine_end.post({**LONG, "seed": -3, "temperature": 0.5})
    ask = engine_end.got()
    assert (ask.seed, ask.temperature, ask.max_tokens, ask.stop_tokens) == (-3, 0.5, 50, frozenset({0}))
    engine_end.say((ask.id, 65), (ask.id, 0), (ask.id, None))
    answer = json.loads(connection.getresponse().read())
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 2
    engine_end.post({**LONG, "model": "law"})
    assert engine_end.got().adapter == "law"  # and nothing was said of the one before: it had ended


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/models/other", 404)],
)
def test_what_is_not_there_is_an_error_of_the_api(
    engine_end: Engine, method: str, path: str, status: int
) -> None:
    connection = engine_end.connection()
    connection.request(method, path)
    answer = connection.getresponse()
    assert answer.status == status
    assert json.loads(answer.read())["error"]["type"] == "invalid_request_error"


def test_models_are_told_one_by_one_too(engine_end: Engine) -> None:
    connection = engine_end.connection()
    connection.request("GET", "/v1/models/law")
    answer = json.loads(connection.getresponse().read())
    assert (answer["id"], answer["object"]) == ("law", "model") and answer["created"] > 0


def test_metrics_are_what_the_engine_said_last(engine_end: Engine) -> None:
    assert _metrics(engine_end) == ""
    engine_end.link.send(Metrics("# TYPE coserve_running gauge\ncoserve_running 2\n"))
    end_s = time.monotonic() + PATIENCE_S
    while not (text := _metrics(engine_end)):
        assert time.monotonic() < end_s
    assert text == "# TYPE coserve_running gauge\ncoserve_running 2\n"


def _metrics(end: Engine) -> str:
    connection = end.connection()
    connection.request("GET", "/metrics")
    return connection.getresponse().read().decode()


@pytest.mark.parametrize(
    "body", [b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b'{"prompt": "x", "stop": "\\udfff"}']
)
def test_half_a_pair_of_surrogates_is_no_text(engine_end: Engine, body: bytes) -> None:
    answer = engine_end.post(body).getresponse()
    assert answer.status == 400 and b"its texts Unicode" in answer.read()


def test_a_mistake_of_ours_is_told_without_its_traceback(
    engine_end: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(asked: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(engine_end.front, "_encoded", broken)
    answer = engine_end.post(LONG).getresponse()
    content = answer.read()
    assert answer.status == 500 and b"secret" not in content
    assert json.loads(content)["error"]["type"] == "server_error"


def test_others_are_answered_while_a_long_text_becomes_tokens(
    engine_end: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, begun, read = engine_end.front._encoded, threading.Event(), threading.Event()

    def slow(asked: Any) -> list[list[int]]:
        begun.set()
        assert read.wait(PATIENCE_S)
        return encoded(asked)

    monkeypatch.setattr(engine_end.front, "_encoded", slow)
    engine_end.post(LONG)
    assert begun.wait(PATIENCE_S)
    connection = engine_end.connection()
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    read.set()
    assert type(engine_end.got()) is Ask


def test_a_body_that_is_too_long_is_refused(engine_end: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.front, "MOST_BYTES", 10)
    answer = engine_end.post(LONG).getresponse()
    assert answer.status == 413 and b"at most 10 bytes" in answer.read()
