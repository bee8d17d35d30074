"""The model, forward: one packed batch of tokens through all layers, whatever each of them is for.

Decodes, prefill chunks and finetuning windows lie one after the other in one batch. They share every matrix
product; attention finds its sequence through block tables, LoRA its adapter through segments. A finetuning
window differs in one thing: what its backward will need is kept, row by row, as it passes (`engine.kept`).

Shapes: T packed tokens, S sequences, E hidden, H query heads, K key/value heads, D head size, Q = H * D,
F MLP, V vocabulary, P pages of B tokens, M pages of a table row, L tokens of a finetuning sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from engine.config import ModelConfig
from engine.elementwise import compute_dtype, require_kernels, rms_norm, rotate, swiglu
from engine.kept import Kept
from engine.kernels.paged_attention import paged_attention
from engine.kernels.write_kv import write_kv
from engine.lora import LoraBatch
from engine.parallel import ALONE, Group, gather_columns, share_of


class LayerWeights(NamedTuple):
    """One block. Projections that read the same input lie in one matrix."""

    input_norm: torch.Tensor  # [E]
    qkv: torch.Tensor  # [Q + 2 K D, E]
    qkv_bias: torch.Tensor | None  # [Q + 2 K D]
    o: torch.Tensor  # [E, Q]
    mlp_norm: torch.Tensor  # [E]
    gate_up: torch.Tensor  # [2 F, E]
    down: torch.Tensor  # [E, F]


class Weights(NamedTuple):
    """All frozen parameters."""

    embed: torch.Tensor  # [V, E]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [E]
    head: torch.Tensor  # [V, E], `embed` itself where they are tied


class Pages(NamedTuple):
    """Cached keys and values of all layers."""

    k: torch.Tensor  # [layers, P, B, K, D]
    v: torch.Tensor  # [layers, P, B, K, D]

    def layers(self) -> list[Pages]:
        """Those of each layer: views [P, B, K, D]."""
        return [Pages(k, v) for k, v in zip(self.k.unbind(), self.v.unbind(), strict=True)]


class Batch(NamedTuple):
    """One packed batch; everything but the numbers is on the device."""

    tokens: torch.Tensor  # [T] int32
    positions: torch.Tensor  # [T] int32
    slots: torch.Tensor | None  # [T] int32, page * B + offset; None: keys and values are there already
    block_tables: torch.Tensor  # [S, M] int32
    query_start: torch.Tensor  # [S + 1] int32
    context_lens: torch.Tensor  # [S] int32
    decodes: int
    max_keys: int
    lora: LoraBatch | None


class Window(NamedTuple):
    """Rows of a batch whose activations are kept, at these tokens of a sample."""

    kept: Kept
    rows: slice
    at: slice


class Model:
    """Weights and their forward. Modifies nothing but the pages and what windows keep."""

    def __init__(self, config: ModelConfig, weights: Weights, group: Group = ALONE) -> None:
        """`config` is the whole model's; `weights` are this rank's share of it."""
        require_kernels(weights.embed.device)
        self.whole = config
        self.config = replace(config, shape=share_of(config.shape, group.size))
        """With the heads and the inner features that lie on this rank."""
        self.group = group
        self.vocab = group.share(config.shape.vocab)
        """The rows of embedding and head that lie on this rank."""
        self.weights = weights
        self.dtype = weights.embed.dtype
        self.device = weights.embed.device
        self.compute = compute_dtype(self.dtype)
        self.scale = config.shape.head_dim**-0.5
        self._inverse = config.inverse_frequencies(self.device)

    def new_pages(self, blocks: int, block_tokens: int) -> Pages:
        """Empty pages for `blocks` blocks."""
        s = self.config.shape
        size = (s.layers, blocks, block_tokens, s.kv_heads, s.head_dim)
        k, v = (torch.zeros(size, dtype=self.dtype, device=self.device) for _ in "kv")
        return Pages(k, v)

    def forward(self, batch: Batch, pages: Pages, windows: Sequence[Window] = ()) -> torch.Tensor:
        """The residual stream after the last block, before the final norm: [T, E].

        Writes the batch's keys and values into the pages.
        """
        x = self._embed(batch.tokens)
        cos, sin = self.rotation(batch.positions)
        for index, own in enumerate(pages.layers()):
            x = self._layer(index, x, cos, sin, batch, own, windows)
        return x

    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weights.norm, self.config.norm_eps)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of rows [N, E] of `forward`'s result."""
        return gather_columns(self.group, self.final_norm(x) @ self.weights.head.T, self.whole.shape.vocab)

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every token's angles, [T, 1, D / 2] in the type of computation."""
        angles = positions.to(torch.float32)[:, None, None] * self._inverse
        return angles.cos().to(self.compute), angles.sin().to(self.compute)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            return F.embedding(tokens, self.weights.embed)
        at = tokens - self.vocab.start
        own = (at >= 0) & (at < self.weights.embed.shape[0])
        x = F.embedding(at.where(own, 0), self.weights.embed)
        return self.group.all_reduce(x.masked_fill_(~own[:, None], 0.0))

    def _layer(
        self,
        index: int,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: Batch,
        pages: Pages,
        windows: Sequence[Window],
    ) -> torch.Tensor:
        """`pages` are the layer's own."""
        shape, w, eps = self.config.shape, self.weights.layers[index], self.config.norm_eps
        tokens, q_dim, kv_dim = x.shape[0], shape.q_dim, shape.kv_dim
        heads, kv_heads = shape.heads, shape.kv_heads

        h = rms_norm(x, w.input_norm, eps)
        qkv = F.linear(h, w.qkv, w.qkv_bias)
        q_flat, k_flat, v_flat = qkv.split_with_sizes((q_dim, kv_dim, kv_dim), dim=1)
        made = {"x": x, "attention norm": h}
        for target, y in (("q_proj", q_flat), ("k_proj", k_flat), ("v_proj", v_flat)):
            _add_lora(y, h, target, index, batch.lora, made)
        # Queries and keys lie beside each other: one rotation for both.
        by_head = qkv.view(tokens, -1, shape.head_dim)
        qk, v = by_head.split_with_sizes((heads + kv_heads, kv_heads), dim=1)
        q, k = rotate(qk, cos, sin).split_with_sizes((heads, kv_heads), dim=1)
        if batch.slots is not None:
            write_kv(k, v, *pages, batch.slots)
        attention, lse = paged_attention(
            q,
            *pages,
            batch.block_tables,
            batch.query_start,
            batch.context_lens,
            scale=self.scale,
            max_keys=batch.max_keys,
            decodes=batch.decodes,
        )
        flat = attention.view(tokens, q_dim)
        out = F.linear(flat, w.o)
        _add_lora(out, flat, "o_proj", index, batch.lora, made)
        self.group.all_reduce(out)
        middle = x + out
        made |= {"q": q, "attention": attention, "lse": lse, "mid": middle}

        h = rms_norm(middle, w.mlp_norm, eps)
        gate_up = F.linear(h, w.gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        _add_lora(gate, h, "gate_proj", index, batch.lora, made)
        _add_lora(up, h, "up_proj", index, batch.lora, made)
        active = swiglu(gate, up)
        down = F.linear(active, w.down)
        _add_lora(down, active, "down_proj", index, batch.lora, made)
        self.group.all_reduce(down)
        made |= {"ffn norm": h, "gate": gate, "up": up, "product": active}

        for kept, rows, at in windows:
            kept.put(index, at, rows, made)
        return middle + down


def _add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    target: str,
    layer: int,
    lora: LoraBatch | None,
    made: dict[str, torch.Tensor],
) -> None:
    """Add the adapters' share of linear layer `target` to y, in place, and its low-rank product to `made`."""
    if lora is None:
        return
    runs = lora.runs.get(target, ())
    x = lora.input_of(target, layer, x)
    for run in runs:
        own_y, own_x = (y, x) if run.rows is None else (y[run.rows], x[run.rows])
        low = run.shelf.add(own_y, own_x, layer, lora.scales, run.segments)
        if len(runs) == 1 and low.shape[0] == x.shape[0]:
            made[f"low {target}"] = low
        elif not run.shelf.placement.rows_up:
            # Rows of adapters that are placed otherwise may lie between, where this is undefined. Where tokens are
            # split, nothing is kept.
            width = max(each.shelf.b.shape[3] for each in runs)
            whole = made.setdefault(f"low {target}", low.new_empty((x.shape[0], width)))
            before = 0 if run.rows is None else run.rows.start
            for rows in run.windows:
                whole[rows, : low.shape[1]] = low[rows.start - before : rows.stop - before]
