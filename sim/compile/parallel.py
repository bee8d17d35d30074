"""Dependent parallelisation: how a bypass is placed, given how tensor parallelism placed the backbone.

An activation of shape (tokens, features) is in one of four states, named as DTensor does:

    R   Replicate    every device has it all              (the paper's `=`)
    S0  Shard(0)     split by tokens                      (`|` on the tokens)
    S1  Shard(-1)    split by features                    (`|` on the features)
    P   Partial      the sum over devices is the tensor   (`+`, pre-reduce)

A dimension that is not split is the paper's non-parallel `-`. Legal states of y = xW (weights W as
(in, out)), rules 1 to 4 of FlexLLM (arXiv 2402.18789, dependent parallelization) and one more that
linearity gives, which lets low-rank partial sums go on into the backbone's own all-reduce:

    1  x R,  W replicated          -> y R       4  x R, W split on out -> y S1
    2  x S1, W split on in         -> y P       5  x P, W replicated   -> y P
    3  x S0, W replicated          -> y S0

`compositions` enumerates every chain of these with at most one change of state between two operators,
from the state in which the backbone has the bypass's input to the one in which it adds the output, and
prices each: FLOPs, memory traffic, collectives forward and backward, gradients reduced at the update. Seconds
are the roofline's (`sim.cost.efficiency`, `sim.cost.collective`), so that what is chosen is what is charged least.

The gradient of W reads the operator's input in its own state. Where a collective brought it there, the
backward has it thus:

    kept   one of the bypass's own, of rank r: it stays as the operator read it
    again  the backbone's input, which is wide and kept as the backbone has it; and whatever is split by
           tokens, as the windows of the backward are not those of the forward, so that a device would have
           kept tokens that are another's now. The collective runs once more, and is priced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sim.compile.bypass import S0, S1, Bypass, P, R, Stage
from sim.core.specs import Collective, DeviceSpec
from sim.cost.collective import one_collective_s
from sim.cost.efficiency import Efficiency

LINEAR_RULES = ((1, R, "R", R), (2, S1, "Sin", P), (3, S0, "R", S0), (4, R, "Sout", S1), (5, P, "R", P))
"""(number, state of x, placement of W, state of y)."""

COLLECTIVES = {
    (P, R): "all_reduce",
    (P, S0): "reduce_scatter",
    (P, S1): "reduce_scatter",
    (S0, R): "all_gather",
    (S1, R): "all_gather",
    (S0, S1): "all_to_all",
    (S1, S0): "all_to_all",
    (R, S0): None,
    (R, S1): None,
    (R, P): None,
}
"""Change of state -> collective; None costs nothing (take a slice; or one device alone contributes)."""

MASTER_BYTES = 16
"""Bytes beside the weight itself per trained parameter: fp32 master, gradient and two Adam moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a composition: a change of state or a stage."""

    kind: str
    """change, linear, vector or pointwise."""
    before: str
    after: str
    rule: int | None = None
    weight: str | None = None
    """Placement of the stage's parameter: R, Sin, Sout."""
    stage: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """One legal placement of a bypass with its cost per device for `tokens` tokens, forward and
    backward; `reduced` are the stages whose weight gradient is reduced at the update."""

    tp: int
    steps: tuple[Step, ...]
    forward: tuple[Collective, ...]
    backward: tuple[Collective, ...]
    """What the backward runs again is among it."""
    reduced: tuple[int, ...]
    own_params: int
    """Parameters that a device holds."""
    reduced_params: int
    """Parameters whose gradient is reduced at the update."""
    flops: float
    collective_bytes: float
    """Sent by one device, reductions at the update included at their share."""
    values: float
    """Read and written per token in the forward, the output where it is added included."""
    resident_bytes: float
    """Parameters with optimizer state, and inner activations kept for the backward."""
    seconds: float
    forward_seconds: float
    """Of the forward alone, which is all that serving runs."""

    @property
    def label(self) -> str:
        """Rules and changes of state, e.g. `2 P>R 4`."""
        return label_of(self.steps)

    @property
    def collectives(self) -> tuple[str, ...]:
        """Forward in order, then backward in order."""
        return tuple(c.kind for c in (*self.forward, *self.backward))

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(s.weight for s in self.steps if s.weight is not None)


def label_of(steps: tuple[Step, ...]) -> str:
    """Rules and changes of state in order, e.g. `2 P>R 4`."""
    return " ".join(
        f"{s.before}>{s.after}" if s.kind == "change" else str(s.rule) if s.rule else s.kind for s in steps
    )


