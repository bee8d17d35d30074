"""Bodies of the OpenAI API, and the text of tokens as they come."""

from __future__ import annotations

import random
from typing import Any

import pytest

from engine.openai import Answer, Refused, wanted
from engine.streamed_text import StreamedText, silent_tokens

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def test_a_completion_and_a_chat_have_the_defaults_of_the_api() -> None:
    one = wanted({"prompt": "x"}, chat=False)
    assert (one.prompts, one.max_tokens, one.temperature, one.top_k, one.seed) == (
        ("x",),
        16,
        1.0,
        None,
        None,
    )
    chat = wanted({**CHAT, "max_completion_tokens": 5, "stop": "a", "top_k": -1}, chat=True)
    assert (chat.messages, chat.max_tokens, chat.stop) == (({"role": "user", "content": "hi"},), 5, ("a",))
    assert wanted(CHAT, chat=True).max_tokens is None


def test_what_changes_nothing_is_taken() -> None:
    none = {
        "n": 1,
        "repetition_penalty": 1.0,
        "min_p": 0.0,
        "skip_special_tokens": True,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "user": "me",
        "tools": [],
        "logprobs": None,
        "stop_token_ids": [],
        "include_stop_str_in_output": False,
        "priority": 0,
        "min_tokens": 0,
    }
    assert wanted({"prompt": "x", **none}, chat=False) == wanted({"prompt": "x"}, chat=False)
    unsaid: dict[str, Any] = {"prompt": "x", "logprobs": False}
    unsaid["stream_options"] = {"include_usage": None, "include_obfuscation": False}
    assert wanted(unsaid, chat=False) == wanted({"prompt": "x"}, chat=False)
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert wanted({"messages": [{"role": "user", "content": parts}]}, chat=True) == wanted(CHAT, chat=True)
    filled = {"role": "user", "content": "hi", "tool_calls": [], "function_call": None, "refusal": None}
    assert wanted({"messages": [filled], "modalities": ["text"]}, chat=True) == wanted(CHAT, chat=True)


def test_counts_in_every_chunk_are_for_streams_that_end_with_them() -> None:
    """As vLLM has it."""
    for asked, found in (
        ({"include_usage": True, "continuous_usage_stats": True}, (True, True)),
        ({"include_usage": True, "continuous_usage_stats": None}, (True, False)),
        ({"include_usage": False, "continuous_usage_stats": True}, (False, False)),
        ({"continuous_usage_stats": True}, (False, False)),
    ):
        one = wanted({"prompt": "x", "stream": True, "stream_options": asked}, chat=False)
        assert (one.include_usage, one.continuous_usage) == found
    with pytest.raises(Refused, match="continuous_usage_stats must be true or false, got 1"):
        wanted({"prompt": "x", "stream_options": {"continuous_usage_stats": 1}}, chat=False)


def test_prompts_are_texts_or_tokens_one_or_several() -> None:
    for given, found in (
        ("x", ("x",)),
        (["x", "y"], ("x", "y")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ):
        assert wanted({"prompt": given}, chat=False).prompts == found


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "the body must be a JSON object"),
        ({}, "prompt must be text, tokens, or a list of these"),
        ({"prompt": []}, "prompt must be text"),
        ({"prompt": [1, "x"]}, "prompt must be text"),
        ({"prompt": [True]}, "prompt must be text"),
        ({"prompt": ["x"] * 65}, "at most 64 of them, got 65"),
        ({"prompt": "x", "n": 2}, "n is not supported: it must be absent, null or 1"),
        ({"prompt": "x", "n": True}, "n is not supported"),
        ({"prompt": "x", "logprobs": 0}, "logprobs is not supported"),
        ({"prompt": "x", "logprobs": 3}, "logprobs is not supported: it must be absent, null or false"),
        ({"prompt": "x", "stream_options": {"every": True}}, "unknown key 'every' of stream_options"),
        ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"prompt": "x", "messages": []}, "unknown key 'messages'"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be a whole number from 1, got 0"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens must be a whole number"),
        ({"prompt": "x", "temperature": -0.1}, "temperature must be a number from 0 to 2"),
        ({"prompt": "x", "temperature": "hot"}, "temperature must be a number"),
        ({"prompt": "x", "top_p": 0}, "top_p must be a number from"),
        ({"prompt": "x", "top_p": float("nan")}, "top_p must be a number from"),
        ({"prompt": "x", "stop": [""]}, "stop must be text that is not empty"),
        ({"prompt": "x", "stop": list("abcdefghijklmnopq")}, "stop must be at most 16 texts, got 17"),
        ({"prompt": "x", "stop_token_ids": [5]}, "stop_token_ids is not supported"),
        ({"prompt": "x", "stream": 1}, "stream must be true or false"),
        ({"prompt": "x", "stream_options": []}, "stream_options must be an object"),
        ({"prompt": "x", "stream_options": {"include_obfuscation": True}}, "include_obfuscation is not"),
        ({"prompt": "x", "model": 3}, "model must be text"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_key(body: Any, words: str) -> None:
    with pytest.raises(Refused, match=words) as refused:
        wanted(body, chat=False)
    error = refused.value.body()["error"]
    assert refused.value.status == error["code"] == 400 and words in error["message"]


@pytest.mark.parametrize(
    "messages",
    [None, [], ["x"], [{"content": "x"}], [{"role": "user"}], [{"role": "user", "content": [{"image": 1}]}]],
)
def test_messages_have_roles_and_text(messages: Any) -> None:
    with pytest.raises(Refused, match="messages"):
        wanted({"messages": messages}, chat=True)


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "audio"])
def test_what_a_message_holds_beside_its_text_is_not_dropped(key: str) -> None:
    for content in ("x", None):
        message = {"role": "assistant", "content": content, key: {"id": "a"}}
        with pytest.raises(Refused, match=rf"messages\[1\]\.{key} is not supported"):
            wanted({"messages": [*CHAT["messages"], message]}, chat=True)


