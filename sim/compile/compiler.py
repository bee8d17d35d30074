"""From a model shape and a PEFT configuration to a plan: prune, choose a Pareto point, place bypasses.

The choice of the memory plan is one number, the share of extra FLOPs allowed (`budget_share`), or none: then
what runs again is element-wise or of a bypass's rank, as fused kernels do it anyway. Or the free memory
decides (`Analysis.plan_within`): the plan with the fewest extra FLOPs that fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from sim.compile.bypass import S0, S1, Bypass, P, R, adapter_bypass, ia3_bypass, lora_bypass
from sim.compile.families import head_graph, layer_graph
from sim.compile.ir import Graph, Op
from sim.compile.parallel import MASTER_BYTES, Composition, changes_of, compositions, sends
from sim.compile.peft import PeftSpec
from sim.compile.plan import (
    DROP,
    KEEP,
    MODES,
    PIN,
    RECOMPUTE,
    Again,
    BypassPlan,
    CompilePlan,
    ParetoPoint,
    TensorPlan,
)
from sim.compile.prune import Need, autograd, kept_bytes, prune, wanted
from sim.compile.remat import Point, pareto
from sim.compile.roles import ROW_PARALLEL, keepable, keys_and_values, kind_of, layer_of, roles_of
from sim.compile.rules import backward_flops, forward_flops
from sim.core.finetune import LOSS_CHUNK_TOKENS
from sim.core.specs import BypassWork, DeviceSpec, ModelShape
from sim.errors import OutOfReach

WINDOW_TOKENS = 1024
"""Of a window that runs again: enough rows to keep a device busy, an eighth of a long sample's bytes."""

REFERENCE = DeviceSpec(
    name="reference",
    peak_flops=312e12,
    memory_bandwidth_bytes_s=2.039e12,
    memory_bytes=80 * 2**30,
    link_bandwidth_bytes_s=300e9,
    sms=108,
    source="A100 80GB SXM datasheet",
)
"""An A100. Prices the placement of bypasses where no device is given: only the proportions count. Bypasses that are
only served (`serving_bypasses`) are placed by it on any device."""


