"""Names of a layer's tensors for people and engines. No pass decides anything by them."""

from __future__ import annotations

from sim.compile.ir import PARAMETER, Graph
from sim.compile.rules import storage

ROW_PARALLEL = ("o_proj", "down_proj")
"""Linear layers that Megatron's tensor parallelism splits by their input."""

KINDS = ("residual", "norm", "query key value", "attention", "gate up", "swiglu", "bypass")
"""Classes of tensors in the table, in its order."""


def kind_of(name: str) -> str:
    """Class of a layer's tensor, from its module path; only for reading, no pass depends on it."""
    parts = name.split(".")
    if "layernorm" in name:
        return "norm"
    if len(parts) > 3 or (parts[-1] in ("scale", "cast", "relu", "gelu", "silu") and "proj" in name):
        return "bypass"
    if len(parts) == 1 or layer_of(name) in ROW_PARALLEL:
        return "residual"
    if parts[0] == "mlp":
        return "gate up" if layer_of(name) in ("gate_proj", "up_proj") else "swiglu"
    return "attention" if parts[1] == "attention" else "query key value"


def layer_of(name: str) -> str:
    """`self_attn.q_proj.linear` -> `q_proj`; the tensor's own name where it belongs to none."""
    parts = name.split(".")
    return parts[1] if len(parts) == 3 else name


def keys_and_values(graph: Graph) -> tuple[str, str]:
    """Owners of the K and V that attention reads."""
    attention = next(op for op in graph.ops if op.kind == "attention")
    owner = storage(graph)
    return owner[attention.inputs[1]], owner[attention.inputs[2]]


def keepable(graph: Graph) -> set[str]:
    """Owners of memory that an engine with fused kernels can keep: those with a role, but for silu, which
    SwiGLU and its backward make from the gate as they run."""
    return {name for name, role in roles_of(graph).items() if role != "silu"}


def roles_of(graph: Graph) -> dict[str, str]:
    """Owner of memory -> what an engine calls it, found by what reads and makes it."""
    owner, roles = storage(graph), {graph.input: "x"}
    silu = ""
    for op in graph.ops:
        out = owner[op.out]
        if op.kind == "attention":
            roles |= {owner[n]: role for n, role in zip(op.inputs, ("q", "k", "v"), strict=True)}
            roles |= dict(zip(op.outputs, ("attention", "lse"), strict=True))
        elif op.kind == "silu" and out.startswith("mlp.act_fn"):
            roles |= {owner[op.inputs[0]]: "gate", out: "silu"}
            silu = op.out
        elif op.kind in ("silu", "relu", "gelu"):
            roles[out] = f"activated {layer_of(op.out)}"
        elif op.kind == "mul" and silu in op.inputs:
            roles |= {owner[n]: "up" for n in op.inputs if n != silu}
            roles[out] = "product"
        elif op.kind == "add" and op.inputs[0] == graph.input:
            roles[out] = "mid"
        elif op.kind == "mul" and graph.tensors[op.inputs[0]].role == PARAMETER:
            roles[out] = "ffn norm" if "mid" in roles.values() else "attention norm"
        elif op.kind == "linear" and op.inputs[1].endswith((".lora_A.weight", ".down.weight")):
            roles[out] = f"low {op.out.split('.')[1]}"
            if op.inputs[1].endswith(".down.weight"):
                roles.setdefault(owner[op.inputs[0]], f"before adapter {op.out.split('.')[1]}")
        elif op.kind == "mul" and owner[op.inputs[1]].endswith(".ia3_l"):
            roles.setdefault(owner[op.inputs[0]], f"unscaled {layer_of(op.out)}")
        elif op.kind == "dropout":
            names = (f"dropped {op.out.split('.')[1]}", f"mask {op.out.split('.')[1]}")
            roles |= dict(zip(op.outputs, names, strict=True))
    return roles
