"""The table of `coserve reference`: a row for each measurement, and what each is compared with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from engine.reference_peft import SETUPS
from engine.reference_timing import Times

HEAD = (
    f"{'what':9}{'variant':56}{'p50 ms':>12}{'p20 ms':>12}{'p80 ms':>12}{'tok/s':>12}"
    f"{'peak GiB':>10}{'ratio':>8}  against"
)
"""Above the lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement; what is not known is None."""

    what: str
    """ceiling, decode, prefill, window, fused, streams, finetune or memory."""
    variant: str
    sequences: int | None = None
    """That decode."""
    context_tokens: int | None = None
    """Of each of them."""
    tokens: int | None = None
    """Of a prompt, window or sample, or of the sequences' next tokens."""
    p20_s: float | None = None
    p50_s: float | None = None
    p80_s: float | None = None
    tok_s: float | None = None
    """tokens / p50_s"""
    rate: float | None = None
    """Of a ceiling: bytes/s or FLOP/s; of a prefill or window: FLOP/s."""
    peak_bytes: int | None = None
    """The allocator's peak without the weights: adapter with optimizer state, gradients, activations."""
    ratio: float | None = None
    against: str = ""
    note: str = ""


def timed_row(what: str, variant: str, times: Times, **known: Any) -> Row:
    """Of repeated times; `known` are other columns."""
    tokens = known.get("tokens")
    tok_s = None if tokens is None else tokens / times.p50_s
    return Row(what=what, variant=variant, **asdict(times), tok_s=tok_s, **known)


def compared(rows: Sequence[Row]) -> list[Row]:
    """The engine's finetuning against PEFT with checkpointing, its memory against PEFT's default."""
    known = {(row.what, row.variant): row for row in rows}
    out = []
    for row in rows:
        name, _, how = row.variant.partition(": ")
        if row.what == "finetune" and how.startswith("engine"):
            other = known.get(("finetune", f"{name}: {SETUPS[1].name}"))
            if other is not None and other.tok_s is not None and row.tok_s is not None:
                row = replace(row, ratio=row.tok_s / other.tok_s, against=f"tok/s of {SETUPS[1].name}")
        if row.what == "memory" and how.startswith("engine"):
            other = known.get(("memory", f"{name}: {SETUPS[0].name}"))
            if other is not None and other.peak_bytes is not None and row.peak_bytes is not None:
                ratio = row.peak_bytes / other.peak_bytes
                row = replace(row, ratio=ratio, against=f"peak of {SETUPS[0].name}")
        out.append(row)
    return out


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """All rows so far, so that a run that is cut short leaves what it has measured."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
    schema = pa.schema([(f.name, kinds[str(f.type).partition(" ")[0]]) for f in fields(Row)])
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=schema), partial)
    os.replace(partial, path)


def line(row: Row) -> str:
    """As it stands below HEAD."""

    def cell(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value * scale, form)

    cells = [f"{row.what:9}{row.variant:56}{cell(row.p50_s, ',.3f', 1e3):>12}"]
    cells.append(f"{cell(row.p20_s, ',.3f', 1e3):>12}{cell(row.p80_s, ',.3f', 1e3):>12}")
    cells.append(f"{cell(row.tok_s, ',.0f'):>12}{cell(row.peak_bytes, ',.2f', 2**-30):>10}")
    cells.append(f"{cell(row.ratio, '.3g'):>8}  {row.note or row.against}")
    return "".join(cells).rstrip()
