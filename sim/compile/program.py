"""`coserve compile`: the memory plan of finetuning beside a model, as a table and a figure.

    coserve compile model=llama_3_1_8b peft=lora_all finetune.seq_len=8192 tp=1
    coserve compile --all

Columns, in bytes per token and layer: every forward tensor (unpruned); what PyTorch saves with `peft` as
its users run it, adapters in float32 (autograd); what the backward needs (pruned); what is kept at the
allowed share of extra FLOPs (+remat); and what is live with token-level finetuning when only K and V
outlast a window (+token-level). The plan is the starred one of the last two.
"""

from __future__ import annotations

import csv
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from sim.compile.compiler import WINDOW_TOKENS, Analysis, autograd_bytes
from sim.compile.console import wide_console
from sim.compile.families import layer_graph
from sim.compile.ir import Graph
from sim.compile.peft import PeftSpec
from sim.compile.plan import KEEP, MODES, PIN, CompilePlan
from sim.compile.prune import autograd, prune, unpruned
from sim.compile.roles import KINDS, kind_of
from sim.core.specs import Collective, DeviceSpec, ModelShape

COLUMNS = ("unpruned", "autograd", "pruned", "+remat", "+token-level")
CHOSEN = {"stash": "+remat", "recompute": "+token-level"}
"""Mode of a plan -> the column that it is."""
GRADIENTS = "dK dV and hidden gradient"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRow:
    """Bytes per token and layer, per device, of one class of tensors."""

    kind: str
    unpruned: float
    autograd: float
    pruned: float
    remat: float
    token_level: float

    @property
    def values(self) -> tuple[float, ...]:
        return (self.unpruned, self.autograd, self.pruned, self.remat, self.token_level)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileReport:
    """One compilation: the plan, the table, and what memory it leaves."""

    plan: CompilePlan
    rows: tuple[ClassRow, ...]
    totals_bytes: tuple[float, ...]
    """Whole sample, all layers, per device, in the order of COLUMNS (loss not included)."""
    peft_bytes: int
    """PEFT default: all that autograd saves for the sample, with the loss over full logits."""
    checkpoint_bytes: int
    """PEFT default with gradient checkpointing: layer inputs, and one layer's set or the loss."""
    kv_room_tokens: int | None
    """Tokens of K/V cache that fit beside weights, adapter and this plan; None if nothing fits."""
    short_bytes: float
    """What is missing on a device for one such token; 0 where there is room."""
    compile_s: float


