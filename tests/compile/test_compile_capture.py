"""The graphs are those of the real models, and the autograd column is what autograd saves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sim.compile.families import layer_graph, shipped
from sim.compile.ir import Graph, same
from sim.compile.peft import LINEARS, PeftSpec
from sim.compile.prune import autograd, kept_bytes, prune
from sim.core.specs import ModelShape

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from engine import capture  # noqa: E402
from engine.compile_translate import CaptureError  # noqa: E402
from tests.compile.adapters import apply_peft  # noqa: E402

FAMILIES = capture.FAMILIES

SPECS = [
    PeftSpec(rank=3),
    PeftSpec(rank=3, rslora=True, targets=("q_proj", "down_proj")),
    PeftSpec(rank=3, adapter_dtype="float32", targets=("k_proj", "v_proj", "up_proj")),
    PeftSpec(rank=3, adapter_dtype="float32", dropout=0.1),
    PeftSpec(method="ia3", targets=("k_proj", "v_proj", "down_proj")),
    PeftSpec(method="ia3", targets=("q_proj", "gate_proj", "down_proj"), adapter_dtype="float32"),
    PeftSpec(method="adapter", targets=("o_proj", "down_proj"), rank=5),
    PeftSpec(method="adapter", targets=("down_proj",), rank=5, adapter_dtype="float32", activation="gelu"),
]

REAL = {
    "llama": [
        ModelShape(name="llama-3.1-8b", layers=2, hidden=4096, heads=32, kv_heads=8, head_dim=128,
                   ffn=14336, vocab=128256),
        ModelShape(name="llama-3.1-70b", layers=2, hidden=8192, heads=64, kv_heads=8, head_dim=128,
                   ffn=28672, vocab=128256),
    ],
    "qwen2": [
        ModelShape(name="qwen2.5-14b", layers=2, hidden=5120, heads=40, kv_heads=8, head_dim=128,
                   ffn=13824, vocab=152064, qkv_bias=True),
        ModelShape(name="qwen2.5-32b", layers=2, hidden=5120, heads=40, kv_heads=8, head_dim=128,
                   ffn=27648, vocab=152064, qkv_bias=True),
    ],
}  # fmt: skip


def small(family: str) -> ModelShape:
    return ModelShape(name="small", layers=2, hidden=40, heads=4, kv_heads=2, head_dim=10, ffn=56, vocab=64,
                      qkv_bias=family == "qwen2")  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_graph_is_a_fresh_capture(family: str) -> None:
    model = capture.build_model(capture.PROTOTYPE, family)
    fresh = capture.symbolise(capture.check_layers_repeat(model), capture.PROTOTYPE)
    assert same(shipped(family), fresh) == []
    head = capture.symbolise(capture.capture_head(model), capture.PROTOTYPE)
    assert same(shipped("head"), head) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_real_shapes_on_the_meta_device_equal_the_bound_shipped_graph(family: str) -> None:
    for shape in REAL[family]:
        model = apply_peft(capture.build_model(shape, family), PeftSpec())
        graph = capture.capture_layer(model, 1)
        assert same(layer_graph(shape, PeftSpec(), eps=capture.EPSILON), graph) == []


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.method}-{s.adapter_dtype}-{len(s.targets)}")
@pytest.mark.parametrize("family", FAMILIES)
def test_attached_bypasses_are_those_of_the_captured_peft_model(family: str, spec: PeftSpec) -> None:
    model = apply_peft(capture.build_model(small(family), family), spec)
    graph = capture.capture_layer(model)
    assert same(layer_graph(small(family), spec, eps=capture.EPSILON), graph) == []


def test_graph_survives_json() -> None:
    for name in (*FAMILIES, "head"):
        assert same(Graph.from_json(shipped(name).to_json()), shipped(name)) == []


def test_an_operator_without_a_translation_is_refused_by_name() -> None:
    model = capture.build_model(small("llama"), "llama")
    mlp = model.model.layers[0].mlp
    mlp.act_fn = torch.nn.Softsign()
    with pytest.raises(CaptureError, match=r"aten\.abs\.default in mlp\.act_fn"):
        capture.capture_layer(model)


def test_layers_that_differ_are_refused() -> None:
    model = capture.build_model(small("llama"), "llama")
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(CaptureError, match="layer 1 differs"):
        capture.check_layers_repeat(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "spec",
    [
        None,
        PeftSpec(targets=("q_proj", "v_proj")),
        PeftSpec(targets=("down_proj",)),
        PeftSpec(),
        PeftSpec(adapter_dtype="float32"),
        PeftSpec(adapter_dtype="float32", dropout=0.1),
        PeftSpec(method="ia3", targets=("k_proj", "v_proj", "down_proj")),
        PeftSpec(method="adapter", targets=("o_proj", "down_proj"), adapter_dtype="float32"),
    ],
    ids=lambda s: "frozen" if s is None else f"{s.method}-{len(s.targets)}-{s.adapter_dtype}-{s.dropout}",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_autograd_column_is_what_saved_tensors_hooks_find(
    family: str, spec: PeftSpec | None, dtype: str
) -> None:
    """Within 1 %, over storages, without parameters and the rotary tables that all layers share."""
    shape = ModelShape(name="s", layers=1, hidden=256, heads=8, kv_heads=2, head_dim=32, ffn=512, vocab=64,
                       qkv_bias=family == "qwen2", dtype_bytes=2 if dtype == "bfloat16" else 4)  # fmt: skip
    model = capture.build_model(shape, family, dtype, "cpu").train()
    if spec is not None:
        model = apply_peft(model, spec).train()
    measured = saved_bytes_per_token(capture.causal_lm(model).model.layers[0], shape, 64)
    assert kept_bytes(autograd(layer_graph(shape, spec))) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("targets", [("v_proj",), ("q_proj",), ("k_proj", "o_proj"), ("down_proj",), LINEARS])
def test_autograd_of_the_lowest_layer_is_what_saved_tensors_hooks_find(targets: tuple[str, ...]) -> None:
    """Its input wants no gradient. Fused attention saves all of its operands even where only V wants
    one; pruning does not."""
    shape = small("llama")
    model = apply_peft(capture.build_model(shape, "llama", "bfloat16", "cpu"), PeftSpec(targets=targets))
    layer = capture.causal_lm(model.train()).model.layers[0]
    measured = saved_bytes_per_token(layer, shape, 64, input_grad=False)
    graph = layer_graph(shape, PeftSpec(targets=targets))
    counted = kept_bytes(autograd(graph, input_grad=False))
    assert counted == pytest.approx(measured, rel=0.01)
    pruned = kept_bytes(prune(graph, input_grad=False))
    spared = graph.tensors["self_attn.attention"].bytes_per_token + shape.kv_dim * 2
    assert counted - pruned == (spared if targets == ("v_proj",) else 0)


def saved_bytes_per_token(layer: Any, shape: ModelShape, tokens: int, input_grad: bool = True) -> float:
    dtype = next(layer.parameters()).dtype
    x = torch.randn(1, tokens, shape.hidden, dtype=dtype, requires_grad=input_grad)
    rope = tuple(torch.randn(1, tokens, shape.head_dim, dtype=dtype) for _ in range(2))
    shared = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *rope)}
    found: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x, position_embeddings=rope, attention_mask=None)
    assert out.requires_grad
    return sum(size for size, _ in found.values()) / tokens


def test_published_measurements_of_a_real_layer() -> None:
    """KiB per token and layer of a Llama-3.1-8B layer in bf16, measured with eager PyTorch (SDPA)."""
    shape = REAL["llama"][0]
    measured = {
        136.1: None,
        144.2: PeftSpec(targets=("q_proj", "v_proj")),
        164.2: PeftSpec(targets=("down_proj",)),
        180.4: PeftSpec(),
        288.6: PeftSpec(adapter_dtype="float32"),
        440.6: PeftSpec(adapter_dtype="float32", dropout=0.1),
    }
    for kib, spec in measured.items():
        assert kept_bytes(autograd(layer_graph(shape, spec))) / 1024 == pytest.approx(kib, abs=0.06)
    full = layer_graph(shape, None)
    full = replace(full, trainable=tuple(n for n, t in full.tensors.items() if t.role == "parameter"))
    assert kept_bytes(autograd(full)) / 1024 == pytest.approx(196.1, abs=0.06)
    assert set(LINEARS) == set(shape.linears)
