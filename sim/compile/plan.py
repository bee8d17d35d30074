"""The plan that compiling yields: the engine executes it and the simulator charges for it.

All bytes and FLOPs are per device; under tensor parallelism the graph is bound to one device's share of
the heads and of the ffn, so nothing is divided afterwards. The lowest layer has its own list: no gradient
leaves it downwards, so it keeps less.

What is there for a sample of T tokens between its first window and its last backward (`live_bytes`):

    stash      T * kept of all layers (K and V among it)     + dK, dV
    recompute  T * K and V of all layers + w * kept of all layers beside K and V + dK, dV

w is `window_tokens`: the backward of a longer window is taken in pieces of so many. dK and dV are there for
one layer in layer-major order and for all in window-major; not for a lowest layer whose attention wants no
gradient. Both have the gradient of the last hidden state, T * h. A recomputed window and the logits of one
chunk of the loss are there only while a slice runs, and not together: `passing_bytes`, which several jobs
share. What an operator needs while it runs is not counted.

A recomputed window runs the whole forward of the layers again (its K and V too, though they are cached;
not the loss); under tensor parallelism that repeats the all-reduces, whose time no FLOP count shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sim.compile.parallel import Step
from sim.core.finetune import ORDERS
from sim.core.specs import BypassWork, Collective

KEEP, PIN, RECOMPUTE, DROP = "keep", "pin", "recompute", "drop"
MODES = ("stash", "recompute")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One forward tensor that owns memory."""

    name: str
    kind: str
    """Class of the table: residual, norm, query key value, attention, gate up, swiglu, bypass."""
    role: str
    """What an engine calls it (`roles.roles_of`): x, q, k, v, attention, lse, mid, gate, up, silu, product,
    attention norm, ffn norm, and of bypasses low, before adapter, activated, unscaled, dropped, mask TARGET;
    empty for the rest, which is inside a fused kernel and never kept."""
    action: str
    """keep; pin (K and V: later windows read them); recompute; drop (no gradient reads it)."""
    bytes_per_token: int
    gradient: bool
    """Whether the backward computes the gradient of this tensor."""
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """One undominated choice for an inner layer: bytes per token and layer against extra FLOPs per
    token and layer, and as share of the layer's forward and backward."""

    kept_bytes: int
    extra_flops: float
    extra_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """What of a layer's forward runs again for the tensors marked recompute, as shares of the forward's."""

    gemm: float
    """Of the FLOPs of the backbone's matrix products."""
    attention: float
    """1 where attention runs again."""
    flops: float
    """Of both, per token and layer."""

    @property
    def heavy(self) -> bool:
        """Whether anything runs again that is neither element-wise nor of a bypass's rank."""
        return self.flops > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BypassPlan:
    """How the bypass of one target is placed (`parallel.Composition`, chosen): the engine executes `steps`, the
    simulator charges for `work`."""

    target: str
    composition: str
    """Rules and changes of state in order, e.g. `2 5`."""
    steps: tuple[Step, ...]
    input_state: str
    output_state: str
    weights: tuple[str, ...]
    weight_bytes: int
    """Of one layer: in the model's dtype, and fp32 master, gradient and two moments."""
    work: BypassWork
    reduced_stages: tuple[int, ...]
    flops: float
    collective_bytes: float
    seconds: float

    @classmethod
    def of(cls, row: dict[str, Any]) -> BypassPlan:
        """From what `asdict` makes of one, through JSON."""
        work = row["work"] | {
            key: tuple(Collective(*sent) for sent in row["work"][key]) for key in ("forward", "backward")
        }
        nested = {"steps": tuple(Step(**step) for step in row["steps"]), "work": BypassWork(**work)}
        return cls(**{k: _tuple(v) for k, v in (row | nested).items()})


