"""Capture of a real model as the graph that `sim.compile` works on.

A decoder layer of a `transformers` model, with the bypasses that `peft` put into it, goes through
`torch.export` with a symbolic number of tokens, on the meta device if the model is there: capturing a
70B layer takes a second and no memory. Every aten operator is translated by one entry of a table; one
without an entry is refused by name.

    python -m engine.capture        # writes the shipped graphs, sim/compile/graphs/*.json
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sim.compile.ir import (
    ACTIVATION,
    CONSTANT,
    PARAMETER,
    TOKENS,
    Graph,
    Op,
    Tensor,
    dims_of,
    drop_idle_casts,
)
from sim.compile.peft import PeftSpec
from sim.core.specs import ModelShape

FAMILIES = ("llama", "qwen2")

PROTOTYPE = ModelShape(
    name="prototype", layers=2, hidden=170, heads=10, kv_heads=5, head_dim=8, ffn=208, vocab=304
)
"""A shape in which no two named dimensions are equal, so that numbers can be read back as names.
(hidden is not heads * head_dim; both families allow that through `head_dim`.)"""

EPSILON = 3e-6
"""Norm epsilon of the prototype, unlike any other number in it."""


class CaptureError(ValueError):
    """A model that cannot be expressed in the IR; the message names the operator."""


def build_model(shape: ModelShape, family: str, dtype: str = "bfloat16", device: str = "meta") -> Any:
    """A `transformers` causal LM of that shape with random (on "meta": no) weights, SDPA attention.

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
    return model.to(getattr(torch, dtype))


def apply_peft(model: Any, spec: PeftSpec) -> Any:
    """The model with `spec`'s bypasses: `peft` for LoRA and (IA)^3, our own module for adapters."""
    if spec.method == "adapter":
        from engine.compile_adapter import add_adapters

        return add_adapters(model, spec)
    import peft

    if spec.method == "ia3":
        feedforward = [t for t in spec.targets if t == "down_proj"]
        config: Any = peft.IA3Config(target_modules=list(spec.targets), feedforward_modules=feedforward)
    else:
        config = peft.LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            lora_dropout=spec.dropout,
            use_rslora=spec.rslora,
            target_modules=list(spec.targets),
        )
    wide = spec.adapter_dtype == "float32"
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=wide)
    return model


def capture_layer(model: Any, index: int = 0, name: str = "layer") -> Graph:
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
    exported = torch.export.export(
        Layer(), (x, cos, sin), dynamic_shapes=({1: tokens},) * 3, strict=False
    )
    return _translate(exported, name, strip="layer.")


def capture_head(model: Any, name: str = "head") -> Graph:
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
    exported = torch.export.export(Head(), (x, labels), dynamic_shapes=({1: tokens}, {0: tokens}), strict=False)
    return _translate(exported, name, strip="")


def check_layers_repeat(model: Any) -> Graph:
    """The graph of layer 0, after checking that every other layer's graph is the same.

    Raises CaptureError naming the first layer that differs.
    """
    from sim.compile.ir import same

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


