"""The forward tensors that the backward of a layer reads, for one window: kept, or made again from what is.

The compile plan says which. The rules below are its operators in the engine's own terms; a tensor that the plan
neither keeps nor makes again is one that no gradient reads, and asking for it is a mistake.

Shapes as in `engine.model`, with N the tokens of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F  # noqa: N812

from engine.dropout import Dropout
from engine.elementwise import rms_norm, rotate
from engine.kept import Kept
from engine.kernels.paged_attention import paged_attention
from engine.model import Model, Pages
from engine.shelf import Segments, Shelf
from sim.compile.plan import RECOMPUTE, CompilePlan

INPUTS = {
    "q_proj": "attention norm",
    "k_proj": "attention norm",
    "v_proj": "attention norm",
    "o_proj": "attention",
    "gate_proj": "ffn norm",
    "up_proj": "ffn norm",
    "down_proj": "product",
}
"""Linear layer -> the role of what it reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedLora:
    """The adapter that a window trains: its weights in the bank, and where its gradients are summed."""

    shelves: Mapping[str, Shelf]
    """By linear layer."""
    scales: torch.Tensor
    slot: int
    segment_slot: torch.Tensor
    """[1] int32: the slot, on the device."""
    scale: float
    grads: Mapping[str, Sequence[tuple[torch.Tensor, torch.Tensor]]]
    """By linear layer, for each layer of the model: dA [r, in] and dB^T [r, out]."""
    dropout: Dropout | None
    """Of the sample at hand."""


class BackwardWindow:
    """Tokens that go through layers together, with what is the same in all of these."""

    def __init__(self, model: Model, lora: TrainedLora, dx: torch.Tensor, at: slice, start: int) -> None:
        """`start` is the first position in the sample, whose gradient dx is [L, E]; `at` is where the tokens
        lie in what is kept."""
        self.lora = lora
        self.at, self.start, self.tokens = at, start, at.stop - at.start
        self.own = slice(start, start + self.tokens)
        """The window in the sample."""
        self.dx = dx[self.own]
        ends = torch.zeros(2, dtype=torch.int32, device=dx.device)
        ends[1:].fill_(self.tokens)
        self.segments = Segments(ends, lora.segment_slot)
        """One: all tokens take the adapter."""
        self._model = model

    @cached_property
    def rotation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the angles."""
        end = self.start + self.tokens
        return self._model.rotation(torch.arange(self.start, end, device=self.dx.device))

    @cached_property
    def rotation_back(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for gradients."""
        cos, sin = self.rotation
        return cos, -sin


class LayerTensors:
    """Layer `index` of one window; `pages` are the layer's."""

    def __init__(
        self,
        model: Model,
        plan: CompilePlan,
        index: int,
        window: BackwardWindow,
        kept: Kept,
        pages: Pages,
        block_table: torch.Tensor,
    ) -> None:
        self.index = index
        self.window = window
        self.tokens = window.tokens
        self.lora = window.lora
        self.k, self.v = pages
        self.block_table = block_table
        self._model = model
        self._weights = model.weights.layers[index]
        self._have = {role: buffer[window.at] for role, buffer in kept.layers[index].items()}
        self._again = {t.role for t in plan.layer(index) if t.action == RECOMPUTE}
        self._wanted = {t.role for t in plan.layer(index) if t.gradient}

    def wants(self, *roles: str) -> bool:
        """Whether the plan computes the gradient of any of these tensors."""
        return not self._wanted.isdisjoint(roles)

    def __getitem__(self, role: str) -> torch.Tensor:
        """[N, ...]"""
        if role not in self._have:
            assert role in self._again, (
                f"the plan neither keeps {role} of layer {self.index} nor makes it again"
            )
            self._have[role] = RULES[role](self)
        return self._have[role]

    def input_of(self, target: str) -> torch.Tensor:
        """What linear layer `target` reads: [N, in]."""
        return self[INPUTS[target]].flatten(1)

    def bypass_input_of(self, target: str) -> torch.Tensor:
        """The same as the first product of its bypass reads it: what dropout leaves of it and what a collective
        brings there is made again, once."""
        before, dropout = self.lora.shelves[target].placement.before, self.lora.dropout
        role = f"bypass input {target}"
        if role not in self._have:
            x = self.input_of(target)
            if dropout is not None:
                x = dropout(x, target, self.index, self.window.start)
            self._have[role] = x if before is None else before.forward(x, self.tokens)
        return self._have[role]

    # Rules

    def _norm(self, role: str, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(self[role], weight, self._model.config.norm_eps)

    def _q(self) -> torch.Tensor:
        w, width = self._weights, self._weights.o.shape[1]
        bias = None if w.qkv_bias is None else w.qkv_bias[:width]
        q = F.linear(self["attention norm"], w.qkv[:width], bias)
        q = self._bypassed("q_proj", q).view(self.tokens, -1, self.k.shape[3])
        return rotate(q, *self.window.rotation)

    def _attention(self) -> torch.Tensor:
        start, end = self.window.start, self.window.start + self.tokens
        attention, self._have["lse"] = paged_attention(
            self["q"],
            self.k,
            self.v,
            self.block_table[None],
            self.window.segments.start,
            torch.full((1,), start, dtype=torch.int32, device=self.block_table.device),
            scale=self._model.scale,
            max_keys=end,
        )
        return attention

    def _lse(self) -> torch.Tensor:
        self._have["attention"] = self._attention()
        return self._have["lse"]

    def _mid(self) -> torch.Tensor:
        return self["x"] + self._bypassed("o_proj", F.linear(self.input_of("o_proj"), self._weights.o))

    def _gate_or_up(self, target: str, half: int) -> torch.Tensor:
        weight = self._weights.gate_up.chunk(2)[half]
        return self._bypassed(target, F.linear(self.input_of(target), weight))

    def _low(self, target: str) -> torch.Tensor:
        rank = self.lora.grads[target][self.index][0].shape[0]
        x = self.bypass_input_of(target)
        return self.lora.shelves[target].low(x, self.index, self.lora.slot, rank, self.tokens)

    def _bypassed(self, target: str, y: torch.Tensor) -> torch.Tensor:
        """y with the bypass of `target`, if it has one."""
        if target not in self.lora.grads:
            return y
        rank, low = self.lora.grads[target][self.index][1].shape[0], self[f"low {target}"]
        return self.lora.shelves[target].bypassed(y, low, self.index, self.lora.slot, rank, self.lora.scale)


RULES: dict[str, Callable[[LayerTensors], torch.Tensor]] = {
    "attention norm": lambda t: t._norm("x", t._weights.input_norm),
    "q": LayerTensors._q,
    "attention": LayerTensors._attention,
    "lse": LayerTensors._lse,
    "mid": LayerTensors._mid,
    "ffn norm": lambda t: t._norm("mid", t._weights.mlp_norm),
    "gate": lambda t: t._gate_or_up("gate_proj", 0),
    "up": lambda t: t._gate_or_up("up_proj", 1),
    "silu": lambda t: F.silu(t["gate"]),
    "product": lambda t: t["silu"] * t["up"],
    **{f"low {target}": partial(LayerTensors._low, target=target) for target in INPUTS},
}
"""Not held by the object itself, which would outlive its use as a cycle, with all that it has made."""