def changes_of(steps: tuple[Step, ...]) -> tuple[Step | None, ...]:
    """The change of state before each stage, and after the last; None where there is none."""
    found: list[Step | None] = [None]
    for step in steps:
        if step.kind == "change":
            found[-1] = step
        else:
            found.append(None)
    return tuple(found)


def sends(step: Step | None) -> bool:
    """Whether a change of state is a collective."""
    return step is not None and step.kind == "change" and COLLECTIVES[step.before, step.after] is not None


def runs_again(steps: tuple[Step, ...]) -> Iterator[int]:
    """Indices of the collectives before operators that the backward repeats: `again` of the module's list."""
    for n, step in enumerate(steps[:-1]):
        if sends(step) and (n == 0 or step.after == S0):
            yield n


def compositions(
    bypass: Bypass,
    tp: int,
    tokens: int,
    device: DeviceSpec,
    tokens_per_step: int,
    layers: int = 1,
) -> list[Composition]:
    """Every legal composition, cheapest first (seconds, then resident bytes).

    Reductions at the update count tokens / `tokens_per_step` of their cost, and one is of all `layers`. On one
    device all states are R.
    Raises ValueError where tp does not divide the features.
    """
    for stage in bypass.stages:
        wide = max(stage.features_in, stage.features_out)
        if wide % tp:
            raise ValueError(f"bypass {bypass.name}: tp must divide its features {wide}, got {tp}")
    if tp > 1 and not device.link_bandwidth_bytes_s > 0:
        raise ValueError(
            f"device.link_bandwidth_bytes_s of {device.name} must be above 0 for tp {tp}, "
            f"got {device.link_bandwidth_bytes_s}"
        )
    if tp == 1:
        bypass = replace(bypass, input_state=R, output_state=R)
    found = [
        _price(bypass, steps, tp, tokens, device, tokens_per_step, layers)
        for steps in _chains(bypass, tp, 0, bypass.input_state, changed=False)
    ]
    return sorted(found, key=lambda c: (c.seconds, c.resident_bytes, c.label))


def _chains(bypass: Bypass, tp: int, at: int, state: str, changed: bool) -> Iterator[tuple[Step, ...]]:
    if at == len(bypass.stages) and state == bypass.output_state:
        yield ()
    if not changed and tp > 1:
        for before, after in COLLECTIVES:
            if before == state and (after != P or at == len(bypass.stages)):
                for rest in _chains(bypass, tp, at, after, changed=True):
                    yield (Step(kind="change", before=before, after=after), *rest)
    if at == len(bypass.stages):
        return
    for step in _stage_steps(bypass.stages[at], state, tp, at):
        for rest in _chains(bypass, tp, at + 1, step.after, changed=False):
            yield (step, *rest)


def _stage_steps(stage: Stage, state: str, tp: int, at: int) -> Iterator[Step]:
    if stage.kind == "pointwise":
        if state != P:
            yield Step(kind="pointwise", before=state, after=state, stage=at)
    elif stage.kind == "vector":
        weight = "Sout" if state == S1 else "R"
        yield Step(kind="vector", before=state, after=state, weight=weight, stage=at)
    else:
        for rule, before, weight, after in LINEAR_RULES:
            divides = {"Sin": stage.features_in, "Sout": stage.features_out}.get(weight, tp) % tp == 0
            if before == state and divides:
                yield Step(kind="linear", before=before, after=after, rule=rule, weight=weight, stage=at)


ITEM_BYTES = 2


def sent_bytes(kind: str, full_bytes: float, tp: int) -> float:
    """Bytes that a device sends in a collective on a tensor of `full_bytes` (ring algorithms)."""
    share = (tp - 1) / tp
    return full_bytes * {"all_reduce": 2 * share, "all_to_all": share / tp}.get(kind, share)


def gradient_path(
    output_state: str, steps: tuple[Step, ...]
) -> tuple[str, list[tuple[Step, str, str, str | None]]]:
    """The backward of a composition: state of the input's gradient, and per step from the last
    (step, state of the gradient after it, state before it, collective).

    The gradient of a P tensor is R; of an R tensor R, or P where devices hold parts of the sum.
    """
    state = {P: R}.get(output_state, output_state)
    path = []
    for step in reversed(steps):
        came = state
        collective: str | None = None
        if step.kind == "change":
            state, collective = _change_gradient(step, state)
        elif step.kind == "linear":
            state = {2: S1, 4: P}.get(step.rule or 0, state)
        path.append((step, came, state, collective))
    return state, path


def _change_gradient(step: Step, state: str) -> tuple[str, str | None]:
    """State of the gradient before a change of state, and the collective that brings it there."""
    if step.before == P:
        if step.after == R:
            return R, "all_reduce" if state == P else None
        return R, "all_gather"
    if step.before == R:
        # The gradient of a slice is the slice among zeros: a part of a sum.
        return (R if step.after == P else P), None
    if step.after == R:
        return step.before, "reduce_scatter" if state == P else None
    return step.before, "all_to_all"


