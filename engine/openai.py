"""The OpenAI API as far as it is served: what the body of a request asks for, and the objects of an answer.

Completions and chat completions, streamed or not (platform.openai.com/docs/api-reference). What would change the
answer and is not supported is refused by name; what would not, is taken. `top_k`, `seed`, `ignore_eos` and
`continuous_usage_stats` are as vLLM has them, and so is `min_tokens` where an answer has them anyway.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_STOPS = 16
"""Of one request, as the next; OpenAI has 4, and programs are ended at more places than these."""
MOST_PROMPTS = 64
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "bad_words": ([],),
    "priority": (0,),
    "return_token_ids": (False,),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
"""Keys that are not supported, and the values at which they change nothing, as null does."""
IGNORED = (
    "user",
    "metadata",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
"""Keys that change nothing in an answer."""
BOTH = (
    "model",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "ignore_eos",
    "stream",
    "stream_options",
)
KEYS = {False: (*BOTH, "prompt"), True: (*BOTH, "messages", "max_completion_tokens")}
"""Keys of a completion and of a chat."""


class Refused(Exception):
    """A request that gets no answer: the status of HTTP, what is wrong, and in which key."""

    def __init__(self, status: int, line: str, key: str | None = None) -> None:
        super().__init__(line)
        self.status = status
        self.key = key

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.key, "code": self.status}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A request, checked. Either `prompts` or `messages` is not empty."""

    model: str | None
    prompts: tuple[str | tuple[int, ...], ...]
    """Texts, or their tokens."""
    messages: tuple[dict[str, str], ...]
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int | None
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    """Whether a stream ends with the counts of tokens."""
    continuous_usage: bool
    """Whether each chunk of that stream has those of its choice so far."""