@dataclass
class _Translation:
    """The graph while it is translated: node -> tensor name, and names already given."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    names: dict[Any, str] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    strip: str = ""

    def tensor(self, node: Any, name: str, role: str) -> str:
        value = node.meta["val"]
        dtype = str(value.dtype).removeprefix("torch.")
        self.tensors[name] = Tensor(name=name, shape=_shape(node), dtype=dtype, role=role)
        return name

    def emit(self, node: Any, kind: str, inputs: tuple[Any, ...], **attrs: Any) -> str:
        """Append an operator and name its output by module path and kind."""
        path = _path(node, self.strip)
        stem = f"{path}.{kind}" if path else kind
        count = self.used.get(stem, 0)
        self.used[stem] = count + 1
        name = self.tensor(node, stem if count == 0 else f"{stem}_{count}", ACTIVATION)
        self.ops.append(Op(kind=kind, inputs=tuple(self.names[n] for n in inputs), outputs=(name,), attrs=attrs))
        self.names[node] = name
        return name

    def second_output(self, like: str, suffix: str, shape: tuple[Any, ...], dtype: str) -> None:
        op = self.ops[-1]
        name = f"{like}.{suffix}"
        self.tensors[name] = Tensor(name=name, shape=shape, dtype=dtype)
        self.ops[-1] = Op(kind=op.kind, inputs=op.inputs, outputs=(op.out, name), attrs=op.attrs)

    def alias(self, node: Any) -> None:
        self.names[node] = self.names[node.args[0]]


def _translate(exported: Any, name: str, strip: str) -> Graph:
    signature = exported.graph_signature
    parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state = _Translation(strip=strip)
    trainable, given = [], []
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in parameters:
                target = parameters[node.name]
                clean = _clean(target, strip)
                state.names[node] = state.tensor(node, clean, PARAMETER)
                owner = dict(exported.named_parameters()).get(target)
                if owner is not None and owner.requires_grad and _is_bypass(target):
                    trainable.append(clean)
            else:
                role = CONSTANT if given else ACTIVATION
                state.names[node] = state.tensor(node, node.name, role)
                given.append(node.name)
        elif node.op == "call_function":
            key = str(node.target)
            if key not in TRANSLATORS:
                raise CaptureError(
                    f"cannot capture operator {key} in {_path(node, strip) or name}: "
                    f"known are {', '.join(sorted(TRANSLATORS))}"
                )
            TRANSLATORS[key](state, node)
        elif node.op == "output":
            output = state.names[node.args[0][0]]
    return drop_idle_casts(
        Graph(
            name=name,
            tensors=state.tensors,
            ops=tuple(state.ops),
            input=given[0],
            output=output,
            trainable=tuple(trainable),
        )
    )


def _is_bypass(target: str) -> bool:
    """Whether a parameter is not the backbone's own, which a freshly built model leaves unfrozen."""
    return bool(re.search(r"\.(lora_[AB]|ia3_l|down|up)\.", f".{target}."))


def _clean(path: str, strip: str) -> str:
    path = path.removeprefix(strip)
    for noise in (".base_layer", ".default"):
        path = path.replace(noise, "")
    return path


def _path(node: Any, strip: str) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0] if stack else ""
    return "" if path.startswith("_empty") or path + "." == strip else _clean(path, strip)


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(d if isinstance(d, int) else _tokens(node, d) for d in node.meta["val"].shape)


def _tokens(node: Any, size: Any) -> str:
    """The name of a symbolic size, which must be the number of tokens itself."""
    if not size.node.expr.is_symbol:
        raise CaptureError(f"cannot capture {node.target}: its output has a dimension of {size} tokens")
    return TOKENS


Translator = Callable[[_Translation, Any], None]


def _skip(state: _Translation, node: Any) -> None:
    """Shape arithmetic and assertions: shapes are read from the tensors themselves."""


def _alias(state: _Translation, node: Any) -> None:
    """`contiguous` of the attention output: the fused kernels write (tokens, heads, size) already."""
    state.alias(node)


def _to(state: _Translation, node: Any) -> None:
    if node.args[0].meta["val"].dtype == node.meta["val"].dtype:
        state.alias(node)
    else:
        state.emit(node, "cast", node.args[:1])


def _view(state: _Translation, node: Any) -> None:
    if _shape(node) == _shape(node.args[0]):
        state.alias(node)
    else:
        state.emit(node, "view", node.args[:1])


def _transpose(state: _Translation, node: Any) -> None:
    state.emit(node, "transpose", node.args[:1], dims=(node.args[1], node.args[2]))


def _unsqueeze(state: _Translation, node: Any) -> None:
    state.emit(node, "unsqueeze", node.args[:1], dim=node.args[1])


def _slice(state: _Translation, node: Any) -> None:
    source, dim, start, stop = node.args
    size = _shape(source)[dim]
    state.emit(node, "slice", (source,), dim=dim, start=start, stop=min(stop, size))


def _cat(state: _Translation, node: Any) -> None:
    state.emit(node, "cat", tuple(node.args[0]), dim=node.args[1])


def _unary(kind: str) -> Translator:
    return lambda state, node: _refuse_keywords(node) or state.emit(node, kind, node.args[:1]) and None