def test_two_names_of_one_bound_may_not_differ() -> None:
    assert wanted({**CHAT, "max_tokens": 5, "max_completion_tokens": 5}, chat=True).max_tokens == 5
    with pytest.raises(Refused, match="must be the same, or one absent"):
        wanted({**CHAT, "max_tokens": 5, "max_completion_tokens": 7}, chat=True)


def test_the_fewest_tokens_are_those_that_come_anyway() -> None:
    ignoring = {"prompt": "x", "max_tokens": 5, "ignore_eos": True}
    assert wanted({**ignoring, "min_tokens": 5}, chat=False) == wanted(ignoring, chat=False)
    for changed in ({"min_tokens": 6}, {"ignore_eos": False}, {"stop": "a"}):
        with pytest.raises(Refused, match="min_tokens is supported up to max_tokens, with ignore_eos and no"):
            wanted({**ignoring, "min_tokens": 5, **changed}, chat=False)
    with pytest.raises(Refused, match="min_tokens is supported up to max_tokens"):
        wanted({**CHAT, "ignore_eos": True, "min_tokens": 5}, chat=True)


def test_chunks_of_a_chat_begin_with_the_role_and_end_with_the_reason() -> None:
    answer = Answer(3, "m", chat=True)
    first = answer.first(0)
    assert first is not None and first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert answer.more(0, "x", None)["choices"][0]["delta"] == {"content": "x"}
    last = answer.more(0, "y", "stop")["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({"content": "y"}, "stop")
    assert Answer(3, "m", chat=False).first(0) is None


def test_streamed_pieces_are_the_text_of_all_tokens(tokenizer: Any) -> None:
    draw = random.Random(0)
    texts = ["The harbour, at night: \u00e9\u4e2d\U0001f600 end", "a\ufffdb"]
    rows = [tokenizer.encode(text) for text in texts]
    rows += [[draw.randrange(len(tokenizer)) for _ in range(60)] for _ in range(40)]
    for tokens in rows:
        stream = StreamedText(tokenizer)
        pieces = [stream.add(token) for token in tokens]
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(pieces) + stream.end() == whole
    stream = StreamedText(tokenizer)
    pieces = [stream.add(token) for token in rows[0]]
    assert not any("\ufffd" in piece for piece in pieces) and sum(map(bool, pieces)) > 10


def test_special_tokens_cost_nothing_and_change_nothing(tokenizer: Any) -> None:
    silent = silent_tokens(tokenizer)
    assert silent == set(tokenizer.encode("<|end|><|user|><|assistant|><|system|>"))
    end = tokenizer.eos_token_id
    tokens = [end, *(t for token in tokenizer.encode("at night \u00e9") for t in (token, end, end))]
    streams = StreamedText(tokenizer), StreamedText(tokenizer, silent=silent)
    told = ["".join(map(stream.add, tokens)) + stream.end() for stream in streams]
    assert told == ["at night \u00e9"] * 2 and len(streams[1]._tokens) < len(tokens) / 2


@pytest.mark.parametrize("stop", ["night", "ar", "end", ": ", "never", "e\u4e2d", "t: \u00e9"])
def test_an_answer_ends_before_a_stop_wherever_tokens_part_it(tokenizer: Any, stop: str) -> None:
    text = "The harbour, at night: \u00e9\u4e2d and the end of it"
    stream = StreamedText(tokenizer, ["zzz", stop])
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    place = text.find(stop)
    assert stream.stopped == (place >= 0)
    assert "".join(pieces) + stream.end() == (text[:place] if place >= 0 else text)
