"""The HTTP side of `coserve serve`, in a process of its own: requests in, tokens out, text here.

The engine's process never waits for a client, a tokenizer or JSON; between the two is a pipe (`engine.messages`).

Endpoints: POST /v1/completions, /v1/chat/completions; GET /v1/models, /health, /metrics (Prometheus).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from engine.choice import STOPPING, Choice
from engine.messages import Ask, Enough, Failed, Gone, Metrics, Ready, Serving, Stop, Tokens
from engine.openai import Answer, Refused, Wanted, usage, wanted
from engine.streamed_text import StreamedText, silent_tokens
from engine.tokenizer import prompt_tokens, read_tokenizer, stop_tokens, template

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MOST_BYTES = 4 * 2**20
"""Of a request's body."""
POLL_S = 0.2
KEEP_ALIVE_S = 75
"""For which a connection may lie idle, longer than clients keep theirs: a request must not meet the hanging up."""
HANG_UP_S = 2.0
"""For clients to take what they are told at the end; those that do not are hung up on."""
GONE = 499
"""Status of what nobody waits for any more."""


def run_front(folder: str, listening: socket.socket, link: Connection) -> None:
    """Serve the model of a folder on a socket that is bound, until the engine says Stop or is gone. The target of a
    process."""
    # Who stops the server tells the engine's process, and that one this.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # A tokenizer needs no torch, and where transformers finds none it is read in a third of the time.
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    told: Ready | Failed = Ready()
    try:
        front = Front(folder, link)
    except ValueError as error:
        told = Failed(str(error))
    try:
        link.send(told)
        serving = link.recv()
    except (EOFError, OSError):
        return  # the engine is gone, or has heard enough
    front.serve(serving, listening)


