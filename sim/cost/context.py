"""What a cost model is built for: one pipeline's device, model, parallelism and adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sim.core.cost import Predictor
from sim.core.specs import BypassWork, DeviceSpec, LoraSpec, ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class CostContext:
    """Everything that seconds depend on besides the work itself."""

    device: DeviceSpec
    model: ModelShape
    tp: int
    lora: LoraSpec
    seed: int
    lookahead: int = 0
    """Iterations that the loop plans ahead: with 1, host time hides behind the GPU's."""
    again_gemm: float = 0.0
    """Share of a layer's matrix products that its backward runs again (compile plan)."""
    again_attention: float = 0.0
    trained: BypassWork | None = None
    """What the bypasses of a finetuning window do in a layer (compile plan). None: they are split as their linear
    layers are, and nothing is sent between devices or reduced at a step."""
    served: BypassWork | None = None
    """The same of inference tokens with an adapter."""

    def __post_init__(self) -> None:
        self.model.check_tp(self.tp)
        if not (0 <= self.again_gemm <= 1 and 0 <= self.again_attention <= 1):
            raise ValueError(
                "shares of the forward that run again must be in [0, 1], "
                f"got {self.again_gemm} and {self.again_attention}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.lookahead not in (0, 1):
            raise ValueError(f"cluster.limits.lookahead must be 0 or 1, got {self.lookahead}")


class CostBuilder(Protocol):
    """A node of the `cost` config group: plain settings, made into a cost model for a context."""

    def build(self, context: CostContext) -> Predictor:
        """A cost model with state of its own: two builds share nothing that changes."""
        ...
