"""The plan that compiling yields: the engine executes it and the simulator charges for it.

All bytes and FLOPs are per device; under tensor parallelism the graph is bound to one device's share of
the heads and of the ffn, so nothing is divided afterwards. The lowest layer has its own list: no gradient
leaves it downwards, so it keeps less.

What is live at once (`stash_bytes`, `recompute_bytes`) for a sample of T tokens and windows of w:

    stash, layer-major     T * kept of all layers (K and V among it)   + dK, dV of one layer
    recompute, window-major  T * K and V of all layers + dK, dV of all layers + w * kept of all layers

A recomputed window runs the whole forward of the layers again (its K and V too, though they are cached;
not the loss); under tensor parallelism that repeats the all-reduces, whose time no FLOP count shows.
and with both the gradient of the last hidden state, T * h, and the loss of one chunk of tokens.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

KEEP, PIN, RECOMPUTE, DROP = "keep", "pin", "recompute", "drop"
MODES = ("stash", "recompute")

ACCUMULATOR_BYTES = 4
"""dK and dV are sums over all later windows: fp32 elements."""
TOKEN_ID_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One forward tensor that owns memory."""

    name: str
    kind: str
    """Class of the table: residual, norm, query key value, attention, gate up, swiglu, bypass."""
    role: str
    """What an engine calls it (`roles.roles_of`): x, q, k, v, attention, lse, mid, gate, up, silu, product,
    attention norm, ffn norm, and of bypasses low, before adapter, activated, unscaled TARGET; empty for
    the rest."""
    action: str
    """keep; pin (K and V: later windows read them); recompute; drop (no gradient reads it)."""
    bytes_per_token: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """One undominated choice for an inner layer: bytes per token and layer against extra FLOPs per
    token and layer, and as share of the layer's forward and backward."""

    kept_bytes: int
    extra_flops: float
    extra_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BypassPlan:
    """How the bypass of one target is placed (`parallel.Composition`, chosen)."""

    target: str
    composition: str
    """Rules and changes of state in order, e.g. `2 5`."""
    input_state: str
    output_state: str
    weights: tuple[str, ...]
    collectives: tuple[str, ...]
    reduced_stages: tuple[int, ...]
    flops: float
    collective_bytes: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CompilePlan:
    """Everything decided for one model, PEFT configuration and sample length."""

    model: str
    method: str
    targets: tuple[str, ...]
    layers: int
    tp: int
    seq_tokens: int
    window_tokens: int
    loss_chunk_tokens: int
    mode: str
    budget_share: float
    """Extra FLOPs allowed, as share of a layer's forward and backward."""
    tensors: tuple[TensorPlan, ...]
    """Of a layer with a layer below it that trains too."""
    first_tensors: tuple[TensorPlan, ...]
    """Of the lowest layer."""
    pareto: tuple[ParetoPoint, ...]
    bypasses: tuple[BypassPlan, ...]
    kv_bytes: int
    """K and V per token and layer."""
    kv_elements: int
    hidden_bytes: int
    """One hidden state per token."""
    logits_bytes: int
    """Logits of one token in the model's dtype, in fp32, and their gradient."""
    layer_forward_flops: float
    """Per token, at the mean context of the sample."""
    layer_step_flops: float
    """Forward and backward per token."""
    extra_flops: float
    """Per token and layer for the tensors marked recompute."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"finetune.mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        for key in ("seq_tokens", "window_tokens", "loss_chunk_tokens", "layers", "tp"):
            if getattr(self, key) < 1:
                raise ValueError(f"finetune.{key} must be at least 1, got {getattr(self, key)}")

    @property
    def kept_names(self) -> tuple[str, ...]:
        """Tensors of an inner layer that stay until its backward."""
        return tuple(t.name for t in self.tensors if t.action in (KEEP, PIN))

    @property
    def recomputed_names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.tensors if t.action == RECOMPUTE)

    @property
    def kept_bytes_per_token_layer(self) -> int:
        return _kept(self.tensors)

    @property
    def kept_bytes_per_token(self) -> int:
        """Over all layers."""
        return (self.layers - 1) * _kept(self.tensors) + _kept(self.first_tensors)

    @property
    def extra_flops_share(self) -> float:
        """Extra FLOPs of this plan's mode over a forward and backward without any."""
        forward = self.layer_forward_flops if self.mode == "recompute" else 0.0
        return (self.extra_flops + forward) / self.layer_step_flops

    def stash_bytes(self, seq_tokens: int) -> dict[str, int]:
        """Live bytes at the peak of a layer-major sample, by part."""
        return {
            "kept": seq_tokens * self.kept_bytes_per_token,
            "hidden gradient": seq_tokens * self.hidden_bytes,
            "dK dV": seq_tokens * 2 * self.kv_elements * ACCUMULATOR_BYTES,
            "loss chunk": min(self.loss_chunk_tokens, seq_tokens) * self.logits_bytes,
        }

    def recompute_bytes(self, seq_tokens: int) -> dict[str, int]:
        """Live bytes at the peak of a window-major sample, by part."""
        window = min(self.window_tokens, seq_tokens)
        return {
            "K V": seq_tokens * self.layers * self.kv_bytes,
            "token ids": seq_tokens * TOKEN_ID_BYTES,
            "hidden gradient": seq_tokens * self.hidden_bytes,
            "dK dV": seq_tokens * self.layers * 2 * self.kv_elements * ACCUMULATOR_BYTES,
            "window": window * (self.kept_bytes_per_token - self.layers * self.kv_bytes),
            "loss chunk": min(self.loss_chunk_tokens, seq_tokens) * self.logits_bytes,
        }

    def live_bytes(self, seq_tokens: int | None = None) -> dict[str, int]:
        """Live bytes of this plan's mode; the plan's own sample length if none is given."""
        tokens = self.seq_tokens if seq_tokens is None else seq_tokens
        return self.stash_bytes(tokens) if self.mode == "stash" else self.recompute_bytes(tokens)

    def total_bytes(self, seq_tokens: int | None = None) -> int:
        """Sum of `live_bytes`: an upper bound, since the loss chunk and dK, dV do not live together."""
        return sum(self.live_bytes(seq_tokens).values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> CompilePlan:
        """The plan written by `to_json`. Raises ValueError for unknown or missing fields."""
        data: dict[str, Any] = json.loads(text)
        nested = {
            "tensors": TensorPlan,
            "first_tensors": TensorPlan,
            "pareto": ParetoPoint,
            "bypasses": BypassPlan,
        }
        try:
            for key, kind in nested.items():
                data[key] = tuple(kind(**{k: _tuple(v) for k, v in row.items()}) for row in data[key])
            return cls(**{k: _tuple(v) for k, v in data.items()})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a compile plan: {error}") from error


def _kept(tensors: tuple[TensorPlan, ...]) -> int:
    return sum(t.bytes_per_token for t in tensors if t.action in (KEEP, PIN))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