def _square(state: _Translation, node: Any) -> None:
    if node.args[1] != 2:
        raise CaptureError(f"cannot capture {node.target} with exponent {node.args[1]}, only 2")
    state.emit(node, "square", node.args[:1])


def _mean(state: _Translation, node: Any) -> None:
    if list(node.args[1]) != [-1] or node.args[2] is not True:
        raise CaptureError(f"cannot capture {node.target} over {node.args[1:]}, only the kept last one")
    state.emit(node, "mean", node.args[:1])


def _add(state: _Translation, node: Any) -> None:
    if hasattr(node.args[1], "meta"):
        state.emit(node, "add", node.args[:2])
    else:
        state.emit(node, "add_scalar", node.args[:1], value=node.args[1])


def _mul(state: _Translation, node: Any) -> None:
    if hasattr(node.args[1], "meta"):
        state.emit(node, "mul", node.args[:2])
    elif node.args[1] == 1:
        state.alias(node)
    else:
        state.emit(node, "scale", node.args[:1], factor=node.args[1])


def _linear(state: _Translation, node: Any) -> None:
    state.emit(node, "linear", tuple(a for a in node.args if a is not None))


def _dropout(state: _Translation, node: Any) -> None:
    source, p, train = node.args
    if p == 0 or not train:
        state.alias(node)
        return
    name = state.emit(node, "dropout", (source,), p=p)
    state.second_output(name, "mask", _shape(node), state.tensors[name].dtype)


def _attention(state: _Translation, node: Any) -> None:
    query, key, value, *rest = node.args
    mask, p, causal = (*rest, None, 0.0, False)[:3] if len(rest) < 3 else rest[:3]
    if mask is not None or p or not causal:
        raise CaptureError(f"cannot capture {node.target} with a mask, dropout or without causality")
    size = _shape(query)[-1]
    scale = node.kwargs.get("scale") or size**-0.5
    name = state.emit(node, "attention", (query, key, value), scale=scale)
    state.second_output(name, "lse", _shape(query)[:-1], "float32")


def _cross_entropy(state: _Translation, node: Any) -> None:
    if len(node.args) > 3 and node.args[3] != 2:
        raise CaptureError(f"cannot capture {node.target} with a reduction other than sum")
    name = state.emit(node, "cross_entropy", node.args[:2])
    state.second_output(name, "log_probs", _shape(node.args[0]), "float32")


def _refuse_keywords(node: Any) -> None:
    if node.kwargs and any(v not in (None, "none") for v in node.kwargs.values()):
        raise CaptureError(f"cannot capture {node.target} with {dict(node.kwargs)}")


TRANSLATORS: Mapping[str, Translator] = {
    "aten.sym_size.int": _skip,
    "aten._assert_tensor_metadata.default": _skip,
    "aten.contiguous.default": _alias,
    "aten.to.dtype": _to,
    "aten.view.default": _view,
    "aten.reshape.default": _view,
    "aten.flatten.using_ints": _view,
    "aten.transpose.int": _transpose,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.slice.Tensor": _slice,
    "aten.cat.default": _cat,
    "aten.neg.default": _unary("neg"),
    "aten.silu.default": _unary("silu"),
    "aten.gelu.default": _unary("gelu"),
    "aten.relu.default": _unary("relu"),
    "aten.rsqrt.default": _unary("rsqrt"),
    "aten.pow.Tensor_Scalar": _square,
    "aten.mean.dim": _mean,
    "aten.add.Tensor": _add,
    "aten.mul.Tensor": _mul,
    "aten.linear.default": _linear,
    "aten.dropout.default": _dropout,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.cross_entropy_loss.default": _cross_entropy,
}


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
        n: Tensor(name=n, shape=dims(t.shape), dtype="model" if t.dtype == "bfloat16" else t.dtype, role=t.role)
        for n, t in graph.tensors.items()
    }
    ops = tuple(
        Op(kind=op.kind, inputs=op.inputs, outputs=op.outputs, attrs=_symbolic_attrs(op, names)) for op in graph.ops
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