def wanted(body: object, chat: bool) -> Wanted:
    """What the body of a (chat) completion asks for. Raises Refused."""
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    given = {key: value for key, value in body.items() if value is not None}
    for key, value in given.items():
        if key in NEUTRAL and not any(_same(value, neutral) for neutral in NEUTRAL[key]):
            allowed = " or ".join(json.dumps(neutral) for neutral in NEUTRAL[key])
            raise Refused(400, f"{key} is not supported: it must be absent, null or {allowed}", key)
        if key not in NEUTRAL and key not in IGNORED and key not in KEYS[chat]:
            raise Refused(400, f"unknown key {key!r}", key)
    include_usage, continuous_usage = _usages(given)
    top_k = _whole(given, "top_k", None, -1)
    stop = _stop(given.get("stop", ()))
    ignore_eos = _typed(given, "ignore_eos", bool, False)
    return Wanted(
        model=_typed(given, "model", str, None),
        prompts=() if chat else _prompts(given.get("prompt")),
        messages=_messages(given.get("messages")) if chat else (),
        max_tokens=_max_tokens(given, None if chat else 16, ends=bool(stop) or not ignore_eos),
        temperature=_number(given, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(given, "top_p", 1.0, 1e-9, 1.0),
        top_k=None if top_k in (-1, 0) else top_k,
        seed=_whole(given, "seed", None, -(2**63)),
        stop=stop,
        ignore_eos=ignore_eos,
        stream=_typed(given, "stream", bool, False),
        include_usage=include_usage,
        continuous_usage=continuous_usage,
    )


class Answer:
    """The objects of one answer, whole or in chunks."""

    def __init__(self, id: int, model: str, chat: bool) -> None:
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{id}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Sequence[str], reasons: Sequence[str], usage: Mapping[str, int]) -> dict[str, Any]:
        choices = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            own = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            choices.append({"index": index, **own, "logprobs": None, "finish_reason": reason})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": dict(usage)}

    def first(self, index: int) -> dict[str, Any] | None:
        """What comes before the first text of a choice; a completion begins with its text."""
        return (
            self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None) if self._chat else None
        )

    def more(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """Text of a choice; `reason` is why it ends with it."""
        return self._chunk(index, {"delta": {"content": text}} if self._chat else {"text": text}, reason)

    def last(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The chunk of the counts, after all choices."""
        return {**self._head, "object": self._kind, "choices": [], "usage": dict(usage)}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, index: int, own: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **own, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": self._kind, "choices": [choice]}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _max_tokens(given: Mapping[str, Any], default: int | None, ends: bool) -> int | None:
    """Under either name; `ends` is whether an answer may end before it."""
    most = _whole(given, "max_tokens", default, 1)
    if "max_completion_tokens" in given:
        other = _whole(given, "max_completion_tokens", None, 1)
        if given.get("max_tokens", other) != other:
            raise Refused(
                400, "max_tokens and max_completion_tokens must be the same, or one absent", "max_tokens"
            )
        most = other
    least = _whole(given, "min_tokens", 0, 0)
    if least and (ends or most is None or least > most):
        line = "min_tokens is supported up to max_tokens, with ignore_eos and no stop"
        raise Refused(400, line, "min_tokens")
    return most


def _usages(given: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a stream ends with the counts of tokens, and whether each chunk has them too."""
    options = _typed(given, "stream_options", dict, {})
    options = {key: value for key, value in options.items() if value is not None}
    if unknown := options.keys() - {"include_usage", "continuous_usage_stats", "include_obfuscation"}:
        raise Refused(400, f"unknown key {min(unknown)!r} of stream_options", "stream_options")
    if _typed(options, "include_obfuscation", bool, False):
        line = "include_obfuscation is not supported: it must be absent, null or false"
        raise Refused(400, line, "stream_options")
    include = _typed(options, "include_usage", bool, False)
    continuous = _typed(options, "continuous_usage_stats", bool, False)
    return include, include and continuous


def _prompts(given: object) -> tuple[str | tuple[int, ...], ...]:
    several = given if isinstance(given, list) and given and not _is_whole(given[0]) else [given]
    prompts: list[str | tuple[int, ...]] = []
    for prompt in several:
        if isinstance(prompt, list) and prompt and all(map(_is_whole, prompt)):
            prompts.append(tuple(prompt))
        elif isinstance(prompt, str):
            prompts.append(prompt)
        else:
            raise Refused(400, "prompt must be text, tokens, or a list of these", "prompt")
    if len(prompts) > MOST_PROMPTS:
        raise Refused(400, f"prompt must have at most {MOST_PROMPTS} of them, got {len(prompts)}", "prompt")
    return tuple(prompts)


def _messages(given: object) -> tuple[dict[str, str], ...]:
    if not isinstance(given, list) or not given:
        raise Refused(400, "messages must be a list of at least one", "messages")
    return tuple(_message(n, message) for n, message in enumerate(given))


def _message(n: int, given: object) -> dict[str, str]:
    where = f"messages[{n}]"
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise Refused(400, f"{where} must be an object with a role and content", "messages")
    for key in ("tool_calls", "function_call", "audio"):
        if given.get(key):
            raise Refused(400, f"{where}.{key} is not supported: a message is its role and text", "messages")
    content = given.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise Refused(400, f"{where}.content must be text; no other parts are supported", "messages")
        content = "".join(texts)
    if not isinstance(content, str):
        raise Refused(400, f"{where}.content must be text", "messages")
    return {"role": given["role"], "content": content}


def _stop(given: object) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused(400, "stop must be text that is not empty, or a list of such", "stop")
    if len(stops) > MOST_STOPS:
        raise Refused(400, f"stop must be at most {MOST_STOPS} texts, got {len(stops)}", "stop")
    return tuple(stops)


def _typed(given: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = given.get(key, default)
    if value is not default and not isinstance(value, kind):
        raise Refused(400, f"{key} must be {_KINDS[kind]}, got {value!r}", key)
    return value


_KINDS = {str: "text", bool: "true or false", dict: "an object"}


def _whole(given: Mapping[str, Any], key: str, default: int | None, least: int) -> int | None:
    value: int | None = given.get(key, default)
    if value is not default and not (_is_whole(value) and least <= (value or 0) < 2**63):
        raise Refused(400, f"{key} must be a whole number from {least}, got {value!r}", key)
    return value


def _number(given: Mapping[str, Any], key: str, default: float, least: float, most: float) -> float:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise Refused(400, f"{key} must be a number from {least:g} to {most:g}, got {value!r}", key)
    return float(value)


def _same(value: object, neutral: object) -> bool:
    """Equal; 0 is not false, nor 1 true."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