class Analysis:
    """What all plans of one model, PEFT configuration and sample length share; not changed by making them.

    `device` prices the placement of bypasses and nothing else. Raises ValueError for a tp that does not divide the
    model, or options outside their range.
    """

    def __init__(
        self,
        model: ModelShape,
        spec: PeftSpec,
        *,
        seq_tokens: int,
        device: DeviceSpec = REFERENCE,
        tp: int = 1,
        window_tokens: int = WINDOW_TOKENS,
        loss_chunk_tokens: int = LOSS_CHUNK_TOKENS,
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
        window, step = min(window_tokens, seq_tokens), accumulation * seq_tokens
        placed = [
            (bypass, compositions(bypass, tp, window, device, step, model.layers)[0])
            for bypass in bypasses_of(model, spec, tp)
        ]
        self.bypasses = tuple(_bypass_plan(*pair, window, model.dtype_bytes) for pair in placed)
        self.graph = placed_graph(layer_graph(self.local, spec), self.bypasses, tp)
        self.step_flops, self.points = frontier(self.graph, self.context_tokens, tp, self.bypasses)
        self.first_points = frontier(self.graph, self.context_tokens, tp, self.bypasses, input_grad=False)[1]
        self.pareto = tuple(
            ParetoPoint(
                kept_bytes=p.kept_bytes,
                extra_flops=p.extra_flops,
                extra_share=p.extra_flops / self.step_flops,
            )
            for p in self.points
        )
        self.needs = prune(self.graph), prune(self.graph, input_grad=False)
        self.forward_flops = sum(self._flops(self.graph.ops).values())
        self._attention = self._flops(op for op in self.graph.ops if op.kind == "attention")
        self._products = self._flops(
            op for op in self.graph.ops if op.kind == "linear" and op.inputs[1] not in self.graph.trainable
        )
        self._wanted = wanted(self.graph), wanted(self.graph, input_grad=False)
        self._roles, self._pinned = roles_of(self.graph), keys_and_values(self.graph)

    def plan(
        self, mode: str = "stash", budget_share: float | None = None, order: str | None = None
    ) -> CompilePlan:
        """The plan with the fewest kept bytes within `budget_share` extra FLOPs, or, with None, without
        running a matrix product of the backbone or attention again. `order` is layer_major for stash and
        window_major for recompute unless given."""
        if budget_share is not None and not budget_share >= 0:
            raise ValueError(f"finetune.flops_budget must be at least 0 or null, got {budget_share}")
        model, local = self.model, self.local
        chosen, first = (self._chosen(points, budget_share) for points in (self.points, self.first_points))
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
            order=order or ("window_major" if mode == "recompute" else "layer_major"),
            budget_share=budget_share,
            tensors=self._tensor_plans(self.needs[0], self._wanted[0], chosen),
            first_tensors=self._tensor_plans(self.needs[1], self._wanted[1], first),
            pareto=self.pareto,
            bypasses=self.bypasses,
            kv_bytes=2 * local.kv_dim * local.dtype_bytes,
            kv_elements=local.kv_dim,
            hidden_bytes=model.hidden * model.dtype_bytes,
            accumulator_bytes=max(4, local.dtype_bytes),
            logits_bytes=local.vocab * (max(4, local.dtype_bytes) + (2 if local.dtype_bytes == 2 else 0)),
            adapter_bytes=model.layers * sum(b.weight_bytes for b in self.bypasses),
            layer_forward_flops=self.forward_flops,
            layer_step_flops=self.step_flops,
            extra_flops=chosen.extra_flops,
            again=self._again(chosen),
            first_again=self._again(first),
        )

    def plan_within(
        self, free_bytes: float, wanted_share: float = 1.0, order: str | None = None
    ) -> CompilePlan:
        """The plan with the fewest extra FLOPs whose total and adapter take at most `wanted_share` of `free_bytes`
        per device, else the smallest if it takes no more than all: stash along the Pareto list, or recompute where
        `order` allows it (None: any). Raises OutOfReach where none fits."""
        shares = [None, *(p.extra_share for p in self.pareto)]
        modes = [mode for mode in MODES if mode == "stash" or order != "layer_major"]
        plans = [self.plan(mode, share, order) for mode in modes for share in shares]
        fitting = [p for p in plans if _taken_bytes(p) <= wanted_share * free_bytes]
        if fitting:
            return min(fitting, key=_least_work)
        smallest = min(plans, key=_taken_bytes)
        if _taken_bytes(smallest) > free_bytes:
            raise OutOfReach(
                f"finetuning {self.model.name} on samples of {self.seq_tokens} tokens needs at least "
                f"{_taken_bytes(smallest) / 2**30:.2f} GiB per device, free are {free_bytes / 2**30:.2f}"
            )
        return smallest

    def _chosen(self, points: list[Point], budget_share: float | None) -> Point:
        """The list's smallest point that is allowed."""
        if budget_share is None:
            return [p for p in points if not self._again(p).heavy][-1]
        limit = budget_share * self.step_flops * (1 + 1e-12)
        allowed = [p for p in points if p.extra_flops <= limit]
        return allowed[-1] if allowed else points[0]

    def _again(self, point: Point) -> Again:
        made = set(point.recomputed)
        products = sum(flops for out, flops in self._products.items() if out in made)
        attention = sum(flops for out, flops in self._attention.items() if out in made)
        return Again(
            gemm=products / sum(self._products.values()),
            attention=float(attention > 0),
            flops=products + attention,
        )

    def _tensor_plans(self, needs: dict[str, Need], grads: set[str], point: Point) -> tuple[TensorPlan, ...]:
        kept, again = set(point.kept), set(point.recomputed)
        plans = []
        for name, need in needs.items():
            if name in self._pinned:
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
                    role=self._roles.get(name, ""),
                    action=action,
                    bytes_per_token=need.bytes_per_token,
                    gradient=name in grads,
                    why=why,
                )
            )
        return tuple(plans)

    def _flops(self, ops: Iterable[Op]) -> dict[str, float]:
        """Output -> FLOPs per token."""
        return {op.out: forward_flops(self.graph, op, self.context_tokens) for op in ops}


def _taken_bytes(plan: CompilePlan) -> int:
    return plan.total_bytes() + plan.adapter_bytes


def _least_work(plan: CompilePlan) -> tuple[float, int]:
    """FLOPs of products and attention that run again, then bytes: element-wise work is not worth memory."""
    forward = plan.layer_forward_flops if plan.mode == "recompute" else 0.0
    return forward + plan.mean_again.flops, plan.total_bytes()


