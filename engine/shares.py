"""Adapters under tensor parallelism: which part of A and B a rank holds, and what is added up at a step.

The compositions that `sim.compile.parallel` finds cheapest for usual ranks, none of which has a collective
of its own in an iteration (rules of FlexLLM, arXiv 2402.18789):

    column-parallel (q, k, v, gate, up)   `1 4`   A whole, B split by its output
    row-parallel (o, down)                `2 5`   A split by its input, B whole

Column-parallel: every rank computes the same x A^T, and its part of the gradient at x joins the backbone's
all-reduce. Row-parallel: partial sums of rank r pass through B, and so join the backbone's all-reduce forward.
What a rank has whole got a gradient from its own part of the rest: that is summed over the ranks, once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from engine.lora import Adapter
from engine.parallel import Group, parts_of, splits_input
from sim.core.specs import ModelShape

if TYPE_CHECKING:
    from engine.model import Model


class _Share(NamedTuple):
    """One tensor of an adapter on the ranks."""

    dim: int | None
    """It is split along this dimension; None: every rank has it whole."""
    parts: int
    """Different parts; where they are fewer than ranks, neighbours hold the same."""


class Shares:
    """The tensors of an adapter, in the order of `Adapter.tensors`."""

    def __init__(self, whole: ModelShape, group: Group, targets: Iterable[str]) -> None:
        self._group = group
        self._tensors: list[_Share] = []
        for target in targets:
            a, b = (_Share(2, group.size), _Share(None, 1))
            if not splits_input(target):
                a, b = (_Share(None, 1), _Share(1, parts_of(target, whole, group.size)))
            self._tensors += [a, b]

    def own(self, adapter: Adapter) -> Adapter:
        """This rank's part of a whole adapter."""
        return _of(adapter, [self._own(s, t) for s, t in self._with(adapter.tensors())])

    def whole(self, adapter: Adapter) -> Adapter:
        """The adapter that this rank has a part of. A collective."""
        return _of(adapter, [self._whole(s, t) for s, t in self._with(adapter.tensors())])

    def reduce(self, grads: Sequence[torch.Tensor]) -> None:
        """Make gradients of parts of the sum those of the sum, in place. A collective."""
        for share, grad in self._with(grads):
            if share.parts == 1:
                self._group.all_reduce(grad)
            elif share.parts < self._group.size:
                # Ranks that hold the same key and value heads have different queries.
                every = grad.new_zeros((share.parts, *grad.shape))
                own = every[self._part(share)]
                own.copy_(grad)
                self._group.all_reduce(every)
                grad.copy_(own)

    def norm(self, norms: Sequence[torch.Tensor]) -> torch.Tensor:
        """The norm [] of the whole from those of this rank's tensors; each part counts once. A collective."""
        squares = [norm.square() for share, norm in self._with(norms) if self._counts(share)]
        total = torch.stack(squares).sum() if squares else torch.zeros_like(norms[0])
        return self._group.all_reduce(total).sqrt()

    def whole_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's `state_dict` over whole tensors. A collective."""
        return _mapped(state, lambda n, t: self._whole(self._tensors[n], t))

    def own_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of `whole_state`."""
        return _mapped(state, lambda n, t: self._own(self._tensors[n], t))

    def _with(self, tensors: Iterable[torch.Tensor]) -> list[tuple[_Share, torch.Tensor]]:
        return list(zip(self._tensors, tensors, strict=True))

    def _part(self, share: _Share) -> int:
        return self._group.rank * share.parts // self._group.size

    def _counts(self, share: _Share) -> bool:
        """Whether no lower rank holds the same."""
        return self._group.rank * share.parts % self._group.size < share.parts

    def _own(self, share: _Share, tensor: torch.Tensor) -> torch.Tensor:
        if share.dim is None:
            return tensor
        own = self._group.share(tensor.shape[share.dim], share.parts)
        return tensor.narrow(share.dim, own.start, own.stop - own.start).contiguous()

    def _whole(self, share: _Share, tensor: torch.Tensor) -> torch.Tensor:
        if share.dim is None:
            return tensor
        repeated = self._group.size // share.parts
        return torch.cat(list(self._group.all_gather(tensor)[::repeated]), dim=share.dim)


def shares_of(model: Model, targets: Iterable[str]) -> Shares | None:
    """How adapters of `targets` lie on the ranks of `model`; None on one."""
    return None if model.group.size == 1 else Shares(model.whole.shape, model.group, targets)


def own_adapter(model: Model, adapter: Adapter) -> Adapter:
    """What the rank of `model` holds of a whole adapter."""
    shares = shares_of(model, adapter.targets)
    return adapter if shares is None else shares.own(adapter)


def whole_adapter(model: Model, adapter: Adapter) -> Adapter:
    """The adapter that the rank of `model` has a part of. A collective."""
    shares = shares_of(model, adapter.targets)
    return adapter if shares is None else shares.whole(adapter)


def _of(like: Adapter, tensors: Sequence[torch.Tensor]) -> Adapter:
    a, b = (dict(zip(like.targets, half, strict=True)) for half in (tensors[::2], tensors[1::2]))
    return Adapter(rank=like.rank, alpha=like.alpha, rslora=like.rslora, a=a, b=b)


def _mapped(state: dict[str, Any], change: Any) -> dict[str, Any]:
    """A `state_dict` with the tensors changed that are shaped as the parameter; steps are counts."""

    def each(n: int, values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: change(n, v) if torch.is_tensor(v) and v.ndim == 3 else v for k, v in values.items()}

    return {**state, "state": {n: each(n, values) for n, values in state["state"].items()}}
