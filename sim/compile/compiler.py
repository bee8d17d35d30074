"""From a model shape and a PEFT configuration to a plan: prune, choose a Pareto point, place bypasses.

The choice of the memory plan is one number, the share of extra FLOPs allowed (`budget_share`), or the
free memory (`plan_for_memory`): then the plan with the fewest extra FLOPs that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sim.compile.bypass import S1, Bypass, P, R, adapter_bypass, ia3_bypass, lora_bypass
from sim.compile.families import head_graph, layer_graph
from sim.compile.ir import Graph
from sim.compile.parallel import Composition, compositions
from sim.compile.peft import PeftSpec
from sim.compile.plan import (
    DROP,
    KEEP,
    MODES,
    PIN,
    RECOMPUTE,
    BypassPlan,
    CompilePlan,
    ParetoPoint,
    TensorPlan,
)
from sim.compile.prune import Need, autograd, kept_bytes, prune, wanted
from sim.compile.remat import Point, pareto
from sim.compile.roles import ROW_PARALLEL, keys_and_values, kind_of, layer_of, roles_of
from sim.compile.rules import backward_flops, forward_flops
from sim.core.specs import DeviceSpec, ModelShape

COLLECTIVE_LATENCY_S = 9e-6
"""Small NCCL collectives between two A100 (ai-dynamo/aiconfigurator, nccl 2.27.3: 9 us); a device
says otherwise with extras["collective_latency_s"]."""


def compile_plan(
    model: ModelShape,
    spec: PeftSpec,
    *,
    seq_tokens: int,
    device: DeviceSpec,
    tp: int = 1,
    mode: str = "stash",
    budget_share: float = 0.05,
    window_tokens: int = 256,
    loss_chunk_tokens: int = 128,
    accumulation: int = 8,
) -> CompilePlan:
    """The plan of `mode` with at most `budget_share` extra FLOPs for the kept set.

    Raises ValueError for a tp that does not divide the model, or options outside their range.
    """
    analysis = Analysis(
        model, spec, seq_tokens=seq_tokens, device=device, tp=tp, window_tokens=window_tokens,
        loss_chunk_tokens=loss_chunk_tokens, accumulation=accumulation,
    )  # fmt: skip
    return analysis.plan(mode, budget_share)


def plan_for_memory(
    model: ModelShape,
    spec: PeftSpec,
    free_bytes: float,
    *,
    seq_tokens: int,
    device: DeviceSpec,
    tp: int = 1,
    window_tokens: int = 256,
) -> CompilePlan:
    """The plan with the fewest extra FLOPs whose total fits `free_bytes` per device: stash along the
    Pareto list, or recompute. Raises ValueError where none fits."""
    analysis = Analysis(model, spec, seq_tokens=seq_tokens, device=device, tp=tp, window_tokens=window_tokens)
    shares = [p.extra_flops / analysis.step_flops for p in analysis.points]
    plans = [analysis.plan(mode, share) for mode in MODES for share in shares]
    fitting = [p for p in plans if p.total_bytes() <= free_bytes]
    if not fitting:
        least = min(p.total_bytes() for p in plans)
        raise ValueError(
            f"finetuning {model.name} on samples of {seq_tokens} tokens needs at least {least:,} bytes per "
            f"device, free are {free_bytes:,.0f}"
        )
    return min(fitting, key=lambda p: (p.extra_flops_share, p.total_bytes()))


class Analysis:
    """What all plans of one model, PEFT configuration and sample length share; not changed by `plan`."""

    def __init__(
        self,
        model: ModelShape,
        spec: PeftSpec,
        *,
        seq_tokens: int,
        device: DeviceSpec,
        tp: int = 1,
        window_tokens: int = 256,
        loss_chunk_tokens: int = 128,
        accumulation: int = 8,
    ) -> None:
        for key, value in (("seq_len", seq_tokens), ("window_tokens", window_tokens)):
            if value < 1:
                raise ValueError(f"finetune.{key} must be at least 1, got {value}")
        self.model, self.spec, self.tp = model, spec, tp
        self.seq_tokens, self.window_tokens = seq_tokens, window_tokens
        self.loss_chunk_tokens = loss_chunk_tokens
        self.local = local_shape(model, tp)
        self.context_tokens = (seq_tokens + 1) / 2
        self.graph = layer_graph(self.local, spec)
        self.step_flops, self.points = frontier(self.graph, self.context_tokens, tp)
        self.first_points = frontier(self.graph, self.context_tokens, tp, input_grad=False)[1]
        self.pareto = tuple(
            ParetoPoint(
                kept_bytes=p.kept_bytes,
                extra_flops=p.extra_flops,
                extra_share=p.extra_flops / self.step_flops,
            )
            for p in self.points
        )
        self.needs = prune(self.graph), prune(self.graph, input_grad=False)
        self.forward_flops = sum(forward_flops(self.graph, op, self.context_tokens) for op in self.graph.ops)
        self.bypasses = tuple(
            _bypass_plan(bypass, tp, window_tokens, accumulation * seq_tokens, device)
            for bypass in bypasses_of(model, spec)
        )

    def plan(self, mode: str, budget_share: float) -> CompilePlan:
        """The plan with the fewest kept bytes within `budget_share` extra FLOPs."""
        if not budget_share >= 0:
            raise ValueError(f"finetune.flops_budget must be at least 0, got {budget_share}")
        model, local, graph, step = self.model, self.local, self.graph, self.step_flops
        limit = budget_share * step * (1 + 1e-12)
        chosen = [p for p in self.points if p.extra_flops <= limit][-1]
        first = [p for p in self.first_points if p.extra_flops <= limit][-1]
        return CompilePlan(
            model=model.name,
            method=self.spec.method,
            targets=self.spec.targets,
            layers=model.layers,
            tp=self.tp,
            seq_tokens=self.seq_tokens,
            window_tokens=self.window_tokens,
            loss_chunk_tokens=self.loss_chunk_tokens,
            mode=mode,
            budget_share=budget_share,
            tensors=_tensor_plans(graph, self.needs[0], chosen),
            first_tensors=_tensor_plans(graph, self.needs[1], first),
            pareto=self.pareto,
            bypasses=self.bypasses,
            kv_bytes=2 * local.kv_dim * local.dtype_bytes,
            kv_elements=local.kv_dim,
            hidden_bytes=model.hidden * model.dtype_bytes,
            logits_bytes=local.vocab * (local.dtype_bytes + 8),
            layer_forward_flops=self.forward_flops,
            layer_step_flops=step,
            extra_flops=chosen.extra_flops,
        )


def local_shape(model: ModelShape, tp: int) -> ModelShape:
    """What one device of `tp` has of the model. K/V heads fewer than devices are repeated."""
    model.check_tp(tp)
    if model.vocab % tp:
        raise ValueError(f"tp must divide vocab {model.vocab} of model {model.name}, got {tp}")
    return replace(
        model,
        heads=model.heads // tp,
        kv_heads=max(1, model.kv_heads // tp),
        ffn=model.ffn // tp,
        vocab=model.vocab // tp,
        tp=1,
    )


def frontier(
    graph: Graph, context_tokens: float, tp: int = 1, input_grad: bool = True
) -> tuple[float, list[Point]]:
    """FLOPs per token of the layer's forward and backward, and its Pareto list, K and V pinned.

    With tp > 1 row-parallel layers never run again: it would repeat their all-reduce.
    """
    grads = wanted(graph, input_grad)
    step = sum(
        forward_flops(graph, op, context_tokens) + backward_flops(graph, op, grads, context_tokens)
        for op in graph.ops
    )
    needed = {n for n, need in prune(graph, input_grad).items() if need.kept}
    points = pareto(
        graph,
        needed,
        context_tokens,
        pinned=keys_and_values(graph),
        may_recompute=(lambda op: layer_of(op.out) not in ROW_PARALLEL) if tp > 1 else None,
    )
    return step, points


def autograd_bytes(model: ModelShape, spec: PeftSpec, tp: int = 1) -> tuple[int, int, int]:
    """Bytes per token that eager PyTorch saves: an inner layer, the lowest layer, norm and loss."""
    local = local_shape(model, tp)
    graph = layer_graph(local, spec)
    return (
        kept_bytes(autograd(graph)),
        kept_bytes(autograd(graph, input_grad=False)),
        kept_bytes(autograd(head_graph(local))),
    )


def bypasses_of(model: ModelShape, spec: PeftSpec) -> Iterator[Bypass]:
    """The bypasses of one layer in the states that Megatron's placement gives their ends."""
    for target in spec.targets:
        wide_in, wide_out = model.linears[target]
        row = target in ROW_PARALLEL
        if spec.method == "lora":
            yield lora_bypass(target, wide_in, wide_out, spec.rank, row)
        elif spec.method == "adapter":
            yield adapter_bypass(target, wide_out, spec.rank, row)
        elif target == "down_proj":
            yield ia3_bypass(target, wide_in, S1)
        else:
            yield ia3_bypass(target, wide_out, P if row else S1)