def local_shape(model: ModelShape, tp: int) -> ModelShape:
    """What one device of `tp` has of the model. K/V heads fewer than devices are repeated."""
    model.check_tp(tp)
    return replace(
        model,
        heads=model.heads // tp,
        kv_heads=max(1, model.kv_heads // tp),
        ffn=model.ffn // tp,
        vocab=-(-model.vocab // tp),
        tp=1,
    )


def placed_graph(graph: Graph, bypasses: Iterable[BypassPlan], tp: int) -> Graph:
    """`graph`, bound, with LoRA's tensors of rank r as one device of `tp` has them."""
    tensors = dict(graph.tensors)
    for bypass in bypasses:
        for op in graph.ops:
            if _is_low(op, bypass.target) and _low_state(bypass) == S1:
                *rest, width = tensors[op.out].shape
                tensors[op.out] = replace(tensors[op.out], shape=(*rest, int(width) // tp))
    return replace(graph, tensors=tensors)


def frontier(
    graph: Graph,
    context_tokens: float,
    tp: int = 1,
    bypasses: Iterable[BypassPlan] = (),
    input_grad: bool = True,
) -> tuple[float, list[Point]]:
    """FLOPs per token of the layer's forward and backward, and its Pareto list, K and V pinned.

    Tensors that exist only inside a fused kernel are never kept (`roles.keepable`), nor are those of `bypasses`
    that are split by tokens. What a collective made never runs again: with tp > 1 row-parallel layers, and what
    `bypasses` send.
    """
    grads = wanted(graph, input_grad)
    step = sum(
        forward_flops(graph, op, context_tokens) + backward_flops(graph, op, grads, context_tokens)
        for op in graph.ops
    )
    needed = {n for n, need in prune(graph, input_grad).items() if need.kept}
    once = set(ROW_PARALLEL) if tp > 1 else set()
    may_keep = keepable(graph)
    for bypass in bypasses:
        once |= {bypass.target} if sends(changes_of(bypass.steps)[-1]) else set()
        for op in graph.ops:
            if _is_low(op, bypass.target):
                once |= {op.out} if _low_stays(bypass) else set()
                may_keep -= {op.out} if _low_state(bypass) == S0 else set()
    points = pareto(
        graph,
        needed,
        context_tokens,
        pinned=keys_and_values(graph),
        may_keep=may_keep,
        may_recompute=(lambda op: layer_of(op.out) not in once and op.out not in once) if once else None,
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


def bypasses_of(model: ModelShape, spec: PeftSpec, tp: int = 1) -> Iterator[Bypass]:
    """The bypasses of one layer in the states that Megatron's placement gives their ends, on `tp` devices."""
    repeated = max(1, tp // model.kv_heads)
    for bypass in _bypasses_of(model, spec):
        yield replace(bypass, repeated=repeated) if bypass.name in ("k_proj", "v_proj") else bypass


def _bypasses_of(model: ModelShape, spec: PeftSpec) -> Iterator[Bypass]:
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


def serving_bypasses(model: ModelShape, spec: PeftSpec, tp: int, tokens: int) -> tuple[BypassPlan, ...]:
    """How adapters lie that are only served, which no job's plan places. The one place that decides it, for engine
    and simulator: the cheapest forward of `tokens` that sends nothing.

    `tokens` are those of a pass in which every sequence decodes, the shape that serving runs most. There the
    latency of a collective, in every layer of every token, is not worth the work that it spares.
    """
    plans = []
    for bypass in bypasses_of(model, spec, tp):
        found = compositions(bypass, tp, tokens, REFERENCE, tokens, model.layers)
        silent = [composition for composition in found if not composition.forward]
        best = min(silent, key=lambda c: (c.forward_seconds, c.resident_bytes, c.label))
        plans.append(_bypass_plan(bypass, best, tokens, model.dtype_bytes))
    return tuple(plans)


def _bypass_plan(bypass: Bypass, best: Composition, tokens: int, item_bytes: int) -> BypassPlan:
    tp = best.tp
    return BypassPlan(
        target=bypass.name,
        composition=best.label,
        steps=best.steps,
        input_state=bypass.input_state if tp > 1 else R,
        output_state=bypass.output_state if tp > 1 else R,
        weights=best.weights,
        weight_bytes=best.own_params * (item_bytes + MASTER_BYTES),
        work=BypassWork(
            values=best.values,
            flops=best.flops / (3 * tokens),
            forward=best.forward,
            backward=best.backward,
            own_params=best.own_params,
            reduced_params=best.reduced_params,
        ),
        reduced_stages=best.reduced,
        flops=best.flops,
        collective_bytes=best.collective_bytes,
        seconds=best.seconds,
    )


def _is_low(op: Op, target: str) -> bool:
    """Whether the operator makes the rank-r tensor of LoRA on `target`."""
    return op.kind == "linear" and op.inputs[1].endswith(f".{target}.lora_A.weight")


def _low_state(bypass: BypassPlan) -> str:
    """State of the rank-r tensor as the second product reads it."""
    return [step for step in bypass.steps if step.kind != "change"][1].before


def _low_stays(bypass: BypassPlan) -> bool:
    """Whether the rank-r tensor must be kept, as a collective made it (`parallel.runs_again` has the others)."""
    change = changes_of(bypass.steps)[1]
    return sends(change) and _low_state(bypass) != S0
