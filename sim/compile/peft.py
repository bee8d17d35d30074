"""PEFT methods as bypass networks, put into a backbone graph.

A bypass reads one backbone tensor and its output is added to one backbone tensor. LoRA on y = Wx adds
s B(A x); a bottleneck adapter behind y adds U act(D y); (IA)^3 adds X * (l - 1), which with the
addition is the single product X * l that `peft` runs. The names that `attach` gives are those that
capturing the real PEFT model gives, so that the two graphs can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sim.compile.ir import PARAMETER, Dim, Graph, Op, Tensor
from sim.core.specs import LINEARS, LoraSpec

METHODS = ("lora", "ia3", "adapter")
ADAPTER_DTYPES = ("model", "float32")
ACTIVATIONS = ("relu", "gelu", "silu")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftSpec:
    """One PEFT configuration, the same for every layer."""

    method: str = "lora"
    targets: tuple[str, ...] = LINEARS
    """Linear layers with a bypass. An adapter sits behind the named layer (o_proj, down_proj)."""
    rank: int = 16
    """Rank of LoRA, width of an adapter's bottleneck; (IA)^3 has none and does not read it."""
    alpha: float = 16.0
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023)."""
    dropout: float = 0.0
    activation: str = "relu"
    """Of the adapter's bottleneck."""
    adapter_dtype: str = "model"
    """Of the bypass parameters while they run: "model", or "float32" as `peft` does by default."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(sorted(set(self.targets), key=_order)))
        if not self.targets:
            raise ValueError("peft.targets must name at least one layer, got none")
        for target in self.targets:
            _one_of("targets", target, LINEARS)
        _one_of("method", self.method, METHODS)
        _one_of("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)
        _one_of("activation", self.activation, ACTIVATIONS)
        if self.rank < 1:
            raise ValueError(f"peft.rank must be at least 1, got {self.rank}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"peft.alpha must be a finite number, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"peft.dropout must be in [0, 1), got {self.dropout}")
        if self.method != "lora" and (self.dropout or self.rslora):
            raise ValueError(f"peft.dropout and peft.rslora are for lora, got method {self.method}")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @classmethod
    def from_lora(cls, lora: LoraSpec) -> PeftSpec:
        return cls(method="lora", targets=lora.targets, rank=lora.rank, alpha=lora.alpha)


def attach(backbone: Graph, spec: PeftSpec) -> Graph:
    """The backbone with `spec`'s bypasses, their parameters trainable. Neither is changed."""
    build = _Builder(backbone)
    for op in backbone.ops:
        target = _layer(op.out)
        if op.kind == "linear" and target in spec.targets:
            _BYPASS[spec.method](build, op, spec)
        else:
            build.add(op)
    return build.graph(backbone, spec)


class _Builder:
    """Operators appended one by one; readers of a layer's output are redirected to the bypassed one."""

    def __init__(self, backbone: Graph) -> None:
        self.tensors = dict(backbone.tensors)
        self.ops: list[Op] = []
        self.trainable: list[str] = []
        self.moved: dict[str, str] = {}

    def add(self, op: Op) -> None:
        self.ops.append(replace(op, inputs=tuple(self.moved.get(n, n) for n in op.inputs)))

    def new(
        self,
        kind: str,
        name: str,
        inputs: Iterable[str],
        like: str,
        dtype: str,
        width: Dim | None = None,
        **attrs: Dim,
    ) -> str:
        """Append an operator whose output has `like`'s shape with the last dimension `width`."""
        shape = self.tensors[like].shape
        self.tensors[name] = Tensor(
            name=name, shape=shape if width is None else (*shape[:-1], width), dtype=dtype
        )
        self.ops.append(Op(kind=kind, inputs=tuple(inputs), outputs=(name,), attrs=dict(attrs)))
        return name

    def param(self, name: str, *shape: Dim) -> str:
        self.tensors[name] = Tensor(name=name, shape=shape, dtype="adapter", role=PARAMETER)
        self.trainable.append(name)
        return name

    def flat(self, param: str, path: str, width: Dim) -> str:
        """The parameter as a vector."""
        name = f"{path}.view"
        self.tensors[name] = Tensor(name=name, shape=(width,), dtype="adapter")
        self.ops.append(Op(kind="view", inputs=(param,), outputs=(name,)))
        return name

    def graph(self, backbone: Graph, spec: PeftSpec) -> Graph:
        return replace(
            backbone,
            name=f"{backbone.name}+{spec.method}",
            tensors=self.tensors,
            ops=tuple(self.ops),
            output=self.moved.get(backbone.output, backbone.output),
            trainable=tuple(self.trainable),
        )