def _price(
    bypass: Bypass,
    steps: tuple[Step, ...],
    tp: int,
    tokens: int,
    device: DeviceSpec,
    tokens_per_step: int,
    layers: int,
) -> Composition:
    flops = values = resident = 0.0
    held, forward, width = 0, [], []
    features = bypass.stages[0].features_in
    for step in steps:
        width.append(features)
        if step.kind == "change":
            kind = COLLECTIVES[step.before, step.after]
            if kind is not None:
                forward.append(Collective(kind, features))
            continue
        at = step.stage or 0
        stage = bypass.stages[at]
        made = bypass.own(at, tp) if step.after == S1 else 1 / tp if step.after == S0 else 1.0
        read = 1 / tp if step.before in (S0, S1) else 1.0
        if step.kind == "linear":
            flops += 2.0 * tokens * stage.params * min(read, made)
        values += stage.features_in * read + stage.features_out * made
        held += _own_params(bypass, step, tp)
        if step.stage:
            resident += tokens * features * ITEM_BYTES * read
        features = stage.features_out * (bypass.repeated if at == len(bypass.stages) - 1 else 1)
    end, path = gradient_path(bypass.output_state, steps)
    features_at = {id(step): features for step, features in zip(steps, width, strict=True)}
    backward = [Collective(kind, features_at[id(step)]) for step, _came, _state, kind in path if kind]
    if end == P and bypass.input_state == R and not bypass.input_grad_reduced:
        backward.append(Collective("all_reduce", bypass.stages[0].features_in))
    for n in runs_again(steps):
        kind = COLLECTIVES[steps[n].before, steps[n].after]
        assert kind is not None
        backward.append(Collective(kind, width[n]))
    reduced = tuple(sorted(_reduced_stages(path))) if tp > 1 else ()
    # Devices that share a key and value head have different queries: parts of a sum again.
    shared = bypass.stages[-1:] if bypass.repeated > 1 and steps[-1].weight == "Sout" else ()
    updated = [bypass.stages[at].params for at in reduced] + [stage.params for stage in shared]
    efficiency = Efficiency.of(device)

    def sent_s(kind: str, size_bytes: float) -> float:
        return one_collective_s(kind, size_bytes, tp, device, efficiency)

    forward_s, backward_s = (
        sum(sent_s(kind, tokens * wide * ITEM_BYTES) for kind, wide in collectives)
        for collectives in (forward, backward)
    )
    share = tokens / tokens_per_step
    update_s = share / layers * sum(sent_s("all_reduce", layers * params * 4) for params in updated)
    link = sum(sent_bytes(kind, tokens * wide * ITEM_BYTES, tp) for kind, wide in (*forward, *backward))
    link += share * sum(sent_bytes("all_reduce", params * 4, tp) for params in updated)
    # Forward, gradient of x and gradient of W each read or write both sides once.
    traffic = ITEM_BYTES * tokens * values
    bandwidth = device.memory_bandwidth_bytes_s * efficiency.elementwise_bandwidth
    work_s = max(flops / (device.peak_flops * efficiency.layer_flops), traffic / bandwidth)
    seconds = 3 * work_s + forward_s + backward_s + update_s
    assert math.isfinite(seconds)
    return Composition(
        tp=tp,
        steps=steps,
        forward=tuple(forward),
        backward=tuple(backward),
        reduced=reduced,
        own_params=held,
        reduced_params=sum(updated),
        flops=3 * flops,
        collective_bytes=link,
        values=values + features / (tp if bypass.output_state in (S0, S1) else 1),
        resident_bytes=resident + held * (ITEM_BYTES + MASTER_BYTES),
        seconds=seconds,
        forward_seconds=work_s + forward_s,
    )


def _own_params(bypass: Bypass, step: Step, tp: int) -> int:
    """Parameters of a stage that a device holds."""
    assert step.stage is not None
    params = bypass.stages[step.stage].params
    if step.weight == "Sout":
        return round(params * bypass.own(step.stage, tp))
    return params // tp if step.weight == "Sin" else params


def _reduced_stages(path: list[tuple[Step, str, str, str | None]]) -> Iterator[int]:
    """Stages whose weight gradient is a part of a sum on each device: the input or the gradient of the
    output is split by tokens or partial while the weight is whole."""
    for step, came, _state, _collective in path:
        if step.weight == "R" and (step.before in (S0, P) or came == P):
            assert step.stage is not None
            yield step.stage
