"""Training data as users have it: a JSON or JSON-lines file whose columns say what it is.

    text                        plain text
    prompt, completion          a prompt and what follows it
    instruction, input, output  alpaca; one exchange, after those of a `history` if there is one
    conversations               sharegpt: a list of {from: human | gpt | system, value}
    messages                    OpenAI: a list of {role: user | assistant | system, content}

The last three become messages and take the tokenizer's chat template. Loss is on the answers alone unless
prompts are asked for: the tokens that the template adds when an answer is appended. Errors name file and row.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.finetune import Sample
from engine.kernels.loss import IGNORE_LABEL
from engine.tokenizer import Tokenizer, prompt_tokens, template, template_text, token_ends
from sim.json_file import parse

FORMATS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
"""Format -> the columns that it is known by; the first that fits."""
ABSENT = (None, "")
"""What a row has in a column that others fill and it does not."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
UNREAD: dict[str, tuple[Any, ...]] = {
    "tools": (None, [], "", "[]"),
    "functions": (None, []),
    "tool_calls": (None, []),
    "function_call": (None,),
    "weight": (None, 1),
}
"""What a conversation or a turn may hold that would change its tokens or their loss -> values that change nothing."""

Message = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Samples to train on, and what became of the rest."""

    samples: Sequence[Sample]
    note: str | None
    """How many were cut or left out; None when none was."""


def read_dataset(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    cutoff_len: int,
    max_samples: int | None = None,
    train_on_prompt: bool = False,
    packing: bool = False,
) -> Dataset:
    """Samples of at most `cutoff_len` tokens of the first `max_samples` rows, in the file's order.

    With `packing` they are laid one after the other and cut into pieces of `cutoff_len`, the last of which
    may be shorter; without it each longer one loses its end. What then has no token to train on is left out.
    Raises ValueError for a row that does not fit.
    """
    path = Path(path)
    samples: list[Sample] = []
    kind: str | None = None
    for row, record in itertools.islice(_records(path), max_samples):
        where = f"{path}: row {row}"
        kind = kind or _format(record, where)
        tokens, trained = _encode(record, kind, tokenizer, where)
        ids, own = np.array(tokens, np.int32), np.array(trained, bool) | train_on_prompt
        samples.append(Sample(ids, np.where(own, ids.astype(np.int64), IGNORE_LABEL)))
    if not samples:
        raise ValueError(f"{path}: holds no rows")
    if packing:
        samples = _packed(samples, cutoff_len)
    long = sum(len(s.tokens) > cutoff_len for s in samples)
    cut = [Sample(s.tokens[:cutoff_len], s.labels[:cutoff_len]) for s in samples]
    kept = [s for s in cut if (s.labels[1:] != IGNORE_LABEL).any()]
    if not kept:
        raise ValueError(f"{path}: no row has a token to train on within cutoff_len {cutoff_len}")
    return Dataset(samples=kept, note=_note(path, len(cut), cutoff_len, long, len(cut) - len(kept)))


def _note(path: Path, count: int, cutoff_len: int, long: int, left_out: int) -> str | None:
    parts = []
    if long:
        parts.append(f"{long} of {count} samples are longer than cutoff_len {cutoff_len} and lose their end")
    if left_out:
        parts.append(f"{left_out} of {count} samples are left out, with no token to train on")
    return f"{path}: {'; '.join(parts)}" if parts else None


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows from 1 with their records."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"dataset {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"dataset {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset {path} is not UTF-8 at byte {error.start}") from None
    if path.suffix == ".jsonl":
        # Not splitlines: JSON may hold the other separators of Unicode as they are.
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows: list[tuple[int, Any]] = [(n, _json(line, f"{path}: row {n}")) for n, line in lines]
    else:
        whole = _json(text, str(path))
        if not isinstance(whole, list):
            raise ValueError(f"{path}: must be a list of records, got {type(whole).__name__}")
        rows = list(enumerate(whole, 1))
    for row, record in rows:
        if not isinstance(record, dict):
            raise ValueError(f"{path}: row {row} must be a record, got {record!r}")
        yield row, record


def _json(text: str, where: str) -> Any:
    try:
        return parse(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _format(record: Mapping[str, Any], where: str) -> str:
    for kind, columns in FORMATS.items():
        if all(column in record for column in columns):
            return kind
    known = "; ".join(" and ".join(columns) for columns in FORMATS.values())
    raise ValueError(f"{where}: columns must include {known}; got {', '.join(record)}")


def _encode(
    record: Mapping[str, Any], kind: str, tokenizer: Tokenizer, where: str
) -> tuple[list[int], list[bool]]:
    """Tokens, and which of them are trained on."""
    if kind == "text":
        tokens = _with_end(prompt_tokens(tokenizer, _text(record, "text", where)), tokenizer)
        return tokens, [True] * len(tokens)
    if kind == "prompt":
        prompt = prompt_tokens(tokenizer, _text(record, "prompt", where))
        answer = tokenizer.encode(_text(record, "completion", where), add_special_tokens=False)
        answer = _with_end(answer, tokenizer)
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)
    return _chat(_messages(record, kind, where), tokenizer, where)


def _messages(record: Mapping[str, Any], kind: str, where: str) -> list[Message]:
    _check_read(record, where)
    if kind == "alpaca":
        user = _text(record, "instruction", where)
        if record.get("input") not in ABSENT:
            given = _text(record, "input", where)
            user = f"{user}\n{given}" if user else given
        found = [*_history(record, where), {"role": "user", "content": user}]
        found.append({"role": "assistant", "content": _text(record, "output", where)})
    else:
        column, role, content = (
            ("messages", "role", "content") if kind == "messages" else ("conversations", "from", "value")
        )
        turns = record.get(column)
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"{where}: {column} must be a list of records, got {turns!r}")
        for turn in turns:
            _check_read(turn, where)
        found = [
            {"role": _role(turn.get(role), where), "content": _text(turn, content, where)} for turn in turns
        ]
    if record.get("system") not in ABSENT:
        found.insert(0, {"role": "system", "content": _text(record, "system", where)})
    if not any(message["role"] == "assistant" for message in found):
        raise ValueError(f"{where}: has no answer to train on")
    return found


def _check_read(record: Mapping[str, Any], where: str) -> None:
    for key, neutral in UNREAD.items():
        if record.get(key) not in neutral:
            raise ValueError(f"{where}: conversations cannot have {key} here, got {record[key]!r}")


def _history(record: Mapping[str, Any], where: str) -> list[Message]:
    """Earlier exchanges of an alpaca row."""
    found: list[Message] = []
    history = [] if record.get("history") in ABSENT else record["history"]
    pairs = isinstance(history, list) and all(isinstance(p, list) and len(p) == 2 for p in history)
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise ValueError(f"{where}: history must be a list of [instruction, output], got {history!r}")
    for user, answer in history:
        found += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return found


def _role(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in ROLES:
        raise ValueError(f"{where}: a turn must be of {', '.join(ROLES)}, got {value!r}")
    return ROLES[value]


def _text(record: Mapping[str, Any], column: str, where: str) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} must be text, got {value!r}")
    return value


def _chat(messages: Sequence[Message], tokenizer: Tokenizer, where: str) -> tuple[list[int], list[bool]]:
    """The whole conversation, and which tokens an answer added. A token across a border belongs to what follows it."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where}: holds a conversation, and the tokenizer has no chat template "
            "(chat_template.jinja beside it, or rows of prompt and completion)"
        )
    tokens = template(tokenizer, messages, where)
    trained = [False] * len(tokens)
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            before = template(tokenizer, messages[:n], where, add_generation_prompt=True)
            after = template(tokenizer, messages[: n + 1], where)
            start, end = len(before), len(after)
            if tokens[:end] != after or after[:start] != before:  # a token across a border, or another text
                asked = template_text(tokenizer, messages[:n], where, add_generation_prompt=True)
                answered = template_text(tokenizer, messages[: n + 1], where)
                text = template_text(tokenizer, messages, where)
                if not (answered.startswith(asked) and text.startswith(answered)):
                    raise ValueError(
                        f"{where}: the chat template changes earlier turns, so answers cannot be found"
                    )
                ends = token_ends(tokenizer, text, where)
                start, end = bisect_right(ends, len(asked)), bisect_right(ends, len(answered))
            trained[start:end] = [True] * (end - start)
    return tokens, trained


def _with_end(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    return tokens if tokenizer.eos_token_id is None else [*tokens, tokenizer.eos_token_id]


def _packed(samples: Sequence[Sample], length: int) -> list[Sample]:
    tokens = np.concatenate([s.tokens for s in samples])
    labels = np.concatenate([s.labels for s in samples])
    return [Sample(tokens[a : a + length], labels[a : a + length]) for a in range(0, len(tokens), length)]