def price_bypass(
    bypass: Bypass, tp: int, tokens: int, tokens_per_step: int, device: DeviceSpec
) -> list[Composition]:
    """Its compositions on that device, cheapest first."""
    latency_s = device.extras.get("collective_latency_s", COLLECTIVE_LATENCY_S)
    return compositions(bypass, tp, tokens, device, latency_s, tokens_per_step)


def _bypass_plan(
    bypass: Bypass, tp: int, tokens: int, tokens_per_step: int, device: DeviceSpec
) -> BypassPlan:
    best = price_bypass(bypass, tp, tokens, tokens_per_step, device)[0]
    return BypassPlan(
        target=bypass.name,
        composition=best.label,
        input_state=bypass.input_state if tp > 1 else R,
        output_state=bypass.output_state if tp > 1 else R,
        weights=best.weights,
        collectives=best.collectives,
        reduced_stages=best.reduced,
        flops=best.flops,
        collective_bytes=best.collective_bytes,
        seconds=best.seconds,
    )


def _tensor_plans(graph: Graph, needs: dict[str, Need], point: Point) -> tuple[TensorPlan, ...]:
    roles = roles_of(graph)
    pinned, kept, again = keys_and_values(graph), set(point.kept), set(point.recomputed)
    plans = []
    for name, need in needs.items():
        if name in pinned:
            action, why = PIN, "K or V of the sample, read by every later window"
        elif name in kept:
            action = KEEP
            why = need.why if need.kept else "others are recomputed from it"
        elif name in again:
            action = RECOMPUTE
            why = need.why if need.kept else "on the way to one that is recomputed"
        else:
            action, why = DROP, need.why
        plans.append(
            TensorPlan(
                name=name,
                kind=kind_of(name),
                role=roles.get(name, ""),
                action=action,
                bytes_per_token=need.bytes_per_token,
                why=why,
            )
        )
    return tuple(plans)
