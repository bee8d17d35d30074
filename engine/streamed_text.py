"""Text of an answer as its tokens come: no half characters, and nothing that may become a stop.

A token can be part of a character, and its text can depend on the token before (a space at a word's start). So the
new text is what decoding the latest tokens gives beyond what it gave without the new one, once that ends with a
whole character; the tokens decoded are those since the last but one such place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"
"""What bytes that are no character are decoded to."""


def silent_tokens(tokenizer: Any) -> frozenset[int]:
    """Special tokens: they have no text, and none depends on them."""
    return frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)


class StreamedText:
    """The text of one answer. `tokenizer` is one of transformers."""

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), silent: frozenset[int] = frozenset()
    ) -> None:
        """The answer ends before the first of the texts `stop`. Tokens that are known to be `silent` cost nothing, in
        whatever number."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._silent = silent
        self._tokens: list[int] = []
        self._begin = 0
        """First token that is decoded."""
        self._read = 0
        """Tokens whose text is known."""
        self._held = ""
        """Text that may be the beginning of a stop."""
        self.stopped = False
        """Whether a stop has come."""

    def add(self, token: int) -> str:
        """The text that this token adds and that stays."""
        if token in self._silent:
            return ""
        self._tokens.append(token)
        known = self._decoded(self._begin, self._read)
        text = self._decoded(self._begin, len(self._tokens))
        if len(text) <= len(known) or text.endswith(HALF):
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return self._released(text[len(known) :])

    def end(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        known = self._decoded(self._begin, self._read)
        rest = self._decoded(self._begin, len(self._tokens))[len(known) :]
        text = self._released(rest) + self._held
        self._held = ""
        return text

    def _decoded(self, begin: int, end: int) -> str:
        # Tidied spaces would be other text for the same tokens, depending on which come together.
        tokens = self._tokens[begin:end]
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _released(self, text: str) -> str:
        """Of what was held and `text`, what comes before a stop and cannot be the beginning of one."""
        text = self._held + text
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _begun(text: str, stop: str) -> int:
    """Letters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
