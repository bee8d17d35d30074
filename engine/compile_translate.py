"""Translation of an exported aten graph into the IR, operator by operator.

One table entry per aten operator; one without an entry is refused by name. Names come from module
paths, without the wrappers that `peft` puts around a layer, so that the same tensor has the same name
with and without bypasses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sim.compile.ir import ACTIVATION, CONSTANT, PARAMETER, TOKENS, Graph, Op, Tensor, drop_idle_casts


class CaptureError(ValueError):
    """A model that cannot be expressed in the IR; the message names the operator."""


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
        self.ops.append(
            Op(kind=kind, inputs=tuple(self.names[n] for n in inputs), outputs=(name,), attrs=attrs)
        )
        self.names[node] = name
        return name

    def second_output(self, like: str, suffix: str, shape: tuple[Any, ...], dtype: str) -> None:
        op = self.ops[-1]
        name = f"{like}.{suffix}"
        self.tensors[name] = Tensor(name=name, shape=shape, dtype=dtype)
        self.ops[-1] = Op(kind=op.kind, inputs=op.inputs, outputs=(op.out, name), attrs=op.attrs)

    def alias(self, node: Any) -> None:
        self.names[node] = self.names[node.args[0]]


def translate(exported: Any, name: str, strip: str) -> Graph:
    """The graph of an `ExportedProgram` whose first input is the hidden state and whose other inputs
    are constants; `strip` is the prefix to take off module paths. Parameters that require a gradient
    are trainable. Raises CaptureError.
    """
    signature = exported.graph_signature
    parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    weights = dict(exported.named_parameters())
    state = _Translation(strip=strip)
    trainable: list[str] = []
    given: list[str] = []
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in parameters:
                target = parameters[node.name]
                clean = _clean(target, strip)
                state.names[node] = state.tensor(node, clean, PARAMETER)
                owner = weights.get(target)
                if owner is not None and owner.requires_grad:
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
    def translate(state: _Translation, node: Any) -> None:
        if any(v not in (None, "none") for v in node.kwargs.values()):
            raise CaptureError(f"cannot capture {node.target} with {dict(node.kwargs)}")
        state.emit(node, kind, node.args[:1])

    return translate


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
