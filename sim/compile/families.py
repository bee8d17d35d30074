"""The shipped graphs of the supported families, bound to a model's numbers.

They were captured by `engine.capture` from models whose dimensions all differ; a test captures again
and compares, so that memory can be planned where torch is not installed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from sim.compile.ir import Graph, dims_of
from sim.compile.peft import PeftSpec, attach
from sim.core.specs import ModelShape

GRAPHS = Path(__file__).parent / "graphs"

MODEL_DTYPES = {2: "bfloat16", 4: "float32", 8: "float64"}


@cache
def shipped(name: str) -> Graph:
    """The symbolic graph `name`: llama, qwen2 or head. Raises ValueError for another."""
    path = GRAPHS / f"{name}.json"
    if not path.exists():
        known = sorted(p.stem for p in GRAPHS.glob("*.json"))
        raise ValueError(f"compile: no graph {name!r}, shipped are {', '.join(known)}")
    return Graph.from_json(path.read_text())


def family_of(model: ModelShape) -> str:
    """The families differ in the biases of q, k and v."""
    return "qwen2" if model.qkv_bias else "llama"


def layer_graph(model: ModelShape, spec: PeftSpec | None, eps: float = 1e-5) -> Graph:
    """One decoder layer of `model` with `spec`'s bypasses (None: the bare backbone), bound."""
    graph = shipped(family_of(model))
    return bind(graph if spec is None else attach(graph, spec), model, spec, eps)


def head_graph(model: ModelShape) -> Graph:
    """Final norm, logits and loss of `model`, bound."""
    return bind(shipped("head"), model, None)


def bind(graph: Graph, model: ModelShape, spec: PeftSpec | None, eps: float = 1e-5) -> Graph:
    """`graph` with the numbers of `model` and `spec`.

    Raises ValueError for a model dtype that is none of MODEL_DTYPES (bytes per element).
    """
    if model.dtype_bytes not in MODEL_DTYPES:
        raise ValueError(f"model.dtype_bytes must be one of {sorted(MODEL_DTYPES)}, got {model.dtype_bytes}")
    dtype = MODEL_DTYPES[model.dtype_bytes]
    adapter = "float32" if spec is not None and spec.adapter_dtype == "float32" else dtype
    values: dict[str, float] = {**dims_of(model), "eps": eps, "attention_scale": model.head_dim**-0.5}
    if spec is not None:
        values |= {"r": spec.rank, "lora_scale": spec.scaling}
    # What is float32 in the graph, norms and the log-sum-exp, is float64 in a float64 model.
    wide = "float64" if dtype == "float64" else "float32"
    return graph.bind(values, {"model": dtype, "adapter": adapter, "float32": wide})
