"""How much of its datasheet a device reaches, and how long its kernels take at least.

The defaults are an A100-SXM4-80GB's, fitted with least relative error to the public kernel
measurements of aiconfigurator (ai-dynamo/aiconfigurator 095f58a, Apache-2.0; vLLM 0.14.0):
gemm_perf.csv (n and k of 512 to 20,000: median error 5 %, p90 17 %), context_attention_perf.csv
(head size 128: 5 %, 24 %), generation_attention_perf.csv (9 %, 41 %, the worst being contexts of a
few tokens) and custom_allreduce_perf.csv (7 %, 30 %). A device file overrides them by name in `extras`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches

from sim.core.specs import DeviceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of a peak are in (0, 1]; `_s` are seconds per kernel unless said otherwise."""

    gemm_flops: float = 0.915
    """Share of peak FLOP/s inside a full wave of 256 x 128 tiles."""
    gemm_tile_128x128: float = 0.887
    """FLOP/s of a full wave of these tiles, relative to 256 x 128 ones; likewise below."""
    gemm_tile_64x128: float = 0.831
    gemm_tile_64x64: float = 0.741
    gemm_tile_16x64: float = 0.40
    gemm_split_k_bandwidth: float = 2.95
    """Rate at which split-k partial sums are written and reduced, as a multiple of the GEMM's memory
    rate: they mostly stay in the L2 cache."""
    gemm_bandwidth: float = 0.718
    gemm_smoothness: float = 3.54
    """Exponent of the smooth maximum of FLOP time and byte time."""
    gemm_fixed_s: float = 5.1e-6
    attention_flops: float = 0.583
    attention_extra_tokens: float = 222.0
    """Keys per query computed in vain: causal tiles that are half masked, and idle multiprocessors."""
    attention_fixed_s: float = 11.4e-6
    decode_bandwidth: float = 0.730
    decode_sequence_s: float = 2.7e-8
    """Seconds per sequence and key-value head."""
    decode_fixed_s: float = 17.6e-6
    allreduce_bandwidth: float = 0.345
    allreduce_fixed_s: float = 5.3e-6
    allreduce_large_s: float = 51.9e-6
    """Added above 2 MiB, where NCCL replaces the one-kernel all-reduce."""
    elementwise_bandwidth: float = 0.8
    """This and the next: mem_bw_empirical_scaling_factor and mem_empirical_constant_latency of
    aiconfigurator's a100_sxm.yaml and h200_sxm.yaml."""
    elementwise_fixed_s: float = 3e-6

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not value > 0:
                raise ValueError(f"device.extras.{item.name} must be above 0, got {value}")
            share = item.name in _SHARES or item.name.startswith("gemm_tile")
            if share and value > 1:
                raise ValueError(f"device.extras.{item.name} must be at most 1, got {value}")

    @classmethod
    def of(cls, device: DeviceSpec) -> Efficiency:
        """The defaults with `device.extras` over them; ValueError for a name that is not known."""
        known = [item.name for item in fields(cls)]
        for name in device.extras:
            if name not in known:
                near = get_close_matches(name, known, 1, 0.0)[0]
                raise ValueError(f"device.extras.{name} of {device.name} is not known; nearest: {near}")
        return cls(**device.extras)


_SHARES = (
    "gemm_flops",
    "gemm_bandwidth",
    "attention_flops",
    "decode_bandwidth",
    "allreduce_bandwidth",
    "elementwise_bandwidth",
)
