"""FlexLLM's published activation bytes, and a reading of them term by term.

Published are twelve totals (script of the activation figure in github.com/goliaro/flexllm): LoRA,
Adapter and (IA)^3 at the 70B shape, 80 layers, hidden size h = 8192, 1024 tokens, bf16. Divided by
layers * tokens * h * 2 bytes they are multiples of h/16. Which tensors they count is not published; the
reading below gives all twelve exactly from one set of conventions. What it rests on:

- the ffn counts as 4h and K and V as h each (real: 3.5h and h/8): LoRA's rematerialised product is 4h,
  (IA)^3's is 6h = product + K + V, and an adapter rematerialises nothing;
- a score matrix is heads * tokens = 8h, and four of them are in the unpruned graph (61h without a
  bypass);
- token-level finetuning counts 1/16 of some tensors (windows of 64 in 1024 tokens): the rest of 9h
  (gate, up and the layer's input) is common to all three methods, and so are 2/16 more.

Where only a size and no tensor can be told from the numbers, the term says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

LAYERS, TOKENS, HIDDEN, ITEM_BYTES = 80, 1024, 8192, 2
WINDOWS = 16

COLUMNS = ("unpruned", "pruned", "remat", "token-level")

PUBLISHED_BYTES: Mapping[str, tuple[int, int, int, int]] = {
    "lora": (84_557_168_640, 21_474_836_480, 16_106_127_360, 12_499_025_920),
    "adapter": (84_557_168_640, 21_474_836_480, 21_474_836_480, 12_834_570_240),
    "ia3": (97_978_941_440, 28_185_722_880, 20_132_659_200, 12_750_684_160),
}
"""Method -> bytes in the order of COLUMNS."""

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

BYPASS = {
    "lora": {"bypass output": 1, "sum": 1},
    "adapter": {"bypass output": 1, "sum": 1},
    "ia3": {"bypass outputs for k, v, product": 6, "sums": 6},
}

WHOLE = {"gate": 4, "up": 4, "layer input": 1}
"""Pruned, needed for every method, and whole under token-level finetuning: 9."""

WINDOWED = {
    "lora": {"q, k, v": 3},
    "adapter": {"q, k, v": 3, "adapters' own inputs (tensors not published)": 4},
    "ia3": {"q, k, v": 3, "further (IA)^3 inputs (tensors not published)": 3},
}
"""Pruned, and held for one window only under token-level finetuning."""

REMATERIALISED = {
    "lora": {"product": 4},
    "adapter": {},
    "ia3": {"product": 4, "k, v before scaling": 2},
}

TOKEN_LEVEL_EXTRA = {"two more of h, as dK and dV of a window": 2}


def published_units(method: str, column: str) -> Fraction:
    """h per token and layer. Raises ValueError for an unknown method or column."""
    _check(method, column)
    total = PUBLISHED_BYTES[method][COLUMNS.index(column)]
    return Fraction(total, LAYERS * TOKENS * HIDDEN * ITEM_BYTES)


def terms(method: str, column: str) -> dict[str, Fraction]:
    """Named terms in units of h per token and layer that add up to `published_units`."""
    _check(method, column)
    if column == "unpruned":
        return {k: Fraction(v) for k, v in {**BACKBONE, **BYPASS[method]}.items()}
    found = {k: Fraction(v) for k, v in {**WHOLE, **WINDOWED[method]}.items()}
    if column == "pruned":
        found |= {k: Fraction(v) for k, v in REMATERIALISED[method].items()}
    if column == "token-level":
        found = {k: v if k in WHOLE else v / WINDOWS for k, v in found.items()}
        found |= {k: Fraction(v, WINDOWS) for k, v in TOKEN_LEVEL_EXTRA.items()}
    return found


def _check(method: str, column: str) -> None:
    if method not in PUBLISHED_BYTES:
        raise ValueError(f"method must be one of {', '.join(PUBLISHED_BYTES)}, got {method!r}")
    if column not in COLUMNS:
        raise ValueError(f"column must be one of {', '.join(COLUMNS)}, got {column!r}")
