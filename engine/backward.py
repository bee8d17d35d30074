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


def backward_layer(
    model: Model,
    saved: LayerTensors,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
) -> None:
    """Take the window's dx [N, E] from the output of a block to its input, in place, as far as the plan wants it.

    dk, dv [>= start + N, K, D] of the sample in this layer are modified, and final for the window's own
    tokens afterwards; None for a layer whose attention wants no gradient. Gradients of A and B are added.
    """
    w, eps = model.weights.layers[saved.index], model.config.norm_eps
    dx = saved.window.dx

    # The MLP: down(silu(gate) * up)
    d_product = dx @ w.down if saved.wants("product") else None
    _bypass(saved, "down_proj", d_product, dx)
    if d_product is None:
        return
    dh = _gate_up(w.gate_up, saved, d_product)
    if dh is None:
        return
    model.group.all_reduce(dh)
    dx += rms_norm_backward(dh, saved["mid"], w.mlp_norm, eps)

    # Attention: o(attend(rotate(q), rotate(k), v))
    d_attention = dx @ w.o if saved.wants("attention") else None
    _bypass(saved, "o_proj", d_attention, dx)
    if d_attention is None:
        return
    assert dk is not None and dv is not None
    d_qkv = _attention(model, saved, d_attention, dk, dv)
    dh = d_qkv @ w.qkv if saved.wants("attention norm") else None
    for target, dy in zip(("q_proj", "k_proj", "v_proj"), _split(model, d_qkv), strict=True):
        _bypass(saved, target, dh, dy)
    if dh is not None:
        model.group.all_reduce(dh)
        dx += rms_norm_backward(dh, saved["x"], w.input_norm, eps)


def _gate_up(weight: torch.Tensor, saved: LayerTensors, d_product: torch.Tensor) -> torch.Tensor | None:
    """The gradient at the norm before the MLP, None if it is not wanted."""
    if not saved.wants("gate"):
        _bypass(saved, "up_proj", None, d_product * saved["silu"])
        return None
    d_gate_up = swiglu_backward(d_product, saved["gate"], saved["up"])
    dh = d_gate_up @ weight if saved.wants("ffn norm") else None
    for target, dy in zip(("gate_proj", "up_proj"), d_gate_up.chunk(2, dim=1), strict=True):
        _bypass(saved, target, dh, dy)
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
        start=saved.window.start,
        scale=model.scale,
    )
    own, rotation = saved.window.own, saved.window.rotation_back
    shape = model.config.shape
    d_qkv = d_attention.new_empty((saved.tokens, shape.q_dim + 2 * shape.kv_dim))
    d_q, d_k, d_v = (part.view(saved.tokens, -1, shape.head_dim) for part in _split(model, d_qkv))
    rotate(dq, *rotation, out=d_q)
    rotate(dk[own], *rotation, out=d_k)
    d_v.copy_(dv[own])
    return d_qkv


def _split(model: Model, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v of [q, k, v]."""
    shape = model.config.shape
    return qkv.split_with_sizes((shape.q_dim, shape.kv_dim, shape.kv_dim), dim=1)


def _bypass(saved: LayerTensors, target: str, dx: torch.Tensor | None, dy: torch.Tensor) -> None:
    """dx += scale (dy B) A unless it is None, dA += scale (dy B)^T x, dB += scale dy^T (x A^T); nothing
    if `target` is not trained. With dropout x is what it leaves, and dx gets what it leaves of its term."""
    lora, index = saved.lora, saved.index
    if target not in lora.grads:
        return
    if dx is not None and lora.dropout is not None:
        part = torch.zeros_like(dx)
        _add_bypass(saved, target, part, dy)
        dx += lora.dropout(part, target, index, saved.window.start)
    else:
        _add_bypass(saved, target, dx, dy)


def _add_bypass(saved: LayerTensors, target: str, dx: torch.Tensor | None, dy: torch.Tensor) -> None:
    """`_bypass` behind the dropout."""
    lora, index = saved.lora, saved.index
    shelf = lora.shelves[target]
    after = shelf.placement.after
    grad = dy if after is None else after.backward(dy, saved.tokens)
    u = shelf.add_input_grad(dx, grad, index, lora.scales, saved.window.segments, saved.tokens)
    low, x = saved[f"low {target}"], saved.bypass_input_of(target)
    shelf.add_weight_grads(lora.grads[target][index], lora.scale, u, x, low, grad)