def work_of(bypasses: Sequence[BypassPlan]) -> BypassWork:
    """Of all bypasses of a layer."""
    works = [bypass.work for bypass in bypasses]
    return BypassWork(
        values=sum(work.values for work in works),
        flops=sum(work.flops for work in works),
        forward=tuple(sent for work in works for sent in work.forward),
        backward=tuple(sent for work in works for sent in work.backward),
        own_params=sum(work.own_params for work in works),
        reduced_params=sum(work.reduced_params for work in works),
    )


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
    order: str
    """Of the backward: `sim.core.finetune.ORDERS`."""
    budget_share: float | None
    """Extra FLOPs allowed, as share of a layer's forward and backward; None: what runs again is
    element-wise or of a bypass's rank."""
    tensors: tuple[TensorPlan, ...]
    """Of a layer with a layer below it that trains too."""
    first_tensors: tuple[TensorPlan, ...]
    """Of the lowest layer."""
    pareto: tuple[ParetoPoint, ...]
    bypasses: tuple[BypassPlan, ...]
    kv_bytes: int
    """K and V per token and layer."""
    kv_elements: int
    accumulator_bytes: int
    """Of an element of dK and dV, which are sums over all later windows: fp32 (fp64 for fp64)."""
    hidden_bytes: int
    """One hidden state per token."""
    logits_bytes: int
    """Of one token in the loss: in fp32, where softmax and gradient overwrite them, and in the model's
    dtype, in which they come and go."""
    adapter_bytes: int
    """Parameters of all layers' bypasses: in the model's dtype, and fp32 master, gradient and two moments."""
    layer_forward_flops: float
    """Per token, at the mean context of the sample."""
    layer_step_flops: float
    """Forward and backward per token."""
    extra_flops: float
    """Per token and inner layer for the tensors marked recompute."""
    again: Again
    """Of an inner layer."""
    first_again: Again

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"finetune.mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.order not in ORDERS:
            raise ValueError(f"finetune.order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        if self.mode == "recompute" and self.order != "window_major":
            raise ValueError(f"memory=recompute needs order=window_major, got {self.order}")
        for key in ("seq_tokens", "window_tokens", "loss_chunk_tokens", "layers", "tp"):
            if getattr(self, key) < 1:
                raise ValueError(f"finetune.{key} must be at least 1, got {getattr(self, key)}")

    def layer(self, index: int) -> tuple[TensorPlan, ...]:
        """The tensors of layer `index`, 0 the lowest."""
        return self.tensors if index else self.first_tensors

    @property
    def kept_bytes_per_token(self) -> int:
        """Over all layers."""
        return (self.layers - 1) * _kept(self.tensors) + _kept(self.first_tensors)

    @property
    def accumulator_layers(self) -> int:
        """Layers with a dK and dV of their own at a time."""
        lowest = any(t.gradient for t in self.first_tensors if t.role in ("q", "k", "v"))
        layers = self.layers - 1 + lowest
        return layers if self.order == "window_major" else min(1, layers)

    @property
    def held_tokens(self) -> int:
        """Tokens of the sample for which the kept tensors have room at a time."""
        return self.seq_tokens if self.mode == "stash" else min(self.window_tokens, self.seq_tokens)

    @property
    def extra_flops_share(self) -> float:
        """Extra FLOPs of this plan's mode over a forward and backward without any."""
        forward = self.layer_forward_flops if self.mode == "recompute" else 0.0
        return (self.extra_flops + forward) / self.layer_step_flops

    @property
    def mean_again(self) -> Again:
        """`again` over all layers, the lowest with its own."""
        inner, first = self.layers - 1, self.first_again
        return Again(
            gemm=(inner * self.again.gemm + first.gemm) / self.layers,
            attention=(inner * self.again.attention + first.attention) / self.layers,
            flops=(inner * self.again.flops + first.flops) / self.layers,
        )

    @property
    def bypass_work(self) -> BypassWork:
        """Of all bypasses of a layer."""
        return work_of(self.bypasses)

    def live_bytes(self) -> dict[str, int]:
        """Bytes held for a sample of `seq_tokens`, by part."""
        tokens, kv_bytes = self.seq_tokens, self.layers * self.kv_bytes
        sums = self.accumulator_layers * 2 * self.kv_elements * self.accumulator_bytes
        return {
            "K V": tokens * kv_bytes,
            "kept": self.held_tokens * (self.kept_bytes_per_token - kv_bytes),
            "dK dV": tokens * sums,
            "hidden gradient": tokens * self.hidden_bytes,
            "loss chunk": min(self.loss_chunk_tokens, tokens) * self.logits_bytes,
        }

    @property
    def passing_bytes(self) -> int:
        """What is there only while a slice of the job runs: the larger of the loss chunk, in the forward, and
        the recomputed window, in the backward."""
        parts = self.live_bytes()
        return max(parts["loss chunk"], parts["kept"] if self.mode == "recompute" else 0)

    @property
    def held_bytes(self) -> int:
        """What stays between slices."""
        parts = self.live_bytes()
        return sum(parts.values()) - parts["loss chunk"] - (parts["kept"] if self.mode == "recompute" else 0)

    def total_bytes(self) -> int:
        """The most at a time."""
        return self.held_bytes + self.passing_bytes

    def describe(self) -> str:
        """One line: what is held, what a layer keeps and what of it runs again."""
        parts = ", ".join(f"{name} {_size(size)}" for name, size in self.live_bytes().items())
        kept = ", ".join(t.role for t in self.tensors if t.action == KEEP) or "nothing"
        products = f"{self.again.gemm:.0%} of the products" if self.again.gemm else "no product"
        again = f"{products} and {'' if self.again.attention else 'no '}attention run again"
        if self.mode == "recompute":
            again = "windows run again whole, and of a layer " + again
        return (
            f"{self.mode}, {self.order}: {_size(self.total_bytes())} for {self.seq_tokens} tokens ({parts}); "
            f"a layer keeps {kept}; {again}"
        )

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
        }
        try:
            for key, kind in nested.items():
                data[key] = tuple(kind(**{k: _tuple(v) for k, v in row.items()}) for row in data[key])
            data["bypasses"] = tuple(BypassPlan.of(row) for row in data["bypasses"])
            data |= {key: Again(**data[key]) for key in ("again", "first_again")}
            return cls(**{k: _tuple(v) for k, v in data.items()})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a compile plan: {error}") from error


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _kept(tensors: tuple[TensorPlan, ...]) -> int:
    return sum(t.bytes_per_token for t in tensors if t.action in (KEEP, PIN))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
