"""Changes of state of a bypass's activations on the ranks: `sim.compile.parallel`'s, forward and backward.

A tensor [T, F] is whole on every rank (R), split by tokens (S0) or by features (S1), or a sum of what the ranks
have (P). Tokens are split into blocks of equal length, of which the last may be short or empty; what is sent of
it is filled up with zeros.

Key and value heads that are fewer than ranks are repeated, so several ranks may have the same features of an
output. Their gradients are parts of a sum then, and are added up where they are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from engine.parallel import Group
from sim.compile.bypass import S0, S1, P, R
from sim.compile.parallel import Step, sends


def rows_of(group: Group, tokens: int) -> slice:
    """This rank's block of `tokens`."""
    block = _block(group, tokens)
    return slice(min(group.rank * block, tokens), min((group.rank + 1) * block, tokens))


class Change:
    """One change of state; `columns` are the features of each rank where they are split."""

    def __init__(self, step: Step, came: str, group: Group, columns: Sequence[slice]) -> None:
        """`came` is the state in which the gradient arrives behind it."""
        self.before, self.after = step.before, step.after
        self.sends = sends(step)
        self._came = came
        self._group = group
        self._columns = columns

    def forward(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        """`tokens` are those of the whole."""
        if self.before == R:
            return self.part(x)
        if self.before == P:
            return self._group.all_reduce(x) if self.after == R else self._scatter(x, self.after)
        if self.after == R:
            return self._gather(x, tokens, self.before)
        return self._exchange(x, tokens, self.before)

    def backward(self, grad: torch.Tensor, tokens: int) -> torch.Tensor:
        """The gradient before it from the one behind it. From R, what is split is a part among zeros."""
        if self.before == P:
            if self.after != R:
                return self._gather(grad, tokens, self.after)
            return self._group.all_reduce(grad) if self._came == P else grad
        if self.before == R:
            whole = grad.new_zeros((tokens, self._columns[-1].stop if self.after == S1 else grad.shape[1]))
            self.part(whole).copy_(grad)
            return whole
        if self.after == R:
            return self._scatter(grad, self.before) if self._came == P else self._take(grad, self.before)
        return self._exchange(grad, tokens, self.after)

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """What the rank has behind the change, of a tensor that is whole before it: a view."""
        assert self.before == R
        return self._take(x, self.after)

    def _take(self, x: torch.Tensor, state: str) -> torch.Tensor:
        if state == S0:
            return x[rows_of(self._group, x.shape[0])]
        return x[:, self._columns[self._group.rank]]

    def _gather(self, x: torch.Tensor, tokens: int, state: str) -> torch.Tensor:
        """The whole of what is split as `state` says."""
        if state == S0:
            every = self._group.all_gather(_filled(x, _block(self._group, tokens)))
            return every.flatten(0, 1)[:tokens]
        return self._joined(self._group.all_gather(x))

    def _scatter(self, x: torch.Tensor, state: str) -> torch.Tensor:
        """The rank's part of the sum over ranks."""
        if state == S0:
            return self._group.reduce_scatter(self._blocks(x))[: _length(rows_of(self._group, x.shape[0]))]
        return self._group.reduce_scatter(self._by_columns(x))

    def _exchange(self, x: torch.Tensor, tokens: int, state: str) -> torch.Tensor:
        """From `state`, S0 or S1, to the other one."""
        if state == S0:
            sent = self._by_columns(_filled(x, _block(self._group, tokens)))
            return self._group.all_to_all(sent).flatten(0, 1)[:tokens]
        whole = self._joined(self._group.all_to_all(self._blocks(x)))
        return whole[: _length(rows_of(self._group, tokens))]

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        """[T, F] as [ranks, block, F]."""
        size = self._group.size
        return _filled(x, size * _block(self._group, x.shape[0])).view(size, -1, x.shape[1])

    def _by_columns(self, x: torch.Tensor) -> torch.Tensor:
        """[T, F] as [ranks, T, own F]."""
        return torch.stack([x[:, columns] for columns in self._columns])

    def _joined(self, every: torch.Tensor) -> torch.Tensor:
        """[ranks, T, own F] as [T, F]; what several ranks have of the same features is added up."""
        parts = len({columns.start for columns in self._columns})
        if parts < len(self._columns):
            every = every.view(parts, -1, *every.shape[1:]).sum(1)
        return torch.cat(every.unbind(), dim=1)


def _block(group: Group, tokens: int) -> int:
    return -(-tokens // group.size)


def _filled(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x if x.shape[0] == rows else F.pad(x, (0, 0, 0, rows - x.shape[0]))


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)
