"""Capture of a real model as the graph that `sim.compile` works on.

A decoder layer of a `transformers` model, with the bypasses that `peft` put into it, goes through
`torch.export` with a symbolic number of tokens, on the meta device if the model is there: capturing a
70B layer takes a second and no memory. What has no translation is refused (`engine.compile_translate`).

    python -m engine.capture        # writes the shipped graphs, sim/compile/graphs/*.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.compile_translate import CaptureError, translate
from sim.compile.ir import Graph, Op, Tensor, dims_of, same
from sim.core.specs import ModelShape

FAMILIES = ("llama", "qwen2")

PROTOTYPE = ModelShape(
    name="prototype", layers=2, hidden=170, heads=10, kv_heads=5, head_dim=8, ffn=208, vocab=304
)
"""A shape in which no two named dimensions are equal, so that numbers can be read back as names.
(hidden is not heads * head_dim; both families allow that through `head_dim`.)"""

EPSILON = 3e-6
"""Norm epsilon of the prototype, unlike any other number in it."""


def build_model(shape: ModelShape, family: str, dtype: str = "bfloat16", device: str = "meta") -> Any:
    """A `transformers` causal LM of that shape with random (on "meta": no) weights, frozen, with
    SDPA attention.

    Raises ValueError for an unknown family.
    """
    import torch
    import transformers

    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    prefix = {"llama": "Llama", "qwen2": "Qwen2"}[family]
    config = getattr(transformers, f"{prefix}Config")(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied_embeddings,
        rms_norm_eps=EPSILON,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device(device):
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    return model.to(getattr(torch, dtype)).requires_grad_(False)


def capture_layer(model: Any, index: int = 0) -> Graph:
    """Graph of decoder layer `index`; shapes are numbers but for the tokens, dtypes torch's names.

    Raises CaptureError with the operator's name where it cannot be expressed.
    """
    import torch

    base = causal_lm(model)
    config, layer = base.config, base.model.layers[index]
    weight = next(layer.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Any, cos: Any, sin: Any) -> Any:
            return self.layer(x, position_embeddings=(cos, sin), attention_mask=None)

    dtype = model_dtype(base)
    x = torch.empty(1, 16, config.hidden_size, device=weight.device, dtype=dtype)
    # Two tensors: torch.export takes one tensor given twice for one input.
    cos, sin = (torch.empty(1, 16, head_dim, device=weight.device, dtype=dtype) for _ in range(2))
    tokens = torch.export.Dim("tokens", min=2)
    exported = torch.export.export(Layer(), (x, cos, sin), dynamic_shapes=({1: tokens},) * 3, strict=False)
    return translate(exported, "layer", strip="layer.")


def capture_head(model: Any) -> Graph:
    """Graph from the last layer's output to the summed loss: norm, logits in fp32, cross entropy."""
    import torch

    base = causal_lm(model)

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.lm_head = base.model.norm, base.lm_head

        def forward(self, x: Any, labels: Any) -> Any:
            logits = self.lm_head(self.norm(x)).float().view(-1, base.config.vocab_size)
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    device = base.lm_head.weight.device
    x = torch.empty(1, 16, base.config.hidden_size, device=device, dtype=model_dtype(base))
    labels = torch.empty(16, device=device, dtype=torch.int64)
    tokens = torch.export.Dim("tokens", min=2)
    exported = torch.export.export(
        Head(), (x, labels), dynamic_shapes=({1: tokens}, {0: tokens}), strict=False
    )
    return translate(exported, "head", strip="")


def check_layers_repeat(model: Any) -> Graph:
    """The graph of layer 0, after checking that every other layer's graph is the same.

    Raises CaptureError naming the first layer that differs.
    """
    first = capture_layer(model, 0)
    for index in range(1, len(causal_lm(model).model.layers)):
        differences = same(first, capture_layer(model, index))
        if differences:
            raise CaptureError(f"layer {index} differs from layer 0: {differences[0]}")
    return first


def causal_lm(model: Any) -> Any:
    """The `transformers` model inside a `peft` one, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_dtype(base: Any) -> Any:
    return base.model.embed_tokens.weight.dtype


def symbolise(graph: Graph, shape: ModelShape) -> Graph:
    """A captured graph of a shape whose dimensions all differ, with names for its numbers.

    Raises CaptureError where two names would fit, or a number has none.
    """
    names: dict[int, str] = {}
    for key, size in dims_of(shape).items():
        if size in names or size == 1:
            raise CaptureError(f"dimension {key}={size} is not unlike {names.get(size, '1')}")
        names[size] = key

    def dims(values: tuple[Any, ...]) -> tuple[Any, ...]:
        unknown = [d for d in values if isinstance(d, int) and d != 1 and d not in names]
        if unknown:
            raise CaptureError(f"graph {graph.name}: no name for dimension {unknown[0]} in {values}")
        return tuple(names.get(d, d) if isinstance(d, int) else d for d in values)

    tensors = {
        n: Tensor(
            name=n, shape=dims(t.shape), dtype="model" if t.dtype == "bfloat16" else t.dtype, role=t.role
        )
        for n, t in graph.tensors.items()
    }
    ops = tuple(
        Op(kind=op.kind, inputs=op.inputs, outputs=op.outputs, attrs=_symbolic_attrs(op, names))
        for op in graph.ops
    )
    return Graph(
        name=graph.name,
        tensors=tensors,
        ops=ops,
        input=graph.input,
        output=graph.output,
        trainable=graph.trainable,
    )


def _symbolic_attrs(op: Op, names: Mapping[int, str]) -> dict[str, Any]:
    if op.kind == "add_scalar":
        return {"value": "eps"}
    if op.kind == "attention":
        return {"scale": "attention_scale"}
    if op.kind == "slice":
        return {**op.attrs, "start": names.get(op.attrs["start"], 0), "stop": names[op.attrs["stop"]]}
    return op.attrs


def main() -> None:
    folder = Path(__file__).resolve().parent.parent / "sim" / "compile" / "graphs"
    for family in FAMILIES:
        model = build_model(PROTOTYPE, family)
        layer = check_layers_repeat(model)
        (folder / f"{family}.json").write_text(symbolise(layer, PROTOTYPE).to_json())
        print(f"{family}: {len(layer.ops)} operators in a layer")
    head = symbolise(capture_head(model), PROTOTYPE)
    (folder / "head.json").write_text(head.to_json())
    print(f"head: {len(head.ops)} operators")


if __name__ == "__main__":
    main()
