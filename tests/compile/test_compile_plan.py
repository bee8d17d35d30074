"""The plan: what it adds up to, what it is compared with, and that it survives writing."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from analysis.figures import style
from sim.compile.compiler import Analysis, autograd_bytes, local_shape
from sim.compile.families import layer_graph
from sim.compile.figure import draw
from sim.compile.ir import PARAMETER, Graph
from sim.compile.peft import PeftSpec
from sim.compile.plan import MODES, CompilePlan
from sim.compile.program import (
    marked_columns,
    memory_table,
    peft_default,
    print_memory_table,
    print_report,
    run_compile,
    write_report,
)
from sim.core.specs import DeviceSpec, LoraSpec, ModelShape

A100 = DeviceSpec(
    name="a100", peak_flops=312e12, memory_bandwidth_bytes_s=2.0e12, memory_bytes=80 * 2**30,
    link_bandwidth_bytes_s=300e9, sms=108, source="A100 datasheet",
)  # fmt: skip
LLAMA_8B = ModelShape(
    name="llama-3.1-8b", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256
)
MODELS = [
    LLAMA_8B,
    ModelShape(name="qwen2.5-14b", layers=48, hidden=5120, heads=40, kv_heads=8, head_dim=128, ffn=13824,
               vocab=152064, qkv_bias=True, tp=2),
    ModelShape(name="qwen2.5-32b", layers=64, hidden=5120, heads=40, kv_heads=8, head_dim=128, ffn=27648,
               vocab=152064, qkv_bias=True, tp=4),
    ModelShape(name="llama-3.1-70b", layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672,
               vocab=128256, tp=4),
]  # fmt: skip
SPECS = {
    "lora": PeftSpec(),
    "adapter": PeftSpec(method="adapter", targets=("o_proj", "down_proj"), rank=64),
    "ia3": PeftSpec(method="ia3", targets=("k_proj", "v_proj", "down_proj")),
}
KIB, GIB = 1024, 2**30


def analysis(seq_tokens: int = 4096, **options: Any) -> Analysis:
    return Analysis(LLAMA_8B, PeftSpec(), **{"seq_tokens": seq_tokens, "device": A100, **options})


def plan(
    seq_tokens: int = 4096, mode: str = "stash", budget_share: float | None = None, **options: Any
) -> CompilePlan:
    return analysis(seq_tokens, **options).plan(mode, budget_share)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_plan_survives_json(spec: PeftSpec, mode: str) -> None:
    made = Analysis(MODELS[1], spec, seq_tokens=2048, device=A100, tp=2).plan(mode)
    assert CompilePlan.from_json(made.to_json()) == made


def test_broken_json_is_refused() -> None:
    with pytest.raises(ValueError, match="not a compile plan"):
        CompilePlan.from_json(plan().to_json().replace('"kv_bytes"', '"kv"'))


@pytest.mark.parametrize("seq_tokens", [4096, 8192])
def test_eighty_percent_less_than_peft_takes_15_percent_flops_or_the_far_end(seq_tokens: int) -> None:
    """288.6 KiB per token and layer with fp32 adapters. Within 5 % extra FLOPs the best kept set is
    84 KiB, 71 % less (it holds 56 KiB of gate and up, whose GEMMs are 13 % each): 80 % less is out of
    reach there, exactly, since the list is. The first point that reaches it costs about 15 %."""
    inner, first, head = autograd_bytes(LLAMA_8B, peft_default(PeftSpec()))
    layers = seq_tokens * (31 * inner + first)
    within = plan(seq_tokens, budget_share=0.05)
    assert within.extra_flops_share <= 0.05
    assert 0.70 < 1 - seq_tokens * within.kept_bytes_per_token / layers < 0.72
    reaching = [p.extra_share for p in within.pareto if p.kept_bytes <= 0.2 * inner]
    assert 0.13 < min(reaching) < 0.16
    for far in (plan(seq_tokens, budget_share=1.0), plan(seq_tokens, mode="recompute")):
        assert far.total_bytes() < 0.2 * layers
        assert far.total_bytes() < 0.2 * (layers + seq_tokens * head)
    for small in (plan(seq_tokens, budget_share=1.0), plan(seq_tokens, mode="recompute", window_tokens=256)):
        assert small.total_bytes() < 0.1 * layers


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("seq_tokens", [4096, 8192])
def test_recompute_end_is_no_worse_than_gradient_checkpointing(model: ModelShape, seq_tokens: int) -> None:
    """PEFT default with checkpointing holds the layers' inputs and then one layer's set or, before it,
    the loss's log-probabilities; ours K, V, its window, dK and dV in fp32 and a chunk of the loss."""
    inner, _first, head = autograd_bytes(model, peft_default(PeftSpec()), model.tp)
    inputs = model.layers * model.hidden * model.dtype_bytes
    for window in (128, 256):
        made = Analysis(
            model, PeftSpec(), seq_tokens=seq_tokens, device=A100, tp=model.tp, window_tokens=window
        ).plan("recompute")
        assert made.total_bytes() <= seq_tokens * (inputs + max(inner, head))
        if window == 128:
            layers_only = made.held_bytes + made.live_bytes()["kept"]
            assert layers_only <= seq_tokens * (inputs + inner)