def run_compile(
    model: ModelShape,
    spec: PeftSpec,
    *,
    seq_tokens: int,
    device: DeviceSpec,
    tp: int = 1,
    mode: str = "stash",
    budget_share: float | None = None,
    window_tokens: int = WINDOW_TOKENS,
    accumulation: int = 8,
    memory_fraction: float = 0.9,
) -> CompileReport:
    """Compile and account. `memory_fraction` of the device is ours to use.

    Raises ValueError for options outside their range (see `Analysis`).
    """
    _check_fraction(memory_fraction)
    start = time.perf_counter()
    analysis = Analysis(
        model,
        spec,
        seq_tokens=seq_tokens,
        device=device,
        tp=tp,
        window_tokens=window_tokens,
        accumulation=accumulation,
    )
    plan = analysis.plan(mode, budget_share)
    free = _usable_bytes(model, plan, device, memory_fraction) - plan.total_bytes()
    local = analysis.local
    token_bytes = model.layers * 2 * local.kv_dim * local.dtype_bytes
    rows = _rows(plan, analysis.graph, layer_graph(analysis.local, peft_default(spec)))
    inner, first, head = autograd_bytes(model, peft_default(spec), tp)
    saved = (model.layers - 1) * inner + first
    inputs = model.layers * plan.hidden_bytes
    sums = [math.fsum(column) for column in zip(*(r.values for r in rows), strict=True)]
    totals = [seq_tokens * model.layers * s for s in sums]
    return CompileReport(
        plan=plan,
        rows=tuple(rows),
        totals_bytes=tuple(totals),
        peft_bytes=seq_tokens * (saved + head),
        checkpoint_bytes=seq_tokens * (inputs + max(inner, head)),
        kv_room_tokens=int(free // token_bytes) if free >= token_bytes else None,
        short_bytes=max(0.0, token_bytes - free),
        compile_s=time.perf_counter() - start,
    )


def _check_fraction(memory_fraction: float) -> None:
    if not 0 < memory_fraction <= 1:
        raise ValueError(f"memory_utilization must be in (0, 1], got {memory_fraction}")


def peft_default(spec: PeftSpec) -> PeftSpec:
    """The same method as `peft` loads it by default: bypass parameters in float32."""
    return replace(spec, adapter_dtype="float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One line of the table over models and methods; bytes per device for one sample."""

    model: str
    method: str
    tp: int
    seq_tokens: int
    weight_bytes: float
    peft_bytes: int
    checkpoint_bytes: int
    stash_bytes: int
    stash_extra_share: float
    far_stash_bytes: int
    """The stash plan's far end: layer inputs, K and V."""
    far_stash_extra_share: float
    recompute_bytes: int
    recompute_extra_share: float
    usable_bytes: float
    """Of one device, beside weights and adapter."""
    compile_s: float


def memory_table(
    models: Iterable[ModelShape],
    specs: Mapping[str, PeftSpec],
    *,
    seq_tokens: int,
    device: DeviceSpec,
    budget_share: float | None = None,
    window_tokens: int = WINDOW_TOKENS,
    memory_fraction: float = 0.9,
) -> list[MemoryRow]:
    """Every model at its own `tp` with every PEFT configuration (name -> spec)."""
    _check_fraction(memory_fraction)
    found = []
    for model in models:
        for name, spec in specs.items():
            start = time.perf_counter()
            analysis = Analysis(
                model, spec, seq_tokens=seq_tokens, device=device, tp=model.tp, window_tokens=window_tokens
            )
            stash, recompute = (analysis.plan(mode, budget_share) for mode in MODES)
            far = analysis.plan("stash", math.inf)
            inner, first, head = autograd_bytes(model, peft_default(spec), model.tp)
            found.append(
                MemoryRow(
                    model=model.name,
                    method=name,
                    tp=model.tp,
                    seq_tokens=seq_tokens,
                    weight_bytes=model.weight_bytes / model.tp,
                    peft_bytes=seq_tokens * ((model.layers - 1) * inner + first + head),
                    checkpoint_bytes=seq_tokens * (model.layers * stash.hidden_bytes + max(inner, head)),
                    stash_bytes=stash.total_bytes(),
                    stash_extra_share=stash.extra_flops_share,
                    far_stash_bytes=far.total_bytes(),
                    far_stash_extra_share=far.extra_flops_share,
                    recompute_bytes=recompute.total_bytes(),
                    recompute_extra_share=recompute.extra_flops_share,
                    usable_bytes=_usable_bytes(model, stash, device, memory_fraction),
                    compile_s=time.perf_counter() - start,
                )
            )
    return found


def write_report(report: CompileReport, folder: Path) -> None:
    """Write `plan.json`, `tensors.csv` (the table in bytes) and `memory.png` into `folder`."""
    from sim.compile.figure import draw

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(report.plan.to_json())
    with (folder / "tensors.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(ClassRow)])
        writer.writerows([r.kind, *r.values] for r in report.rows)
    draw(report, folder / "memory.png")


def print_report(report: CompileReport, ways: str = "") -> None:
    """Write the table. `ways`: what would make a plan fit that does not."""
    from rich.table import Table

    plan, console = report.plan, wide_console()
    title = f"{plan.model}, {plan.method} on {', '.join(plan.targets)}: KiB per token and layer"
    title += f", per device of {plan.tp}" if plan.tp > 1 else ""
    # A table's own title would be wrapped to its width.
    console.print(title, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("tensors")
    for column in marked_columns(plan):
        table.add_column(column, justify="right")
    for row in report.rows:
        table.add_row(row.kind, *(_kib(v) for v in row.values))
    table.add_section()
    sums = [math.fsum(c) for c in zip(*(r.values for r in report.rows), strict=True)]
    table.add_row("layer", *(_kib(v) for v in sums))
    table.add_row(
        f"{plan.layers} layers x {plan.seq_tokens} tokens, GiB", *(_gib(v) for v in report.totals_bytes)
    )
    console.print(table)
    for line in _lines(report, ways):
        console.print(line, highlight=False, soft_wrap=True)


def marked_columns(plan: CompilePlan) -> list[str]:
    """COLUMNS with a star behind that of the plan."""
    return [f"{column} *" if column == CHOSEN[plan.mode] else column for column in COLUMNS]


def held_bytes(report: CompileReport) -> float:
    """Per token and layer: the column of the plan, added up."""
    return math.fsum(row.values[COLUMNS.index(CHOSEN[report.plan.mode])] for row in report.rows)


MEMORY_HEADS = (
    ("", "PEFT"), ("PEFT", "ckpt"), ("", "stash"), ("extra", "%"), ("least", "stash"), ("extra", "%"),
    ("", "recompute"), ("extra", "%"),
)  # fmt: skip
MEMORY_LEGEND = """\
finetuning memory of one sample in GiB per device: PEFT as it comes and with
gradient checkpointing; here as stash, as the stash that keeps least, and as
recompute; extra: FLOPs of what runs again, as a share of a training step;
recompute goes back window by window and holds dK and dV of all layers in fp32
and a window's tensors of all layers; the least stash goes back layer by layer
and holds their inputs, and on several devices what a collective made; either
can be less than the other"""


def print_memory_table(rows: Iterable[MemoryRow]) -> None:
    """Write the table over models and methods, a section for each model; it fits in 80 columns."""
    widths = [max(5 if head[1] == "%" else 6, *map(len, head)) for head in MEMORY_HEADS]

    def line(first: str, cells: Iterable[str], marks: Iterable[str] = ()) -> str:
        """Marks stand behind the cells, in the gap to the next."""
        marked = zip(cells, widths, ["", *marks, *[""] * len(widths)], strict=False)
        return f"  {first:<10}" + "".join(f"{mark:<2}{cell:>{width}}" for cell, width, mark in marked)

    lines = [MEMORY_LEGEND]
    lines += [line(("", "method")[level], [head[level] for head in MEMORY_HEADS]) for level in (0, 1)]
    before, beyond = None, False
    for r in rows:
        scene = f"{r.model} on {r.tp}, {r.seq_tokens:,} tokens; weights {_gib(r.weight_bytes)}"
        if scene != before:
            lines.append(scene)
        before = scene
        plans = (
            (r.stash_bytes, r.stash_extra_share),
            (r.far_stash_bytes, r.far_stash_extra_share),
            (r.recompute_bytes, r.recompute_extra_share),
        )
        cells, marks = [], []
        for size, share in ((r.peft_bytes, None), (r.checkpoint_bytes, None), *plans):
            cells += [_gib(size)] if share is None else [_gib(size), f"{100 * share:.1f}"]
            mark = "*" if size > r.usable_bytes else ""
            marks += [mark] if share is None else [mark, ""]
        beyond = beyond or "*" in marks
        lines.append(line(r.method, cells, marks))
    if beyond:
        lines.append("* does not fit into a device beside its weights and adapter")
    wide_console().print("\n".join(lines), highlight=False, soft_wrap=True)


def _rows(plan: CompilePlan, graph: Graph, peft_graph: Graph) -> list[ClassRow]:
    columns = [
        _by_kind(unpruned(graph)),
        _by_kind({n: v.bytes_per_token for n, v in autograd(peft_graph).items() if v.kept}),
        _by_kind({n: v.bytes_per_token for n, v in prune(graph).items() if v.kept}),
        _by_kind({t.name: t.bytes_per_token for t in plan.tensors if t.action in (KEEP, PIN)}),
    ]
    share = min(1.0, plan.window_tokens / plan.seq_tokens)
    pinned = _by_kind({t.name: t.bytes_per_token for t in plan.tensors if t.action == PIN})
    kept = columns[-1]
    window = {k: pinned.get(k, 0) + share * (kept.get(k, 0) - pinned.get(k, 0)) for k in KINDS}
    rows = [
        ClassRow(
            kind=kind,
            unpruned=columns[0].get(kind, 0),
            autograd=columns[1].get(kind, 0),
            pruned=columns[2].get(kind, 0),
            remat=columns[3].get(kind, 0),
            token_level=window[kind],
        )
        for kind in KINDS
    ]
    # What token-level finetuning holds in exchange; the other columns' gradients in flight are not
    # kept tensors and are left out.
    gradients = 2 * plan.kv_elements * plan.accumulator_bytes + plan.hidden_bytes / plan.layers
    extra = ClassRow(kind=GRADIENTS, unpruned=0, autograd=0, pruned=0, remat=0, token_level=gradients)
    return [r for r in rows if any(r.values)] + [extra]


def _by_kind(sizes: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, size in sizes.items():
        kind = kind_of(name)
        found[kind] = found.get(kind, 0) + size
    return found


def _usable_bytes(model: ModelShape, plan: CompilePlan, device: DeviceSpec, fraction: float) -> float:
    """Of one device, beside weights in the model's dtype and the adapter; negative where these do not fit."""
    return fraction * device.memory_bytes - model.weight_bytes / plan.tp - plan.adapter_bytes


def _lines(report: CompileReport, ways: str) -> list[str]:
    plan = report.plan
    parts = ", ".join(f"{k} {_gib(v)}" for k, v in plan.live_bytes().items())
    if plan.mode == "recompute":
        parts += ", the last and the kept window in turn"
    room = (
        f"none, it does not fit: weights, adapter and this sample need {_gib(report.short_bytes)} GiB more per "
        f"device than may be used{'; ' if ways else ''}{ways}"
        if report.kv_room_tokens is None
        else f"{report.kv_room_tokens:,} tokens"
    )
    saving = 1 - plan.total_bytes() / report.peft_bytes
    lines = [
        f"* {plan.mode}: {_gib(plan.total_bytes())} GiB live ({parts}), "
        f"{plan.extra_flops_share:.1%} extra FLOPs",
        f"PEFT default with full logits: {_gib(report.peft_bytes)} GiB ({saving:.1%} less here); "
        f"with gradient checkpointing: {_gib(report.checkpoint_bytes)} GiB",
        f"KV room left: {room}",
        f"compiled in {report.compile_s:.2f} s",
    ]
    if plan.tp > 1:
        lines += _placement_lines(plan)
    return lines


def _placement_lines(plan: CompilePlan) -> list[str]:
    """Which composition each bypass has, what of it is sent, and what at a step."""
    placed = ", ".join(f"{b.target}: {b.composition}" for b in plan.bypasses)
    # The engine runs LoRA, in windows of WINDOW_TOKENS; of all else it is said what would be cheapest.
    run = plan.method == "lora" and plan.window_tokens == WINDOW_TOKENS
    whose = "as engine and simulator run them" if run else "at the least cost"
    work = plan.bypass_work
    reduced = f"gradients of {work.reduced_params:,} parameters"
    return [
        f"bypasses on {plan.tp} devices, {whose} (rules, changes of state): {placed}",
        f"in a layer they send forward {_sent(work.forward)}, backward {_sent(work.backward)}; "
        f"added up at a step: {reduced if work.reduced_params else 'nothing'}",
    ]


def _sent(collectives: Iterable[Collective]) -> str:
    """Collectives by kind and features per token."""
    counts = Counter(collectives)
    words = (f"{count} {sent.kind} of {sent.features}" for sent, count in sorted(counts.items()))
    return ", ".join(words) or "nothing"


def _kib(value: float) -> str:
    return f"{value / 1024:.1f}" if value else "-"


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f}"