class Front:
    """Requests under way, and the tokens that they wait for."""

    def __init__(self, folder: str, link: Connection) -> None:
        """Takes seconds. Raises ValueError for a folder whose tokenizer cannot be read."""
        import uvicorn

        self._ready = threading.Event()
        self._serving: Serving
        self._link = link
        self._tokenizer = read_tokenizer(folder)
        self._stop_tokens = stop_tokens(folder, self._tokenizer)
        self._silent = silent_tokens(self._tokenizer)
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Queue[int | None]] = {}
        self._metrics = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        config = uvicorn.Config(
            self.app(), log_level="warning", lifespan="off", timeout_keep_alive=KEEP_ALIVE_S
        )
        config.load()
        self._server: Any = uvicorn.Server(config)
        self._stopping = False
        self._created = int(time.time())

    def serve(self, serving: Serving, listening: socket.socket) -> None:
        """Answer until the engine says Stop or is gone."""
        self._serving = serving
        # Apart from the main thread it leaves signals alone.
        thread = threading.Thread(target=self._run, args=(listening,))
        thread.start()
        self._ready.wait()
        try:
            while thread.is_alive():
                if self._link.poll(POLL_S):
                    self._take(self._link.recv())
        except (EOFError, OSError):
            self._take(Stop(0.0))
        thread.join()

    def _run(self, listening: socket.socket) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._ready.set()
            await self._server.serve(sockets=[listening])

        try:
            asyncio.run(serve())
        finally:
            self._ready.set()

    def _take(self, message: Tokens | Metrics | Stop) -> None:
        """What the engine says; from another thread than the server's."""
        with suppress(RuntimeError):  # the server has ended meanwhile
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._give, message)

    def app(self) -> Starlette:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.responses import JSONResponse, PlainTextResponse
        from starlette.routing import Route

        async def completions(request: Request) -> Any:
            return await self._answer(request, chat=False)

        async def chat(request: Request) -> Any:
            return await self._answer(request, chat=True)

        async def models(request: Request) -> Response:
            names = [self._serving.name, *self._serving.adapters]
            return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

        async def model(request: Request) -> Response:
            name = request.path_params["name"]
            try:
                self._adapter(name)
            except Refused as refused:
                return JSONResponse(refused.body(), refused.status)
            return JSONResponse(self._model(name))

        async def health(request: Request) -> Response:
            return JSONResponse({"status": "ok"})

        async def metrics(request: Request) -> Response:
            return PlainTextResponse(self._metrics, media_type="text/plain; version=0.0.4")

        async def unknown(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            refused = Refused(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
            return JSONResponse(refused.body(), refused.status, error.headers)

        async def failed(request: Request, error: Exception) -> Response:
            # What it was is on the server's own stderr.
            refused = Refused(500, "a mistake of the server")
            return JSONResponse(refused.body(), refused.status)

        return Starlette(
            routes=[
                Route("/v1/completions", completions, methods=["POST"]),
                Route("/v1/chat/completions", chat, methods=["POST"]),
                Route("/v1/models", models),
                Route("/v1/models/{name:path}", model),
                Route("/health", health),
                Route("/metrics", metrics),
            ],
            exception_handlers={HTTPException: unknown, Exception: failed},
        )

    def _give(self, message: Tokens | Metrics | Stop) -> None:
        if isinstance(message, Metrics):
            self._metrics = message.text
            return
        if isinstance(message, Stop):
            assert self._loop is not None
            self._server.should_exit = self._stopping = True
            self._loop.call_later(message.drain_s, self._give_up)
            return
        for id, token in message.tokens:
            queue = self._waiting.get(id)
            if queue is not None:
                queue.put_nowait(token)

    def _give_up(self) -> None:
        """Whoever still waits is told that there is no more, and soon hung up on."""
        assert self._loop is not None
        for queue in self._waiting.values():
            queue.put_nowait(None)
        self._loop.call_later(HANG_UP_S, self._hang_up)

    def _hang_up(self) -> None:
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    async def _answer(self, request: Request, chat: bool) -> Any:
        """A response as Starlette calls it."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse, StreamingResponse

        try:
            asked = wanted(await _body(request), chat)
            adapter = self._adapter(asked.model)
            # Long texts take seconds, in which others get their tokens.
            prompts = await asyncio.to_thread(self._encoded, asked)
            most = [self._room(tokens, asked.max_tokens) for tokens in prompts]
            if self._stopping:
                raise Refused(503, STOPPING)
            if len(self._waiting) + len(prompts) > self._serving.max_requests:
                raise Refused(429, f"{self._serving.max_requests} requests are under way; try again later")
        except Refused as refused:
            return JSONResponse(refused.body(), refused.status)
        except ClientDisconnect:
            return JSONResponse({}, GONE)
        choices = [self._begin(asked, tokens, n, adapter) for tokens, n in zip(prompts, most, strict=True)]
        answer = Answer(choices[0].id, asked.model or self._serving.name, chat)
        counts = [len(tokens) for tokens in prompts]
        if asked.stream:
            events = self._events(answer, choices, counts, asked)
            return _Ending(StreamingResponse(events, media_type="text/event-stream"), self._end, choices)
        whole = asyncio.ensure_future(self._wholes(choices))
        gone = asyncio.ensure_future(_disconnected(request))
        both: tuple[asyncio.Future[Any], ...] = (whole, gone)
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                return JSONResponse({}, GONE)
            texts = await whole
        except Refused as refused:
            return JSONResponse(refused.body(), refused.status)
        finally:
            whole.cancel()
            gone.cancel()
            self._end(choices)
        reasons = [choice.reason for choice in choices]
        made = sum(choice.count for choice in choices)
        return JSONResponse(answer.whole(texts, reasons, usage(sum(counts), made)))

    async def _events(
        self, answer: Answer, choices: Sequence[Choice], counts: Sequence[int], asked: Wanted
    ) -> AsyncIterator[str]:
        """Server-sent events of all choices as their tokens come. `counts` are those of the prompts' tokens."""
        ready: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        def tell(index: int, chunk: dict[str, Any], made: int) -> None:
            more = {"usage": usage(counts[index], made)} if asked.continuous_usage else {}
            ready.put_nowait({**chunk, **more})

        async def follow(index: int, choice: Choice) -> None:
            # With the first token, not before it: clients take the first chunk's time for that token's.
            first = answer.first(index)
            try:
                async for text in choice.texts():
                    if first is not None:
                        tell(index, first, 0)
                        first = None
                    reason = choice.reason if choice.ended else None
                    tell(index, answer.more(index, text, reason), choice.count)
            except Refused as refused:
                ready.put_nowait(refused.body())
            self._end([choice])
            ready.put_nowait(None)

        tasks = [asyncio.ensure_future(follow(n, choice)) for n, choice in enumerate(choices)]
        left = len(tasks)
        try:
            while left:
                event = await ready.get()
                if event is None:
                    left -= 1
                else:
                    yield _event(event)
            if asked.include_usage:
                made = sum(choice.count for choice in choices)
                yield _event(answer.last(usage(sum(counts), made)))
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()

    async def _wholes(self, choices: Sequence[Choice]) -> list[str]:
        """The texts of all choices."""
        return await asyncio.gather(*(self._whole(choice) for choice in choices))

    async def _whole(self, choice: Choice) -> str:
        """A choice's text, all of it."""
        try:
            return "".join([text async for text in choice.texts()])
        finally:
            self._end([choice])

    def _begin(self, asked: Wanted, tokens: list[int], most: int, adapter: str | None) -> Choice:
        id = next(self._ids)
        stops = frozenset[int]() if asked.ignore_eos else self._stop_tokens
        queue: asyncio.Queue[int | None] = asyncio.Queue()
        self._waiting[id] = queue
        self._link.send(
            Ask(
                id=id,
                tokens=tokens,
                max_tokens=most,
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=asked.top_k,
                seed=secrets.randbits(63) if asked.seed is None else asked.seed,
                stop_tokens=stops,
                adapter=adapter,
            )
        )
        return Choice(id, queue, StreamedText(self._tokenizer, asked.stop, self._silent), most, stops)

    def _end(self, choices: Sequence[Choice]) -> None:
        """Forget them; those that still run are ended."""
        for choice in choices:
            self._waiting.pop(choice.id, None)
            if not choice.done:
                choice.done = True
                with suppress(OSError):  # the engine is gone
                    self._link.send((Enough if choice.reason == "stop" else Gone)(choice.id))

    def _model(self, name: str) -> dict[str, Any]:
        """`max_model_len` is of prompt and answer, as vLLM has it."""
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "coserve",
            "max_model_len": self._serving.longest_tokens,
        }

    def _adapter(self, model: str | None) -> str | None:
        if model is None or model == self._serving.name:
            return None
        if model in self._serving.adapters:
            return model
        names = ", ".join([self._serving.name, *self._serving.adapters])
        raise Refused(404, f"no model {model!r}; there are {names}", "model")

    def _encoded(self, asked: Wanted) -> list[list[int]]:
        """The tokens of each prompt."""
        if not asked.messages:
            given = [
                prompt_tokens(self._tokenizer, p) if isinstance(p, str) else list(p) for p in asked.prompts
            ]
        else:
            if self._tokenizer.chat_template is None:
                raise Refused(400, f"{self._serving.name} has no chat template", "messages")
            try:
                given = [template(self._tokenizer, asked.messages, "messages", add_generation_prompt=True)]
            except ValueError as error:
                raise Refused(400, str(error), "messages") from None
        for tokens in given:
            if not tokens:
                raise Refused(400, "the prompt must have at least one token", "prompt")
            if min(tokens) < 0 or max(tokens) >= self._serving.vocab:
                raise Refused(400, f"tokens must be in 0..{self._serving.vocab - 1}", "prompt")
        return given

    def _room(self, tokens: Sequence[int], max_tokens: int | None) -> int:
        """How many tokens the answer may have."""
        room = self._serving.longest_tokens - len(tokens)
        if room < 1 or (max_tokens or 1) > room:
            asked = f"{len(tokens)} of the prompt and {max_tokens or 1} of the answer"
            raise Refused(
                400,
                f"at most {self._serving.longest_tokens} tokens fit together here (the model's context, "
                f"limits.max_sequence_tokens and limits.kv_tokens of the server), got {asked}",
                "max_tokens",
            )
        return room if max_tokens is None else max_tokens


class _Ending:
    """A response that calls `end(choices)` when it is over, and when it never began: its client may have gone."""

    def __init__(
        self,
        response: Response,
        end: Callable[[Sequence[Choice]], None],
        choices: Sequence[Choice],
    ) -> None:
        self._response = response
        self._end = end
        self._choices = choices

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._response(scope, receive, send)
        finally:
            self._end(self._choices)


async def _body(request: Request) -> object:
    """What the body of a request holds."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BYTES:
            raise Refused(413, f"the body must have at most {MOST_BYTES} bytes")
        parts.append(part)
    try:
        found = json.loads(b"".join(parts))
        # JSON can write half of a pair of surrogates, which is no character and has no bytes.
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise Refused(400, "the body must be JSON, its texts Unicode") from None
    return found


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(event: Mapping[str, Any]) -> str:
    # ASCII: many a client ends a line at U+0085 and U+2028 as well.
    return f"data: {json.dumps(event)}\n\n"
