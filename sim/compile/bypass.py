"""Bypass networks as tensor parallelism sees them: chains of stages between two backbone tensors.

An activation of shape (tokens, features) is in one of four states, named as DTensor does: R Replicate,
S0 Shard(0) by tokens, S1 Shard(-1) by features, P Partial.
"""

from __future__ import annotations

from dataclasses import dataclass

R, S0, S1, P = "R", "S0", "S1", "P"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One operator of a bypass: `linear` (features_in x features_out), `vector` (a trained scale per
    feature) or `pointwise` (a function without parameters that is not linear)."""

    kind: str
    features_in: int
    features_out: int

    @property
    def params(self) -> int:
        return {"linear": self.features_in * self.features_out, "vector": self.features_out}.get(self.kind, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bypass:
    """A chain of stages from one backbone tensor to another."""

    name: str
    stages: tuple[Stage, ...]
    input_state: str
    output_state: str
    """State in which the output is added; P joins the backbone's own all-reduce."""
    input_grad_reduced: bool = True
    """The backbone reduces the gradient of this input anyway (column-parallel layers), so a partial
    one joins it for nothing."""
    repeated: int = 1
    """Devices that have the same features of an output that is split by them: those of a K/V head."""

    def own(self, stage: int, tp: int) -> float:
        """Share of the features that a device of `tp` has of what a stage makes, where they are split."""
        return (self.repeated if stage == len(self.stages) - 1 else 1) / tp


def lora_bypass(name: str, features_in: int, features_out: int, rank: int, row_parallel: bool) -> Bypass:
    """LoRA on a column-parallel layer (input R, output S1) or a row-parallel one (input S1, output P)."""
    stages = (
        Stage(kind="linear", features_in=features_in, features_out=rank),
        Stage(kind="linear", features_in=rank, features_out=features_out),
    )
    states = (S1, P) if row_parallel else (R, S1)
    return Bypass(name=name, stages=stages, input_state=states[0], output_state=states[1])


def adapter_bypass(name: str, features: int, width: int, row_parallel: bool) -> Bypass:
    """A bottleneck adapter behind a layer: after its all-reduce (R) if row-parallel, else on S1."""
    stages = (
        Stage(kind="linear", features_in=features, features_out=width),
        Stage(kind="pointwise", features_in=width, features_out=width),
        Stage(kind="linear", features_in=width, features_out=features),
    )
    state = R if row_parallel else S1
    return Bypass(
        name=name, stages=stages, input_state=state, output_state=state, input_grad_reduced=not row_parallel
    )


def ia3_bypass(name: str, features: int, state: str) -> Bypass:
    """(IA)^3 scales a tensor in the state in which the backbone has it."""
    stage = Stage(kind="vector", features_in=features, features_out=features)
    return Bypass(name=name, stages=(stage,), input_state=state, output_state=state)
