"""Adapters on the ranks: taken apart and put together, and what is added up over the ranks at a step.

Where a tensor is split, and whose gradient is a sum over the ranks, its placement says (`engine.placement`).
Ranks that hold the same key and value heads have different queries: gradients of their parts are added up too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from engine.lora import Adapter
from engine.parallel import Group
from engine.placement import Placement, Share


class Shares:
    """The tensors of an adapter, in the order of `Adapter.tensors`."""

    def __init__(self, placements: Mapping[str, Placement], group: Group, targets: Iterable[str]) -> None:
        self._group = group
        self._tensors: list[Share] = []
        for target in targets:
            self._tensors += [placements[target].a, placements[target].b]

    def own(self, adapter: Adapter) -> Adapter:
        """This rank's part of a whole adapter."""
        return _of(adapter, [self._own(s, t) for s, t in self._with(adapter.tensors())])

    def whole(self, adapter: Adapter) -> Adapter:
        """The adapter that this rank has a part of. A collective."""
        return _of(adapter, [self._whole(s, t) for s, t in self._with(adapter.tensors())])

    def reduce(self, grads: Sequence[torch.Tensor]) -> None:
        """Make gradients of parts of the sum those of the sum, in place. A collective."""
        for share, grad in self._with(grads):
            if share.reduced:
                self._group.all_reduce(grad)
            elif share.dim is not None and share.parts < self._group.size:
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

    def _with(self, tensors: Iterable[torch.Tensor]) -> list[tuple[Share, torch.Tensor]]:
        return list(zip(self._tensors, tensors, strict=True))

    def _part(self, share: Share) -> int:
        return self._group.rank * share.parts // self._group.size

    def _counts(self, share: Share) -> bool:
        """Whether no lower rank holds the same."""
        return self._group.rank * share.parts % self._group.size < share.parts

    def _own(self, share: Share, tensor: torch.Tensor) -> torch.Tensor:
        if share.dim is None:
            return tensor
        own = self._group.share(tensor.shape[share.dim], share.parts)
        return tensor.narrow(share.dim, own.start, own.stop - own.start).contiguous()

    def _whole(self, share: Share, tensor: torch.Tensor) -> torch.Tensor:
        if share.dim is None:
            return tensor
        repeated = self._group.size // share.parts
        return torch.cat(list(self._group.all_gather(tensor)[::repeated]), dim=share.dim)


def own_adapter(adapter: Adapter, placements: Mapping[str, Placement], group: Group) -> Adapter:
    """What this rank holds of a whole adapter."""
    return adapter if group.size == 1 else Shares(placements, group, adapter.targets).own(adapter)


def _of(like: Adapter, tensors: Sequence[torch.Tensor]) -> Adapter:
    a, b = (dict(zip(like.targets, half, strict=True)) for half in (tensors[::2], tensors[1::2]))
    return replace(like, a=a, b=b)


def _mapped(state: dict[str, Any], change: Any) -> dict[str, Any]:
    """A `state_dict` with the tensors changed that are shaped as the parameter; steps are counts."""

    def each(n: int, values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: change(n, v) if torch.is_tensor(v) and v.ndim == 3 else v for k, v in values.items()}

    return {**state, "state": {n: each(n, values) for n, values in state["state"].items()}}
