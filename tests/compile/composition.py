"""Runs a composition of `sim.compile.parallel` on real processes, forward and backward.

It follows the steps that the plan names and nothing else, with plain collectives, so that a plan can be
compared with the unsharded bypass. Exact, not fast: reduce-scatter and all-to-all are made of all-reduce
and all-gather, which every backend has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from sim.compile.bypass import S0, S1, Bypass, P, R
from sim.compile.parallel import Composition, Step, gradient_path

DIM = {S0: 0, S1: -1}

Weights = dict[int | None, torch.Tensor]
"""Stage -> this process's part of its parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Full tensors: output of the bypass, gradient of its input, gradients of its weights."""

    output: torch.Tensor
    input_grad: torch.Tensor
    weight_grads: tuple[torch.Tensor, ...]

    def error(self, other: Results) -> float:
        """Largest difference relative to the largest entry, over all tensors."""
        mine = (self.output, self.input_grad, *self.weight_grads)
        theirs = (other.output, other.input_grad, *other.weight_grads)
        return max(
            float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
            for a, b in zip(mine, theirs, strict=True)
        )


def unsharded(bypass: Bypass, weights: list[torch.Tensor], x: torch.Tensor, grad: torch.Tensor) -> Results:
    """Autograd on the whole bypass. x (tokens, features_in), W (in, out) or (features,)."""
    x = x.detach().requires_grad_()
    weights = [w.detach().requires_grad_() for w in weights]
    y, rest = x, list(weights)
    for stage in bypass.stages:
        if stage.kind == "pointwise":
            y = torch.relu(y)
        else:
            w = rest.pop(0)
            y = y @ w if stage.kind == "linear" else y * w
    grads = torch.autograd.grad(y, [x, *weights], grad)
    return Results(output=y.detach(), input_grad=grads[0], weight_grads=tuple(grads[1:]))


def run_composition(
    bypass: Bypass, plan: Composition, weights: list[torch.Tensor], x: torch.Tensor, grad: torch.Tensor
) -> Results:
    """The same through `plan` on the processes of the default group; every process gives the same full
    arguments, takes its part of them, and gets the full results."""
    by_stage = dict(zip([i for i, s in enumerate(bypass.stages) if s.params], weights, strict=True))
    local: Weights = {s.stage: _take_weight(by_stage[s.stage], s) for s in plan.steps if s.stage in by_stage}
    y, inputs = _take(x, bypass.input_state), []
    for step in plan.steps:
        inputs.append(y)
        y = _forward(step, y, local)
    end, path = gradient_path(bypass.output_state, plan.steps)
    g = _take(grad, {P: R}.get(bypass.output_state, bypass.output_state))
    made: dict[int, torch.Tensor] = {}
    for (step, came, _state, collective), before in zip(path, reversed(inputs), strict=True):
        if step.stage in local and step.stage is not None:
            made[step.stage] = _weight_grad(step, before, g, reduce=step.stage in plan.reduced)
        g = _backward(step, before, g, local, came, collective)
    return Results(
        output=_whole(y, bypass.output_state),
        input_grad=_whole(g, end),
        weight_grads=tuple(_whole_weight(made[i], plan, i) for i in sorted(made)),
    )


def _forward(step: Step, x: torch.Tensor, weights: Weights) -> torch.Tensor:
    if step.kind == "change":
        return _change(x, step.before, step.after)
    if step.kind == "pointwise":
        return torch.relu(x)
    return x @ weights[step.stage] if step.kind == "linear" else x * weights[step.stage]


def _backward(
    step: Step,
    x: torch.Tensor,
    grad: torch.Tensor,
    weights: Weights,
    came: str,
    collective: str | None,
) -> torch.Tensor:
    if step.kind == "linear":
        return grad @ weights[step.stage].T
    if step.kind == "vector":
        return grad * weights[step.stage]
    if step.kind == "pointwise":
        return grad * (x > 0)
    if collective == "all_reduce":
        return _reduce(grad)
    if collective is not None:
        return _change(grad, came, R if step.before == P else step.before)
    if step.before == R and step.after in DIM:
        return _embed(grad, step.after)
    if step.after == R and step.before in DIM:
        return _take(grad, step.before)
    return grad


def _weight_grad(step: Step, x: torch.Tensor, grad: torch.Tensor, reduce: bool) -> torch.Tensor:
    made = x.T @ grad if step.kind == "linear" else (x * grad).sum(0)
    return _reduce(made) if reduce else made


def _change(x: torch.Tensor, before: str, after: str) -> torch.Tensor:
    if before == R and after == P:
        return x if dist.get_rank() == 0 else torch.zeros_like(x)
    whole = _reduce(x) if before == P else _gather(x, DIM[before]) if before in DIM else x
    return _take(whole, after)


def _reduce(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def _gather(x: torch.Tensor, dim: int) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


def _take(x: torch.Tensor, state: str) -> torch.Tensor:
    """This process's part; of a partial tensor, a part such that all parts add up to it."""
    if state == P:
        return x / dist.get_world_size()
    return x.chunk(dist.get_world_size(), DIM[state])[dist.get_rank()] if state in DIM else x


def _embed(x: torch.Tensor, state: str) -> torch.Tensor:
    """A part among zeros: with the other processes' it adds up to the whole."""
    parts = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
    parts[dist.get_rank()] = x
    return torch.cat(parts, DIM[state])


def _whole(x: torch.Tensor, state: str) -> torch.Tensor:
    return _reduce(x) if state == P else _gather(x, DIM[state]) if state in DIM else x


def _weight_dim(step: Step) -> int | None:
    return {"Sin": 0, "Sout": -1}.get(step.weight or "")


def _take_weight(weight: torch.Tensor, step: Step) -> torch.Tensor:
    dim = _weight_dim(step)
    return weight if dim is None else weight.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def _whole_weight(grad: torch.Tensor, plan: Composition, stage: int) -> torch.Tensor:
    dim = _weight_dim(next(s for s in plan.steps if s.stage == stage and s.kind != "change"))
    return grad if dim is None else _gather(grad, dim)
