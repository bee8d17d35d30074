"""Backward of one frozen block for one window of a sample, with the gradients of its LoRA adapters.

Written by hand because autograd would hold what it saved until the whole sequence has passed, while windows
pass one at a time, in either order, and free what they used. Windows must go right to left within a layer:
the gradient of a window's keys and values is final only when every query to its right has passed.

Which forward tensors are at hand and which gradients are wanted is the compile plan's: of the lowest layer only
what its own adapter needs, as no gradient goes below it.

Shapes as in `engine.model`, with N the tokens of the window.
"""

from __future__ import annotations

import torch

from engine.elementwise import rms_norm_backward, rotate, swiglu_backward
from engine.kernels.attention_backward import attention_backward
from engine.model import Model
from engine.recall import LayerTensors
from engine.shelf import Segments


def backward_layer(
    model: Model,
    saved: LayerTensors,
    dx: torch.Tensor,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
) -> None:
    """Take dx [N, E] from the output of a block to its input, in place, as far as the plan wants it.

    dk, dv [>= start + N, K, D] of the sample in this layer are modified, and final for the window's own
    tokens afterwards; None for a layer whose attention wants no gradient. Gradients of A and B are added.
    """
    w, eps = model.weights.layers[saved.index], model.config.norm_eps
    bypass = _Bypass(saved)

    # The MLP: down(silu(gate) * up)
    d_product = dx @ w.down if saved.wants("product") else None
    bypass.run("down_proj", d_product, dx)
    if d_product is None:
        return
    dh = _gate_up(w.gate_up, saved, bypass, d_product)
    if dh is None:
        return
    model.group.all_reduce(dh)
    dx += rms_norm_backward(dh, saved["mid"], w.mlp_norm, eps)

    # Attention: o(attend(rotate(q), rotate(k), v))
    d_attention = dx @ w.o if saved.wants("attention") else None
    bypass.run("o_proj", d_attention, dx)
    if d_attention is None:
        return
    assert dk is not None and dv is not None
    d_qkv = _attention(model, saved, d_attention, dk, dv)
    dh = d_qkv @ w.qkv if saved.wants("attention norm") else None
    kv_dim = dk[0].numel()
    parts = torch.split(d_qkv, [d_qkv.shape[1] - 2 * kv_dim, kv_dim, kv_dim], dim=1)
    for target, dy in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
        bypass.run(target, dh, dy)
    if dh is not None:
        model.group.all_reduce(dh)
        dx += rms_norm_backward(dh, saved["x"], w.input_norm, eps)


def _gate_up(
    weight: torch.Tensor, saved: LayerTensors, bypass: _Bypass, d_product: torch.Tensor
) -> torch.Tensor | None:
    """The gradient at the norm before the MLP, None if it is not wanted."""
    if not saved.wants("gate"):
        bypass.run("up_proj", None, d_product * saved["silu"])
        return None
    d_gate_up = swiglu_backward(d_product, saved["gate"], saved["up"])
    dh = d_gate_up @ weight if saved.wants("ffn norm") else None
    for target, dy in zip(("gate_proj", "up_proj"), d_gate_up.chunk(2, dim=1), strict=True):
        bypass.run(target, dh, dy)
    return dh


def _attention(
    model: Model, saved: LayerTensors, d_attention: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
) -> torch.Tensor:
    """The gradient at [q, k, v] before rotation, [N, Q + 2 K D]; parts that are not wanted are undefined."""
    q = saved["q"]
    d_attention = d_attention.view(q.shape)
    dq = attention_backward(
        d_attention,
        q,
        # dV alone does not depend on the output: then any tensor of its shape will do.
        saved["attention"] if saved.wants("q", "k") else q,
        saved["lse"],
        saved.k,
        saved.v,
        saved.block_table,
        dk,
        dv,
        start=saved.start,
        scale=model.scale,
    )
    own = slice(saved.start, saved.start + saved.tokens)
    cos, sin = saved.rotation()
    parts = (rotate(dq, cos, -sin), rotate(dk[own], cos, -sin), dv[own])
    return torch.cat([part.flatten(1).to(d_attention.dtype) for part in parts], dim=1)


class _Bypass:
    """Backward of one adapter's bypasses in one layer."""

    def __init__(self, saved: LayerTensors) -> None:
        self._saved = saved
        self._lora = saved.lora
        start = torch.zeros(2, dtype=torch.int32, device=saved.lora.segment_slot.device)
        start[1:].fill_(saved.tokens)
        self._segments = Segments(start, saved.lora.segment_slot)

    def run(self, target: str, dx: torch.Tensor | None, dy: torch.Tensor) -> None:
        """dx += scale (dy B) A unless it is None, dA += scale (dy B)^T x, dB += scale dy^T (x A^T); nothing
        if `target` is not trained."""
        lora, saved = self._lora, self._saved
        if target not in lora.grads.a:
            return
        shelf, index = lora.shelves[target], saved.index
        after = shelf.placement.after
        grad = dy if after is None else after.backward(dy, saved.tokens)
        u = shelf.add_input_grad(dx, grad, index, lora.scales, self._segments, saved.tokens)
        grads = lora.grads.a[target][index], lora.grads.b[target][index]
        low, x = saved[f"low {target}"], saved.bypass_input_of(target)
        shelf.add_weight_grads(grads, lora.grads.scale, u, x, low, grad)
