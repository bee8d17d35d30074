"""Room for the adapters that have one placement of one linear layer, and the two products of their bypass.

    forward    y += scale * after(between(before(x) A^T) B^T)
    backward   g = after'(dy)   u = between'(g B)   dx += scale * before'(u A)
               dB += scale * g^T low                dA += scale * u^T before(x)

before, between and after are the placement's changes of state, with ' their backward; on one device there are
none, and forward and dx are one call of `grouped_lora` each. low is what the second product reads.

What is sent has the model's dtype. Shapes: T tokens, r the adapter's rank as far as this rank of the replica has
it, before and behind the change between; I and O likewise; N slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from engine.changes import rows_of
from engine.kernels.grouped_lora import grouped_lora
from engine.kernels.lora_expand import lora_expand
from engine.kernels.lora_shrink import lora_shrink
from engine.kernels.lora_weight_grad import lora_weight_grad
from engine.parallel import Group
from engine.placement import Placement
from sim.compile.bypass import R


class Segments(NamedTuple):
    """Which slot each token takes."""

    start: torch.Tensor  # [G + 1] int32
    slot: torch.Tensor  # [G] int32, -1 is the base model

    def of(self, rows: slice) -> Segments:
        """The same of some of the tokens."""
        return Segments((self.start - rows.start).clamp_(0, rows.stop - rows.start), self.slot)


class Shelf:
    """Adapters of one `Placement.key`, in slots. Other adapters have rank 0 here."""

    def __init__(
        self,
        placement: Placement,
        group: Group,
        layers: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`placement` is that of the largest rank."""
        self.placement = placement
        self._group = group
        self.a = torch.zeros((layers, slots, *placement.a.shape), dtype=dtype, device=device)
        """[layers, N, r, I]"""
        self.b = torch.zeros((layers, slots, *placement.b.shape), dtype=dtype, device=device)
        """[layers, N, O, r]"""
        self._cut()
        self.a_ranks = torch.zeros(slots, dtype=torch.int32, device=device)
        self.b_ranks = self.a_ranks if placement.between is None else torch.zeros_like(self.a_ranks)
        self.slots: set[int] = set()
        """Those of adapters that are here."""

    def put(self, slot: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Copy A [layers, r, I] and B [layers, O, r] into a slot."""
        a_rank, b_rank = a.shape[1], b.shape[2]
        self.a[:, slot, :a_rank] = a
        self.b[:, slot, :, :b_rank] = b
        # Not by assignment: the number would be a tensor of the host, and the copy waited for.
        self.a_ranks[slot].fill_(a_rank)
        self.b_ranks[slot].fill_(b_rank)
        self.slots.add(slot)

    def clear(self, slot: int) -> None:
        """No adapter of the slot is here: nothing of it is read any more."""
        self.a_ranks[slot].fill_(0)
        self.b_ranks[slot].fill_(0)
        self.slots.discard(slot)

    def double(self) -> None:
        """As many slots more."""
        same = self.b_ranks is self.a_ranks
        self.a, self.b = (torch.cat((t, torch.zeros_like(t)), dim=1) for t in (self.a, self.b))
        self._cut()
        self.a_ranks = torch.cat((self.a_ranks, torch.zeros_like(self.a_ranks)))
        self.b_ranks = self.a_ranks if same else torch.cat((self.b_ranks, torch.zeros_like(self.b_ranks)))

    def _cut(self) -> None:
        """Views of the layers' A and B, and of both transposed, which every iteration needs."""
        self._layers = list(zip(self.a.unbind(), self.b.unbind(), strict=True))
        self._transposed = [(a.transpose(1, 2), b.transpose(1, 2)) for a, b in self._layers]

    def add(
        self, y: torch.Tensor, x: torch.Tensor, layer: int, scales: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """Add the bypass of x [T, I] to y [T, O], in place; returns low [T, >= r], unscaled."""
        placement, (a, b) = self.placement, self._layers[layer]
        if placement.plain:
            return grouped_lora(y, x, a, b, self.a_ranks, scales, *segments)
        tokens = x.shape[0]
        own = segments.of(rows_of(self._group, tokens))
        if placement.before is not None:
            x = placement.before.forward(x, tokens)
        low = lora_shrink(x, a, self.a_ranks, *(own if placement.rows_down else segments)).to(x.dtype)
        if placement.between is not None:
            low = placement.between.forward(low, tokens)
        up = own if placement.rows_up else segments
        if placement.after is not None:
            out = y.new_zeros((low.shape[0], b.shape[1]))
            lora_expand(out, low, b, self.b_ranks, scales, *up)
            y += placement.after.forward(out, tokens)
        elif placement.adds:
            lora_expand(y, low, b, self.b_ranks, scales, *up)
        return low

    def low(self, x: torch.Tensor, layer: int, slot: int, rank: int, tokens: int) -> torch.Tensor:
        """What the second product reads, made again: x is `before(x)`, `rank` that of A."""
        low = F.linear(x, self._layers[layer][0][slot, :rank])
        between = self.placement.between
        return low if between is None else between.forward(low, tokens)

    def bypassed(
        self, y: torch.Tensor, low: torch.Tensor, layer: int, slot: int, rank: int, scale: float
    ) -> torch.Tensor:
        """y [T, O] with the bypass of low [T, r]; one whose output is sent is never made again."""
        after, b = self.placement.after, self._layers[layer][1][slot, :, :rank]
        assert self.placement.adds and (after is None or not after.sends)
        if after is None:
            return torch.addmm(y, low, b.T, alpha=scale)
        return y.add(after.part(F.linear(low, b)), alpha=scale)

    def add_input_grad(
        self,
        dx: torch.Tensor | None,
        grad: torch.Tensor,
        layer: int,
        scales: torch.Tensor,
        segments: Segments,
        tokens: int,
    ) -> torch.Tensor:
        """Add to dx [T, I], unless it is None, what comes of `after'(dy)`; returns u [T, >= r] in the type of sums.

        `segments` are of all `tokens`.
        """
        placement, (a, b) = self.placement, self._transposed[layer]
        if placement.plain and dx is not None:
            return grouped_lora(dx, grad, b, a, self.a_ranks, scales, *segments)
        own = segments.of(rows_of(self._group, tokens))
        u = lora_shrink(grad, b, self.b_ranks, *(own if placement.rows_up else segments))
        wide = u.dtype
        if placement.between is not None:
            u = placement.between.backward(u.to(grad.dtype), tokens)
        if dx is not None:
            down, before = own if placement.rows_down else segments, placement.before
            if before is None or before.before == R:
                part = dx if before is None else before.part(dx)
                lora_expand(part, u, a, self.a_ranks, scales, *down)
            else:
                part = dx.new_zeros((u.shape[0], a.shape[1]))
                lora_expand(part, u, a, self.a_ranks, scales, *down)
                dx += before.backward(part, tokens)
        return u.to(wide)

    def add_weight_grads(
        self,
        grads: tuple[torch.Tensor, torch.Tensor],
        scale: float,
        u: torch.Tensor,
        x: torch.Tensor,
        low: torch.Tensor,
        grad: torch.Tensor,
    ) -> None:
        """Add to dA [r, I] and dB^T [r, O], from u, `before(x)`, low and `after'(dy)`."""
        d_a, d_b = grads
        lora_weight_grad(d_a, u, x, scale)
        lora_weight_grad(d_b, low, grad, scale)
