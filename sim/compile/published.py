"""FlexLLM's published LoRA activation bytes, and a reading of them term by term.

Published are four totals at the 70B shape: 80 layers, hidden size h = 8192, 1024 tokens, bf16. Divided by
layers * tokens * h * 2 bytes they are multiples of h/16. Which tensors they count is not published; the
reading below gives all four exactly. What it rests on:

- the ffn counts as 4h and K and V as h each (real: 3.5h and h/8), so the rematerialised product is 4h;
- a score matrix is heads * tokens = 8h, and four of them are in the unpruned graph;
- token-level finetuning counts 1/16 of some tensors (windows of 64 in 1024 tokens); the rest of 9h (gate,
  up and the layer's input) is whole. 2/16 more can only be sized, not named.
"""

from __future__ import annotations

from fractions import Fraction

LAYERS, TOKENS, HIDDEN, ITEM_BYTES = 80, 1024, 8192, 2
WINDOWS = 16

COLUMNS = ("unpruned", "pruned", "remat", "token-level")

PUBLISHED_BYTES = (84_557_168_640, 21_474_836_480, 16_106_127_360, 12_499_025_920)
"""In the order of COLUMNS."""

BACKBONE = {
    "layer input": 1,
    "attention norm": 1,
    "q, k, v": 3,
    "rotated q, k": 2,
    "scores: product, scaled, masked, softmax": 32,
    "attention output": 1,
    "o_proj": 1,
    "residual after attention": 1,
    "ffn norm": 1,
    "gate, up, silu, product": 16,
    "down_proj": 1,
    "layer output": 1,
}
"""Unpruned graph without a bypass, in units of h: 61."""

BYPASS = {"bypass output": 1, "sum": 1}

WHOLE = {"gate": 4, "up": 4, "layer input": 1}
"""Pruned, and whole under token-level finetuning: 9."""

WINDOWED = {"q, k, v": 3}
"""Pruned, and held for one window only under token-level finetuning."""

REMATERIALISED = {"product": 4}

TOKEN_LEVEL_EXTRA = {"two more of h, as dK and dV of a window": 2}


def published_units(column: str) -> Fraction:
    """h per token and layer. Raises ValueError for an unknown column."""
    _check(column)
    total = PUBLISHED_BYTES[COLUMNS.index(column)]
    return Fraction(total, LAYERS * TOKENS * HIDDEN * ITEM_BYTES)


def terms(column: str) -> dict[str, Fraction]:
    """Named terms in units of h per token and layer that add up to `published_units`."""
    _check(column)
    if column == "unpruned":
        return {k: Fraction(v) for k, v in {**BACKBONE, **BYPASS}.items()}
    found = {k: Fraction(v) for k, v in {**WHOLE, **WINDOWED}.items()}
    if column == "pruned":
        found |= {k: Fraction(v) for k, v in REMATERIALISED.items()}
    if column == "token-level":
        found = {k: v if k in WHOLE else v / WINDOWS for k, v in found.items()}
        found |= {k: Fraction(v, WINDOWS) for k, v in TOKEN_LEVEL_EXTRA.items()}
    return found


def _check(column: str) -> None:
    if column not in COLUMNS:
        raise ValueError(f"column must be one of {', '.join(COLUMNS)}, got {column!r}")
