"""K/V blocks one by one, as vLLM's block pool has them: who uses a block, what it holds, which is taken next.

A block that a request fills keeps what it holds after its release, until it is taken again. A request finds
the blocks of its own beginning, whoever filled them: its own before a preemption, or those of another prompt
that begins alike, running or gone. The free list is first in, first out, and the blocks of a request enter it
last block first, so that beginnings survive longest. A block counts as filled when the chunk that fills it is
planned, so that two prompts admitted in one iteration share as well.

Source: vllm/v1/core/block_pool.py and kv_cache_manager.py of vLLM 0.19; its design document "Automatic Prefix
Caching".
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence

Content = int | tuple[int, int]
"""What a full block holds: the number that `alike` gives prompts' blocks, or (request, index) for any other."""


def alike(prompts: Sequence[Sequence[int]], block_tokens: int) -> dict[int, tuple[int, ...]]:
    """Request (its index in `prompts`) -> a number for each full block of its prompt, equal for two blocks
    exactly when all tokens up to their ends are."""
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    found = {}
    for request, tokens in enumerate(prompts):
        before, blocks = -1, []
        for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
            own = (before, tuple(tokens[start : start + block_tokens]))
            before = numbers.setdefault(own, len(numbers))
            blocks.append(before)
        found[request] = tuple(blocks)
    return found


class BlockPool:
    """All blocks of one engine."""

    def __init__(
        self, blocks: int, block_tokens: int, prompts: Mapping[int, Sequence[int]], *, caching: bool
    ) -> None:
        """`prompts`: from `alike`; a request that is not in it has nothing in common with others. `caching`:
        False forgets what a block held when it is released, as vLLM does without prefix caching."""
        self._block_tokens = block_tokens
        self._prompts = prompts
        self._caching = caching
        self._free = OrderedDict.fromkeys(range(blocks))
        """Blocks, the next to be taken first."""
        self._users = dict.fromkeys(range(blocks), 0)
        self._held: dict[int, tuple[int, ...]] = {}
        """Request -> its blocks in order."""
        self._filled: dict[int, int] = {}
        """Request -> how many of them are."""
        self._content: dict[int, Content] = {}
        self._holding: dict[Content, tuple[int, ...]] = {}
        """Content -> the blocks that hold it: several when it was computed several times."""

    @property
    def free(self) -> int:
        return len(self._free)

    def found(self, request: int, known_tokens: int) -> tuple[int, ...]:
        """Blocks that hold the beginning of `request`; its last token is always computed."""
        blocks = []
        if self._caching:
            for index in range((known_tokens - 1) // self._block_tokens):
                holding = self._holding.get(self._content_of(request, index))
                if holding is None:
                    break
                blocks.append(holding[0])
        return tuple(blocks)

    def needed(self, request: int, known_tokens: int) -> int:
        """Free blocks that `request` takes to be admitted with room for all it knows. A block that is free
        counts, whether it is found or taken anew."""
        in_use = sum(self._users[block] > 0 for block in self.found(request, known_tokens))
        return -(-known_tokens // self._block_tokens) - in_use

    def admit(self, request: int, known_tokens: int) -> int:
        """Use the blocks that are found; their number."""
        found = self.found(request, known_tokens)
        for block in found:
            if self._users[block] == 0:
                del self._free[block]
            self._users[block] += 1
        self._held[request], self._filled[request] = found, len(found)
        return len(found)

    def hold(self, request: int, tokens: int) -> None:
        """Take blocks until `request` has room for so many tokens."""
        held = self._held[request]
        count = -(-tokens // self._block_tokens) - len(held)
        if count > 0:
            self._held[request] = held + tuple(self._take() for _ in range(count))

    def fill(self, request: int, tokens: int) -> None:
        """The first `tokens` of `request` are computed, or will be with the iteration that is planned."""
        if not self._caching:
            return
        filled = tokens // self._block_tokens
        for index in range(self._filled[request], filled):
            block, content = self._held[request][index], self._content_of(request, index)
            self._content[block] = content
            self._holding[content] = (*self._holding.get(content, ()), block)
        self._filled[request] = max(filled, self._filled[request])

    def release(self, request: int) -> None:
        """Its blocks are free unless another request uses them."""
        del self._filled[request]
        for block in reversed(self._held.pop(request)):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None

    def freed_by(self, request: int, gone: Counter[int]) -> int:
        """Blocks that nobody uses when `request` is released after those that `gone` counts, by block; it is
        counted there then."""
        gone.update(self._held[request])
        return sum(self._users[block] == gone[block] for block in self._held[request])

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._users[block] = 1
        content = self._content.pop(block, None)
        if content is not None:
            left = tuple(other for other in self._holding[content] if other != block)
            if left:
                self._holding[content] = left
            else:
                del self._holding[content]
        return block

    def _content_of(self, request: int, index: int) -> Content:
        prompt = self._prompts.get(request, ())
        return prompt[index] if index < len(prompt) else (request, index)


class Trial:
    """A pool as it would be after the changes that are tried here; the pool itself stays as it is, and must not
    change meanwhile. Costs what changes, not what there is."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._block_tokens = pool._block_tokens
        self.free = pool.free
        self._next = iter(pool._free)
        self._taken: set[int] = set()
        """Of the free blocks, those that hold something else now."""
        self._reused: set[int] = set()
        """Of the free blocks, those that are in use again."""
        self._filled: set[Content] = set()
        """What blocks hold since."""

    def take(self, blocks: int) -> None:
        """So many free blocks, whoever takes them."""
        self.free -= blocks
        while blocks:
            block = next(self._next)
            if block not in self._reused:
                self._taken.add(block)
                blocks -= 1

    def found(self, request: int, known_tokens: int) -> list[int | None]:
        """As `BlockPool.found`; None is a block that was filled here."""
        pool = self._pool
        blocks: list[int | None] = []
        for index in range((known_tokens - 1) // self._block_tokens if pool._caching else 0):
            content = pool._content_of(request, index)
            holding = pool._holding.get(content, ())
            block = next((block for block in holding if block not in self._taken), None)
            if block is None and content not in self._filled:
                break
            blocks.append(block)
        return blocks

    def needed(self, found: Sequence[int | None], upto_tokens: int) -> int:
        """Free blocks for a request with `found` to be admitted with room for `upto_tokens`."""
        return -(-upto_tokens // self._block_tokens) - len(found) + len(self._idle(found))

    def admit(self, found: Sequence[int | None]) -> None:
        """Use the blocks that were found."""
        idle = self._idle(found)
        self.free -= len(idle)
        self._reused.update(idle)

    def compute(self, request: int, done_tokens: int, tokens: int) -> None:
        """A chunk of `request` after `done_tokens`: its new blocks, and what they hold then."""
        size, upto = self._block_tokens, done_tokens + tokens
        self.take(-(-upto // size) - -(-done_tokens // size))
        self._filled.update(
            self._pool._content_of(request, index) for index in range(done_tokens // size, upto // size)
        )

    def _idle(self, found: Sequence[int | None]) -> list[int]:
        users = self._pool._users
        return [
            block for block in found if block is not None and not users[block] and block not in self._reused
        ]
