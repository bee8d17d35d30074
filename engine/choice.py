"""One answer of the server as it comes: its tokens in, its text out, and why it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from engine.messages import LOST
from engine.openai import Refused
from engine.streamed_text import StreamedText

STOPPING = "the server stops"
NO_NUMBERS = (
    "the model's logits are not numbers: weights or an adapter are not finite, or too large for their type"
)


class Choice:
    """One answer as it comes."""

    def __init__(
        self,
        id: int,
        queue: asyncio.Queue[int | None],
        text: StreamedText,
        most: int,
        stop_tokens: frozenset[int],
    ) -> None:
        self.id = id
        self.count = 0
        self.reason = "length"
        self.done = False
        """Whether the engine has no more to do for it."""
        self._queue = queue
        self._text = text
        self._most = most
        self._stop_tokens = stop_tokens

    @property
    def ended(self) -> bool:
        """Whether its last token has come."""
        return self.count == self._most or self.reason == "stop"

    async def texts(self) -> AsyncIterator[str]:
        """Its text, a piece for each token: of some none, and of the last what was held back too. Raises Refused where
        the engine gives up on it."""
        while not self.ended:
            token = await self._queue.get()
            if token is None:
                self.done = True
                raise Refused(503, STOPPING)
            if token == LOST:
                self.done = True
                raise Refused(500, NO_NUMBERS)
            self.count += 1
            self.done = self.count == self._most or token in self._stop_tokens
            text = self._text.add(token)
            if self.done:
                text += self._text.end()
            if self._text.stopped or token in self._stop_tokens:
                self.reason = "stop"
            yield text
