"""Plain facts about models, adapters and devices, shared by cost models, memory plans and engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

MOST = 2**31 - 1
"""Of a size of a model."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a block, Hugging Face names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer with grouped-query attention and a gated MLP (Llama, Qwen2)."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    qkv_bias: bool = False
    tied_embeddings: bool = False
    dtype_bytes: int = 2
    max_context_tokens: int = 131072
    tp: int = 1
    """Tensor-parallel degree used when the cluster does not say."""

    def __post_init__(self) -> None:
        for key in (
            "layers",
            "hidden",
            "heads",
            "kv_heads",
            "head_dim",
            "ffn",
            "vocab",
            "tp",
            "dtype_bytes",
            "max_context_tokens",
        ):
            if not 1 <= getattr(self, key) <= MOST:
                raise ValueError(
                    f"model.{key} must be at least 1 and at most {MOST}, got {getattr(self, key)}"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads must be a multiple of model.kv_heads, got {self.heads} and {self.kv_heads}"
            )
        # As `transformers` has it for Llama, also where head_dim is not their quotient.
        if self.hidden % self.heads:
            raise ValueError(
                f"model.hidden must be a multiple of model.heads, got {self.hidden} and {self.heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even, for rotary embeddings, got {self.head_dim}")

    @property
    def q_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one block, name -> (input, output) features, Hugging Face names."""
        return {
            "q_proj": (self.hidden, self.q_dim),
            "k_proj": (self.hidden, self.kv_dim),
            "v_proj": (self.hidden, self.kv_dim),
            "o_proj": (self.q_dim, self.hidden),
            "gate_proj": (self.hidden, self.ffn),
            "up_proj": (self.hidden, self.ffn),
            "down_proj": (self.ffn, self.hidden),
        }

    @property
    def layer_params(self) -> int:
        bias = self.q_dim + 2 * self.kv_dim if self.qkv_bias else 0
        return sum(i * o for i, o in self.linears.values()) + bias + 2 * self.hidden

    @property
    def params(self) -> int:
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return self.layers * self.layer_params + embeddings + self.hidden

    @property
    def weight_bytes(self) -> int:
        return self.params * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Key and value of one token over all layers."""
        return 2 * self.layers * self.kv_dim * self.dtype_bytes

    def check_tp(self, tp: int) -> None:
        """Raise ValueError unless `tp` divides what tensor parallelism splits."""
        if tp < 1 or self.heads % tp or self.ffn % tp or (self.kv_heads % tp and tp % self.kv_heads):
            raise ValueError(
                f"tp must divide heads {self.heads}, kv_heads {self.kv_heads} and ffn {self.ffn} "
                f"of model {self.name}, got {tp}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """A LoRA adapter: rank-r bypasses on the named linear layers of every block."""

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("down_proj",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ValueError(f"finetune.lora.rank must be at least 1, got {self.rank}")
        for target in self.targets:
            if self.targets.count(target) > 1:
                raise ValueError(f"finetune.lora.targets must name each layer once, got {target} again")
        if not self.targets:
            raise ValueError("finetune.lora.targets must name at least one linear layer, got none")
        unknown = [target for target in self.targets if target not in LINEARS]
        if unknown:
            raise ValueError(f"finetune.lora.targets must be among {', '.join(LINEARS)}, got {unknown[0]}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"finetune.lora.alpha must be a finite number, got {self.alpha}")

    def layer_params(self, model: ModelShape) -> int:
        return sum(self.rank * sum(model.linears[t]) for t in self.targets)

    def params(self, model: ModelShape) -> int:
        return model.layers * self.layer_params(model)


class Collective(NamedTuple):
    """A collective over the devices of a replica, on a tensor of tokens x features."""

    kind: str
    """all_reduce, all_gather, reduce_scatter or all_to_all."""
    features: int
    """Of the whole tensor, which may be split over the devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BypassWork:
    """What an adapter's bypasses make a device do in one layer, as they are placed."""

    values: float
    """Read and written per token in the forward: inputs, rank values, and outputs that are added up."""
    flops: float
    """Of both products per token, in the forward."""
    forward: tuple[Collective, ...] = ()
    backward: tuple[Collective, ...] = ()
    own_params: int
    """Parameters that the device holds and updates."""
    reduced_params: int = 0
    """Parameters whose gradient is added up over the devices, once a step."""


MOST_SMS = 1_000_000
"""Beyond it no work fills a device, and none has a rate."""


class Magnitude(NamedTuple):
    """What a number of a device can be in its unit, from a processor's core to a wafer; a common card's is near the
    middle of the two, in powers of ten."""

    least: float
    most: float
    unit: str
    or_none: bool = False
    """0 is that the device has none."""

    def check(self, key: str, value: float) -> None:
        """ValueError unless `value` is between them; one that another prefix of the unit would explain is told so."""
        if self.least <= value <= self.most or (self.or_none and value == 0):
            return
        middle = math.log10(self.least * self.most) / 2
        fitting = [
            (abs(math.log10(value) + power - middle), power, prefix)
            for power, prefix in PREFIXES.items()
            if self.least <= value * 10.0**power <= self.most
        ]
        hint = ""
        if fitting:
            _, power, prefix = min(fitting)
            hint = f"; {value:.12g} {prefix}{self.unit} are {value:.12g}e{power}"
        allowed = f"{'0 or ' if self.or_none else ''}from {self.least:g} to {self.most:g} {self.unit}"
        raise ValueError(f"{key} must be {allowed}, got {value:.12g}{hint}")


PREFIXES = {3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}
MAGNITUDES = {
    "peak_flops": Magnitude(1e8, 1e20, "FLOP/s"),
    "vector_flops": Magnitude(1e7, 1e19, "FLOP/s"),
    "memory_bandwidth_bytes_s": Magnitude(1e6, 1e19, "B/s"),
    "link_bandwidth_bytes_s": Magnitude(1e6, 1e16, "B/s", or_none=True),
    "memory_bytes": Magnitude(1e6, 1e15, "B"),
    "l2_bytes": Magnitude(1e4, 1e11, "B"),
    "clock_hz": Magnitude(1e7, 1e12, "Hz"),
}
"""Of the keys whose datasheets have a prefix: a factor of a thousand and more beyond what is built, but for clocks,
which drivers give in kHz."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One accelerator, as its datasheet gives it (dense half precision)."""

    name: str
    peak_flops: float
    memory_bandwidth_bytes_s: float
    memory_bytes: float
    link_bandwidth_bytes_s: float
    """Per direction, to the other devices of the node; 0 is no link."""
    sms: int
    source: str
    """Where the numbers come from."""
    architecture: str = "ampere"
    """Whose kernels' constants it has, of `sim.cost.architectures`."""
    vector_flops: float | None = None
    """Single precision outside the tensor cores; None is a sixteenth of `peak_flops`, about a datacentre's. Read
    where `clock_hz` is not given."""
    clock_hz: float | None = None
    """Boost clock; None is what `vector_flops` says of 128 lanes per multiprocessor."""
    l2_bytes: float | None = None
    """Last-level cache; None is an A100's 40 MiB."""
    power_w: float | None = None
    idle_power_w: float | None = None
    price_per_hour: float | None = None
    """Currency per device and hour; whoever states it chooses the currency."""
    extras: dict[str, float] = field(default_factory=dict, hash=False)
    """Efficiencies and latencies that a cost model reads by name."""

    def __post_init__(self) -> None:
        for key, magnitude in MAGNITUDES.items():
            if (value := getattr(self, key)) is not None:
                magnitude.check(f"device.{key}", value)
        if not 1 <= self.sms <= MOST_SMS:
            raise ValueError(f"device.sms must be at least 1 and at most {MOST_SMS:,}, got {self.sms}")
        for key in ("power_w", "idle_power_w", "price_per_hour"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"device.{key} must be at least 0 and finite, got {value}")
        power_w = math.inf if self.power_w is None else self.power_w
        if self.idle_power_w is not None and self.idle_power_w > power_w:
            raise ValueError(
                f"device.idle_power_w must be at most power_w {power_w:g}, got {self.idle_power_w:g}"
            )

    @property
    def softmax_flops(self) -> float:
        """FLOP/s in single precision outside the tensor cores."""
        return self.peak_flops / 16 if self.vector_flops is None else self.vector_flops

    @property
    def sm_clocks_hz(self) -> float:
        """Clocks of all multiprocessors together per second."""
        return self.softmax_flops / 256 if self.clock_hz is None else self.sms * self.clock_hz

    @property
    def cache_bytes(self) -> float:
        """Of the last-level cache."""
        return 40.0 * 2**20 if self.l2_bytes is None else self.l2_bytes
