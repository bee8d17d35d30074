"""The compositions of LoRA on a column- and a row-parallel layer, side by side: FlexLLM's four
candidates first, then what else is legal and cheap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from sim.compile.bypass import lora_bypass
from sim.compile.console import wide_console
from sim.compile.parallel import compositions
from sim.compile.roles import ROW_PARALLEL
from sim.core.specs import DeviceSpec, ModelShape

LAYERS = ("up_proj", "down_proj")
TPS = (2, 4, 8)
RANKS = (8, 16, 64, 256)
ALTERNATIVES = 4

PUBLISHED = {
    "1 4": "1+4",
    "R>S1 2 P>R 4": "2+4",
    "R>S0 3 3 S0>S1": "3+3",
    "R>S0 3 S0>R 4": "3+4",
    "2 5": "partial sums joined",
}
"""Label of a composition -> FlexLLM's name for it: four for an input that every device has and an
output split by features; the last is its choice for down_proj."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRow:
    """One composition of LoRA on one layer; costs per device, forward and backward of `tokens`."""

    layer: str
    tp: int
    rank: int
    tokens: int
    composition: str
    published: str
    """FlexLLM's name, or empty."""
    chosen: bool
    seconds: float
    flops: float
    collective_bytes: float
    collectives: int
    resident_bytes: float


def placement_table(
    model: ModelShape,
    device: DeviceSpec,
    *,
    tokens: int,
    accumulation_tokens: int,
) -> list[PlacementRow]:
    """The published candidates and the ALTERNATIVES cheapest, for each of LAYERS, TPS and RANKS."""
    rows = []
    for layer, tp, rank in product(LAYERS, TPS, RANKS):
        bypass = lora_bypass(layer, *model.linears[layer], rank, layer in ROW_PARALLEL)
        found = compositions(bypass, tp, tokens, device, accumulation_tokens, model.layers)
        rows += [
            PlacementRow(
                layer=layer,
                tp=tp,
                rank=rank,
                tokens=tokens,
                composition=c.label,
                published=PUBLISHED.get(c.label, ""),
                chosen=i == 0,
                seconds=c.seconds,
                flops=c.flops,
                collective_bytes=c.collective_bytes,
                collectives=len(c.collectives),
                resident_bytes=c.resident_bytes,
            )
            for i, c in enumerate(found)
            if i < ALTERNATIVES or c.label in PUBLISHED
        ]
    return rows


def print_placements(rows: Iterable[PlacementRow]) -> None:
    """Write the table; the chosen composition of each group is marked.

    `sent` counts collectives; MiB is what stays: parameters with optimizer state, inner activations.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = "LoRA under tensor parallelism, per device, forward and backward"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    words = ("layer", "composition", "FlexLLM")
    for name in ("layer", "tp", "rank", "composition", "FlexLLM", "us", "MFLOP", "link KiB", "sent", "MiB"):
        longest = max(map(len, name.split()))
        table.add_column(name, justify="left" if name in words else "right", min_width=longest)
    for r in rows:
        table.add_row(
            r.layer,
            str(r.tp),
            str(r.rank),
            f"{r.composition}{' *' if r.chosen else ''}",
            r.published,
            f"{r.seconds * 1e6:.1f}",
            f"{r.flops / 1e6:.0f}",
            f"{r.collective_bytes / 1024:.0f}",
            str(r.collectives),
            f"{r.resident_bytes / 2**20:.1f}",
        )
    wide_console().print(table)
