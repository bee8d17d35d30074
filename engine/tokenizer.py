"""A model's tokenizer: its file, its end tokens, its chat template. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sim.errors import one_line
from sim.json_file import read_object


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    eos_token_id: int | None
    chat_template: Any
    is_fast: bool

    def __call__(self, text: str, **options: Any) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def read_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder. ValueError names its file that cannot be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.encode("a")
        return tokenizer
    except Exception as error:  # tokenizers raises bare ones
        for path in sorted([*Path(folder).glob("config.json"), *Path(folder).glob("*token*.json")]):
            read_object(path)
        raise ValueError(f"{folder}: its tokenizer cannot be read: {one_line(str(error))[:200]}") from error


def prompt_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text that something follows: after what the tokenizer begins a text with, and without what it would
    end one with."""
    tokens = tokenizer.encode(text, add_special_tokens=True)
    framed, own = (tokenizer.encode("a", add_special_tokens=added) for added in (True, False))
    end = next(n for n in range(len(framed)) if framed[n : n + len(own)] == own) + len(own)
    return tokens[: len(tokens) - (len(framed) - end)]


def check_tokens(tokens: Iterable[int], vocab: int, folder: str | Path) -> None:
    """Raise ValueError for a token for which the model of the tokenizer's folder has no embedding."""
    largest = max(tokens, default=0)
    if largest >= vocab:
        raise ValueError(
            f"{folder}: its tokenizer has a token {largest}, and its config.json a vocab_size of {vocab}"
        )


def stop_tokens(folder: str, tokenizer: Any) -> frozenset[int]:
    """The end tokens of generation_config.json, or the tokenizer's own."""
    path = Path(folder) / "generation_config.json"
    values = read_object(path) if path.is_file() else {}
    found = values.get("eos_token_id")
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return frozenset()
    tokens = found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) for token in tokens):
        raise ValueError(f"{path}: eos_token_id must be a token or a list of tokens, got {found!r}")
    return frozenset(tokens)


def template(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], where: str, **options: Any
) -> list[int]:
    """Tokens of a conversation under the tokenizer's chat template. ValueError begins with `where` when the template
    is broken, or refuses such a conversation."""
    return list(_applied(tokenizer, messages, where, tokenize=True, return_dict=True, **options)["input_ids"])


def template_text(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], where: str, **options: Any
) -> str:
    """What `template` takes the tokens of."""
    text: str = _applied(tokenizer, messages, where, tokenize=False, **options)
    return text


def token_ends(tokenizer: Tokenizer, text: str, where: str) -> list[int]:
    """Where in `text`, whose special tokens are written out, each of its tokens ends. ValueError for a tokenizer that
    does not tell."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{where}: a token is of a question and of its answer, and a tokenizer without tokenizer.json does not "
            "tell where they meet"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [end for _, end in found["offset_mapping"]]


def _applied(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], where: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:  # a template computes, and may fail as any program does
        told = one_line(str(error))
        raise ValueError(f"{where}: the tokenizer's chat template fails on it: {told}") from error
