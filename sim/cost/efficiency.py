"""How much of its datasheet a device reaches, and how long its kernels take at least.

The defaults are an A100-SXM4's (Ampere), fitted with least relative error to public kernel measurements:
GEMM, attention and all-reduces of ai-dynamo/aiconfigurator 095f58a (Apache-2.0; vLLM 0.14.0, NCCL
2.27.3), products and element-wise kernels of a layer of microsoft/vidur 7d47513 (MIT; Llama-3-8B). A device's
`architecture` replaces what differs (`sim.cost.architectures`), its `extras` what is its own;
`profiles/README.md` has the errors, `coserve profile curves` fits and scores again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from math import inf

from sim.core.specs import DeviceSpec
from sim.cost.architectures import constants_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of a peak are in (0, 1]; `_s` are seconds per kernel unless said otherwise.

    Bandwidths named so are shares of the memory's or the link's.
    """

    gemm_flops: float = 0.911
    """Share of peak FLOP/s inside a tile."""
    gemm_l2_bandwidth: float = 0.0176
    """Rate at which all tiles together are fed through the L2, in bytes per peak FLOP."""
    gemm_read_bandwidth: float = 0.774
    gemm_write_bandwidth: float = 0.469
    gemm_smoothness: float = 2.21
    """Exponent of the smooth maximum of arithmetic and memory time."""
    gemm_tile_steps: float = 3.12
    """Filling and draining a tile's pipeline, as steps of its loop: 128 x 128 x 32 products."""
    gemm_split_k_s: float = 2e-6
    gemm_fixed_s: float = 2.46e-6

    layer_flops: float = 0.756
    """This and the next seven are the same eight for products of a running layer, fitted to an engine's
    operators on an A100 (microsoft/vidur 7d47513, Llama-3-8B, TP 1 to 8). A kernel timed alone finds the chip
    cool and its operands in the L2; libraries differ too."""
    layer_l2_bandwidth: float = 0.0143
    layer_read_bandwidth: float = 0.698
    layer_write_bandwidth: float = 0.225
    layer_smoothness: float = 4.93
    layer_tile_steps: float = 0.373
    layer_split_k_s: float = 3.13e-6
    layer_fixed_s: float = 1.77e-6

    attention_generation: float = 2.0
    """Of FlashAttention: 2 has a tile per query head and splits the keys of one token only; 3 packs the
    query heads of a group into one tile and splits any keys."""
    attention_exponentials: float = 2.63
    """Time per score that the matrix products do not hide, as exponentials."""
    attention_wide_head: float = 1
    """FLOP/s of heads above 256, which have a kernel of their own, relative to the others."""
    attention_tile_s: float = 0.686e-6
    attention_critical: float = 0.5
    """Time of the longest tile, alone on its multiprocessor, relative to a busy device's. Not fitted here:
    only chunks after a context tell it, and it is 0.51 for an RTX 4090 (casys-kaist/LLMServingSim 5daddb2)."""
    attention_tail: float = 0.562
    """Share of what the longest tile has more than the mean one that comes at the end."""
    attention_clock_bytes: float = 19.7
    """Query, key, value and output bytes per multiprocessor and clock, through the L2."""
    attention_split_s: float = 1e-6
    attention_fixed_s: float = 9.06e-6
    cache_write_clocks: float = 5470
    """Latency of a block that writes one token's keys and values to the cache."""

    decode_bandwidth: float = 0.742
    decode_sm_bandwidth: float = 1.21
    """Memory rate of one multiprocessor alone, as a multiple of its share of the device's."""
    decode_tile_s: float = 3.34e-6
    decode_head64: float = 0.844
    """`decode_tile_s` of heads below 128, relative to 128; and of each doubling above."""
    decode_head256: float = 1.41
    decode_smoothness: float = 3.25
    decode_split_s: float = 4.92e-6
    """Combining the results of split keys, and the same per split."""
    decode_each_split_s: float = 0.215e-6
    decode_regroup_s: float = 6.12e-6
    """FlashAttention 2 copies the query when several sequences have several groups."""
    decode_query: float = 2.38
    """Memory accesses that each byte of a query or result costs."""
    decode_sequence_s: float = 0.015e-6
    """FlashAttention 3 prepares each of up to 992 sequences."""
    decode_fixed_s: float = 9.6e-6

    allreduce_fixed_s: float = 4.88e-6
    """The one-kernel all-reduce; the next is for each further device."""
    allreduce_hop_s: float = 0.147e-6
    allreduce_one_shot: float = 0.628
    """Share of the link when every device reads all others' data, and when it reduces its part first."""
    allreduce_two_shot: float = 0.721
    allreduce_two_shot_s: float = 7.2e-6
    allreduce_eager_s: float = 44.9e-6
    """Outside a captured graph an all-reduce takes at least its launch."""
    nccl_fixed_s: float = 10e-6
    nccl_hop_s: float = 0.764e-6
    nccl_low_latency: float = 0.208
    """Share of the link by NCCL's low-latency protocols; beyond them it takes `nccl_simple` times
    `nccl_fixed_s` more and reaches `nccl_bandwidth`."""
    nccl_simple: float = 3.32
    nccl_bandwidth: float = 0.813
    nccl_few_devices: float = 0.694
    """Loss of bandwidth with few devices: 1 / (1 + this / devices)."""
    nccl_switch: float = 0.914
    """Bandwidth of an all-reduce of 8 devices, relative: the switch reduces (NVLS), or does not."""
    nccl_all_gather: float = 0.85
    """Bandwidth relative to an all-reduce; the next two likewise."""
    nccl_reduce_scatter: float = 0.912
    nccl_alltoall: float = 0.882
    nccl_alltoall_low_latency: float = 0.19
    """An all-to-all is made of sends and receives, which have other protocols."""
    nccl_alltoall_simple_s: float = 22.2e-6

    elementwise_bandwidth: float = 0.8
    """Optimizer, LoRA and logits. This is mem_bw_empirical_scaling_factor of aiconfigurator's
    a100_sxm.yaml and h200_sxm.yaml."""
    norm_clock_bytes: float = 5.53
    """Bytes per multiprocessor and clock; the next four likewise."""
    add_clock_bytes: float = 15
    rotary_clock_bytes: float = 5.44
    activation_clock_bytes: float = 6.98
    embedding_clock_bytes: float = 2.01
    norm_missed: float = 0.639
    """Share of what does not fit into the L2 that costs a memory access; the next four likewise."""
    add_missed: float = 0.272
    rotary_missed: float = 0.001
    activation_missed: float = 0.0785
    embedding_missed: float = 0.427
    elementwise_fixed_s: float = 3e-6
    norm_fixed_s: float = 3.92e-6
    add_fixed_s: float = 2.1e-6
    rotary_fixed_s: float = 2.93e-6
    activation_fixed_s: float = 2.89e-6
    embedding_fixed_s: float = 4.19e-6

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 < value < inf:
                raise ValueError(f"device.extras.{item.name} must be above 0 and finite, got {value}")
            if item.name in SHARES and value > 1:
                raise ValueError(f"device.extras.{item.name} must be at most 1, got {value}")
        if self.attention_generation not in (2, 3):
            raise ValueError(
                f"device.extras.attention_generation must be 2 or 3, got {self.attention_generation}"
            )

    @property
    def in_layer(self) -> Efficiency:
        """With the constants of a running layer in place of those of a product alone."""
        names = [item.name for item in fields(self) if item.name.startswith("layer_")]
        own = {f"gemm_{name.removeprefix('layer_')}": getattr(self, name) for name in names}
        return replace(self, **own)

    @classmethod
    def of(cls, device: DeviceSpec) -> Efficiency:
        """The defaults with what the device has instead; ValueError for a name that is not known."""
        known = [item.name for item in fields(cls)]
        for name in device.extras:
            if name not in known:
                near = get_close_matches(name, known, 1, 0.0)[0]
                raise ValueError(f"device.extras.{name} of {device.name} is not known; nearest: {near}")
        return cls(**constants_of(device))


SHARES = (
    "gemm_flops",
    "gemm_read_bandwidth",
    "gemm_write_bandwidth",
    "layer_flops",
    "layer_read_bandwidth",
    "layer_write_bandwidth",
    "attention_tail",
    "decode_bandwidth",
    "allreduce_one_shot",
    "allreduce_two_shot",
    "nccl_low_latency",
    "nccl_alltoall_low_latency",
    "nccl_bandwidth",
    "elementwise_bandwidth",
    "norm_missed",
    "add_missed",
    "rotary_missed",
    "activation_missed",
    "embedding_missed",
)