def test_far_stash_is_below_checkpointing_even_with_adapters_in_the_model_dtype() -> None:
    """Layer inputs, K and V (12 KiB) against layer inputs and one whole layer of a sample."""
    inner = autograd_bytes(LLAMA_8B, peft_default(PeftSpec()))[0] - 108 * KIB - 7 * 32
    assert inner / KIB == pytest.approx(180.4, abs=0.1)
    far = plan(budget_share=1.0)
    assert far.held_bytes < 4096 * (32 * 8 * KIB + inner)


def test_smaller_windows_and_larger_budgets_never_need_more() -> None:
    totals = [plan(mode="recompute", window_tokens=w).total_bytes() for w in (16, 64, 256, 1024, 4096)]
    assert totals == sorted(totals)
    kept = [plan(budget_share=b).kept_bytes_per_token for b in (0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4)]
    assert kept == sorted(kept, reverse=True)


def test_memory_decides_between_points_and_modes() -> None:
    free = [40 * GIB, 12 * GIB, 8 * GIB, 4 * GIB, 3.2 * GIB]
    plans = [analysis(window_tokens=256).plan_within(f) for f in free]
    for limit, made in zip(free, plans, strict=True):
        assert made.total_bytes() + made.adapter_bytes <= limit
    shares = [p.extra_flops_share for p in plans]
    assert shares == sorted(shares)
    assert len(set(shares)) == len(shares)
    # With room for everything it is the default plan: element-wise work is not worth memory.
    assert plans[0].budget_share is None
    with pytest.raises(ValueError, match="at least"):
        analysis().plan_within(0.1 * GIB)


def test_where_layer_major_order_is_not_allowed_the_far_end_is_recompute() -> None:
    """Window-major stash has dK and dV of all layers too: then layer inputs are what recompute saves."""

    def chosen(free: float, order: str) -> CompilePlan:
        return analysis(window_tokens=256).plan_within(free, order=order)

    assert [chosen(f * GIB, "layer_major").mode for f in (40, 8, 3.2)] == ["stash"] * 3
    assert [chosen(f * GIB, "window_major").mode for f in (40, 8, 3.2)] == ["stash", "stash", "recompute"]


def test_layer_inputs_against_gradients_of_all_layers_and_a_window() -> None:
    """What the least stash and recompute hold beside K, V, the last gradient and the loss, on one device."""
    made = analysis(8192)
    usual, least, recompute = made.plan(), made.plan(budget_share=math.inf), made.plan("recompute")
    assert least.live_bytes()["kept"] == 8192 * 32 * 8 * KIB
    assert recompute.live_bytes()["kept"] == 1024 * (usual.kept_bytes_per_token - 32 * usual.kv_bytes)
    assert recompute.live_bytes()["dK dV"] == 32 * least.live_bytes()["dK dV"]
    assert least.total_bytes() < recompute.total_bytes()


def kept_bytes(plan: CompilePlan) -> int:
    """Per token, in an inner layer."""
    return sum(t.bytes_per_token for t in plan.tensors if t.action in ("keep", "pin"))


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_devices_share_what_tensor_parallelism_splits(tp: int) -> None:
    """The residual stream is whole on each device, everything inside attention and ffn is split; the
    far end is different since row-parallel layers do not run again."""
    whole, part = plan(budget_share=0.01), plan(budget_share=0.01, tp=tp)
    assert local_shape(LLAMA_8B, tp).ffn * tp == LLAMA_8B.ffn
    residual = 2 * 4096 * 2
    assert kept_bytes(part) == pytest.approx(residual + (kept_bytes(whole) - residual) / tp, rel=0.01)
    assert {b.composition for b in part.bypasses if b.target in ("o_proj", "down_proj")} == {"2 5"}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_roles_name_what_an_engine_keeps(model: ModelShape, spec: PeftSpec) -> None:
    made = Analysis(model, spec, seq_tokens=1024, device=A100).plan(budget_share=0.01)
    roles = {t.role: t for t in made.tensors if t.role}
    assert {"x", "mid", "q", "k", "v", "attention", "lse", "gate", "up", "silu", "product"} <= set(roles)
    assert {r for r, t in roles.items() if t.action == "pin"} == {"k", "v"}
    kept = {r for r, t in roles.items() if t.action == "keep"}
    # With an adapter its input is kept and the residual made again from it.
    assert {"x", "gate", "up", "before adapter o_proj" if spec.method == "adapter" else "mid"} <= kept
    assert all(t.role for t in made.tensors if t.action in ("keep", "pin"))
    assert roles["gate"].bytes_per_token == roles["product"].bytes_per_token == 2 * model.ffn


def trainable_parameters(graph: Graph) -> int:
    return sum(graph.tensors[n].elements for n in graph.trainable if graph.tensors[n].role == PARAMETER)


def layer_params(spec: PeftSpec, model: ModelShape) -> int:
    sizes = model.linears
    if spec.method == "ia3":
        return sum(sizes[t][0 if t == "down_proj" else 1] for t in spec.targets)
    if spec.method == "adapter":
        return sum(2 * spec.rank * sizes[t][1] for t in spec.targets)
    return sum(spec.rank * sum(sizes[t]) for t in spec.targets)


