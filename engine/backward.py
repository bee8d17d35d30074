"""Backward of one frozen block for one window of a sample, with the gradients of its LoRA adapters.

Written by hand because autograd would hold what it saved until the whole sequence has passed, while windows
pass one at a time, in either order, and free what they used. Windows must go right to left within a layer:
the gradient of a window's keys and values is final only when every query to its right has passed.

Shapes as in `engine.model`, with N the tokens of the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.elementwise import rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward
from engine.kernels.attention_backward import attention_backward
from engine.kernels.grouped_lora import grouped_lora, lora_weight_grad
from engine.lora import Adapter, AdapterBank
from engine.model import Kept, Model, Pages


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedLora:
    """The adapter that a window trains: its weights in the bank, and where its gradients are summed."""

    bank: AdapterBank
    slot: int
    segment_adapter: torch.Tensor
    """[1] int32: the slot, on the device."""
    grads: Adapter


def backward_layer(
    model: Model,
    index: int,
    kept: Kept,
    at: slice,
    dx: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    lora: TrainedLora,
    *,
    start: int,
) -> None:
    """Take dx [N, E] from the output of block `index` to its input, in place.

    `kept` holds the window's activations at `at`; `start` is the window's first position in the sample;
    dk, dv [>= start + N, K, D] of the sample in this layer are modified, and final for the window's own
    tokens afterwards. Gradients of A and B are added to `lora.grads`.
    """
    shape, w, eps = model.config.shape, model.weights.layers[index], model.config.norm_eps
    tokens = dx.shape[0]
    bypass = _Bypass(lora, index, tokens)

    # The MLP: down(silu(gate) * up)
    middle = kept.middle[index, at]
    gate, up = kept.gate_up[index, at].chunk(2, dim=1)
    d_active = dx @ w.down
    if bypass.has("down_proj"):
        bypass.run("down_proj", d_active, dx, swiglu(gate, up))
    d_gate_up = swiglu_backward(d_active, gate, up)
    d_gate, d_up = d_gate_up.chunk(2, dim=1)
    dh = d_gate_up @ w.gate_up
    if bypass.has("gate_proj", "up_proj"):
        h = rms_norm(middle, w.mlp_norm, eps)
        bypass.run("gate_proj", dh, d_gate, h)
        bypass.run("up_proj", dh, d_up, h)
    model.group.all_reduce(dh)
    dx += rms_norm_backward(dh, middle, w.mlp_norm, eps)

    # Attention: o(attend(rotate(q), rotate(k), v))
    attention = kept.attention[index, at]
    flat = attention.view(tokens, shape.q_dim)
    d_attention = dx @ w.o
    bypass.run("o_proj", d_attention, dx, flat)
    dq = attention_backward(
        d_attention.view(attention.shape),
        kept.q[index, at],
        attention,
        kept.lse[index, at],
        pages.k[index],
        pages.v[index],
        block_table,
        dk,
        dv,
        start=start,
        scale=model.scale,
    )
    own = slice(start, start + tokens)
    cos, sin = model.rotation(torch.arange(start, start + tokens, device=dx.device))
    parts = (rotate(dq, cos, -sin), rotate(dk[own], cos, -sin), dv[own])
    d_qkv = torch.cat([part.flatten(1).to(dx.dtype) for part in parts], dim=1)
    dh = d_qkv @ w.qkv
    x = kept.x[index, at]
    if bypass.has("q_proj", "k_proj", "v_proj"):
        h = rms_norm(x, w.input_norm, eps)
        d_parts = torch.split(d_qkv, [shape.q_dim, shape.kv_dim, shape.kv_dim], dim=1)
        for target, dy in zip(("q_proj", "k_proj", "v_proj"), d_parts, strict=True):
            bypass.run(target, dh, dy, h)
    model.group.all_reduce(dh)
    dx += rms_norm_backward(dh, x, w.input_norm, eps)


class _Bypass:
    """Backward of one adapter's bypasses in one layer."""

    def __init__(self, lora: TrainedLora, index: int, tokens: int) -> None:
        self._lora = lora
        self._index = index
        self._start = torch.zeros(2, dtype=torch.int32, device=lora.segment_adapter.device)
        self._start[1:].fill_(tokens)

    def has(self, *targets: str) -> bool:
        return any(target in self._lora.grads.a for target in targets)

    def run(self, target: str, dx: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
        """dx += scale (dy B) A, dA += scale (dy B)^T x, dB += scale dy^T (x A^T); nothing if not trained."""
        if not self.has(target):
            return
        bank, slot, grads = self._lora.bank, self._lora.slot, self._lora.grads
        a, b = bank.a[target][self._index], bank.b[target][self._index]
        u = grouped_lora(
            dx,
            dy,
            b.transpose(1, 2),
            a.transpose(1, 2),
            bank.ranks,
            bank.scales,
            self._start,
            self._lora.segment_adapter,
        )
        s = (x @ a[slot, : grads.rank].T).to(u.dtype)
        lora_weight_grad(grads.a[target][self._index], u, x, grads.scale)
        lora_weight_grad(grads.b[target][self._index].T, s, dy, grads.scale)