def _lora(build: _Builder, op: Op, spec: PeftSpec) -> None:
    """y = Wx + s B(A drop(x)); a cast of x to the adapter's dtype first, of the sum back at last."""
    build.add(op)
    path, x = op.out.removesuffix(".linear"), build.ops[-1].inputs[0]
    wide_in, wide_out = build.tensors[x].shape[-1], build.tensors[op.out].shape[-1]
    x = build.new("cast", f"{path}.cast", (x,), x, "adapter")
    if spec.dropout:
        mask = f"{path}.lora_dropout.dropout.mask"
        name = build.new("dropout", f"{path}.lora_dropout.dropout", (x,), x, "adapter", p=spec.dropout)  # type: ignore[arg-type]
        build.tensors[mask] = replace(build.tensors[x], name=mask)
        build.ops[-1] = replace(build.ops[-1], outputs=(name, mask))
        x = name
    down = build.param(f"{path}.lora_A.weight", "r", wide_in)
    up = build.param(f"{path}.lora_B.weight", wide_out, "r")
    low = build.new("linear", f"{path}.lora_A.linear", (x, down), x, "adapter", "r")
    y = build.new("linear", f"{path}.lora_B.linear", (low, up), low, "adapter", wide_out)
    if spec.scaling != 1:
        y = build.new("scale", f"{path}.scale", (y,), y, "adapter", factor="lora_scale")
    y = build.new("add", f"{path}.add", (op.out, y), y, "adapter")
    build.moved[op.out] = build.new("cast", f"{path}.cast_1", (y,), y, "model")


def _ia3(build: _Builder, op: Op, spec: PeftSpec) -> None:
    """down_proj scales its input, every other layer its output (Liu et al. 2022)."""
    path = op.out.removesuffix(".linear")
    if _layer(op.out) == "down_proj":
        x = build.moved.get(op.inputs[0], op.inputs[0])
        width = build.tensors[x].shape[-1]
        x = build.new("cast", f"{path}.cast", (x,), x, "adapter")
        vector = build.flat(build.param(f"{path}.ia3_l", 1, width), path, width)
        x = build.new("mul", f"{path}.mul", (x, vector), x, "adapter")
        x = build.new("cast", f"{path}.cast_1", (x,), x, "model")
        build.add(replace(op, inputs=(x, *op.inputs[1:])))
        return
    build.add(op)
    width = build.tensors[op.out].shape[-1]
    vector = build.flat(build.param(f"{path}.ia3_l", width, 1), path, width)
    y = build.new("mul", f"{path}.mul", (op.out, vector), op.out, "adapter")
    build.moved[op.out] = build.new("cast", f"{path}.cast", (y,), y, "model")


def _adapter(build: _Builder, op: Op, spec: PeftSpec) -> None:
    """y + U act(D y) behind the layer (Houlsby et al. 2019), biases left out."""
    build.add(op)
    path, wide = op.out.removesuffix(".linear"), build.tensors[op.out].shape[-1]
    y = build.new("cast", f"{path}.cast", (op.out,), op.out, "adapter")
    down = build.param(f"{path}.down.weight", "r", wide)
    up = build.param(f"{path}.up.weight", wide, "r")
    low = build.new("linear", f"{path}.down.linear", (y, down), y, "adapter", "r")
    low = build.new(spec.activation, f"{path}.{spec.activation}", (low,), low, "adapter")
    z = build.new("linear", f"{path}.up.linear", (low, up), low, "adapter", wide)
    z = build.new("add", f"{path}.add", (op.out, z), z, "adapter")
    build.moved[op.out] = build.new("cast", f"{path}.cast_1", (z,), z, "model")


_BYPASS = {"lora": _lora, "ia3": _ia3, "adapter": _adapter}


def _layer(name: str) -> str:
    """`self_attn.q_proj.linear` -> `q_proj`."""
    return name.split(".")[-2] if "." in name else name


def _order(target: str) -> tuple[int, str]:
    return (LINEARS.index(target), "") if target in LINEARS else (len(LINEARS), target)


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"peft.{key} must be one of {', '.join(allowed)}, got {value!r}")