def test_trainable_parameters_of_graph_and_specs_agree() -> None:
    for model in MODELS:
        for spec in SPECS.values():
            graph = layer_graph(model, spec)
            assert trainable_parameters(graph) == layer_params(spec, model)
    lora = LoraSpec(rank=8, targets=("q_proj", "down_proj"))
    graph = layer_graph(LLAMA_8B, PeftSpec.from_lora(lora))
    assert trainable_parameters(graph) == lora.layer_params(LLAMA_8B)


def test_report_adds_up_and_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = run_compile(LLAMA_8B, PeftSpec(), seq_tokens=4096, device=A100, budget_share=0.05)
    sums = [sum(r.values[i] for r in report.rows) for i in range(5)]
    assert sums[1] / KIB == pytest.approx(288.6, abs=0.05)
    assert sums[2] / KIB == pytest.approx(180.4, abs=0.06)
    assert sums[3] == kept_bytes(report.plan)
    assert sums[0] > sums[1] > sums[2] > sums[3] > sums[4]
    assert report.totals_bytes[3] == 4096 * 32 * sums[3]
    # What is left is K and V of that many tokens, to less than one of them.
    assert report.kv_room_tokens is not None
    adapter = 32 * layer_params(PeftSpec(), LLAMA_8B) * 18
    assert report.plan.adapter_bytes == adapter
    used = LLAMA_8B.weight_bytes + adapter + report.plan.total_bytes()
    left = 0.9 * A100.memory_bytes - used - report.kv_room_tokens * LLAMA_8B.kv_bytes_per_token
    assert 0 <= left < LLAMA_8B.kv_bytes_per_token
    print_report(report)
    assert "KV room left" in capsys.readouterr().out
    write_report(report, tmp_path)
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert CompilePlan.from_json((tmp_path / "plan.json").read_text()) == report.plan
    with (tmp_path / "tensors.csv").open() as file:
        written = [float(row["remat"]) for row in csv.DictReader(file)]
    assert sum(written) == sums[3]


@pytest.mark.parametrize("mode", ["stash", "recompute"])
def test_figure_and_text_say_the_same_numbers(
    mode: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, path: drawn.append(figure))
    report = run_compile(LLAMA_8B, PeftSpec(), seq_tokens=4096, device=A100, mode=mode)
    print_report(report)
    text = capsys.readouterr().out
    draw(report, tmp_path / "memory.png")
    (point,) = [line for line in drawn[0].axes[1].lines if line.get_marker() == "o"]
    (extra,), (held,) = point.get_data()
    assert f"{extra:.1f}% extra FLOPs" in text and f"{extra:.1f}% extra FLOPs" in str(point.get_label())
    at = marked_columns(report.plan).index({"stash": "+remat *", "recompute": "+token-level *"}[mode])
    (layer,) = [line for line in text.splitlines() if " layer " in line]
    cells = layer.strip("\u2502").split("\u2502")[1:]
    assert cells[at].strip() == f"{held:.1f}" and f"{held:.1f} KiB" in str(point.get_label())


def test_no_room_is_none() -> None:
    report = run_compile(MODELS[3], PeftSpec(), seq_tokens=4096, device=A100, tp=1)
    assert report.kv_room_tokens is None


def test_table_over_models_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    rows = memory_table(MODELS, SPECS, seq_tokens=4096, device=A100, budget_share=0.05)
    assert [(r.model, r.method) for r in rows] == [(m.name, s) for m in MODELS for s in SPECS]
    for row in rows:
        assert max(row.stash_bytes, row.far_stash_bytes) < row.peft_bytes
        assert row.recompute_bytes < row.stash_bytes
        assert row.stash_extra_share <= 0.05
    print_memory_table(rows)
    out = capsys.readouterr().out
    assert "GiB per device" in out and "gradient checkpointing" in out
    assert "dK and dV of all layers" in out, "why recompute can hold more than the least stash"
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len({len(line) for line in lines if line.split()[0] in SPECS}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "swap"}, "finetune.mode must be one of stash, recompute"),
        ({"budget_share": -0.1}, "flops_budget must be at least 0"),
        ({"seq_tokens": 0}, "seq_len must be at least 1"),
        ({"window_tokens": 0}, "window_tokens must be at least 1"),
        ({"loss_chunk_tokens": 0}, "loss_chunk_tokens must be at least 1"),
        ({"tp": 3}, "tp must divide"),
    ],
)
def test_illegal_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**options)


@pytest.mark.parametrize(
    "options",
    [{"method": "dora"}, {"rank": 0}, {"dropout": 1.0}, {"adapter_dtype": "int8"}, {"activation": "tanh"},
     {"method": "ia3", "rslora": True}],
)  # fmt: skip
def test_illegal_specs_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="peft\\."):
        PeftSpec(**options)


def test_a_target_that_no_model_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"peft\.targets must be one of q_proj, .*, got 'qkv_proj'"):
        PeftSpec(targets=("qkv_proj",))
